"""The interface of what runs trials: local processes, SLURM, or resident workers on top of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import JobRef

Cause = Literal["scheduler", "user", "trial"]
R = TypeVar("R", bound=JobRef)
TRACEBACK = "Traceback (most recent call last)"
CHAINED = ("During handling of the above exception", "The above exception was the direct cause")


class SchedulerUnavailable(LaunchError):
    """The scheduler takes no more jobs now, or does not answer: try the same jobs again later."""


@dataclass(frozen=True)
class JobExit:
    """Why a job ended, according to the scheduler.

    ``cause``: ``scheduler`` when that ended it (preemption, time limit, a lost node), ``user`` when a user cancelled it,
    ``trial`` when neither is known.
    """

    reason: str = ""
    cause: Cause = "trial"


class Dispatcher(ABC, Generic[R]):
    """Starts jobs, checks which are alive, ends them. A trial's outcome comes from its folder, not from here."""

    slots: int
    """How many trials run at a time."""
    threads: int | None
    """How many threads each trial may use; None: as many as its job has."""
    free_worker_slots: int = 0
    """How many more trials the living workers can take, without a new job."""
    idle_workers: int = 0
    """How many living workers run no trial."""

    @abstractmethod
    def submit_all(self, jobs: Sequence[Job]) -> list[R]:
        """Start or queue jobs; returns references to the first ones only when no more of them can be taken now.

        Raises SchedulerUnavailable when none can be taken now, and LaunchError when none ever can.
        """

    def submit(self, job: Job) -> R:
        """Start or queue one job. Raises as ``submit_all``."""
        refs = self.submit_all([job])
        if not refs:
            raise SchedulerUnavailable("no more jobs can be started now.")
        return refs[0]

    @abstractmethod
    def alive(self, refs: Iterable[R]) -> list[bool]:
        """For each job, whether it is queued or running; one query for all."""

    @abstractmethod
    def cancel(self, refs: Sequence[R]) -> None:
        """Ask jobs to checkpoint and end (SIGTERM), take pending ones out of the queue; ignores ended ones."""

    @abstractmethod
    def kill(self, refs: Sequence[R]) -> None:
        """Kill jobs and all their processes; ignores ended ones."""

    @abstractmethod
    def log_tail(self, ref: R, lines: int = 8) -> str:
        """The last lines that the job printed."""

    def job_exit(self, ref: R) -> JobExit:
        """Why a job that is not alive has ended."""
        return JobExit()

    def suspended(self, ref: R) -> bool:
        """Whether a living job is suspended, so that it sends no heartbeats."""
        return False

    def queued(self, ref: R) -> bool:
        """Whether a living job still waits in a queue."""
        return False

    def withdraw(self, refs: Sequence[R]) -> None:
        """Take superseded attempts from workers that have not started yet, and end the workers that have none left."""

    def dismiss_idle(self) -> None:
        """End the idle workers: no trial is left for them."""

    def abandon(self, ref: R) -> None:
        """Stop tracking a job that does not end although it was killed: its slot is free for another one."""

    def close(self) -> None:
        """End what is still running: the sweep has ended."""


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file, of a traceback only the error's own; empty when the file does not exist."""
    try:
        content = path.read_bytes()[-20_000:]
    except OSError:
        return ""
    return "\n".join(_without_frames(content.decode("utf-8", "replace").splitlines())[-lines:])


def _without_frames(lines: list[str]) -> list[str]:
    kept: list[str] = []
    in_traceback = False
    for line in lines:
        in_traceback = line.startswith(TRACEBACK) or (in_traceback and (not line or line.startswith(" ")))
        if not in_traceback and not line.startswith(CHAINED):
            kept.append(line)
    return kept
