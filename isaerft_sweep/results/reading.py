"""Reads a sweep from its folder alone, while it runs or after; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.folders import SweepFolder
from isaerft_sweep.journal.journal import SweepRecord, replay
from isaerft_sweep.results.leaderboard import Entry, rank
from isaerft_sweep.search.sweep_file import Metric


@dataclass(frozen=True)
class ReadSweep:
    """A sweep's trials, ranked by its own metric."""

    folder: SweepFolder
    metric: Metric
    entries: list[Entry]

    def best(self) -> Entry:
        """The winner. Raises FolderError when no trial has completed yet."""
        found = next((entry for entry in self.entries if entry.rank == 1), None)
        if found is None:
            raise FolderError(f"the sweep in {self.folder.path} has no completed trial yet. Run its command again to go on.")
        return found


def read_sweep_folder(path: Path) -> ReadSweep:
    """The sweep in ``path``. Raises FolderError when there is none."""
    folder = SweepFolder(path.expanduser().absolute())
    if not folder.journal.is_file():
        raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, but there is none.")
    record = SweepRecord()
    replay(folder.journal, record)
    metric = Metric(record.metric, record.goal)
    return ReadSweep(folder, metric, rank(record.trials.values(), folder, metric))
