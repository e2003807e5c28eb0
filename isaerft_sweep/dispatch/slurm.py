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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import submitit

from isaerft_sweep.dispatch.base import Dispatcher, JobRef, QueueBusy, Verdict, tail
from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.dispatch.slurm_flags import sbatch_parameters, working_s
from isaerft_sweep.dispatch.slurm_site import ANSWER_S, ask, read_site
from isaerft_sweep.dispatch.snapshot import code_snapshot
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.specs import LauncherSpec

OVER = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED",
    "REVOKED", "LAUNCH_FAILED",
}  # fmt: skip
SITES_DOING = {"TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LAUNCH_FAILED"}
CORES = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
"""From 22.05 on srun does not take over how many cores sbatch was asked for: a step would be bound to one."""
FULL = ("SubmitJob",)
"""In sbatch's words: as many jobs as the user's account or qos allows are in the queue. There may be room for fewer."""
AWAY = (
    "Unable to contact", "timed out", "Connection refused", "Zero Bytes", "communication connection", "not responding",
    "temporarily un", "too many jobs",
)  # fmt: skip
"""In sbatch's words: slurmctld does not answer, or the whole cluster's queue is full (sbatch itself has waited by then)."""

REFUSED = re.compile(r"[0-9a-f]{32}\.pkl")
"""submitit's name for a job that has no number yet."""


class SlurmDispatcher(Dispatcher):
    """Job arrays, each of all jobs submitted in one turn; jobs outlive the controller and are found again by their id."""

    def __init__(self, spec: LauncherSpec, folder: Path) -> None:
        """Read the cluster and check what is asked of it. Raises LaunchError with what is valid."""
        self.folder = folder
        self.slots = spec.slots or 1
        self.threads = spec.threads
        site = read_site()
        self.name = job_name(folder)
        parameters = sbatch_parameters(spec, site, self.name)
        self.name = parameters["job_name"]
        code = code_snapshot(folder.parent / "code")
        path = f"export PYTHONPATH={shlex.quote(str(code.absolute()))}${{PYTHONPATH:+:$PYTHONPATH}}"
        # SLURM tells it from 23.02 on; a job's time runs while its setup lines do (module load, conda activate)
        began = "export SLURM_JOB_START_TIME=${SLURM_JOB_START_TIME:-$(date +%s)}"
        parameters["setup"] = [began, CORES, *parameters.get("setup", []), path]
        self._limit_s = working_s(parameters["time"], spec.grace_s)
        self._parallelism = int(parameters.pop("array_parallelism", self.slots))
        self._array_size = site.array_size
        self._states: dict[str, tuple[str, str]] = {}
        self._remembered: dict[str, tuple[str, str]] = {}
        self._known: set[str] = set()
        self._names = {self.name}
        try:
            self.executor = submitit.SlurmExecutor(folder=folder, python=spec.slurm.get("python"))
            self.executor.update_parameters(**parameters)
        except RuntimeError as error:
            raise LaunchError(f"launcher=slurm needs srun on this machine: {error}. Or use launcher=local.") from error
        except (ValueError, TypeError) as error:
            raise LaunchError(f"launcher.slurm has a parameter that submitit does not know: {error}") from error

    def submit_all(self, jobs: Sequence[Job]) -> list[JobRef]:
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
        return [{"kind": "slurm", "id": job_id, "name": self.name} for job_id in ids]

    def _submit_array(self, jobs: Sequence[Job], parallelism: int) -> list[str]:
        self._queue_is_full = False
        try:
            self.executor.update_parameters(array_parallelism=parallelism)
            with outside_of_any_job(), self.executor.batch():
                submitted = [self.executor.submit(replace(job, limit_s=self._limit_s)) for job in jobs]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            self._forget_refused()
            words = str(error).strip()
            self._queue_is_full = any(word in words for word in FULL)
            if self._queue_is_full or any(word in words for word in AWAY):
                raise QueueBusy(f"sbatch takes no job now: {words}") from error
            raise LaunchError(f"sbatch refused the job: {words}") from error
        except OSError as error:
            raise LaunchError(f"{self.folder} cannot be written: {error.strerror}. Make room or mend the disk.") from error
        ids = [job.job_id for job in submitted]
        self._known.update(ids)
        return ids

    def _forget_refused(self) -> None:
        """Remove what submitit has written for jobs that sbatch did not take."""
        for path in (*self.folder.glob("*.pkl"), *self.folder.glob(".submission_file_*.sh")):
            if REFUSED.fullmatch(path.name) or (path.suffix == ".sh" and not path.is_symlink()):
                path.unlink(missing_ok=True)

    def alive(self, refs: Iterable[JobRef]) -> list[bool]:
        asked = list(refs)
        ids = [ref["id"] for ref in asked]
        self._names.update(ref["name"] for ref in asked if "name" in ref)  # of a controller that saw the folder elsewhere
        self._known.update(ids)
        try:
            self._states = self._read_states()
        except LaunchError:
            return [True] * len(ids)  # the scheduler does not answer: nothing is known, so nothing has ended
        if strays := [job for job, (state, _) in self._states.items() if state not in OVER and job not in self._known]:
            scancel(*strays)  # of a controller that died between sbatch and its journal: their trials are begun anew
        self._ask_accounting([job for job in ids if job not in self._states and job not in self._remembered])
        return [self._states.get(job, ("", ""))[0] not in {"", *OVER} for job in ids]

    def _read_states(self) -> dict[str, tuple[str, str]]:
        """State, with reason and node, of every job of this sweep that the scheduler remembers."""
        who = ("--user", str(os.getuid()), "--name", ",".join(sorted(self._names)))
        lines = ask("squeue", "--noheader", "--array", "--states=all", *who, "--format=%i|%T|%r|%N").splitlines()
        rows = [line.split("|") for line in lines if line.count("|") == 3]
        return {row[0].strip(): (row[1], ", ".join(part for part in row[2:] if part not in ("", "None"))) for row in rows}

    def verdict(self, ref: JobRef) -> Verdict:
        state, more = self._states.get(ref["id"]) or self._remembered.get(ref["id"], ("", ""))
        if not state or state == "COMPLETED":
            return Verdict()
        cause = "site" if state in SITES_DOING else "person" if state == "CANCELLED" else "trial"
        return Verdict(f"SLURM: {state}" + (f" ({more})" if more else ""), cause)

    def _ask_accounting(self, jobs: list[str]) -> None:
        """What accounting knows of jobs that squeue has forgotten, in one query; nothing where there is no accounting."""
        if not jobs:
            return
        try:
            lines = ask("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "JobID,State,NodeList").splitlines()
        except LaunchError:
            return
        for job, state, node in (line.split("|") for line in lines if line.count("|") == 2):
            self._remembered[job] = (state.split() or [""])[0], node

    def cancel(self, refs: Sequence[JobRef]) -> None:
        ids = self._arrays(refs)
        # to the steps alone: the batch script would die of it and take the trial along before its checkpoint
        scancel("--state=PENDING", *ids)
        scancel("--signal=TERM", "--state=RUNNING", *ids)

    def kill(self, refs: Sequence[JobRef]) -> None:
        scancel(*self._arrays(refs))

    def _arrays(self, refs: Sequence[JobRef]) -> list[str]:
        """The jobs' ids, with one id for all of an array that are alive: the scheduler gets one request for an array."""
        ids = dict.fromkeys(ref["id"] for ref in refs)
        told = self._known | set(self._states)
        others = {job for job in told if job not in ids and self._states.get(job, ("", ""))[0] not in OVER}
        shared = {job.split("_")[0] for job in others}
        return list(dict.fromkeys(job if (array := job.split("_")[0]) in shared else array for job in ids))

    def log_tail(self, ref: JobRef, lines: int = 8) -> str:
        return tail(self.folder / f"{ref['id']}_0_log.out", lines)

    def suspended(self, ref: JobRef) -> bool:
        return self._states.get(ref["id"], ("", ""))[0] == "SUSPENDED"

    def close(self) -> None:
        """Take out of the queue what nobody remembers; jobs that are known are told to end by their owner."""
        self.alive([])


def job_name(folder: Path) -> str:
    """A name for all jobs of the sweep whose ``jobs`` folder this is, and of no other sweep."""
    place = folder.absolute().parent
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", place.name)
    return f"{readable}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def scancel(*args: str) -> None:
    """One scancel for all; a scheduler that does not answer is asked again at the next poll."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", *args], capture_output=True, timeout=ANSWER_S, check=False)


@contextmanager
def outside_of_any_job() -> Iterator[None]:
    """Hide the settings of the job that this process may itself run in: they would become the new job's.

    submitit's own helper also hides SLURM_CONF, without which the commands may not find their cluster.
    """
    place = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env(extra_names=("CUDA_VISIBLE_DEVICES",)):
        if place is not None:
            os.environ["SLURM_CONF"] = place
        yield
