"""How a worker is asked to end: by a signal, by wandb, by its job's clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from isaerft_sweep.journal.folders import PRUNED, STOPPED
from isaerft_sweep.journal.workers import STOP_AT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def stop_requests() -> Iterator[dict[str, bool]]:
    """While the block runs, a signal to end only sets ``asked``: the step is finished and a checkpoint written first.

    So does a clock when the job's time is nearly over: a scheduler's own signal comes up to a minute early, which is all of
    a short job, and a C extension (NCCL) may swallow it.
    """
    asked = {"asked": False}
    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        # a controller shields its workers from the terminal that way, but wandb interrupts with SIGINT: out of the
        # terminal's reach it can be let through again; one of the terminal's that waits is dropped
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with suppress(PermissionError):
            os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def time_is_over() -> None:
        print("the job's time limit is near: checkpoint, then stop", flush=True)
        asked["asked"] = True

    clock = threading.Timer(max(0.0, float(os.environ.get(STOP_AT, "inf")) - time.time()), time_is_over)
    clock.daemon = True
    if STOP_AT in os.environ:
        clock.start()

    def note(number: int, _frame: Any) -> None:
        print(f"received {signal.Signals(number).name}: checkpoint, then stop", flush=True)
        asked["asked"] = True
        asked["by_signal"] = asked.get("by_signal", False) or number != signal.SIGINT

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        clock.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_state(stopping: dict[str, bool], by_wandb: bool) -> str | None:
    """The state in which the trial shall end; None when nobody has asked for it.

    wandb interrupts its process when the run is to be stopped for good, in W&B's page or by its early termination. No other
    SIGINT comes here: the terminal's is the controller's.
    """
    if not stopping["asked"]:
        return None
    return STOPPED if stopping.get("by_signal") or not by_wandb else PRUNED
