"""The protocol between a controller and a resident worker, which runs one trial after the other, or some together.

Tasks are numbered files. Number n belongs to whoever creates ``task-n.json`` first: the controller with a trial, or the
worker (or a controller that has come back) with the word that it ends. So a task is never given to a worker that has
gone, and never run twice; a worker that was killed leaves its task undone for everybody to see.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isaerft_sweep.journal.atomic_files import read_json, write_json

STOP_AT = "ISAERFT_STOP_AT"
"""The environment variable that tells a worker when it must begin to end, in seconds since the epoch."""


@dataclass(frozen=True)
class Task:
    """One attempt of one trial; ``trial`` is its folder. The last task of a worker has none: the worker ends."""

    trial: str | None
    attempt: int = 0


@dataclass(frozen=True)
class TaskProgress:
    """Which tasks of a worker are over: all up to ``upto``, and ``beyond`` some more. ``ending``: it takes no others."""

    upto: int = 0
    beyond: tuple[int, ...] = ()
    ending: bool = False

    def over(self, number: int) -> bool:
        return number <= self.upto or number in self.beyond

    @property
    def count(self) -> int:
        return self.upto + len(self.beyond)

    def with_over(self, number: int) -> TaskProgress:
        """After one more task."""
        upto, beyond = self.upto, {*self.beyond, number}
        while upto + 1 in beyond:
            upto += 1
            beyond.remove(upto)
        return replace(self, upto=upto, beyond=tuple(sorted(beyond)))


@dataclass(frozen=True)
class WorkerFolder:
    """``workers/<name>``."""

    path: Path

    def claim(self, task: Task, room: int | None = 1) -> int | None:
        """Give the worker a task; its number, or None when it has ``room`` open ones already, ends, or somebody was first.

        Args:
            task: a trial's attempt, or the word to end.
            room: how many tasks may be open at a time, this one included; None: any number.
        """
        progress = self.progress()
        if progress.ending:
            return None
        number = progress.upto + 1
        while (there := self.task(number)) is not None:
            if there.trial is None:
                return None
            number += 1
        if room is not None and number - 1 - progress.count >= room:
            return None
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

    def note(self, progress: TaskProgress) -> None:
        """Say what is over. Called by the worker."""
        write_json(self.path / "done.json", asdict(progress))

    def progress(self) -> TaskProgress:
        """What the worker has said last."""
        found = read_json(self.path / "done.json")
        return TaskProgress(found["upto"], tuple(found["beyond"]), found["ending"]) if found else TaskProgress()

    def note_room(self, room: int) -> None:
        """Say how many trials the worker runs at a time, once it has measured that."""
        write_json(self.path / "room.json", {"room": room})

    def room(self) -> int | None:
        """How many trials the worker runs at a time; None while it has not measured."""
        found = read_json(self.path / "room.json")
        return int(found["room"]) if found else None

    def _task(self, number: int) -> Path:
        return self.path / f"task-{number}.json"
