"""Trials as processes on this machine, one per visible GPU by default, through submitit's local executor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from isaerft_sweep.dispatch.base import Dispatcher, tail
from isaerft_sweep.dispatch.job import Job
from isaerft_sweep.dispatch.processes import descendants, is_running, start_time
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import LocalJob
from isaerft_sweep.specs import LauncherSpec

NO_LIMIT_MIN = 60 * 24 * 365


class LocalDispatcher(Dispatcher[LocalJob]):
    """Runs jobs as processes that outlive the controller; the next one finds them by process id and start time."""

    def __init__(self, spec: LauncherSpec, folder: Path) -> None:
        self.folder = folder
        self.devices = visible_gpus()
        self.slots = spec.slots or max(1, len(self.devices)) * spec.trials_per_gpu
        self.threads = spec.threads or max(1, (os.cpu_count() or 1) // self.slots)
        self._timeout_min = spec.timeout_min or NO_LIMIT_MIN
        self._grace_s = int(spec.grace_s)
        self._jobs: dict[int, submitit.Job[Any]] = {}
        self._device_of: dict[int, str] = {}

    def submit_all(self, jobs: Sequence[Job]) -> list[LocalJob]:
        return [self._submit(job) for job in jobs]

    def _submit(self, job: Job) -> LocalJob:
        executor = submitit.LocalExecutor(folder=self.folder)
        device = self._free_device()
        executor.update_parameters(
            timeout_min=self._timeout_min,
            signal_delay_s=self._grace_s,
            stderr_to_stdout=True,
            gpus_per_node=0,  # the job sets CUDA_VISIBLE_DEVICES itself: submitit accepts no UUIDs
        )
        with shielded_from_terminal():
            running = executor.submit(replace(job, device=device))
        pid = int(running.job_id)
        self._jobs[pid] = running
        if device is not None:
            self._device_of[pid] = device
        return LocalJob(pid, start_time(pid), device)

    def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
        return [self._alive(ref) for ref in refs]

    def _alive(self, ref: LocalJob) -> bool:
        job = self._jobs.get(ref.pid)
        if job is not None:
            job.done()  # reaps the process, so that it does not stay a zombie
        running = is_running(ref.pid, ref.start)
        if not running:
            self._jobs.pop(ref.pid, None)
            self._device_of.pop(ref.pid, None)
        elif ref.device is not None:
            self._device_of[ref.pid] = ref.device
        return running

    def cancel(self, refs: Sequence[LocalJob]) -> None:
        for ref in refs:
            # submitit's process passes SIGTERM on to the trial and waits for it
            if is_running(ref.pid, ref.start):
                os.kill(ref.pid, signal.SIGTERM)

    def kill(self, refs: Sequence[LocalJob]) -> None:
        for ref in refs:
            if is_running(ref.pid, ref.start):
                for pid in [*descendants(ref.pid), ref.pid]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def log_tail(self, ref: LocalJob, lines: int = 8) -> str:
        return tail(self.folder / ref.log_name, lines)

    def _free_device(self) -> str | None:
        if not self.devices:
            return None
        used = list(self._device_of.values())
        return min(self.devices, key=used.count)


def visible_gpus() -> list[str]:
    """Numbers or UUIDs of the GPUs this process may use, without loading CUDA: CUDA_VISIBLE_DEVICES, else nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise LaunchError("nvidia-smi does not answer. Name the GPUs yourself: CUDA_VISIBLE_DEVICES=0,1.") from error
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in done.stdout.splitlines()))]


@contextmanager
def shielded_from_terminal() -> Iterator[None]:
    """Shield processes started in this block from the terminal's Ctrl-C: the controller stops them itself.

    Children inherit the blocked signal; one that arrives meanwhile reaches this process after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
