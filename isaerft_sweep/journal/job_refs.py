"""References to jobs, by which another process finds them. The journal keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class JobRef:
    """A job that runs trials. ``kind``: names the class in the journal."""

    kind: ClassVar[str] = ""

    @property
    def process(self) -> JobRef:
        """The process or SLURM job itself, not the worker in it."""
        return self

    @property
    def worker(self) -> str | None:
        """The worker that runs the trial; equal for all trials of one worker."""
        return None

    @property
    def log_name(self) -> str | None:
        """The job's log file in the sweep's ``jobs`` folder; None where there is none."""
        return None

    @property
    def label(self) -> str:
        """``job 4711_2`` or ``process 4711``."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """As the journal keeps it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"kind": self.kind, **{name: value for name, value in values.items() if value is not None}}


@dataclass(frozen=True)
class LocalJob(JobRef):
    """A process on this machine. ``start``: its start time in clock ticks since boot, since process ids are reused."""

    pid: int
    start: float | None = None
    device: str | None = None
    """Its GPU."""
    kind: ClassVar[str] = "local"

    @property
    def log_name(self) -> str:
        return f"{self.pid}_0_log.out"

    @property
    def label(self) -> str:
        return f"process {self.pid}"


@dataclass(frozen=True)
class SlurmJob(JobRef):
    """An element of a SLURM array. ``name``: the job name of the sweep's jobs. ``cluster``: None for the default one."""

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
    def label(self) -> str:
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
    def label(self) -> str:
        return self.job.label

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "worker": self.name, "task": self.task, "job": self.job.to_json()}


@dataclass(frozen=True)
class AgentJob(JobRef):
    """A W&B agent that runs the trial, as the server records it."""

    agent: str
    kind: ClassVar[str] = "agent"


def job_from_json(content: Mapping[str, Any]) -> JobRef:
    """A reference from its ``to_json``. Raises KeyError, TypeError or ValueError when ``content`` is not valid."""
    kind = content.get("kind", "agent" if "agent" in content else "")
    if kind == WorkerTask.kind:
        return WorkerTask(content["worker"], content["task"], job_from_json(content["job"]))
    for ref_class in (LocalJob, SlurmJob, AgentJob):
        if kind == ref_class.kind:
            names = {field.name for field in dataclasses.fields(ref_class)}
            return ref_class(**{name: value for name, value in content.items() if name in names})
    raise ValueError(f"unknown kind of job {kind!r}")
