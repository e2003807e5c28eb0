"""The protocol between a controller and a resident worker, which runs one trial after the other.

The controller writes ``task.json``, the worker ``done.json``; each replaces its own file in one step. Tasks are numbered, so
a task is never run twice, and a worker that was killed leaves its task undone for everybody to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isaerft_sweep.journal.files import read_json, write_json


@dataclass(frozen=True)
class Task:
    """One attempt of one trial; ``trial`` is its folder. The last task of a worker has none: it shall end."""

    number: int
    trial: str | None
    attempt: int = 0


@dataclass(frozen=True)
class WorkerFolder:
    """``workers/<name>``."""

    path: Path

    @property
    def _task(self) -> Path:
        return self.path / "task.json"

    @property
    def _done(self) -> Path:
        return self.path / "done.json"

    def assign(self, trial: str | None, attempt: int = 0) -> int:
        """Give the worker its next task; returns the task's number. Called by the controller, when the last one is done."""
        before = self.task()
        number = (before.number if before else 0) + 1
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self._task, {"number": number, "trial": trial, "attempt": attempt})
        return number

    def task(self) -> Task | None:
        """The latest task; None before the first."""
        found: dict[str, Any] | None = read_json(self._task)
        return Task(**found) if found else None

    def note_done(self, number: int, ending: bool) -> None:
        """Say that a task is over, and whether the worker ends with it. Called by the worker."""
        write_json(self._done, {"number": number, "ending": ending})

    def done(self) -> tuple[int, bool]:
        """The number of the last task that is over, 0 before the first, and whether the worker takes no more."""
        found = read_json(self._done) or {"number": 0, "ending": False}
        return int(found["number"]), bool(found["ending"])
