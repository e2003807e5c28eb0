"""The protocol between a controller and a resident worker, which runs one trial after the other.

Tasks are numbered files. Number n belongs to whoever creates ``task-n.json`` first: the controller with a trial, or the
worker (or a controller that has come back) with the word that it ends. So a task is never given to a worker that has
gone, and never run twice; a worker that was killed leaves its task undone for everybody to see.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.journal.files import read_json, write_json

STOP_AT = "ISAERFT_STOP_AT"
"""The environment variable that tells a worker when it must begin to end, in seconds since the epoch."""


@dataclass(frozen=True)
class Task:
    """One attempt of one trial; ``trial`` is its folder. The last task of a worker has none: the worker ends."""

    trial: str | None
    attempt: int = 0


@dataclass(frozen=True)
class WorkerFolder:
    """``workers/<name>``."""

    path: Path

    def claim(self, task: Task) -> int | None:
        """Make ``task`` the worker's next one; its number, or None when somebody else was first: the worker is not free."""
        done, ending = self.done()
        if ending:
            return None
        number = done + 1
        self.path.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=self.path, prefix=".task.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"trial": task.trial, "attempt": task.attempt}, file)
            os.link(aside, self._task(number))  # fails when it is there, on network file systems too
            return number
        except FileExistsError:
            return None
        finally:
            Path(aside).unlink()

    def task(self, number: int) -> Task | None:
        """A task; None while nobody has claimed its number."""
        found = read_json(self._task(number))
        return Task(**found) if found else None

    def note_done(self, number: int, ending: bool) -> None:
        """Say that a task is over, and whether the worker ends with it. Called by the worker."""
        write_json(self.path / "done.json", {"number": number, "ending": ending})

    def done(self) -> tuple[int, bool]:
        """The number of the last task that is over, 0 before the first, and whether the worker takes no more."""
        found = read_json(self.path / "done.json") or {"number": 0, "ending": False}
        return int(found["number"]), bool(found["ending"])

    def _task(self, number: int) -> Path:
        return self.path / f"task-{number}.json"
