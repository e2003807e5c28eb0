"""References to jobs: what finds a job again from another process. The journal keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class JobRef:
    """A job that runs trials; ``launcher`` is the ``launcher=`` that started it."""

    kind: ClassVar[str] = ""

    @property
    def process(self) -> JobRef:
        """The process or SLURM job itself, not the worker in it."""
        return self

    @property
    def worker(self) -> str | None:
        """Which worker runs the trial; equal for all trials of one worker."""
        return None

    @property
    def log_name(self) -> str | None:
        """The file in the sweep's ``jobs`` folder that the job prints into; None where there is none."""
        return None

    @property
    def words(self) -> str:
        """For people: ``job 4711_2`` or ``process 4711``."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """As the journal keeps it."""
        known = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {"kind": self.kind, **{name: value for name, value in known.items() if value is not None}}


@dataclass(frozen=True)
class LocalJob(JobRef):
    """A process on this machine. ``start``: its start time in clock ticks since boot, since numbers are used again."""

    pid: int
    start: float | None = None
    device: str | None = None
    """The GPU that it was given."""
    kind: ClassVar[str] = "local"

    @property
    def log_name(self) -> str:
        return f"{self.pid}_0_log.out"

    @property
    def words(self) -> str:
        return f"process {self.pid}"


@dataclass(frozen=True)
class SlurmJob(JobRef):
    """An element of a SLURM array. ``name``: the job name of the sweep's jobs. ``cluster``: where it is not the default."""

    id: str
    name: str | None = None
    cluster: str | None = None
    kind: ClassVar[str] = "slurm"

    @property
    def worker(self) -> str:
        return self.id

    @property
    def log_name(self) -> str:
        return f"{self.id}_0_log.out"

    @property
    def words(self) -> str:
        return f"job {self.id}"


@dataclass(frozen=True)
class WorkerTask(JobRef):
    """Task number ``task`` of the resident worker with the folder name ``name``, which runs as ``job``."""

    name: str
    task: int
    job: JobRef
    kind: ClassVar[str] = "resident"

    @property
    def process(self) -> JobRef:
        return self.job

    @property
    def worker(self) -> str:
        return self.name

    @property
    def log_name(self) -> str | None:
        return self.job.log_name

    @property
    def words(self) -> str:
        return self.job.words

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "worker": self.name, "task": self.task, "job": self.job.to_json()}


@dataclass(frozen=True)
class AgentJob(JobRef):
    """A W&B agent that runs the trial; on the server."""

    agent: str
    kind: ClassVar[str] = "agent"


def job_from_json(content: Mapping[str, Any]) -> JobRef:
    """The reference that the journal keeps. Raises KeyError, TypeError or ValueError when it is none."""
    kind = content.get("kind", "agent" if "agent" in content else "")
    if kind == WorkerTask.kind:
        return WorkerTask(content["worker"], content["task"], job_from_json(content["job"]))
    for known in (LocalJob, SlurmJob, AgentJob):
        if kind == known.kind:
            names = {one.name for one in dataclasses.fields(known)}
            return known(**{name: value for name, value in content.items() if name in names})
    raise ValueError(f"unknown kind of job {kind!r}")
