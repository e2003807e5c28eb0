"""What a user would write today: TRL's trainers on a model with a forward hook from the adapter's formula; nothing of our loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.sae import load_sae
from isaerft_sweep.models.loading import load, without_dropout
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import Experiment, OrpoSpec
from isaerft_sweep.trial.data import Pairs, load_pairs


class Collect(TrainerCallback):
    """Every row that a trainer logs, with its step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "train_runtime" not in logs:
            self.rows.append({"step": state.global_step, **logs})


def steered_model(experiment: Experiment) -> Any:
    """The loaded model with a trainable vector on the latents of its first hook point: f + b, or f · (1 + b)."""
    loaded = without_dropout(load(experiment.model, None))
    site = to_dict(experiment.adapter.sites[0])
    sae = load_sae({key: value for key, value in site.items() if value is not None}).sae
    layer = decoder_layers(loaded.model)[site["layer"]]
    layer.register_parameter("steering", torch.nn.Parameter(torch.zeros(sae.cfg.d_sae)))

    def hook(module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        f = sae.encode(x)
        changed = f + module.steering if experiment.adapter.kind == "bias" else f * (1 + module.steering)
        x = x + (sae.decode(changed) - sae.decode(f)).to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    layer.register_forward_hook(hook)
    return loaded


def trl_arguments(config: Any, orpo: OrpoSpec, output: Path, **more: Any) -> Any:
    """TRL's config with the settings of ``orpo``."""
    return config(
        output_dir=str(output), learning_rate=orpo.learning_rate, beta=orpo.beta, max_length=orpo.max_length,
        max_steps=orpo.max_steps, num_train_epochs=orpo.epochs, per_device_train_batch_size=orpo.batch_size,
        per_device_eval_batch_size=orpo.eval_batch_size, gradient_accumulation_steps=orpo.gradient_accumulation,
        warmup_steps=orpo.warmup_steps, lr_scheduler_type=orpo.schedule, optim="adamw_torch", weight_decay=orpo.weight_decay,
        seed=orpo.seed, logging_steps=1, eval_strategy="steps", eval_steps=orpo.max_steps if orpo.max_steps > 0 else 1000,
        save_strategy="no", report_to=[], bf16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, **more,
    )  # fmt: skip


def orpo_rows(experiment: Experiment, output: Path) -> list[dict[str, float]]:
    """What TRL's ORPOTrainer logs for the experiment."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return trained_rows(ORPOTrainer, ORPOConfig, experiment, output)


def trained_rows(trainer: Any, config: Any, experiment: Experiment, output: Path, **more: Any) -> list[dict[str, float]]:
    """What a TRL trainer logs for the experiment; ``more``: of its config."""
    loaded, seen = steered_model(experiment), Collect()
    pairs: Pairs = load_pairs(experiment.data, loaded.tokenizer, experiment.orpo.max_length)
    trainer(
        model=loaded.model, args=trl_arguments(config, experiment.orpo, output, **more), train_dataset=pairs.train,
        eval_dataset=pairs.evaluation, processing_class=loaded.tokenizer, callbacks=[seen],
    ).train()  # fmt: skip
    return seen.rows
