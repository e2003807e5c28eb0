"""The task queue of a resident worker, which runs trials one after the other or several at a time.

Tasks are numbered files. Number n belongs to the process that creates ``task-n.json`` first: the controller with a trial,
or the worker (or a restarted controller) with a task without a trial, which ends the worker. So no task goes to a worker
that has ended, no task runs twice, and the task of a killed worker stays visibly unfinished.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isaerft_sweep.journal.atomic_files import read_json, write_json

STOP_AT = "ISAERFT_STOP_AT"
"""The environment variable with the time at which a worker must begin to end, in seconds since the epoch."""


@dataclass(frozen=True)
class Task:
    """One attempt of one trial; ``trial`` is its folder. The last task of a worker has no trial: the worker ends."""

    trial: str | None
    attempt: int = 0


@dataclass(frozen=True)
class TaskProgress:
    """The finished tasks of a worker: all up to ``upto``, and those in ``beyond``. ``ending``: it takes no more tasks."""

    upto: int = 0
    beyond: tuple[int, ...] = ()
    ending: bool = False

    def over(self, number: int) -> bool:
        return number <= self.upto or number in self.beyond

    @property
    def count(self) -> int:
        return self.upto + len(self.beyond)

    def with_over(self, number: int) -> TaskProgress:
        """The progress with one more finished task."""
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
        """Add a task; its number, or None when ``room`` tasks are open, the worker ends, or another process was first.

        Args:
            task: a trial's attempt, or the task without a trial that ends the worker.
            room: how many tasks may be open at a time, this one included; None: any number.
        """
        progress = self.progress()
        if progress.ending:
            return None
        number = progress.upto + 1
        while (existing := self.task(number)) is not None:
            if existing.trial is None:
                return None
            number += 1
        if room is not None and number - 1 - progress.count >= room:
            return None
        self.path.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=self.path, prefix=".task.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"trial": task.trial, "attempt": task.attempt}, file)
            os.link(aside, self._task(number))  # fails when it exists, on network file systems too
            return number
        except FileExistsError:
            return None
        finally:
            Path(aside).unlink()

    def task(self, number: int) -> Task | None:
        """A task; None while its number is free."""
        content = read_json(self._task(number))
        return Task(**content) if content else None

    def note(self, progress: TaskProgress) -> None:
        """Write the progress. Called by the worker."""
        write_json(self.path / "done.json", asdict(progress))

    def progress(self) -> TaskProgress:
        """The progress that the worker wrote last."""
        content = read_json(self.path / "done.json")
        return TaskProgress(content["upto"], tuple(content["beyond"]), content["ending"]) if content else TaskProgress()

    def note_room(self, room: int) -> None:
        """Write how many trials the worker runs at a time, once it has measured that."""
        write_json(self.path / "room.json", {"room": room})

    def room(self) -> int | None:
        """How many trials the worker runs at a time; None while it has not measured."""
        content = read_json(self.path / "room.json")
        return int(content["room"]) if content else None

    def _task(self, number: int) -> Path:
        return self.path / f"task-{number}.json"
