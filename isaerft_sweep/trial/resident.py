"""A worker that runs one trial after the other: what they have in common is loaded once."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import peft
import torch

from isaerft_sweep.journal.folders import COMPLETED, DIVERGED, PRUNED, STOPPED, Superseded, TrialFolder
from isaerft_sweep.journal.workers import Task, WorkerFolder
from isaerft_sweep.trial.run import Shared, run_trial, stop_requests
from isaerft_sweep.trial.trainer import resolve_optimizer

POLL_S = 0.05
IDLE_S = 60.0
"""A worker that is given nothing for so long ends: its controller has gone."""

OVER = (COMPLETED, DIVERGED, PRUNED)

T = TypeVar("T")


def serve_trials(folder: WorkerFolder, idle_s: float = IDLE_S) -> int:
    """Run the tasks in ``folder`` until the last one; returns how many trials were run.

    Ends after a trial that failed, since an error may have left anything behind, when it is asked to stop, and when nobody
    has given it anything for ``idle_s``.
    """
    shared, count, waited_s = KeptModel(), 0, 0.0
    done, ended = folder.done()
    if ended:  # a scheduler has started a worker again that was over
        return 0
    number = done + 1
    with stop_requests() as stopping:
        while True:
            task = folder.task(number)
            if task is None and (stopping["asked"] or waited_s >= idle_s):
                folder.claim(Task(None))  # or a trial has come at the last moment: then that is next
                task = folder.task(number)
            if task is None:
                time.sleep(POLL_S)
                waited_s += POLL_S
                continue
            if task.trial is None:
                folder.note_done(number, ending=True)
                return count
            ending = _run(TrialFolder(Path(task.trial)), task.attempt, shared, stopping)
            count, waited_s = count + 1, 0.0
            folder.note_done(number, ending or stopping["asked"])
            if ending or stopping["asked"]:
                return count
            number += 1
            gc.collect()  # a trainer and its model refer to each other


def _run(trial: TrialFolder, attempt: int, shared: KeptModel, stopping: dict[str, bool]) -> bool:
    """Run one attempt; whether the worker should end after it."""
    status = trial.read_status()
    if status.get("attempt") == attempt and status.get("state") in OVER:
        return False  # a scheduler that started this worker again does not know that the trial has ended
    with logged_to(trial.log):
        try:
            state = run_trial(trial, attempt, shared, stopping)
        except Superseded as error:
            print(f"ended: {error}", flush=True)
            return True
    orpo, adapter = trial.read_spec().experiment.orpo, trial.read_spec().experiment.adapter
    # bitsandbytes never gives the paged state of large parameters back
    paged = resolve_optimizer(orpo.optimizer).startswith("paged") and adapter.kind in ("linear", "mlp")
    return paged or state not in (*OVER, STOPPED)


class KeptModel(Shared):
    """Keeps the last model, its pairs and its stored activations for the next trial that asks for the same."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Any]] = {}

    def get(self, what: str, key: str, make: Callable[[], T]) -> T:
        if self._kept.get(what, ("", None))[0] != key:
            self._kept.pop(what, None)  # one at a time is in memory
            self._kept[what] = (key, make())
        found: T = self._kept[what][1]
        return found

    def give_back(self, model: peft.PeftModel) -> None:
        """Take the adapter off again, so that the next trial finds the model as it was loaded."""
        base: Any = model.unload()
        base.eval()
        base.gradient_checkpointing_disable()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
        sys.stdout, sys.stderr = _Both(sys.stdout, file), _Both(sys.stderr, file)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            os.fsync(file.fileno())
