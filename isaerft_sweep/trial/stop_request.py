"""How a worker is asked to end: by a signal, by wandb, by its job's clock, by a file; and how soon it hears of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.worker_queue import STOP_AT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOOK_S = 0.2
"""How often a trial that prepares looks whether its clock or a file asks it to stop."""


@dataclass
class StopFlags:
    """Whether a worker's process was requested to stop, by what, and how soon it must end."""

    stop_requested: bool = False
    by_signal: bool = False
    """Whether one of the signals was no interrupt: wandb sends interrupts."""
    at_once: bool = False
    """Whether a request raises StopRequested: nothing that runs now could be kept by a checkpoint."""
    woken: bool = False
    """Whether the next signal only wakes the process."""


class StopRequested(BaseException):
    """The trial must end at once: nothing that it does now could be kept by a checkpoint.

    No ``Exception``, since libraries that load and compute take those for failures of their own, and try again.
    """


@contextmanager
def stop_requests() -> Iterator[StopFlags]:
    """While the block runs, a signal only sets ``stop_requested``, so that the step ends and a checkpoint is written.

    So does a clock when the job's time is nearly over: a scheduler's own signal comes up to a minute early, which is all of
    a short job, and a C extension (NCCL) may swallow it.
    """
    flags = StopFlags()
    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        # a controller shields its workers from the terminal that way, but wandb interrupts with SIGINT: out of the
        # terminal's reach it can be let through again; one of the terminal's that waits is dropped
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with suppress(PermissionError):
            os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def time_is_over() -> None:
        print("the job's time limit is near: checkpoint, then stop", flush=True)
        flags.stop_requested = True

    clock = threading.Timer(max(0.0, float(os.environ.get(STOP_AT, "inf")) - time.time()), time_is_over)
    clock.daemon = True
    if STOP_AT in os.environ:
        clock.start()

    def note(number: int, _frame: Any) -> None:
        if not flags.woken:
            print(f"received {signal.Signals(number).name}: checkpoint, then stop", flush=True)
            flags.stop_requested, flags.by_signal = True, flags.by_signal or number != signal.SIGINT
        flags.woken, at_once_now, flags.at_once = False, flags.at_once, False
        if at_once_now:
            raise StopRequested

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield flags
    finally:
        clock.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def requested_state(flags: StopFlags, by_wandb: bool) -> TrialState | None:
    """The state in which the trial must end; None when nobody has asked for it.

    wandb interrupts its process when the run is to be stopped for good, in W&B's page or by its early termination. No other
    SIGINT comes here: the terminal's is the controller's.
    """
    if not flags.stop_requested:
        return None
    return TrialState.STOPPED if flags.by_signal or not by_wandb else TrialState.PRUNED


@contextmanager
def at_once(flags: StopFlags, folder: TrialFolder) -> Iterator[None]:
    """Inside the block a request to stop raises StopRequested at once, even while the trial waits for a lock.

    For the preparation before the first step, which has no checkpoint. ``flags``: from ``stop_requests``. A file that asks
    for an early stop waits until there is a checkpoint, from which the trial can be revived.
    """

    def is_requested() -> bool:
        return flags.stop_requested or folder.stop_requested() == TrialState.STOPPED

    def look() -> None:
        while not over.wait(LOOK_S):
            if is_requested():
                flags.woken = True
                # a signal, since it also ends a wait inside the kernel; the handler above raises
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    over, watch = threading.Event(), threading.Thread(target=lambda: look(), daemon=True)
    try:
        flags.at_once = True
        if is_requested():
            raise StopRequested
        watch.start()
        yield
    finally:
        flags.at_once = False
        over.set()
        if watch.ident is not None:
            watch.join()  # a signal of its own must not come after the handlers have gone
