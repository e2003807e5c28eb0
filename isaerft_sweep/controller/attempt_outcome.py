"""What an attempt's end means, once its job is gone: the status file decides, the launcher only adds reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.scheduling.sweep_state import AttemptOutcome


def classify_exit(
    record: TrialRecord, status: TrialStatus, dispatcher: Dispatcher[Any], asked_to_stop: bool
) -> AttemptOutcome:
    """The outcome of the trial's current attempt. ``status``: the worker's last message in it, empty when there is none."""
    return replace(_classify(record, status, dispatcher, asked_to_stop), checkpoint=status.checkpoint)


def _classify(record: TrialRecord, status: TrialStatus, dispatcher: Dispatcher[Any], asked_to_stop: bool) -> AttemptOutcome:
    state, message, seconds = status.state, status.message, status.duration_s
    if state in (TrialState.COMPLETED, TrialState.PRUNED):
        return AttemptOutcome(state, status.metric, message, seconds)
    if state in FINAL:
        return AttemptOutcome(state, None, message, seconds)
    if asked_to_stop:
        return AttemptOutcome(TrialState.STOPPED, None, message or "ended before it could write a checkpoint", seconds)
    if state is TrialState.FAILED:
        return AttemptOutcome(state, None, message, seconds, can_retry=not status.user_error, counted=True)
    return classify_interrupted(record, status, dispatcher)


def classify_interrupted(record: TrialRecord, status: TrialStatus, dispatcher: Dispatcher[Any]) -> AttemptOutcome:
    """An attempt that something else has ended: in order, with a checkpoint, or by force.

    It counts as a failure unless the site had reasons of its own and the trial has got further than before: in jobs that
    are too short, for example, it would otherwise be tried for ever.
    """
    assert record.job is not None
    job_exit, seconds = dispatcher.job_exit(record.job), status.duration_s
    in_order = status.state is TrialState.STOPPED
    if in_order and not status.begun:  # its worker ended for another trial's sake
        return AttemptOutcome(TrialState.STOPPED, None, status.message)
    further = status.checkpoint > record.checkpoint
    if in_order and job_exit.cause != "person" and further:
        return AttemptOutcome(TrialState.STOPPED, None, status.message, seconds)
    reason = f" ({job_exit.words})" if job_exit.words else ""
    if job_exit.cause == "site" and further:
        message = f"its job was ended by the site{reason}; it resumes from a checkpoint"
        return AttemptOutcome(TrialState.STOPPED, None, message, seconds)
    if in_order:
        what = "it was stopped from outside" if job_exit.cause == "person" else "it was stopped before it got any further"
    else:
        what = "its process ended without a word"
        reason = reason or " (killed, out of memory, or the node was lost)"
    last = dispatcher.log_tail(record.job)
    lines = f"; its last lines:\n{last}" if last else ""
    return AttemptOutcome(TrialState.FAILED, None, f"{what}{reason}{lines}", seconds, counted=True)
