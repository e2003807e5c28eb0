"""Where a trial runs, what it does there, and where it writes that down: in words for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isaerft_sweep.dispatch.base import JobRef
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import FINAL, RUNNING, SweepFolder
from isaerft_sweep.results.leaderboard import short_path
from isaerft_sweep.results.reading import SILENT_S


def process_reference(job: JobRef | None) -> JobRef:
    """The reference of the process or SLURM job itself, not of the worker in it."""
    job = job or {}
    inner: JobRef = job.get("job", job)
    return inner


def job_words(job: JobRef | None) -> str:
    """``job 4711_2`` or ``process 4711``; empty where nobody knows."""
    own = process_reference(job)
    if "id" in own:
        return f"job {own['id']}"
    return f"process {own['pid']}" if "pid" in own else ""


def log_path(folder: SweepFolder, record: TrialRecord) -> Path:
    """What the trial prints; before it has printed anything, what its job prints."""
    log = folder.trial(record.name).log
    return log if log.exists() else job_log(folder, record) or log


def job_log(folder: SweepFolder, record: TrialRecord) -> Path | None:
    """What the job of the trial's last attempt prints, perhaps for other trials too; None where there was no job."""
    own = process_reference(record.last_job)
    number = own.get("id", own.get("pid"))
    return None if number is None else folder.jobs / f"{number}_0_log.out"


def current_activity(record: TrialRecord, status: Mapping[str, Any]) -> str:
    """The trial's state; while a worker is at it what that does: ``frozen layers 43 %``."""
    if record.given_up:
        return "given up"
    if record.ended:
        return record.state
    state = str(status.get("state", record.state))
    if state != RUNNING:
        if state == "queued":  # a process has begun, and imports; a job may wait for its turn
            return "starting" if "pid" in process_reference(record.job) else "waiting"
        return state
    return str(status.get("phase") or state)


def state_for_count(record: TrialRecord, status: Mapping[str, Any], now: float) -> str:
    """The trial's state for a count: a worker's own word while a job is under way, or an array that nobody sees to."""
    if record.given_up:
        return "given up"
    if record.ended:
        return record.state
    state = str(status.get("state", record.state))
    alone = record.state != "queued" and state == RUNNING
    return "silent" if alone and now - float(status.get("heartbeat", now)) > SILENT_S else state


def has_ended(record: TrialRecord, status: Mapping[str, Any]) -> bool:
    """Whether the trial has ended, as the journal or, where no controller has looked yet, its worker says."""
    return record.ended or status.get("state") in FINAL


def under_way(record: TrialRecord, status: Mapping[str, Any], now: float) -> bool:
    """Whether a job is at the trial, or waits for its turn."""
    return record.state == "queued" or state_for_count(record, status, now) == RUNNING


def given_up_words(records: Iterable[TrialRecord], folder: SweepFolder) -> str:
    """Which trials were given up, and what to do about it."""
    numbers = [str(record.index + 1) for record in records if record.given_up]
    which, them = (f"Trial {numbers[0]} was", "it") if len(numbers) == 1 else (f"Trials {', '.join(numbers)} were", "them")
    sweep = shlex.quote(short_path(folder.path))
    return (
        f"{which} given up. The same command tries {them} again, once the cause is mended; one alone: isaerft-sweep retry "
        f"{sweep} {numbers[0]}; why it failed: isaerft-sweep logs {sweep} {numbers[0]}"
    )
