"""Writes a trial's status, as long as the worker's attempt is the current one."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from typing import Any

from isaerft_sweep.errors import IsaerftError
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus, write_status_file


class Superseded(IsaerftError):
    """A newer attempt of the same trial has begun: the worker must end without writing."""


class StatusWriter:
    """Writes the status file of one attempt."""

    def __init__(self, folder: TrialFolder, attempt: int, min_interval_s: float = 1.0) -> None:
        self.folder, self.attempt, self.min_interval_s = folder, attempt, min_interval_s
        self._last_s = 0.0
        self._status = TrialStatus(attempt=attempt, host=socket.gethostname(), pid=os.getpid(), started=time.time())

    def check(self) -> None:
        """Raise Superseded when a newer attempt has begun."""
        current = self.folder.current_attempt()
        if current != self.attempt:
            raise Superseded(f"attempt {self.attempt} of {self.folder.path.name} was replaced by attempt {current}.")

    def write(self, state: TrialState, *, force: bool = True, **changes: Any) -> None:
        """Replace the status. Without ``force`` at most every ``min_interval_s`` seconds.

        ``changes``: fields of ``TrialStatus``; the other fields keep their earlier values.
        """
        self._status = dataclasses.replace(self._status, **changes)
        now = time.time()
        if not force and now - self._last_s < self.min_interval_s:
            return
        self.check()
        write_status_file(self.folder.status, dataclasses.replace(self._status, state=state, heartbeat=now))
        self._last_s = now
