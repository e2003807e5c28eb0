"""Watches a training run: records metrics, reports to the controller, decides on checkpoints, stops it when it must end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from isaerft_sweep.errors import TrialDiverged
from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.journal.layout import PairScores
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.specs import TrialSpec
from isaerft_sweep.tracking.wandb_run import Run
from isaerft_sweep.trial.phases import EVALUATING, TRAINING
from isaerft_sweep.trial.stop_request import StopRequested

PRINTED = ("train/loss", "train/learning_rate", "eval/loss", "eval/rewards/accuracies", "eval/log_odds_chosen")


@dataclass(frozen=True)
class Actions:
    """What is to follow a step. ``save``: write a checkpoint, after the evaluation if there is one."""

    save: bool


class Recorder:
    """One per attempt of a trial.

    Every logged step becomes one row of ``metrics.jsonl`` and one step of the W&B run. After a resume the rows beyond
    the checkpoint are dropped, so that the file is the same as an uninterrupted run's.

    Args:
        spec: the trial's.
        status: of this attempt.
        run: the trial's W&B run.
        stop_state: gives the state in which the trial should end; None while nothing has asked for it.
    """

    def __init__(self, spec: TrialSpec, status: StatusWriter, run: Run, stop_state: Callable[[], TrialState | None]) -> None:
        self.spec, self.status, self.folder, self.run = spec.experiment.orpo, status, status.folder, run
        self.metric, self.stop_state = spec.metric, stop_state
        self.latest: dict[str, float] = {}
        self.untrained: dict[str, float] = {}
        self.evaluations: list[float] = []
        """The trial's metric at each evaluation: what early stopping looks at."""
        self.stopped: TrialState | None = None
        """The state in which the trial was asked to end."""
        self.tokens_seen = 0
        """Tokens trained on: those of prompt and answer of both sides, padding left out."""
        self._patience_s = spec.experiment.launcher.grace_s / 2
        """How long after a request to stop an evaluation may continue: its step's checkpoint is written after it."""
        self._asked_s: float | None = None
        self._began = False
        self._first_loss: float | None = None
        self._last_checkpoint_s = time.monotonic()

    def rewind(self, step: int) -> None:
        """Forget what was recorded after ``step``, the step of the checkpoint that training resumes from."""
        self.status.check()
        kept = [row for row in self.folder.read_metrics() if row["step"] <= step]
        write_text(self.folder.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for row in kept:
            self._remember(row)
            self.run.replay({k: v for k, v in row.items() if k not in ("step", "time")}, row["step"])
        self.tokens_seen = int(self.latest.get("train/num_tokens", 0))

    def count_tokens(self, tokens: int) -> None:
        self.tokens_seen += tokens

    def note_scores(self, step: int, scores: PairScores, pairs: str = "") -> None:
        """Keep every pair's scores of an evaluation. ``pairs``: ``test`` for the test pairs."""
        self.status.check()
        self.folder.note_scores(step, scores, pairs)

    def begins(self, step: int, steps: int) -> None:
        """Step ``step + 1`` begins. At the first one of this attempt: the time left is estimated from here on."""
        if self._began:
            return
        self._began = True
        self.status.write(
            TrialState.RUNNING, step=step, max_steps=steps, phase=TRAINING, trained_from=step, trained_since=time.time()
        )

    def after_step(self, step: int, steps: int) -> Actions:
        """An optimiser step is done."""
        self.status.check()
        if step >= steps:
            return Actions(save=False)
        self._stop_if_asked()
        due_s = time.monotonic() - self._last_checkpoint_s >= self.spec.checkpoint_every_min * 60
        return Actions(save=due_s or step % self.spec.checkpoint_every_steps == 0)

    def log(self, metrics: dict[str, float], step: int, steps: int) -> None:
        """Metrics of a step or an evaluation, by W&B name. Raises TrialDiverged when they show that it has."""
        self.status.check()  # an orphan of an older attempt must not add rows
        row = {"step": step, "time": time.time(), **metrics}
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name in (*PRINTED, self.metric))
        print(f"step {step}/{steps}: {shown}", flush=True)
        self.run.log(metrics, step)
        self._remember(row)
        self._check(metrics, step)
        self.status.write(
            TrialState.RUNNING,
            force=self.metric in metrics,
            step=step,
            max_steps=steps,
            loss=self.latest.get("train/loss"),
            phase=TRAINING,
            metric=self.latest.get(self.metric),
            evaluations=tuple(self.evaluations),
        )

    def evaluating(self, step: int, done: int, batches: int) -> None:
        """Report progress. Raises StopRequested where a stop loses nothing, or the evaluation takes too long."""
        phase = f"{EVALUATING} {100 * done / batches:.0f} %"
        self.status.write(TrialState.RUNNING, force=False, phase=phase)  # a long evaluation is not a hung worker
        requested = self.stop_state() or self.folder.stop_requested()
        if requested in (None, TrialState.PRUNED):  # one that is stopped early keeps a checkpoint, and nothing waits for it
            return
        self._asked_s = self._asked_s or time.monotonic()
        if step == 0 or time.monotonic() - self._asked_s > self._patience_s:
            raise StopRequested

    def evaluated(self, step: int, steps: int) -> None:
        """An evaluation is done."""
        if 0 < step < steps:
            self._stop_if_asked()  # requested during the evaluation: not another step

    def saved(self, step: int) -> None:
        """A checkpoint was written after ``step``."""
        self._last_checkpoint_s = time.monotonic()
        self.status.write(TrialState.RUNNING, force=False, checkpoint=step)

    def cut_off(self, state: TrialState) -> None:
        """The trial was asked to end where no checkpoint could be written."""
        self.stopped = state

    def _stop_if_asked(self) -> None:
        self.stopped = self.stopped or self.stop_state() or self.folder.stop_requested()

    def _remember(self, row: dict[str, float]) -> None:
        metrics = {k: v for k, v in row.items() if k not in ("step", "time")}
        self.latest.update(metrics)
        if self.metric in metrics and row["step"] > 0:
            self.evaluations.append(metrics[self.metric])
        if row["step"] == 0:
            self.untrained.update({k: v for k, v in metrics.items() if k.startswith(("eval/", "test/"))})
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
