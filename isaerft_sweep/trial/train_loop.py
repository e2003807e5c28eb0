"""The training loop of one trial: steps, evaluations and checkpoints, as in transformers' Trainer and TRL's ORPOTrainer.

The loop is a generator: it yields forward and backward passes (``passes.py``) and whoever drives it runs them. An optimiser
step is the mean of ``gradient_accumulation`` batches, an epoch's last one of those that are left. The order of epoch e is a
permutation by a generator with seed ``seed + e``. Evaluations count every pair the same (every token, for the NLL), whatever
its batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from datasets import Dataset

from isaerft_sweep.journal.layout import PairScores
from isaerft_sweep.search.pruning import steps_between
from isaerft_sweep.specs import OrpoSpec, total_steps
from isaerft_sweep.trial.checkpoints import load_checkpoint, save_checkpoint
from isaerft_sweep.trial.cobatch.passes import BackwardPass, ForwardPass, Steps
from isaerft_sweep.trial.data import Pairs
from isaerft_sweep.trial.forward.activation_cache import sequences_of
from isaerft_sweep.trial.forward.batch_layout import TokenLogps
from isaerft_sweep.trial.forward.strategy import ForwardStrategy
from isaerft_sweep.trial.gradient_record import GradientRecord
from isaerft_sweep.trial.losses import OrpoLoss, PairLogps, make_loss
from isaerft_sweep.trial.optimizers import make_optimizer, make_schedule
from isaerft_sweep.trial.pair_batch import PairBatch, pair_batch
from isaerft_sweep.trial.recorder import Recorder
from isaerft_sweep.trial.reference import Reference
from isaerft_sweep.trial.sparsity import Sparsity


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation reads: tokenised pairs, those of the test, and what it measures besides, each by metric."""

    evaluation: Dataset
    test: Dataset
    measures: tuple[Callable[[], dict[str, float]], ...] = ()


@dataclass(frozen=True)
class PassContext:
    """What passes through the model need.

    ``strategy``: how batches go through it. ``held_out``: what evaluations read. ``untrained``: what the one before the
    first step reads, where that is something else. ``reference``: the log-probabilities of the model without the adapter,
    where the loss needs them. ``fit``: sets the adapter's weights in place of training, in a single step. ``record``: of the
    gradients of the loss's parts.
    """

    strategy: ForwardStrategy
    held_out: HeldOut
    untrained: HeldOut | None = None
    reference: Reference | None = None
    fit: Callable[[], None] | None = None
    record: GradientRecord | None = None


@dataclass(frozen=True)
class Order:
    """Which pairs each optimiser step takes."""

    pairs: int
    spec: OrpoSpec

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(self.pairs / self.spec.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.spec.gradient_accumulation)

    def step(self, number: int) -> list[list[int]]:
        """The batches of step ``number``, counted from 0, as numbers of pairs."""
        epoch, place = divmod(number, self.steps_per_epoch)
        order = _permutation(self.pairs, self.spec.seed + epoch)
        size = self.spec.batch_size
        first, end = (number * self.spec.gradient_accumulation * size for number in (place, place + 1))
        return [order[i : i + size] for i in range(first, min(end, len(order)), size)]

    def epochs_after(self, steps: int) -> float:
        """Passes over the pairs after so many steps."""
        epoch, place = divmod(steps, self.steps_per_epoch)
        return epoch + min(1.0, place * self.spec.gradient_accumulation / self.batches_per_epoch)

    def reached(self, steps: int) -> list[int]:
        """The pairs that so many steps take, in the order in which they do."""
        if steps >= self.steps_per_epoch:
            return list(range(self.pairs))
        return [pair for number in range(steps) for batch in self.step(number) for pair in batch]


@dataclass
class _Mean:
    """Batches' metrics, each with a weight."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    pairs: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, metrics: dict[str, float], batch: PairBatch) -> None:
        for name, value in metrics.items():
            self.values[name].append(value)
        self.pairs.append(batch.pairs)
        self.tokens.append(batch.nll_tokens)

    def over_batches(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self.values.items()}

    def over_pairs(self) -> dict[str, float]:
        """Over pairs, and the NLL over tokens."""
        weights = {"nll_loss": self.tokens}
        return {name: float(np.average(v, weights=weights.get(name, self.pairs))) for name, v in self.values.items()}


class TrainLoop:
    """Trains one adapter.

    Args:
        spec: loss, steps and optimiser.
        model: with the adapter on it.
        pairs: tokenised pairs.
        pad: id of the padding token.
        recorder: hears of every step and decides when to write a checkpoint and when to stop.
        checkpoints: the folder that they are written into.
    """

    def __init__(
        self, spec: OrpoSpec, model: peft.PeftModel, pairs: Pairs, pad: int, recorder: Recorder, checkpoints: Path
    ) -> None:
        self.spec, self.model, self.pairs, self.pad = spec, model, pairs, pad
        self.recorder, self.checkpoints = recorder, checkpoints
        self.base: Any = model.get_base_model()
        self.loss = make_loss(spec)
        self.steps = total_steps(spec, len(pairs.train))
        self.order = Order(len(pairs.train), spec)
        self.optimizer = make_optimizer(spec, model, checkpoints)
        self.schedule = make_schedule(spec, self.optimizer, self.steps)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if spec.gradient_checkpointing:
            # by its name in newer transformers, else by the earlier one; not reentrant, which would need inputs that
            # require a gradient, down through the frozen layers
            enable = getattr(self.base, "activation_checkpointing_enable", None) or self.base.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def reached_rows(self) -> Dataset:
        """The training pairs that the steps will reach: all of them from one epoch on."""
        reached = self.order.reached(total_steps(self.spec, len(self.pairs.train)))
        return self.pairs.train if len(reached) == len(self.pairs.train) else self.pairs.train.select(reached)

    def texts(self, more: list[list[int]], trains: bool = True) -> list[list[int]]:
        """The token sequences that the trial will show the model, and ``more``. ``trains``: with the training pairs."""
        return sequences_of(*([self.reached_rows()] if trains else []), self.pairs.evaluation, self.pairs.test) + more

    def run(
        self,
        context: PassContext,
        sparsity: Sparsity,
        resume: Path | None,
        evaluate_first: bool,
    ) -> Steps[None]:
        """Train to the end, or until the recorder stops it.

        Args:
            context: what passes through the model need.
            sparsity: what follows each optimiser step.
            resume: the checkpoint to start from; None: the beginning.
            evaluate_first: whether to evaluate the untrained model.
        """
        step = load_checkpoint(resume, self.model, self.optimizer, self.schedule) if resume else 0
        record = context.record
        if record is not None and not record.resume(step):
            print(
                "sweep.emulate: no record of the steps before the checkpoint; nothing is emulated from this trial",
                flush=True,
            )
            record = None
        context = replace(context, record=record)
        if context.fit is not None:
            self.steps = 1
        if evaluate_first:
            yield from self._evaluate(0, context)
        while step < self.steps and not self.recorder.stopped:
            self.recorder.begins(step, self.steps)
            metrics = yield from self._step(step, context, sparsity)
            step += 1
            actions = self.recorder.after_step(step, self.steps)
            self.recorder.log(_prefixed("train", metrics), step, self.steps)
            if step % steps_between(self.spec.eval_fraction, self.steps) == 0 or step == self.steps:
                yield from self._evaluate(step, context)
            if record is not None and (actions.save or self.recorder.stopped or step == self.steps):
                record.save(is_last=step == self.steps)
            if actions.save or self.recorder.stopped:
                save_checkpoint(self.checkpoints, step, self.model, self.optimizer, self.schedule)
                self.recorder.saved(step)

    def _step(self, number: int, context: PassContext, sparsity: Sparsity) -> Steps[dict[str, float]]:
        """One optimiser step; its metrics."""
        if context.fit is not None:
            context.fit()
            return {"num_tokens": self.recorder.tokens_seen, "epoch": self.order.epochs_after(number + 1)}
        self.model.train()
        mean, total = _Mean(), 0.0
        batches = self.order.step(number)
        for pairs in batches:
            batch = self._batch(self.pairs.train[pairs], read_prompt=self.loss.reads_prompt)
            logps, tokens = yield from self._forward(batch, context, trains=True)
            total += yield from self._backward(logps, tokens, len(batches), context.record)
            mean.add(self._metrics(logps, tokens, batch), batch)
            self.recorder.count_tokens(batch.tokens)
        if context.record is not None:
            context.record.finish_step(self.spec.beta)
        limit = self.spec.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        rate = float(self.schedule.get_last_lr()[0])
        sparsity.before_step(self.model)
        self.optimizer.step()
        sparsity.after_step(self.model, rate, number + 1, self.steps)
        self.schedule.step()
        self.optimizer.zero_grad()
        progress = {"num_tokens": self.recorder.tokens_seen, "epoch": self.order.epochs_after(number + 1)}
        return {"loss": total, "grad_norm": float(norm), "learning_rate": rate, **mean.over_batches(), **progress}

    def _evaluate(self, step: int, context: PassContext) -> Steps[None]:
        held_out = context.held_out if step or context.untrained is None else context.untrained
        metrics, scores = yield from self.measured(held_out.evaluation, step, context)
        for measure in held_out.measures:
            metrics |= measure()
        self.recorder.note_scores(step, scores)
        logged = _prefixed("eval", metrics)
        if step in (0, self.steps) and len(held_out.test):
            tested, scores = yield from self.measured(held_out.test, step, context)
            self.recorder.note_scores(step, scores, "test")
            logged |= _prefixed("test", tested)
        epoch = {"train/epoch": self.order.epochs_after(step)}
        self.recorder.log({**logged, **epoch}, step, self.steps)
        self.recorder.evaluated(step, self.steps)

    def measured(self, rows: Dataset, step: int, context: PassContext) -> Steps[tuple[dict[str, float], PairScores]]:
        """Metrics of some pairs, and the scores of each."""
        self.model.eval()
        size = self.spec.eval_batch_size
        mean, scores, number = _Mean(), PairScores(), math.ceil(len(rows) / size)
        for done, start in enumerate(range(0, len(rows), size), 1):
            batch = self._batch(rows[start : start + size], read_prompt=True)
            logps, tokens = yield from self._forward(batch, context, trains=False)
            mean.add(self._metrics(logps, tokens, batch), batch)
            scores.add(batch.keys, logps.chosen.tolist(), logps.rejected.tolist())
            self.recorder.evaluating(step, done, number)
        metrics = mean.over_pairs()
        # the loss of all pairs: the mean of batches' losses would weigh tokens by their batch
        metrics["loss"] = metrics.pop("pair_loss") + metrics.pop("router_loss", 0.0)
        metrics["loss"] += self.loss.nll_weight * metrics["nll_loss" if self.loss.reads_prompt else "answer_nll"]
        metrics.pop("answer_nll")
        return metrics, scores

    def _batch(self, rows: Any, read_prompt: bool) -> PairBatch:
        return pair_batch(rows, self.pad, self.base.device, read_prompt)

    def _forward(self, batch: PairBatch, context: PassContext, trains: bool) -> Steps[tuple[PairLogps, TokenLogps]]:
        tokens = yield ForwardPass(self.base, batch.batch, context.strategy, trains)
        assert tokens is not None
        logps = batch.pair_logps(tokens.logps)
        if context.reference is not None:
            logps = replace(logps, **context.reference.of(batch, tokens.logps.device))
        return logps, tokens

    def _backward(self, logps: PairLogps, tokens: TokenLogps, batches: int, record: GradientRecord | None) -> Steps[float]:
        """The backward pass of a batch, or one for each part of its loss that is recorded; the loss.

        Args:
            logps: of the batch's pairs, made of ``tokens``.
            tokens: what the forward pass gave.
            batches: of the optimiser step, which takes their mean.
            record: of the gradients of the loss's parts.
        """
        if record is None:
            parts = [self.loss(logps)]
        else:
            assert isinstance(self.loss, OrpoLoss)
            parts = [self.loss.nll(logps), self.loss.odds_ratio(logps)]
        if tokens.router_loss is not None:
            parts[0] = parts[0] + self._router_weight * tokens.router_loss
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            (part / batches).backward(retain_graph=not is_last)
            yield BackwardPass(again=not is_last)
            if record is not None:
                record.add_part(number)
                for tensor in tokens.differentiable():
                    tensor.grad = None
        whole = parts[0] if record is None else parts[0] + self.spec.beta * parts[1]
        return float(whole.detach()) / batches

    @property
    def _router_weight(self) -> float:
        return float(getattr(self.base.config, "router_aux_loss_coef", 0.0))

    @torch.no_grad()
    def _metrics(self, logps: PairLogps, tokens: TokenLogps, batch: PairBatch) -> dict[str, float]:
        """A batch's metrics; in an evaluation also what its loss is made of."""
        chosen, rejected = self.loss.rewards(logps)
        values = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": logps.chosen.mean(),
            "logps/rejected": logps.rejected.mean(),
            "logits/chosen": tokens.mean_logits[: batch.chosen_reads].mean(),
            "logits/rejected": tokens.mean_logits[batch.chosen_reads :].mean(),
            "log_odds_ratio": torch.nn.functional.logsigmoid(logps.log_odds).mean(),
            "log_odds_chosen": logps.log_odds.mean(),
        }
        if logps.nll is not None:
            values["nll_loss"] = logps.nll
        if not self.model.training:
            values |= {"pair_loss": self.loss.pair_losses(logps).mean(), "answer_nll": logps.answer_nll}
            if tokens.router_loss is not None:
                values["router_loss"] = self._router_weight * tokens.router_loss
        return {name: float(value) for name, value in values.items()}


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
