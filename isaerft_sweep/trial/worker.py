"""A worker that runs one trial after the other, or some together: what they have in common is loaded once."""

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

from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.journal.status_writer import StatusWriter, Superseded
from isaerft_sweep.journal.worker_queue import Task, TaskProgress, WorkerFolder
from isaerft_sweep.specs import Experiment
from isaerft_sweep.trial.co_batching import RunningTrial, best_trials_per_pass, run_passes
from isaerft_sweep.trial.multi_trial import MultiTrialModel
from isaerft_sweep.trial.optimizers import resolve_optimizer
from isaerft_sweep.trial.passes import Steps
from isaerft_sweep.trial.process_cache import ProcessCache, activations_key
from isaerft_sweep.trial.runner import trial_steps
from isaerft_sweep.trial.stop_request import StopFlags, stop_requests

POLL_S = 0.05
IDLE_S = 60.0
"""A worker that is given nothing for so long ends: its controller has gone."""

OVER = (*FINAL, TrialState.PRUNED)

T = TypeVar("T")


def serve_trials(folder: WorkerFolder, idle_s: float = IDLE_S, trials_per_pass: int | None = 1) -> int:
    """Run the tasks in ``folder`` until the last one; returns how many trials were run.

    Ends after a trial that failed, since an error may have left anything behind, when it is asked to stop, and when nobody
    has given it anything for ``idle_s``. ``trials_per_pass``: how many trials advance together; None: as many as pay,
    measured.
    """
    if folder.progress().ending:  # a scheduler has started a worker again that was over
        return 0
    with stop_requests() as flags:
        return _Worker(folder, idle_s, trials_per_pass, flags).serve()


class _Worker:
    """The trials that run now, and what they share."""

    def __init__(self, folder: WorkerFolder, idle_s: float, trials_per_pass: int | None, flags: StopFlags) -> None:
        self.folder, self.idle_s, self.room, self.flags = folder, idle_s, trials_per_pass, flags
        self.kept = WorkerCache()
        self.trials: dict[int, RunningTrial[bool]] = {}
        self.progress, self.number, self.count = folder.progress(), 0, 0
        self.closed = False
        self._pack: str | None = None
        self._next_up: tuple[int, TrialFolder, int, Experiment] | None = None
        self._site = 0
        self._joint: MultiTrialModel | None = None

    def serve(self) -> int:
        idle_since = time.monotonic()
        while not self.closed or self.trials:
            if self.flags.asked and not self.closed:
                self._close()
            self._start_waiting()
            if self.trials:
                self._advance()
                idle_since = time.monotonic()
            elif not self.closed:
                time.sleep(POLL_S)
                if time.monotonic() - idle_since > self.idle_s:
                    self.folder.claim(Task(None))  # or a trial has come at the last moment: then that is next
        self._note(self.progress)
        return self.count

    def _start_waiting(self) -> None:
        """Begin the tasks that there is room for; one that cannot share a pass with those at hand waits for them."""
        while not self.closed and len(self.trials) < (self.room or 1):
            if self._next_up is None:
                self._next_up = self._read_next()
            if self._next_up is None:
                return
            number, trial, attempt, experiment = self._next_up
            pack = pass_key(experiment)
            if self.trials and (pack is None or pack != self._pack):
                return
            self.number, self._pack, self._next_up = number, pack, None
            self._site = min(site.layer for site in experiment.adapter.sites)
            self.trials[number] = RunningTrial(self._run(trial, attempt, experiment))

    def _read_next(self) -> tuple[int, TrialFolder, int, Experiment] | None:
        """The first task that has not begun: its number, trial, attempt and what it is about. The word to end closes."""
        while (task := self.folder.task(number := self._next())) is not None:
            if task.trial is None:
                self.closed = True
                return None
            trial = TrialFolder(Path(task.trial))
            try:
                if trial.current_attempt() > task.attempt:  # another worker has taken it over before this one was started
                    self._pass_over(number)
                    continue
                return number, trial, task.attempt, trial.read_spec().experiment
            except Exception as error:
                self._cannot_begin(number, trial, task.attempt, error)
        return None

    def _cannot_begin(self, number: int, trial: TrialFolder, attempt: int, error: Exception) -> None:
        """A trial whose folder cannot be read has failed; the others of this worker have not."""
        _note_failure(trial, attempt, error)
        self._pass_over(number)

    def _pass_over(self, number: int) -> None:
        self.progress = self.progress.with_over(number)
        self._note(self.progress)

    def _next(self) -> int:
        """The number of the first task that has not begun."""
        number = max(self.number, self.progress.upto) + 1
        while self.progress.over(number):
            number += 1
        return number

    def _advance(self) -> None:
        """Let every trial continue to its next pass, then run the passes of all."""
        for number, running in list(self.trials.items()):
            running.advance()
            if running.ended:
                spoiled = running.result
                del self.trials[number], running
                self.count += 1
                self.progress = self.progress.with_over(number)
                # before the trial's end is noted: a worker that has room and is about to go must be given nothing
                if (spoiled or self.flags.asked) and not self.closed:
                    self._close()
                else:
                    self._note(self.progress)
                gc.collect()  # a trainer and its model refer to each other
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        if not self.trials:
            self._joint = None  # the next trial may want another model: one at a time is in memory
            return
        waiting = list(self.trials.values())
        joint = self._joint_model(waiting)
        if self.room is None and waiting[0].wants_forward and waiting[0].trains and waiting[0].forward is not None:
            # a trial that goes through the model by itself would only wait for others
            self.room = 1 if joint is None else best_trials_per_pass(joint, waiting[0].forward)
            self.folder.note_room(self.room)
        run_passes(joint, waiting)

    def _run(self, trial: TrialFolder, attempt: int, experiment: Experiment) -> Steps[bool]:
        """One attempt; returns whether the worker should end after it."""
        try:
            if trial.read_status().of_attempt(attempt).state in OVER:
                return False  # a scheduler that started this worker again does not know that the trial has ended
            with logged_to(trial.log):
                try:
                    shared = _CountedCache(self.kept, self.count)
                    state = yield from trial_steps(trial, attempt, shared, self.flags)
                except Superseded as error:
                    print(f"ended: {error}", flush=True)
                    return True
        except Exception as error:  # its folder cannot be read or written
            _note_failure(trial, attempt, error)
            return True
        # bitsandbytes never gives the paged state of large parameters back
        paged = resolve_optimizer(experiment.orpo.optimizer).startswith("paged")
        return (paged and experiment.adapter.kind in ("linear", "mlp")) or state not in (*OVER, TrialState.STOPPED)

    def _close(self) -> None:
        """Take no further task; those that were given and have not begun go back as they came."""
        self.closed, self._next_up = True, None
        while True:
            number = self._next()
            task = self.folder.task(number)
            if task is None:
                self.folder.claim(Task(None), room=None)  # in vain where a trial comes at this moment: that goes back too
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
        """The model that several trials' passes go through; None where each runs by itself."""
        bases = [trial.forward.strategy.base for trial in trials if trial.forward is not None and trial.joinable]
        base = bases[0] if bases else None
        if base is None:
            return None
        if self._joint is None or self._joint.base is not base or self._joint.site != self._site:
            self._joint = MultiTrialModel(base, self._site)
        return self._joint


def _note_failure(trial: TrialFolder, attempt: int, error: Exception) -> None:
    """Say in a trial's status, as far as that can be written, that its folder is of no use."""
    traceback.print_exception(error)
    with suppress(Exception):  # then it has died without a word
        message = f"its folder could not be used: {type(error).__name__}: {error}"
        StatusWriter(trial, attempt).write(TrialState.FAILED, message=message[:2000])


def pass_key(experiment: Experiment) -> str | None:
    """Equal for experiments that can go through the model together; None for one that goes alone."""
    if not experiment.launcher.lean_logits or experiment.orpo.gradient_checkpointing:
        return None
    return activations_key(experiment)


class _CountedCache(ProcessCache):
    """What a trial has in common with others, with how many its worker has run before."""

    def __init__(self, kept: WorkerCache, served: int) -> None:
        self.kept, self.served = kept, served

    def get(self, what: str, key: str, make: Callable[[], T]) -> T:
        return self.kept.get(what, key, make)


class WorkerCache(ProcessCache):
    """Keeps the last model, its pairs and its stored activations for the next trial that asks for the same."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Any]] = {}

    def get(self, what: str, key: str, make: Callable[[], T]) -> T:
        if self._kept.get(what, ("", None))[0] != key:
            self._kept.pop(what, None)  # one at a time is in memory
            self._kept[what] = (key, make())
        found: T = self._kept[what][1]
        return found


class _Both:
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
    """While the block runs, what Python prints also goes to ``path``: the worker's own log holds many trials."""
    before = sys.stdout, sys.stderr
    with path.open("a", encoding="utf-8", buffering=1) as file:
        sys.stdout, sys.stderr = _Both(sys.stdout, file), _Both(sys.stderr, file)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            os.fsync(file.fileno())
