"""TRL's ORPOTrainer with the settings of a spec, complete checkpoints and no model card of TRL's own."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.training_args import OptimizerNames
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from isaerft_sweep.adapter import IsaerftConfig
from isaerft_sweep.journal.layout import PairScores
from isaerft_sweep.models.loading import LoadedModel
from isaerft_sweep.search.pruning import steps_between
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import AdapterSpec, OrpoSpec, total_steps
from isaerft_sweep.trial.activation_cache import sequence_key
from isaerft_sweep.trial.batch_layout import Batch
from isaerft_sweep.trial.data import Pairs
from isaerft_sweep.trial.strategy import ForwardStrategy

COMPLETE = ".complete"
"""Written into a checkpoint last: one without it was cut short by a crash and is ignored."""
KEPT_CHECKPOINTS = 2
OPTIMIZERS = tuple(member.value for member in OptimizerNames)


class TrialTrainer(ORPOTrainer):
    """ORPOTrainer whose checkpoints say that they are whole, and which computes only the logits that its loss reads.

    It also counts the tokens trained on (``num_tokens`` in the log: those of prompt and answer of both sides, padding left
    out) and hands every evaluated pair's scores to ``note_scores``. TRL averages an evaluation over its batches, so that the
    pairs of a short last batch count for more; here every pair counts the same (every token, for the NLL).
    """

    lean_logits = True
    passes = ForwardStrategy()
    tokens_seen = 0
    note_scores: Callable[[int, PairScores], None] | None = None
    _scores: PairScores | None = None
    _batch_sizes: list[tuple[int, int]]
    """Pairs, and tokens that the NLL reads, of each evaluated batch."""
    _batch_aux: list[float]
    """The router's loss of each evaluated batch, where the model has one."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """As ORPOTrainer's; see ``_lean_forward`` for what differs."""
        lean = self.lean_logits and not self.aux_loss_enabled
        outputs = self._lean_forward(model, batch) if lean else super().concatenated_forward(model, batch)
        if model.training:
            self.tokens_seen += int(batch["chosen_attention_mask"].sum() + batch["rejected_attention_mask"].sum())
        elif self._scores is not None:
            self._scores.add(pair_keys(batch), outputs[0].tolist(), outputs[1].tolist())
            mask = batch["chosen_attention_mask"]
            self._batch_sizes.append((len(mask), int(mask[:, 1:].sum())))
            if self.aux_loss_enabled:
                self._batch_aux.append(float(outputs[5]))
        return outputs

    def reached_rows(self) -> Dataset:
        """The training pairs that the steps will reach: all of them from one epoch on."""
        batches = self.args.max_steps * self.args.gradient_accumulation_steps
        if batches * self.args.per_device_train_batch_size >= len(self.train_dataset):
            return self.train_dataset
        with torch.random.fork_rng():  # the order is the seed's, and asking for it must not change what comes after
            order = self.get_train_dataloader().batch_sampler
            return self.train_dataset.select([row for batch in islice(order, batches) for row in batch])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.passes.backward()
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._scores, self._batch_sizes, self._batch_aux = PairScores(), [], []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            self._weigh(output.metrics)
            if self.note_scores is not None:
                self.note_scores(self.state.global_step, self._scores)
        finally:
            self._scores = None
        return output

    def _weigh(self, metrics: dict[str, float]) -> None:
        """Replace what TRL has stored of each batch by the mean over all pairs or tokens."""
        stored = self._stored_metrics["eval"]
        pairs, tokens = zip(*self._batch_sizes, strict=True)
        for key, values in stored.items():
            stored[key] = [float(np.average(values, weights=tokens if key == "eval_nll_loss" else pairs))]
        # arXiv 2403.07691, equation 6
        metrics["eval_loss"] = stored["eval_nll_loss"][0] - self.beta * stored["eval_log_odds_ratio"][0]
        if self._batch_aux:
            metrics["eval_loss"] += self.aux_loss_coef * float(np.average(self._batch_aux, weights=pairs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self.tokens_seen
        super().log(logs, start_time)

    def _lean_forward(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """As ORPOTrainer's ``concatenated_forward``, with mean logits per token read by the loss in place of all logits.

        Returns mean log-probabilities of the chosen and rejected answers [batch], mean logits of their tokens, and the NLL
        of prompt and chosen answer (arXiv 2403.07691, equation 6; TRL counts the prompt in).
        """
        joined = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        ids, mask = joined["concatenated_input_ids"], joined["concatenated_attention_mask"]
        chosen = batch["chosen_labels"].shape[0]
        base = self.accelerator.unwrap_model(model).get_base_model()
        answer = joined["concatenated_labels"][:, 1:] != -100
        read = answer.clone()
        read[:chosen] = mask[:chosen, 1:].bool()
        logps, logits = self.passes.forward(base, Batch(ids, mask, read, tuple((i, i + chosen) for i in range(chosen))))
        table = torch.zeros(read.shape, device=logps.device).index_put(read.nonzero(as_tuple=True), logps)
        nll = -table[:chosen].sum() / read[:chosen].sum()
        means = (table * answer).sum(-1) / answer.sum(-1)
        of_chosen = int(read[:chosen].sum())
        return means[:chosen], means[chosen:], logits[:of_chosen], logits[of_chosen:], nll

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # the adapter alone: asked to look at the embeddings, PEFT would search the Hub for the base model's vocabulary
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # not ORPOTrainer's, which writes a card each time
        folder = Path(self.args.output_dir)
        (folder / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()
        for old in complete_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)


def pair_keys(batch: dict[str, Any]) -> list[str]:
    """A name for each pair of a batch that its tokens decide, so that trials can be compared pair by pair."""
    sides = [(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"].bool()) for side in ("chosen", "rejected")]
    rows = len(batch["chosen_input_ids"])
    tokens = [[ids[row][mask[row]].tolist() for ids, mask in sides] for row in range(rows)]
    return [sequence_key([len(chosen), *chosen, *rejected])[:16] for chosen, rejected in tokens]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    found = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def attach_adapter(loaded: LoadedModel, spec: AdapterSpec, seed: int, revision: str | None = None) -> peft.PeftModel:
    """The model with a fresh adapter on it; the same numbers for the same seed."""
    set_seed(seed)
    config = adapter_config(spec)
    config.revision = revision
    return peft.get_peft_model(loaded.model, config)


def adapter_config(spec: AdapterSpec) -> IsaerftConfig:
    """PEFT's config of an adapter. Raises ConfigError when its settings do not go together."""
    return IsaerftConfig(
        sites=[{k: v for k, v in to_dict(site).items() if v is not None} for site in spec.sites],
        kind=spec.kind,
        rank=spec.rank,
        hidden_size=spec.hidden_size,
        hidden_layers=spec.hidden_layers,
    )


def make_trainer(
    spec: OrpoSpec,
    model: peft.PeftModel,
    loaded: LoadedModel,
    pairs: Pairs,
    folder: Path,
    eval_first: bool,
    callbacks: list[TrainerCallback],
) -> TrialTrainer:
    """The trainer of one trial. ``folder`` receives the checkpoints."""
    cuda = torch.cuda.is_available()
    steps = total_steps(spec, len(pairs.train))
    args = ORPOConfig(
        output_dir=str(folder),
        learning_rate=spec.learning_rate,
        beta=spec.beta,
        max_length=spec.max_length,
        num_train_epochs=spec.epochs,
        max_steps=steps,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.eval_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        warmup_steps=spec.warmup_steps,
        lr_scheduler_type=spec.schedule,
        optim=resolve_optimizer(spec.optimizer),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_first_step=True,
        # a NaN must be seen, not replaced by the mean of the other steps
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=steps_between(spec.eval_fraction, steps),
        eval_on_start=eval_first,
        save_strategy="no",  # the recorder decides: by steps, by time and on a signal
        # the model is loaded in the dtype it computes in; autocast would only cast the float32 adapter
        bf16=False,
        fp16=False,
        gradient_checkpointing=spec.gradient_checkpointing,
        # reentrant checkpointing would need inputs that require a gradient, down through the frozen trunk
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = TrialTrainer(
        model=model,
        args=args,
        train_dataset=_as_it_is(pairs.train),
        eval_dataset=_as_it_is(pairs.evaluation),
        processing_class=loaded.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # the recorder prints a line per step
    return trainer


def _as_it_is(data: Dataset) -> Dataset:
    """A tokenised data set that ORPOTrainer does not tokenise again: all that it does to its data goes through ``map``."""
    data.map = lambda *_args, **_kwargs: data
    return data


def resolve_optimizer(name: str) -> str:
    """``auto`` as the published run chose: paged 8-bit AdamW on a GPU with bitsandbytes, torch's AdamW elsewhere."""
    if name != "auto":
        return name
    eight_bit = torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None
    if torch.cuda.is_available() and not eight_bit:
        print("orpo.optimizer=auto: bitsandbytes is not installed (the extra `gpu`), so AdamW is torch's", flush=True)
    return "paged_adamw_8bit" if eight_bit else "adamw_torch"
