"""Workers and trials as SLURM job arrays, through submitit's SLURM executor.

One squeue returns the state of all of the sweep's jobs, by a job name that no other sweep has. It also finds stray jobs,
whose controller died right after sbatch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit

from isaerft_sweep.dispatch.base import Cause, Dispatcher, JobExit, SchedulerUnavailable, tail
from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.dispatch.slurm.cluster import (
    COMPLETING_S,
    PLACE,
    REST,
    SETTING,
    SLURM_TERMINAL,
    accounting_states,
    cancel_jobs,
    cluster_of,
    job_states,
    read_cluster,
    state_of,
)
from isaerft_sweep.dispatch.slurm.sbatch_flags import sbatch_parameters, working_s
from isaerft_sweep.dispatch.snapshot import code_snapshot
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import SlurmJob
from isaerft_sweep.specs import LauncherSpec

SCHEDULER_CAUSED = {"TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LAUNCH_FAILED", "COMPLETING"}
"""States in which the site, not a person or the trial, ended the job."""
CORES = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
"""Since 22.05 srun ignores sbatch's number of cores: without this a step would be bound to one."""
QUEUE_FULL_ERRORS = ("SubmitJob",)
"""sbatch's messages when the account's or qos's limit of queued jobs is reached. There may be room for fewer."""
CONTROLLER_DOWN_ERRORS = (
    "Unable to contact", "timed out", "Connection refused", "Zero Bytes", "communication connection", "not responding",
    "temporarily un", "too many jobs",
)  # fmt: skip
"""sbatch's messages when slurmctld does not answer or the cluster's queue is full (sbatch itself has waited by then)."""
NOT_IN_PATHS = re.compile(r"%[jtaA]|[\\\\\n\r]")
UNSUBMITTED = re.compile(r"[0-9a-f]{32}\.pkl")
"""submitit's file name for a job that has no id yet."""


class SlurmDispatcher(Dispatcher[SlurmJob]):
    """Submits all jobs of one poll as one array; jobs outlive the controller, and the next one tracks them by their id."""

    def __init__(self, spec: LauncherSpec, folder: Path) -> None:
        """Read the cluster and check the flags against it. Raises LaunchError that lists the valid values."""
        check_folder(folder)
        self.folder = folder
        self.slots = spec.slots or 1
        self.threads = spec.threads
        self.cluster = cluster_of(spec)
        site = read_cluster(self.cluster)
        self.name = job_name(folder)
        parameters = sbatch_parameters(spec, site, self.name)
        if self.cluster is not None:
            parameters["additional_parameters"]["clusters"] = self.cluster
        self.name = parameters["job_name"]
        code = code_snapshot(folder.parent / "code")
        path = f"export PYTHONPATH={shlex.quote(str(code.absolute()))}${{PYTHONPATH:+:$PYTHONPATH}}"
        # SLURM sets it since 23.02; a job's time limit also covers its setup lines (module load, conda activate)
        export_start = "export SLURM_JOB_START_TIME=${SLURM_JOB_START_TIME:-$(date +%s)}"
        parameters["setup"] = [export_start, CORES, *parameters.get("setup", []), path]
        self._limit_s = working_s(parameters["time"], spec.grace_s)
        self._parallelism = int(parameters.pop("array_parallelism", self.slots))
        self._array_size = site.array_size
        self._queues: dict[str | None, _Queue] = {self.cluster: _Queue(self.cluster, {self.name})}
        try:
            self.executor = _Executor(folder=folder, python=spec.slurm.get("python"))
            self.executor.update_parameters(**parameters)
        except RuntimeError as error:
            raise LaunchError(f"launcher=slurm needs srun on this machine: {error}. Or use launcher=local.") from error
        except (ValueError, TypeError) as error:
            raise LaunchError(f"launcher.slurm has a parameter that submitit does not know: {error}") from error

    def submit_all(self, jobs: Sequence[Job]) -> list[SlurmJob]:
        ids: list[str] = []
        size, arrays = self._array_size, -(-len(jobs) // self._array_size)
        while len(ids) < len(jobs):
            part = jobs[len(ids) : len(ids) + size]
            try:
                ids += self._submit_array(part, max(1, self._parallelism // arrays))
            except LaunchError:
                if self._queue_is_full and len(part) > 1:
                    size = len(part) // 2  # there may be room for fewer
                elif ids:
                    break  # the submitted ones are in the queue whatever happened to the others
                else:
                    raise
        return [SlurmJob(job_id, self.name, self.cluster) for job_id in ids]

    def _submit_array(self, jobs: Sequence[Job], parallelism: int) -> list[str]:
        self._queue_is_full = False
        try:
            self.executor.update_parameters(array_parallelism=parallelism)
            with outside_of_any_job(), self.executor.batch():
                submitted = [self.executor.submit(replace(job, limit_s=self._limit_s)) for job in jobs]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            self._remove_unsubmitted()
            message = " ".join(str(error).split())
            self._queue_is_full = any(text in message for text in QUEUE_FULL_ERRORS)
            if self._queue_is_full or any(text in message for text in CONTROLLER_DOWN_ERRORS):
                raise SchedulerUnavailable(f"sbatch takes no job now: {message}") from error
            raise LaunchError(f"sbatch refused the job: {message}") from error
        except OSError as error:
            raise LaunchError(f"{self.folder} cannot be written: {error.strerror}. Make room or repair the disk.") from error
        ids = [job.job_id for job in submitted]
        self._queues[self.cluster].known.update(ids)
        return ids

    def _remove_unsubmitted(self) -> None:
        """Remove submitit's files of jobs that sbatch did not take."""
        for path in (*self.folder.glob("*.pkl"), *self.folder.glob(".submission_file_*.sh")):
            if UNSUBMITTED.fullmatch(path.name) or (path.suffix == ".sh" and not path.is_symlink()):
                path.unlink(missing_ok=True)

    def alive(self, refs: Iterable[SlurmJob]) -> list[bool]:
        refs = list(refs)
        for ref in refs:
            queue = self._queue(ref)
            queue.known.add(ref.id)
            if ref.name:
                queue.names.add(ref.name)  # of a controller that used another path of the folder
        answered = {
            cluster: queue.refresh({ref.id for ref in refs if ref.cluster == cluster})
            for cluster, queue in self._queues.items()
        }
        # while the scheduler does not answer, every job counts as alive
        return [not answered[ref.cluster] or self._queue(ref).is_alive(ref.id) for ref in refs]

    def _queue(self, ref: SlurmJob) -> _Queue:
        cluster = ref.cluster
        return self._queues.setdefault(cluster, _Queue(cluster, {ref.name or self.name}))

    def job_exit(self, ref: SlurmJob) -> JobExit:
        state, details = self._queue(ref).current_state(ref.id)
        if not state or state == "COMPLETED":
            return JobExit()
        cause: Cause = "scheduler" if state in SCHEDULER_CAUSED else "user" if state == "CANCELLED" else "trial"
        return JobExit(f"SLURM: {state}" + (f" ({details})" if details else ""), cause)

    def cancel(self, refs: Sequence[SlurmJob]) -> None:
        for queue, ids in self._arrays(refs):
            # signals only the steps: SIGTERM would kill the batch script, and with it the trial before its checkpoint
            cancel_jobs("--state=PENDING", *ids, cluster=queue.cluster)
            cancel_jobs("--signal=TERM", "--state=RUNNING", *ids, cluster=queue.cluster)

    def kill(self, refs: Sequence[SlurmJob]) -> None:
        for queue, ids in self._arrays(refs):
            cancel_jobs(*ids, cluster=queue.cluster)

    def _arrays(self, refs: Sequence[SlurmJob]) -> list[tuple[_Queue, list[str]]]:
        """The jobs' ids by cluster, whole arrays under one id."""
        ids_by_cluster: dict[str | None, list[str]] = {}
        for ref in refs:
            ids_by_cluster.setdefault(self._queue(ref).cluster, []).append(ref.id)
        return [(self._queues[cluster], self._queues[cluster].arrays(ids)) for cluster, ids in ids_by_cluster.items()]

    def log_tail(self, ref: SlurmJob, lines: int = 8) -> str:
        return tail(self.folder / ref.log_name, lines)

    def suspended(self, ref: SlurmJob) -> bool:
        return self._queue(ref).current_state(ref.id)[0] == "SUSPENDED"

    def queued(self, ref: SlurmJob) -> bool:
        return self._queue(ref).current_state(ref.id)[0] == "PENDING"

    def close(self) -> None:
        """Cancel stray jobs; the controller has ended those that it knows."""
        self.alive([])


@dataclass
class _Queue:
    """The states of this sweep's jobs on one cluster, where they have the job ``names``."""

    cluster: str | None
    names: set[str]
    known: set[str] = field(default_factory=set)
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    accounted: dict[str, tuple[str, str]] = field(default_factory=dict)
    """States from accounting, of jobs that squeue no longer lists."""
    completing: dict[str, float] = field(default_factory=dict)
    """When a job was first seen COMPLETING (``time.monotonic``)."""

    def refresh(self, jobs: set[str]) -> bool:
        """Read the states of all jobs in one query; whether the scheduler answered."""
        try:
            self.states = job_states(self.names, cluster=self.cluster)
        except LaunchError:
            return False
        # of a controller that died between sbatch and its journal entry: new attempts run their trials
        orphans = [job for job, (state, _) in self.states.items() if state not in SLURM_TERMINAL and job not in self.known]
        if orphans := [job for job in orphans if not job.endswith(REST)]:
            cancel_jobs(*orphans, cluster=self.cluster)
        self.completing = {
            job: self.completing.get(job, time.monotonic()) for job in jobs if state_of(self.states, job)[0] == "COMPLETING"
        }
        ended = {job for job, (state, _) in self.accounted.items() if state in SLURM_TERMINAL}
        self._read_accounting(sorted(job for job in jobs - ended if not state_of(self.states, job)[0] or self._stuck(job)))
        return True

    def _read_accounting(self, jobs: list[str]) -> None:
        """Read from accounting the jobs that squeue no longer lists; does nothing where the cluster has no accounting."""
        if jobs:
            with suppress(LaunchError):
                self.accounted |= accounting_states(jobs, cluster=self.cluster)

    def current_state(self, job: str) -> tuple[str, str]:
        """State, and reason or node: squeue's, else accounting's; empty when neither lists the job."""
        queued, accounted = state_of(self.states, job), state_of(self.accounted, job)
        return accounted if not queued[0] or (self._stuck(job) and accounted[0] in SLURM_TERMINAL) else queued

    def is_alive(self, job: str) -> bool:
        """Whether the job is queued or running, as far as is known."""
        return self.current_state(job)[0] not in {"", *SLURM_TERMINAL} and not self._stuck(job)

    def _stuck(self, job: str) -> bool:
        """Whether the job takes too long to end: its processes got the signal, but a node or an epilog hangs."""
        return job in self.completing and time.monotonic() - self.completing[job] > COMPLETING_S

    def arrays(self, jobs: Iterable[str]) -> list[str]:
        """The jobs' ids; where they are all living jobs of an array, the array's id, so that it takes one request."""
        ids = dict.fromkeys(jobs)
        others_alive = {
            job
            for job in self.known | set(self.states)
            if job not in ids and state_of(self.states, job)[0] not in SLURM_TERMINAL
        }
        shared = {job.split("_")[0] for job in others_alive}
        return list(dict.fromkeys(job if (array := job.split("_")[0]) in shared else array for job in ids))


class _Executor(submitit.SlurmExecutor):
    """submitit's executor, also for folders with ``%``, which starts a pattern in SLURM's output file names."""

    folder: Path

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        folder, stand_in = self.folder, Path("/.output")
        self.folder = stand_in
        try:
            text: str = super()._make_submission_file_text(command, uid)
        finally:
            self.folder = folder
        begin = str(folder.absolute()).replace("%", "%%")
        return re.sub(rf"{re.escape(str(stand_in))}/(\S+)", lambda name: shlex.quote(f"{begin}/{name[1]}"), text)


def check_folder(folder: Path) -> None:
    """Raise LaunchError for a path with characters that SLURM or submitit interprets."""
    if match := NOT_IN_PATHS.search(str(folder.absolute())):
        raise LaunchError(
            f"with launcher=slurm the output folder's path must not contain {match[0]!r}, which stands for something "
            f"else in the names of a job's files, but got {str(folder.absolute().parent)!r}. Choose another: output=PATH."
        )


def job_name(folder: Path) -> str:
    """A name for all jobs of the sweep whose ``jobs`` folder this is, and of no other sweep."""
    sweep = folder.absolute().parent
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", sweep.name)
    return f"{readable}-{hashlib.sha256(str(sweep).encode()).hexdigest()[:8]}"


@contextmanager
def outside_of_any_job() -> Iterator[None]:
    """Hide the variables of the job that this process may itself run in: the new job would inherit them.

    submitit's own helper also hides the variables that the commands may need to find their cluster.
    """
    location = {name: os.environ[name] for name in PLACE if name in os.environ}
    settings = [name for name in os.environ if name.startswith(SETTING)]
    with submitit.helpers.clean_env(extra_names=("CUDA_VISIBLE_DEVICES", *settings)):
        os.environ.update(location)
        yield
