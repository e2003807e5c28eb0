"""Workers and trials as SLURM jobs, through submitit's SLURM executor."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import submitit

from isaerft_sweep.dispatch.base import Dispatcher, JobRef, tail
from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.specs import LauncherSpec

SLURM_TIMEOUT_S = 120
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class SlurmDispatcher(Dispatcher):
    """One SLURM job per worker or trial; jobs outlive the controller and are found again by their id."""

    def __init__(self, spec: LauncherSpec, folder: Path) -> None:
        self.folder = folder
        self.slots = spec.slots or 1
        self.threads = spec.threads
        try:
            self.executor = submitit.SlurmExecutor(folder=folder)
            self.executor.update_parameters(
                time=spec.timeout_min,
                signal_delay_s=int(spec.grace_s),
                stderr_to_stdout=True,
                **_slurm_names(dict(spec.slurm)),
            )
        except RuntimeError as error:
            raise LaunchError(f"launcher=slurm needs sbatch on this machine: {error}. Or use launcher=local.") from error
        except (ValueError, TypeError) as error:
            raise LaunchError(f"launcher.slurm has a parameter that submitit does not know: {error}") from error

    def submit(self, job: Job) -> JobRef:
        try:
            with outside_of_any_job():
                return {"kind": "slurm", "id": self.executor.submit(job).job_id}
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            raise LaunchError(f"sbatch refused the job: {error}") from error

    def alive(self, refs: Iterable[JobRef]) -> list[bool]:
        ids = [ref["id"] for ref in refs]
        if not ids:
            return []
        command = ["squeue", "--noheader", "--states=all", "--format=%i %T", f"--jobs={','.join(ids)}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return [True] * len(ids)
        if done.returncode and "Invalid job id" not in done.stderr:
            return [True] * len(ids)  # the controller of the cluster does not answer: nothing is known, so nothing ended
        states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())
        return [states.get(job, "COMPLETED").strip() not in OVER for job in ids]

    def cancel(self, ref: JobRef) -> None:
        # to the steps alone: the batch script would die of it and take the trial along before its checkpoint
        _scancel("--signal=TERM", ref["id"])
        _scancel("--state=PENDING", ref["id"])

    def kill(self, ref: JobRef) -> None:
        _scancel(ref["id"])

    def log_tail(self, ref: JobRef, lines: int = 8) -> str:
        return tail(self.folder / f"{ref['id']}_0_log.out", lines)


def _scancel(*args: str) -> None:
    """One scancel; a scheduler that does not answer is asked again at the next poll."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", *args], capture_output=True, timeout=SLURM_TIMEOUT_S, check=False)


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


def _slurm_names(given: dict[str, object]) -> dict[str, object]:
    """submitit's common names as its SlurmExecutor spells them, without those left to the cluster."""
    given = {name: value for name, value in given.items() if value is not None}
    if "mem_gb" in given:
        given["mem"] = f"{given.pop('mem_gb')}GB"
    return given
