"""The interface of a place where trials run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import JobRef

Cause = Literal["site", "person", "trial"]
R = TypeVar("R", bound=JobRef)


class SchedulerUnavailable(LaunchError):
    """The scheduler takes no more jobs now, or does not answer: the same jobs may be welcome later."""


@dataclass(frozen=True)
class JobExit:
    """What the place says about the end of a job.

    ``cause``: ``site`` when the place ended it for reasons of its own (preemption, time limit, a lost node), ``person`` when
    somebody cancelled it, ``trial`` when nothing speaks for either.
    """

    words: str = ""
    cause: Cause = "trial"


class Dispatcher(ABC, Generic[R]):
    """Starts jobs, tells which are alive, ends them. A job's outcome is read from its trial's folder, not from here."""

    slots: int
    """How many trials run at a time."""
    threads: int | None
    """How many threads each trial may use; None: as many as its job has."""
    waiting_workers: int = 0
    """How many trials can be given to somebody who waits for one, without a new job."""
    idle_workers: int = 0
    """How many of those who wait have nothing to do."""

    @abstractmethod
    def submit_all(self, jobs: Sequence[Job]) -> list[R]:
        """Start or queue jobs; fewer references than jobs, of the first ones, when the place takes no more of them now.

        Raises SchedulerUnavailable when it takes none now, and LaunchError when it never will.
        """

    def submit(self, job: Job) -> R:
        """Start or queue one job. Raises as ``submit_all``."""
        refs = self.submit_all([job])
        if not refs:
            raise SchedulerUnavailable("no more jobs can be started now.")
        return refs[0]

    @abstractmethod
    def alive(self, refs: Iterable[R]) -> list[bool]:
        """For each job whether it is queued or running, in one query for all."""

    @abstractmethod
    def cancel(self, refs: Sequence[R]) -> None:
        """Ask jobs to end in order (SIGTERM; those in a queue are taken out of it); nothing for those that have ended."""

    @abstractmethod
    def kill(self, refs: Sequence[R]) -> None:
        """End jobs and all their processes at once; nothing for those that have ended."""

    @abstractmethod
    def log_tail(self, ref: R, lines: int = 8) -> str:
        """The last lines that the job printed."""

    def job_exit(self, ref: R) -> JobExit:
        """What the place knows about the end of a job that is not alive."""
        return JobExit()

    def suspended(self, ref: R) -> bool:
        """Whether the place holds a living job still, so that it cannot say anything."""
        return False

    def queued(self, ref: R) -> bool:
        """Whether the place has not started a living job yet."""
        return False

    def withdraw(self, refs: Sequence[R]) -> None:
        """Take trials that have a newer attempt from workers that are not started yet, and end those left without one."""

    def dismiss_idle(self) -> None:
        """End the workers that wait: there is nothing more to give them."""

    def abandon(self, ref: R) -> None:
        """Give up a job that does not end, though it was killed: its slot is free for another one."""

    def close(self) -> None:
        """The sweep has ended: leave nothing running."""


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file; empty when there is none."""
    try:
        content = path.read_bytes()[-20_000:]
    except OSError:
        return ""
    return "\n".join(content.decode("utf-8", "replace").splitlines()[-lines:])
