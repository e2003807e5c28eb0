"""What runs on the other side of a dispatch."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.guard import UNEXPECTED, WRONG, unexpected
from isaerft_sweep.journal.worker_queue import STOP_AT
from isaerft_sweep.terminal import speak_any_encoding


def prepare_process(threads: int | None, device: str | None, limit_s: float | None = None) -> None:
    """Settings that must come before torch is imported."""
    speak_any_encoding()
    if limit_s is not None:
        os.environ[STOP_AT] = str(started() + limit_s)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        # one that comes while torch is imported: the trial notices it as soon as it listens
        signal.signal(number, lambda *_: os.environ.update({STOP_AT: "0"}))
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if threads:
        # several trials on one machine must share its cores: spinning threads slow each other down tenfold
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def ending_clearly(folder: Path) -> Iterator[None]:
    """An error that nobody has foreseen ends the process with one line, the last of its log; its trace is in ``folder``."""
    try:
        yield
    except IsaerftError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(WRONG) from None
    except Exception as error:
        print(f"error: {unexpected(error, folder)}", file=sys.stderr, flush=True)
        raise SystemExit(UNEXPECTED) from None


@contextmanager
def importing() -> Iterator[None]:
    """Import in this block what the process needs for good, and keep the garbage collector off it.

    A million objects come with torch and transformers, and none of them ever becomes garbage. Looking through them
    costs a second while they are imported, and a third of a second twice a trial, as transformers and accelerate ask for.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def started() -> float:
    """When this job's time began to run, in seconds since the epoch: a SLURM job says so, else when the process did."""
    import psutil

    said = os.environ.get("SLURM_JOB_START_TIME", "")
    return float(said) if said.isdecimal() else min(psutil.Process().create_time(), time.time())


@dataclass(frozen=True)
class TrialJob:
    """A picklable call of one attempt of one trial.

    torch and transformers are imported inside ``__call__``: the controller that pickles this never loads them.
    """

    folder: str
    attempt: int
    threads: int | None
    device: str | None = None
    limit_s: float | None = None
    """How many seconds after the job's start the trial must begin to end."""

    def __call__(self) -> str:
        with ending_clearly(Path(self.folder)):
            return self._run()

    def _run(self) -> str:
        prepare_process(self.threads, self.device, self.limit_s)
        with importing():
            from isaerft_sweep.journal.layout import TrialFolder
            from isaerft_sweep.journal.status_writer import Superseded
            from isaerft_sweep.trial.runner import run_trial
            from isaerft_sweep.trial.worker import logged_to

        trial = TrialFolder(Path(self.folder))
        try:
            with logged_to(trial.log):
                return run_trial(trial, self.attempt)
        except Superseded as error:
            print(f"ended: {error}", flush=True)
            return "superseded"


@dataclass(frozen=True)
class WorkerJob:
    """A picklable call of a worker that runs many trials, ``trials_per_pass`` at a time; its tasks come into ``folder``."""

    folder: str
    threads: int | None
    device: str | None = None
    trials_per_pass: int | None = 1
    limit_s: float | None = None
    """How many seconds after the job's start the trial must begin to end."""

    def __call__(self) -> str:
        with ending_clearly(Path(self.folder)):
            return self._run()

    def _run(self) -> str:
        prepare_process(self.threads, self.device, self.limit_s)
        with importing():
            from isaerft_sweep.journal.worker_queue import WorkerFolder
            from isaerft_sweep.trial.worker import serve_trials

        return f"{serve_trials(WorkerFolder(Path(self.folder)), trials_per_pass=self.trials_per_pass)} trials"


def check_needs() -> int:
    """What the check before a sweep runs in a process of its own; see ``trial/prepare.py``."""
    speak_any_encoding()
    with importing():
        from isaerft_sweep.trial.prepare import main

    return main()


Job = TrialJob | WorkerJob
