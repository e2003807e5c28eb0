"""How a sweep is asked to stop: by a signal to its controller, or from anywhere by a file in its folder."""

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
LOOK_S = 0.25
"""How often a controller that waits for its next turn looks whether it is asked to stop."""


@dataclass
class StopRequest:
    """How urgently somebody has asked to stop: not at all, ``IN_ORDER`` or ``AT_ONCE``. ``file``: where others may ask."""

    file: Path
    parent: int | None = None
    """The process whose end is a request too: an agent that has died leaves nothing running."""
    signals: int = 0
    tell: Callable[[StopRequest], None] = lambda _request: None
    """Hears at once of a request and of a more urgent one."""
    _told: int = 0

    @property
    def urgency(self) -> int:
        try:
            asked = AT_ONCE if self.file.read_text(encoding="utf-8").strip() == "now" else IN_ORDER
        except OSError:
            asked = 0
        if self.parent is not None and os.getppid() != self.parent:
            asked = max(asked, IN_ORDER)
        asked = max(self.signals, asked)
        if asked > self._told:
            before, self._told = self._told, asked
            try:
                self.tell(self)
            except RuntimeError:  # a signal has come while the terminal is being written to: the next turn will tell
                self._told = before
        return asked

    def words(self, grace_s: float) -> str:
        """What somebody who has asked should know."""
        if self._told >= AT_ONCE:
            return "ending all trials now"
        return f"stopping, at most {grace_s:g} s" + ("; Ctrl-C again ends it now" if self.signals else "")

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Count Ctrl-C and requests to end while the block runs, instead of raising in the middle of something."""

        def note(_number: int, _frame: Any) -> None:
            self.signals += 1
            _ = self.urgency  # which tells of it

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # one that is ignored stays ignored: that is what nohup means
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heard}
        with suppress(FileNotFoundError):
            if self.file.stat().st_mtime < process_began():
                self.file.unlink()  # meant for an earlier controller
        try:
            yield
        finally:
            self.file.unlink(missing_ok=True)
            for number, handler in before.items():
                signal.signal(number, handler)


def wait(seconds: float, urgency: Callable[[], int]) -> None:
    """Wait for the next turn; a request to stop, or to stop more urgently, is that turn."""
    before, end = urgency(), time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0 and urgency() <= before:
        time.sleep(min(left_s, LOOK_S))


def process_began() -> float:
    """When this process was started, in seconds since the epoch."""
    ticks = start_time(os.getpid()) or 0.0
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def ask_to_stop(file: Path, at_once: bool) -> None:
    """Ask whichever controller looks at ``file``."""
    write_text(file, "now" if at_once else "in order")
