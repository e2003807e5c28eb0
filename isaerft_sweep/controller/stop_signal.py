"""Requests to stop a sweep: a signal to its controller, or a file in its folder from any process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isaerft_sweep.dispatch.processes import start_time
from isaerft_sweep.journal.atomic_files import write_text

IN_ORDER, AT_ONCE = 1, 2
"""Checkpoint first, or kill."""
CHECK_S = 0.25
"""How often a controller checks for a request to stop while it waits for its next poll."""


@dataclass
class StopRequest:
    """The request to stop: none (0), ``IN_ORDER`` or ``AT_ONCE``. ``file``: by which other processes ask."""

    file: Path
    parent: int | None = None
    """The agent's process, whose end also is a request: a dead agent must leave nothing running."""
    signals: int = 0
    notify: Callable[[StopRequest], None] = lambda _request: None
    """Called at once for a request and for a more urgent one."""
    _notified: int = 0

    @property
    def urgency(self) -> int:
        try:
            urgency = AT_ONCE if self.file.read_text(encoding="utf-8").strip() == "now" else IN_ORDER
        except OSError:
            urgency = 0
        if self.parent is not None and os.getppid() != self.parent:
            urgency = max(urgency, IN_ORDER)
        urgency = max(self.signals, urgency)
        if urgency > self._notified:
            before, self._notified = self._notified, urgency
            try:
                self.notify(self)
            except RuntimeError:  # a signal came during a write to the terminal: the next poll notifies
                self._notified = before
        return urgency

    def message(self, grace_s: float) -> str:
        """What happens now, for the user who has asked."""
        if self._notified >= AT_ONCE:
            return "ending all trials now"
        return f"stopping, at most {grace_s:g} s" + ("; Ctrl-C again ends it now" if self.signals else "")

    @contextmanager
    def signals_counted(self) -> Iterator[None]:
        """Count Ctrl-C, SIGTERM and SIGHUP during the block instead of raising or ending."""

        def count(_number: int, _frame: Any) -> None:
            self.signals += 1
            _ = self.urgency  # notifies

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # ignored ones stay ignored, as with nohup
        handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, count) for number in handled}
        with suppress(FileNotFoundError):
            if self.file.stat().st_mtime < process_began():
                self.file.unlink()  # a request to an earlier controller
        try:
            yield
        finally:
            self.file.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)


def wait(seconds: float, urgency: Callable[[], int]) -> None:
    """Wait; return early for a request to stop, or for a more urgent one."""
    before, end = urgency(), time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0 and urgency() <= before:
        time.sleep(min(left_s, CHECK_S))


def process_began() -> float:
    """When this process started, in seconds since the epoch."""
    ticks = start_time(os.getpid()) or 0.0
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def ask_to_stop(file: Path, at_once: bool) -> None:
    """Ask the controller that checks ``file`` to stop."""
    write_text(file, "now" if at_once else "in order")
