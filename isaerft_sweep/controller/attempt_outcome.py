"""Classifies how an attempt ended, once its job is gone: by the status file, with the dispatcher's reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.scheduling.sweep_state import AttemptOutcome


def classify_exit(
    record: TrialRecord, status: TrialStatus, dispatcher: Dispatcher[Any], stop_requested: bool
) -> AttemptOutcome:
    """The outcome of the trial's current attempt.

    Args:
        record: the trial's.
        status: the worker's latest in this attempt, empty before the first.
        dispatcher: ran the job.
        stop_requested: whether the controller asked the job to stop.
    """
    return replace(_classify(record, status, dispatcher, stop_requested), checkpoint=status.checkpoint)


def _classify(record: TrialRecord, status: TrialStatus, dispatcher: Dispatcher[Any], stop_requested: bool) -> AttemptOutcome:
    state, message, seconds = status.state, status.message, status.duration_s
    if state in (TrialState.COMPLETED, TrialState.PRUNED):
        return AttemptOutcome(state, status.metric, message, seconds)
    if state in FINAL:
        return AttemptOutcome(state, None, message, seconds)
    if stop_requested:
        return AttemptOutcome(TrialState.STOPPED, None, message or "ended before it could write a checkpoint", seconds)
    if state is TrialState.FAILED:
        return AttemptOutcome(state, None, message, seconds, can_retry=not status.user_error, counted=True)
    return classify_interrupted(record, status, dispatcher)


def classify_interrupted(record: TrialRecord, status: TrialStatus, dispatcher: Dispatcher[Any]) -> AttemptOutcome:
    """The outcome of an attempt that was interrupted from outside, with a checkpoint or killed.

    It counts as a failure unless the site ended it and the trial progressed: in jobs that are too short, for example, it
    would otherwise be retried forever.
    """
    assert record.job is not None
    job_exit, seconds = dispatcher.job_exit(record.job), status.duration_s
    checkpointed = status.state is TrialState.STOPPED
    if checkpointed and not status.begun:  # its worker ended because of another trial
        return AttemptOutcome(TrialState.STOPPED, None, status.message)
    progressed = status.checkpoint > record.checkpoint
    if checkpointed and job_exit.cause != "user" and progressed:
        return AttemptOutcome(TrialState.STOPPED, None, status.message, seconds)
    reason = f" ({job_exit.reason})" if job_exit.reason else ""
    if job_exit.cause == "scheduler" and progressed:
        message = f"its job was ended by the site{reason}; it resumes from a checkpoint"
        return AttemptOutcome(TrialState.STOPPED, None, message, seconds)
    if checkpointed:
        event = "it was stopped from outside" if job_exit.cause == "user" else "it was stopped before it got any further"
    else:
        event = "its process ended"
    log_tail = dispatcher.log_tail(record.job)
    if not checkpointed and not any(line.startswith("error: ") for line in log_tail.splitlines()):
        event, reason = f"{event} without a word", reason or " (killed, out of memory, or the node was lost)"
    lines = f"; its last lines:\n{log_tail}" if log_tail else ""
    return AttemptOutcome(TrialState.FAILED, None, f"{event}{reason}{lines}", seconds, counted=True)
