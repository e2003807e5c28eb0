"""Watches a training run: records metrics, tells the controller, decides on checkpoints, stops it when it must end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from isaerft_sweep.errors import TrialDiverged
from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.journal.layout import PairScores, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.metrics import wandb_name
from isaerft_sweep.specs import OrpoSpec
from isaerft_sweep.tracking.wandb_run import Run
from isaerft_sweep.trial.phases import EVALUATING, TRAINING
from isaerft_sweep.trial.stop_request import AskedToStop

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "total_flos", "train_loss")
PRINTED = ("train/loss", "train/learning_rate", "eval/loss", "eval/rewards/accuracies", "eval/log_odds_chosen")

Asking = Callable[[], TrialState | None]
"""Gives the state in which the trial shall end; None while nobody has asked for it."""


class Recorder(TrainerCallback):
    """One per attempt of a trial.

    Every logged step becomes one row of ``metrics.jsonl`` and one step of the W&B run. After a resume the rows beyond
    the checkpoint are dropped, so that the file is the same as an uninterrupted run's.
    """

    def __init__(
        self,
        folder: TrialFolder,
        spec: OrpoSpec,
        status: StatusWriter,
        run: Run,
        metric: str,
        stopping: Asking,
    ) -> None:
        self.folder, self.spec, self.status, self.run, self.metric = folder, spec, status, run, metric
        self.stopping = stopping
        self.latest: dict[str, float] = {}
        self.untrained: dict[str, float] = {}
        self.evaluations: list[float] = []
        """The trial's metric at each evaluation: what early stopping looks at."""
        self.stopped: TrialState | None = None
        """The state in which the trial was asked to end."""
        self.patience_s = 0.0
        """How long after a request to stop an evaluation may go on: its step's checkpoint is written after it."""
        self._asked_s: float | None = None
        self._evaluated = 0
        self._began = False
        self._first_loss: float | None = None
        self._last_checkpoint_s = time.monotonic()

    def rewind(self, step: int) -> None:
        """Forget what was recorded after ``step``, the step of the checkpoint that training goes on from."""
        self.status.check()
        kept = [row for row in self.folder.read_metrics() if row["step"] <= step]
        write_text(self.folder.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for row in kept:
            self._remember(row)
            self.run.replay({k: v for k, v in row.items() if k not in ("step", "time")}, row["step"])

    def note_scores(self, step: int, scores: PairScores) -> None:
        """Keep what an evaluation found for every pair."""
        self.status.check()
        self.folder.note_scores(step, scores)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        metrics = {wandb_name(k): float(v) for k, v in (logs or {}).items() if not k.endswith(TIMINGS)}
        metrics.pop("eval/epoch", None)
        if not metrics.keys() - {"train/epoch"}:
            return
        self.status.check()  # an orphan of an older attempt must not add rows
        row = {"step": state.global_step, "time": time.time(), **metrics}
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name in (*PRINTED, self.metric))
        print(f"step {state.global_step}/{state.max_steps}: {shown}", flush=True)
        self.run.log(metrics, state.global_step)
        self._remember(row)
        self._check(metrics, state.global_step)
        self.status.write(
            TrialState.RUNNING,
            force=self.metric in metrics,
            step=state.global_step,
            max_steps=state.max_steps,
            loss=self.latest.get("train/loss"),
            phase=TRAINING,
            metric=self.latest.get(self.metric),
            evaluations=tuple(self.evaluations),
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._began:  # what is left is told from here on: loading and what came before tell nothing of it
            self._began = True
            self.status.write(
                TrialState.RUNNING,
                step=state.global_step,
                max_steps=state.max_steps,
                phase=TRAINING,
                trained_from=state.global_step,
                trained_since=time.time(),
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.status.check()
        last = state.global_step >= state.max_steps
        if last:
            control.should_evaluate = True
        else:
            self._stop_if_asked(control)
        due_s = time.monotonic() - self._last_checkpoint_s >= self.spec.checkpoint_every_min * 60
        if not last and (due_s or state.global_step % self.spec.checkpoint_every_steps == 0):
            control.should_save = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self._evaluated += 1
        batches = len(given.get("eval_dataloader") or ())
        words = f"{EVALUATING} {100 * self._evaluated / batches:.0f} %" if batches else EVALUATING
        self.status.write(TrialState.RUNNING, phase=words, force=False)  # a long evaluation is not a hung worker
        self._end_evaluation(state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluated = 0
        if 0 < state.global_step < state.max_steps:
            self._stop_if_asked(control)  # asked while it was evaluated: not another step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last_checkpoint_s = time.monotonic()
        self.status.write(TrialState.RUNNING, checkpoint=state.global_step, force=False)

    def _stop_if_asked(self, control: TrainerControl) -> None:
        if asked := self.stopping() or self.folder.stop_asked():
            self.stopped = asked
            control.should_save = control.should_training_stop = True

    def _end_evaluation(self, step: int) -> None:
        """Raise AskedToStop when somebody has asked for a stop and the evaluation keeps nothing, or takes too long."""
        asked = self.stopping() or self.folder.stop_asked()
        if asked in (None, TrialState.PRUNED):  # one that is stopped early keeps a checkpoint, and nobody waits for its end
            return
        self._asked_s = self._asked_s or time.monotonic()
        if step == 0 or time.monotonic() - self._asked_s > self.patience_s:
            raise AskedToStop

    def _remember(self, row: dict[str, float]) -> None:
        metrics = {k: v for k, v in row.items() if k not in ("step", "time")}
        self.latest.update(metrics)
        if self.metric in metrics and row["step"] > 0:
            self.evaluations.append(metrics[self.metric])
        if row["step"] == 0:
            self.untrained.update({k: v for k, v in metrics.items() if k.startswith("eval/")})
        if self._first_loss is None:
            self._first_loss = metrics.get("train/loss")

    def _check(self, metrics: dict[str, float], step: int) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise TrialDiverged(f"{bad[0]} became {metrics[bad[0]]} at step {step}. Try a smaller learning rate.")
        loss, limit = metrics.get("train/loss"), self.spec.diverged_loss_factor
        if loss is not None and self._first_loss and loss > limit * abs(self._first_loss):
            raise TrialDiverged(
                f"the loss rose to {loss:.4g} at step {step}, more than {limit:g} times the first loss "
                f"{self._first_loss:.4g} (orpo.diverged_loss_factor). Try a smaller learning rate."
            )
