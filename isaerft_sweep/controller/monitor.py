"""Looking at a sweep from beside its controller: its journal as it grows, and what its workers say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from isaerft_sweep.controller.controller_info import controller_alive, last_controller_info
from isaerft_sweep.controller.live_view import LiveView
from isaerft_sweep.errors import FolderError, JournalError
from isaerft_sweep.journal.journal import SweepRecord, TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus

POLL_S = 1.0


class SweepMonitor:
    """A sweep's record, kept up to date by reading only what the journal has got since."""

    def __init__(self, path: Path) -> None:
        """Read what there is. Raises FolderError when ``path`` is no sweep's folder."""
        self.folder = SweepFolder(path.expanduser().absolute())
        if not self.folder.journal.is_file():
            raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, but there is none.")
        self.record = SweepRecord()
        self._read_bytes = 0
        self.update()

    @property
    def records(self) -> list[TrialRecord]:
        return list(self.record.trials.values())

    @property
    def trials(self) -> int:
        """How many trials the sweep shall have."""
        known = last_controller_info(self.folder)
        return max(known.trials if known else 0, len(self.record.trials))

    def update(self) -> list[TrialRecord]:
        """The trials that something has happened to."""
        with self.folder.journal.open("rb") as file:
            file.seek(self._read_bytes)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a line that is being written is read the next time
        self._read_bytes += len(whole)
        changed = []
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                self.record.apply(event)
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(f"{self.folder.journal} has a broken line ({error}): {line[:80]!r}.") from error
            if "index" in event and event["event"] != "trial":
                changed.append(self.record.trials[event["index"]])
        return changed

    def statuses(self) -> dict[int, TrialStatus]:
        """The last word of each worker whose trial is under way, or was in an array that no controller sees to."""
        statuses: dict[int, TrialStatus] = {}
        made = self.folder.static_array.exists()
        for record in self.records:
            if record.state is TrialState.QUEUED:
                statuses[record.index] = self.folder.trial(record.name).read_status().of_attempt(record.attempt)
            elif made and not record.attempt and (status := self.folder.trial(record.name).read_status()):
                statuses[record.index] = status
        return statuses


def follow(console: Console, path: Path, asleep: Callable[[float], None] = time.sleep) -> bool:
    """Show a sweep that a controller runs until that has ended; False when no controller runs it."""
    seen = SweepMonitor(path)
    if not controller_alive(seen.folder):
        return False
    with LiveView(console, seen.record.metric, seen.trials, seen.folder) as view:
        while True:
            running = controller_alive(seen.folder)
            for record in seen.update():
                view.event(record)
            view.update(seen.records, seen.statuses())
            if not running:
                return True
            asleep(POLL_S)
