"""Workers and trials as SLURM job arrays, through submitit's SLURM executor.

The scheduler is asked one thing, what state the sweep's jobs are in, with one squeue for all of them, found by a job name
that no other sweep has. That also finds jobs which nobody remembers, since their controller died right after sbatch.
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
from isaerft_sweep.dispatch.cluster import (
    ANSWER_S,
    PLACE,
    REST,
    SACCT,
    SETTING,
    SLURM_TERMINAL,
    SQUEUE,
    cluster_of,
    commands_environment,
    parse_accounting,
    parse_queue,
    read_cluster,
    run_slurm_command,
    state_of,
    to_cluster,
)  # fmt: skip
from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.dispatch.sbatch_flags import sbatch_parameters, working_s
from isaerft_sweep.dispatch.snapshot import code_snapshot
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import SlurmJob
from isaerft_sweep.specs import LauncherSpec

SITES_DOING = {"TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LAUNCH_FAILED", "COMPLETING"}
CORES = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
"""From 22.05 on srun does not take over how many cores sbatch was asked for: a step would be bound to one."""
COMPLETING_S = 90.0
"""How long a job may take to end once its processes have been told to: SLURM itself kills them after half a minute."""
QUEUE_FULL_ERRORS = ("SubmitJob",)
"""In sbatch's words: as many jobs as the user's account or qos allows are in the queue. There may be room for fewer."""
CONTROLLER_DOWN_ERRORS = (
    "Unable to contact", "timed out", "Connection refused", "Zero Bytes", "communication connection", "not responding",
    "temporarily un", "too many jobs",
)  # fmt: skip
"""In sbatch's words: slurmctld does not answer, or the whole cluster's queue is full (sbatch itself has waited by then)."""

NOT_IN_PATHS = re.compile(r"%[jtaA]|[\\\\\n\r]")
REFUSED = re.compile(r"[0-9a-f]{32}\.pkl")
"""submitit's name for a job that has no number yet."""


class SlurmDispatcher(Dispatcher[SlurmJob]):
    """Job arrays, each of all jobs submitted in one turn; jobs outlive the controller and are found again by their id."""

    def __init__(self, spec: LauncherSpec, folder: Path) -> None:
        """Read the cluster and check what is asked of it. Raises LaunchError with what is valid."""
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
        # SLURM tells it from 23.02 on; a job's time runs while its setup lines do (module load, conda activate)
        began = "export SLURM_JOB_START_TIME=${SLURM_JOB_START_TIME:-$(date +%s)}"
        parameters["setup"] = [began, CORES, *parameters.get("setup", []), path]
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
                    break  # those are in the queue, whatever became of the others
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
            self._forget_refused()
            words = " ".join(str(error).split())
            self._queue_is_full = any(word in words for word in QUEUE_FULL_ERRORS)
            if self._queue_is_full or any(word in words for word in CONTROLLER_DOWN_ERRORS):
                raise SchedulerUnavailable(f"sbatch takes no job now: {words}") from error
            raise LaunchError(f"sbatch refused the job: {words}") from error
        except OSError as error:
            raise LaunchError(f"{self.folder} cannot be written: {error.strerror}. Make room or mend the disk.") from error
        ids = [job.job_id for job in submitted]
        self._queues[self.cluster].known.update(ids)
        return ids

    def _forget_refused(self) -> None:
        """Remove what submitit has written for jobs that sbatch did not take."""
        for path in (*self.folder.glob("*.pkl"), *self.folder.glob(".submission_file_*.sh")):
            if REFUSED.fullmatch(path.name) or (path.suffix == ".sh" and not path.is_symlink()):
                path.unlink(missing_ok=True)

    def alive(self, refs: Iterable[SlurmJob]) -> list[bool]:
        asked = list(refs)
        for ref in asked:
            queue = self._queue(ref)
            queue.known.add(ref.id)
            if ref.name:
                queue.names.add(ref.name)  # of a controller that saw the folder elsewhere
        answers = {
            cluster: queue.ask({ref.id for ref in asked if ref.cluster == cluster})
            for cluster, queue in self._queues.items()
        }
        # a scheduler that does not answer: nothing is known, so nothing has ended
        return [not answers[ref.cluster] or self._queue(ref).lives(ref.id) for ref in asked]

    def _queue(self, ref: SlurmJob) -> _Queue:
        cluster = ref.cluster
        return self._queues.setdefault(cluster, _Queue(cluster, {ref.name or self.name}))

    def job_exit(self, ref: SlurmJob) -> JobExit:
        state, more = self._queue(ref).said_of(ref.id)
        if not state or state == "COMPLETED":
            return JobExit()
        cause: Cause = "site" if state in SITES_DOING else "person" if state == "CANCELLED" else "trial"
        return JobExit(f"SLURM: {state}" + (f" ({more})" if more else ""), cause)

    def cancel(self, refs: Sequence[SlurmJob]) -> None:
        for queue, ids in self._arrays(refs):
            # to the steps alone: the batch script would die of it and take the trial along before its checkpoint
            scancel("--state=PENDING", *ids, cluster=queue.cluster)
            scancel("--signal=TERM", "--state=RUNNING", *ids, cluster=queue.cluster)

    def kill(self, refs: Sequence[SlurmJob]) -> None:
        for queue, ids in self._arrays(refs):
            scancel(*ids, cluster=queue.cluster)

    def _arrays(self, refs: Sequence[SlurmJob]) -> list[tuple[_Queue, list[str]]]:
        """The jobs' ids by cluster, as few as say it."""
        found: dict[str | None, list[str]] = {}
        for ref in refs:
            found.setdefault(self._queue(ref).cluster, []).append(ref.id)
        return [(self._queues[cluster], self._queues[cluster].arrays(ids)) for cluster, ids in found.items()]

    def log_tail(self, ref: SlurmJob, lines: int = 8) -> str:
        return tail(self.folder / ref.log_name, lines)

    def suspended(self, ref: SlurmJob) -> bool:
        return self._queue(ref).said_of(ref.id)[0] == "SUSPENDED"

    def queued(self, ref: SlurmJob) -> bool:
        return self._queue(ref).said_of(ref.id)[0] == "PENDING"

    def close(self) -> None:
        """Take out of the queue what nobody remembers; jobs that are known are told to end by their owner."""
        self.alive([])


@dataclass
class _Queue:
    """What one cluster says of this sweep's jobs, which have these ``names`` there."""

    cluster: str | None
    names: set[str]
    known: set[str] = field(default_factory=set)
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    remembered: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By accounting, of jobs that squeue does not tell of."""
    completing: dict[str, float] = field(default_factory=dict)
    """Since when a job has been seen to end (``time.monotonic``)."""

    def ask(self, jobs: set[str]) -> bool:
        """Take note of the states of all, in one query; whether the scheduler has answered."""
        who = ("--user", str(os.getuid()), "--name", ",".join(sorted(self.names)), f"--format={SQUEUE}")
        try:
            self.states = parse_queue(
                run_slurm_command("squeue", "--noheader", "--array", "--states=all", *who, cluster=self.cluster)
            )
        except LaunchError:
            return False
        # of a controller that died between sbatch and its journal: their trials are begun anew
        strays = [job for job, (state, _) in self.states.items() if state not in SLURM_TERMINAL and job not in self.known]
        if strays := [job for job in strays if not job.endswith(REST)]:
            scancel(*strays, cluster=self.cluster)
        self.completing = {
            job: self.completing.get(job, time.monotonic()) for job in jobs if state_of(self.states, job)[0] == "COMPLETING"
        }
        over = {job for job, (state, _) in self.remembered.items() if state in SLURM_TERMINAL}
        self._ask_accounting(sorted(job for job in jobs - over if not state_of(self.states, job)[0] or self._stuck(job)))
        return True

    def _ask_accounting(self, jobs: list[str]) -> None:
        """What accounting knows of jobs that squeue does not tell of, in one query; nothing where there is no accounting."""
        if not jobs:
            return
        try:
            said = run_slurm_command("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", SACCT, cluster=self.cluster)
        except LaunchError:
            return
        self.remembered |= parse_accounting(said)

    def said_of(self, job: str) -> tuple[str, str]:
        """State, with reason and node: squeue's word, else accounting's; empty when neither has one."""
        found = state_of(self.states, job)
        known = state_of(self.remembered, job)
        return known if not found[0] or (self._stuck(job) and known[0] in SLURM_TERMINAL) else found

    def lives(self, job: str) -> bool:
        """Whether the job is queued or running, as far as is known."""
        return self.said_of(job)[0] not in {"", *SLURM_TERMINAL} and not self._stuck(job)

    def _stuck(self, job: str) -> bool:
        """Whether its end takes too long: its processes have been told to end, and a node or an epilog hangs."""
        return job in self.completing and time.monotonic() - self.completing[job] > COMPLETING_S

    def arrays(self, jobs: Iterable[str]) -> list[str]:
        """The jobs' ids, with one id for all of an array that are alive: the scheduler gets one request for an array."""
        ids = dict.fromkeys(jobs)
        others = {
            job
            for job in self.known | set(self.states)
            if job not in ids and state_of(self.states, job)[0] not in SLURM_TERMINAL
        }
        shared = {job.split("_")[0] for job in others}
        return list(dict.fromkeys(job if (array := job.split("_")[0]) in shared else array for job in ids))


class _Executor(submitit.SlurmExecutor):
    """submitit's, for more folders: in the names of output files SLURM takes ``%`` for the beginning of a pattern."""

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
    """Raise LaunchError for a path whose characters SLURM or submitit would take for something else."""
    if found := NOT_IN_PATHS.search(str(folder.absolute())):
        raise LaunchError(
            f"with launcher=slurm the output folder's path must not contain {found[0]!r}, which stands for something "
            f"else in the names of a job's files, but got {str(folder.absolute().parent)!r}. Choose another: output=PATH."
        )


def job_name(folder: Path) -> str:
    """A name for all jobs of the sweep whose ``jobs`` folder this is, and of no other sweep."""
    place = folder.absolute().parent
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", place.name)
    return f"{readable}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def scancel(*args: str, cluster: str | None = None) -> None:
    """One scancel for all; a scheduler that does not answer is asked again at the next poll."""
    command = ["scancel", *to_cluster(cluster), *args]
    with suppress(subprocess.TimeoutExpired, OSError):
        subprocess.run(command, capture_output=True, timeout=ANSWER_S, check=False, env=commands_environment())


@contextmanager
def outside_of_any_job() -> Iterator[None]:
    """Hide the settings of the job that this process may itself run in: they would become the new job's.

    submitit's own helper also hides the variables without which the commands may not find their cluster.
    """
    places = {name: os.environ[name] for name in PLACE if name in os.environ}
    settings = [name for name in os.environ if name.startswith(SETTING)]
    with submitit.helpers.clean_env(extra_names=("CUDA_VISIBLE_DEVICES", *settings)):
        os.environ.update(places)
        yield
