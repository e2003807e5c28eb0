"""The interface of a place where trials run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isaerft_sweep.dispatch.job import Job

JobRef = Mapping[str, Any]
"""What finds a job again from another process: plain data, kept in the journal."""


class Dispatcher(ABC):
    """Starts jobs, tells which are alive, ends them. A job's outcome is read from its trial's folder, not from here."""

    slots: int
    """How many trials run at a time."""
    threads: int | None
    """How many threads each trial may use; None: as many as its job has."""

    @abstractmethod
    def submit(self, job: Job) -> JobRef:
        """Start a job, or queue it. Raises LaunchError."""

    @abstractmethod
    def alive(self, refs: Iterable[JobRef]) -> list[bool]:
        """For each job whether it is queued or running, in one query for all."""

    @abstractmethod
    def cancel(self, ref: JobRef) -> None:
        """Signal a job to end in order (SIGTERM); nothing when it has ended."""

    @abstractmethod
    def kill(self, ref: JobRef) -> None:
        """End a job and all its processes at once; nothing when it has ended."""

    @abstractmethod
    def log_tail(self, ref: JobRef, lines: int = 8) -> str:
        """The last lines that the job printed."""

    def close(self) -> None:  # noqa: B027  (most have nothing to do)
        """The sweep has ended: leave nothing running."""


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file; empty when there is none."""
    try:
        content = path.read_bytes()[-20_000:]
    except OSError:
        return ""
    return "\n".join(content.decode("utf-8", "replace").splitlines()[-lines:])
