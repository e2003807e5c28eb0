"""The picklable jobs that a dispatcher starts, and the set-up of their processes."""

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
from isaerft_sweep.guard import UNEXPECTED, WRONG, ignore_pefts_old_name, unexpected
from isaerft_sweep.journal.worker_queue import STOP_AT
from isaerft_sweep.terminal import speak_any_encoding


def prepare_process(threads: int | None, device: str | None, limit_s: float | None = None) -> None:
    """Apply settings that must precede the import of torch. ``limit_s``: when to begin to end, seconds after the start."""
    speak_any_encoding()
    if limit_s is not None:
        os.environ[STOP_AT] = str(started() + limit_s)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        # a signal during the import of torch: the trial notices it as soon as it has its own handler
        signal.signal(number, lambda *_: os.environ.update({STOP_AT: "0"}))
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if threads:
        # several trials share the machine's cores: oversubscribed threads slow each other down tenfold
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ignore_pefts_old_name()


@contextmanager
def ending_clearly(folder: Path) -> Iterator[None]:
    """Turn any error into one line, the last of the log, and an exit; the trace of an unexpected one goes to ``folder``."""
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
    """Exclude what this block imports from garbage collection.

    torch and transformers create a million objects that never become garbage. Scanning them costs a second during the
    import, and a third of a second in each of the two collections per trial that transformers and accelerate request.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def started() -> float:
    """When the job started, in seconds since the epoch: SLURM's value, else the process's start."""
    import psutil

    job_start = os.environ.get("SLURM_JOB_START_TIME", "")
    return float(job_start) if job_start.isdecimal() else min(psutil.Process().create_time(), time.time())


@dataclass(frozen=True)
class TrialJob:
    """A picklable call that runs one attempt of one trial.

    torch and transformers are imported inside ``__call__``: the controller, which pickles this, never loads them.
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
    """A picklable call of a worker that runs the tasks in ``folder``, ``trials_per_pass`` at a time."""

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
    """The preflight's check, for a separate process; see ``trial/prepare.py``."""
    speak_any_encoding()
    with importing():
        from isaerft_sweep.trial.prepare import main

    return main()


Job = TrialJob | WorkerJob
