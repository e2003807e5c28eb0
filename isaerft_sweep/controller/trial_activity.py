"""For display: where a trial runs, what it does there, and where its log is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from isaerft_sweep.journal.job_refs import JobRef, LocalJob
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.paths import quoted
from isaerft_sweep.results.leaderboard import short_path
from isaerft_sweep.results.reading import SILENT_S


def job_label(job: JobRef | None) -> str:
    """``job 4711_2`` or ``process 4711``; empty without a job."""
    return job.label if job else ""


def is_process(job: JobRef | None) -> bool:
    """Whether the job is a local process, which has begun; a scheduler's job may still be pending."""
    return job is not None and isinstance(job.process, LocalJob)


def log_path(folder: SweepFolder, record: TrialRecord) -> Path:
    """The trial's log; before it exists, its job's log."""
    log = folder.trial(record.name).log
    return log if log.exists() else job_log(folder, record) or log


def job_log(folder: SweepFolder, record: TrialRecord) -> Path | None:
    """The log of the job of the trial's last attempt, which other trials may share; None where there was no job."""
    name = record.last_job and record.last_job.log_name
    return folder.jobs / name if name else None


def current_activity(record: TrialRecord, status: TrialStatus) -> str:
    """The trial's state; while a worker runs it, the phase: ``frozen layers 43 %``."""
    if record.given_up:
        return "given up"
    if record.ended:
        return record.state
    state = status.state or record.state
    if state is TrialState.QUEUED:  # a process imports; a job may be pending
        return "starting" if is_process(record.job) else "waiting"
    return status.phase or state if state is TrialState.RUNNING else state


def state_for_count(record: TrialRecord, status: TrialStatus, now: float) -> str:
    """The trial's state for a count: the worker's while a job runs it, also a job of an array without a controller."""
    if record.given_up:
        return "given up"
    if record.ended:
        return record.state
    state = status.state or record.state
    unattended = record.state is not TrialState.QUEUED and state is TrialState.RUNNING
    return "silent" if unattended and now - status.heartbeat > SILENT_S else state


def has_ended(record: TrialRecord, status: TrialStatus) -> bool:
    """Whether the trial has ended, according to the journal or to its worker."""
    return record.ended or status.is_final


def under_way(record: TrialRecord, status: TrialStatus, now: float) -> bool:
    """Whether a job runs the trial or is pending for it."""
    return record.state is TrialState.QUEUED or state_for_count(record, status, now) == TrialState.RUNNING


def given_up_note(records: Iterable[TrialRecord], folder: SweepFolder) -> str:
    """Which trials were given up, and how to retry them."""
    numbers = [str(record.index + 1) for record in records if record.given_up]
    single = len(numbers) == 1
    subject, pronoun = (f"Trial {numbers[0]} was", "it") if single else (f"Trials {', '.join(numbers)} were", "them")
    sweep = quoted(short_path(folder.path))
    return (
        f"{subject} given up. The same command tries {pronoun} again, once the cause is fixed; one alone: isaerft-sweep "
        f"retry {sweep} {numbers[0]}; why it failed: isaerft-sweep logs {sweep} {numbers[0]}"
    )
