"""Observes a sweep from another process than its controller, by its journal and its workers' status files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from isaerft_sweep.controller.controller_info import controller_alive, last_controller_info
from isaerft_sweep.controller.live_view import LiveView
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.journal import JournalReader, SweepRecord, TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus

POLL_S = 1.0


class SweepMonitor:
    """A sweep's record; ``update`` reads only the new lines of the journal."""

    def __init__(self, path: Path) -> None:
        """Read the journal. Raises FolderError when ``path`` is no sweep's folder."""
        self.folder = SweepFolder(path.expanduser().absolute())
        if not self.folder.journal.is_file():
            raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, but there is none.")
        self._journal = JournalReader(self.folder)
        self.update()

    @property
    def record(self) -> SweepRecord:
        return self._journal.record

    @property
    def records(self) -> list[TrialRecord]:
        return list(self.record.trials.values())

    @property
    def trials(self) -> int:
        """The number of trials of the sweep, those not created yet included."""
        controller = last_controller_info(self.folder)
        return max(controller.trials if controller else 0, len(self.record.trials))

    def update(self) -> list[TrialRecord]:
        """Read the new lines; the trials that they are about, apart from new ones."""
        return [trial for event, trial in self._journal.update() if trial is not None and event != "trial"]

    def statuses(self) -> dict[int, TrialStatus]:
        """The latest status of each worker whose trial is under way, or runs or ran in a static array."""
        statuses: dict[int, TrialStatus] = {}
        in_array = self.folder.static_array.exists()
        for record in self.records:
            if record.state is TrialState.QUEUED:
                statuses[record.index] = self.folder.trial(record.name).read_status().of_attempt(record.attempt)
            elif in_array and not record.attempt and (status := self.folder.trial(record.name).read_status()):
                statuses[record.index] = status
        return statuses


def follow(console: Console, path: Path, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Show a sweep until its controller has ended; False when no controller runs it. ``sleep``: for tests."""
    monitor = SweepMonitor(path)
    if not controller_alive(monitor.folder):
        return False
    with LiveView(console, monitor.record.metric, monitor.trials, monitor.folder) as view:
        while True:
            running = controller_alive(monitor.folder)
            for record in monitor.update():
                view.event(record)
            view.update(monitor.records, monitor.statuses())
            if not running:
                return True
            sleep(POLL_S)
