"""A worker that runs trials in sequence or co-batched, and loads what they have in common once."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from isaerft_sweep.errors import disk_failure
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.journal.status_writer import StatusWriter, Superseded
from isaerft_sweep.journal.worker_queue import Task, TaskProgress, WorkerFolder
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.cobatch.multi_trial import MultiTrialModel
from isaerft_sweep.trial.cobatch.passes import Steps
from isaerft_sweep.trial.cobatch.run_passes import RunningTrial, best_trials_per_pass, run_passes
from isaerft_sweep.trial.optimizers import resolve_optimizer
from isaerft_sweep.trial.process_cache import ProcessCache, activations_key
from isaerft_sweep.trial.runner import trial_steps
from isaerft_sweep.trial.stop_request import StopFlags, stop_requests

POLL_S = 0.05
IDLE_S = 60.0
"""A worker without a new task for so long ends: its controller has gone."""

ENDED = (*FINAL, TrialState.PRUNED)

T = TypeVar("T")


def serve_trials(folder: WorkerFolder, idle_s: float = IDLE_S, trials_per_pass: int | None = 1) -> int:
    """Run the tasks in ``folder`` until the last one; returns the number of trials that ran.

    Ends early after a failed trial, since an error may leave the process in any state, on a request to stop, and when no
    task arrives for ``idle_s`` seconds. ``trials_per_pass``: number of co-batched trials; None: measure the fastest.
    """
    if folder.progress().ending:  # a scheduler restarted a worker that had ended
        return 0
    with stop_requests() as flags:
        return _Worker(folder, idle_s, trials_per_pass, flags).serve()


class _Worker:
    """The running trials and their shared state."""

    def __init__(self, folder: WorkerFolder, idle_s: float, trials_per_pass: int | None, flags: StopFlags) -> None:
        self.folder, self.idle_s, self.trials_per_pass, self.flags = folder, idle_s, trials_per_pass, flags
        self.cache = WorkerCache()
        self.trials: dict[int, RunningTrial[bool]] = {}
        self.progress, self.number, self.count = folder.progress(), 0, 0
        self.closed = False
        self._pass_key: str | None = None
        self._pending: tuple[int, TrialFolder, int, Experiment] | None = None
        self._hook_layer = 0
        self._joint: MultiTrialModel | None = None

    def serve(self) -> int:
        idle_since = time.monotonic()
        while not self.closed or self.trials:
            if self.flags.stop_requested and not self.closed:
                self._close()
            self._start_waiting()
            if self.trials:
                self._advance()
                idle_since = time.monotonic()
            elif not self.closed:
                time.sleep(POLL_S)
                if time.monotonic() - idle_since > self.idle_s:
                    self.folder.claim(Task(None))  # fails if a trial has just arrived: that runs next
        self._note(self.progress)
        return self.count

    def _start_waiting(self) -> None:
        """Start waiting tasks up to ``trials_per_pass``; a task that cannot be co-batched waits until the others end."""
        while not self.closed and len(self.trials) < (self.trials_per_pass or 1):
            if self._pending is None:
                self._pending = self._read_next()
            if self._pending is None:
                return
            number, trial, attempt, experiment = self._pending
            key = pass_key(experiment)
            if self.trials and (key is None or key != self._pass_key):
                return
            self.number, self._pass_key, self._pending = number, key, None
            self._hook_layer = min(hook_point.layer for hook_point in experiment.adapter.sites)
            self.trials[number] = RunningTrial(self._run(trial, attempt, experiment))

    def _read_next(self) -> tuple[int, TrialFolder, int, Experiment] | None:
        """The first waiting task: number, trial, attempt, experiment. A task without a trial closes the worker."""
        while (task := self.folder.task(number := self._next())) is not None:
            if task.trial is None:
                self.closed = True
                return None
            trial = TrialFolder(Path(task.trial))
            try:
                if trial.current_attempt() > task.attempt:  # another worker has taken it over
                    self._pass_over(number)
                    continue
                return number, trial, task.attempt, trial.read_spec().experiment
            except Exception as error:
                self._cannot_begin(number, trial, task.attempt, error)
        return None

    def _cannot_begin(self, number: int, trial: TrialFolder, attempt: int, error: Exception) -> None:
        """Fail a trial whose folder cannot be read; the worker's other trials continue."""
        _note_failure(trial, attempt, error)
        self._pass_over(number)

    def _pass_over(self, number: int) -> None:
        self.progress = self.progress.with_over(number)
        self._note(self.progress)

    def _next(self) -> int:
        """The number of the first waiting task."""
        number = max(self.number, self.progress.upto) + 1
        while self.progress.over(number):
            number += 1
        return number

    def _advance(self) -> None:
        """Let every trial continue to its next pass, then run all these passes."""
        for number, running in list(self.trials.items()):
            running.advance()
            if running.ended:
                must_end = running.result
                del self.trials[number], running
                self.count += 1
                self.progress = self.progress.with_over(number)
                # close before noting the trial's end: otherwise the controller would give this worker another task
                if (must_end or self.flags.stop_requested) and not self.closed:
                    self._close()
                else:
                    self._note(self.progress)
                gc.collect()  # training loop and model form reference cycles
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        if not self.trials:
            self._joint = None  # the next trial may use another model: keep one in memory
            return
        waiting = list(self.trials.values())
        joint = self._joint_model(waiting)
        first = waiting[0]
        if self.trials_per_pass is None and first.wants_forward and first.trains and first.forward is not None:
            # a trial that cannot be co-batched would only wait for others
            self.trials_per_pass = 1 if joint is None else best_trials_per_pass(joint, first.forward)
            self.folder.note_room(self.trials_per_pass)
        run_passes(joint, waiting)

    def _run(self, trial: TrialFolder, attempt: int, experiment: Experiment) -> Steps[bool]:
        """One attempt; returns whether the worker should end after it."""
        try:
            if trial.read_status().of_attempt(attempt).state in ENDED:
                return False  # the trial had ended when a scheduler restarted this worker
            with logged_to(trial.log):
                try:
                    shared = _CountedCache(self.cache, self.count)
                    state = yield from trial_steps(trial, attempt, shared, self.flags)
                except Superseded as error:
                    print(f"ended: {error}", flush=True)
                    return True
        except Exception as error:  # its folder cannot be read or written
            _note_failure(trial, attempt, error)
            return True
        # bitsandbytes never frees the paged state of large parameters
        paged = resolve_optimizer(experiment.orpo.optimizer).startswith("paged")
        return (paged and experiment.adapter.kind in ("linear", "mlp")) or state not in (*ENDED, TrialState.STOPPED)

    def _close(self) -> None:
        """Take no further task; hand waiting tasks back to the controller."""
        self.closed, self._pending = True, None
        while True:
            number = self._next()
            task = self.folder.task(number)
            if task is None:
                self.folder.claim(Task(None), room=None)  # fails if a trial has just arrived: hand that back too
                continue
            if task.trial is None:
                break
            with suppress(Superseded):
                writer = StatusWriter(TrialFolder(Path(task.trial)), task.attempt)
                writer.write(TrialState.STOPPED, message="its worker ended before it began", begun=False)
            self.number, self.progress = number, self.progress.with_over(number)
        self._note(self.progress)

    def _note(self, progress: TaskProgress) -> None:
        self.folder.note(replace(progress, ending=self.closed))

    def _joint_model(self, trials: Sequence[RunningTrial[bool]]) -> MultiTrialModel | None:
        """The model for co-batched trials; None if no trial can be co-batched."""
        bases = [trial.forward.strategy.base for trial in trials if trial.forward is not None and trial.joinable]
        base = bases[0] if bases else None
        if base is None:
            return None
        if self._joint is None or self._joint.base is not base or self._joint.hook_layer != self._hook_layer:
            self._joint = MultiTrialModel(base, self._hook_layer)
        return self._joint


def _note_failure(trial: TrialFolder, attempt: int, error: Exception) -> None:
    """Write to the trial's status, if possible, that its folder could not be used."""
    if message := disk_failure(error, trial.path):
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        message = f"its folder could not be used: {type(error).__name__}: {error}"
    with suppress(Exception):  # the status cannot be written either
        StatusWriter(trial, attempt).write(TrialState.FAILED, message=message[:2000])


def pass_key(experiment: Experiment) -> str | None:
    """Equal for experiments that can be co-batched; None for one that cannot."""
    # LoRA changes weights that all rows of a pass share
    changes_weights = experiment.adapter.kind == "lora"
    if not experiment.launcher.lean_logits or experiment.orpo.gradient_checkpointing or changes_weights:
        return None
    return activations_key(experiment)


class _CountedCache(ProcessCache):
    """The worker's cache, with the number of trials that it has run before."""

    def __init__(self, cache: WorkerCache, served: int) -> None:
        self.cache, self.served = cache, served

    def get(self, what: str, key: str, make: Callable[[], T]) -> T:
        return self.cache.get(what, key, make)


class WorkerCache(ProcessCache):
    """Keeps the last model, pairs, activations and so on for the next trial with the same keys."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, Any]] = {}

    def get(self, what: str, key: str, make: Callable[[], T]) -> T:
        if self._entries.get(what, ("", None))[0] != key:
            self._entries.pop(what, None)  # first free the old one: memory may hold only one
            self._entries[what] = (key, make())
        value: T = self._entries[what][1]
        return value


class _Tee:
    """Writes to two streams."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self._streams = (first, second)

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams[0], name)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Inside the block, copy what Python prints to ``path``: the worker's own log mixes all its trials."""
    before = sys.stdout, sys.stderr
    with path.open("a", encoding="utf-8", buffering=1) as file:
        sys.stdout, sys.stderr = _Tee(sys.stdout, file), _Tee(sys.stderr, file)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            os.fsync(file.fileno())
