"""Where a trial runs, what it does there, and where it writes that down: in words for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from isaerft_sweep.journal.job_refs import JobRef, LocalJob
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.results.leaderboard import short_path
from isaerft_sweep.results.reading import SILENT_S


def job_words(job: JobRef | None) -> str:
    """``job 4711_2`` or ``process 4711``; empty where nobody knows."""
    return job.words if job else ""


def is_process(job: JobRef | None) -> bool:
    """Whether the job has begun for certain: a process has, a scheduler's job may wait for its turn."""
    return job is not None and isinstance(job.process, LocalJob)


def log_path(folder: SweepFolder, record: TrialRecord) -> Path:
    """What the trial prints; before it has printed anything, what its job prints."""
    log = folder.trial(record.name).log
    return log if log.exists() else job_log(folder, record) or log


def job_log(folder: SweepFolder, record: TrialRecord) -> Path | None:
    """What the job of the trial's last attempt prints, perhaps for other trials too; None where there was no job."""
    name = record.last_job and record.last_job.log_name
    return folder.jobs / name if name else None


def current_activity(record: TrialRecord, status: TrialStatus) -> str:
    """The trial's state; while a worker is at it what that does: ``frozen layers 43 %``."""
    if record.given_up:
        return "given up"
    if record.ended:
        return record.state
    state = status.state or record.state
    if state is TrialState.QUEUED:  # a process has begun, and imports; a job may wait for its turn
        return "starting" if is_process(record.job) else "waiting"
    return status.phase or state if state is TrialState.RUNNING else state


def state_for_count(record: TrialRecord, status: TrialStatus, now: float) -> str:
    """The trial's state for a count: a worker's own word while a job is under way, or an array that nobody sees to."""
    if record.given_up:
        return "given up"
    if record.ended:
        return record.state
    state = status.state or record.state
    alone = record.state is not TrialState.QUEUED and state is TrialState.RUNNING
    return "silent" if alone and now - status.heartbeat > SILENT_S else state


def has_ended(record: TrialRecord, status: TrialStatus) -> bool:
    """Whether the trial has ended, as the journal or, where no controller has looked yet, its worker says."""
    return record.ended or status.is_final


def under_way(record: TrialRecord, status: TrialStatus, now: float) -> bool:
    """Whether a job is at the trial, or waits for its turn."""
    return record.state is TrialState.QUEUED or state_for_count(record, status, now) == TrialState.RUNNING


def given_up_words(records: Iterable[TrialRecord], folder: SweepFolder) -> str:
    """Which trials were given up, and what to do about it."""
    numbers = [str(record.index + 1) for record in records if record.given_up]
    which, them = (f"Trial {numbers[0]} was", "it") if len(numbers) == 1 else (f"Trials {', '.join(numbers)} were", "them")
    sweep = shlex.quote(short_path(folder.path))
    return (
        f"{which} given up. The same command tries {them} again, once the cause is mended; one alone: isaerft-sweep retry "
        f"{sweep} {numbers[0]}; why it failed: isaerft-sweep logs {sweep} {numbers[0]}"
    )
