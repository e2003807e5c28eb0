"""What came of an attempt whose job is gone: the worker's last word decides, the place is asked for reasons alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import COMPLETED, FAILED, FINAL, PRUNED, STOPPED


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended: a state of ``journal.folders``, what was measured and a message for people."""

    state: str
    metric: float | None
    message: str
    seconds: float
    can_retry: bool = True
    counted: bool = False
    """Whether it counts against ``launcher.max_retries``."""


def classify_exit(
    record: TrialRecord, status: Mapping[str, Any], dispatcher: Dispatcher, told_to_stop: bool
) -> AttemptOutcome:
    """The ending of the trial's present attempt. ``status``: the worker's last word in it, empty when it said nothing."""
    state, message = status.get("state"), str(status.get("message", ""))
    seconds = float(status.get("ended", status.get("heartbeat", 0)) - status.get("started", 0)) if status else 0.0
    if state in (COMPLETED, PRUNED):
        return AttemptOutcome(str(state), status.get("metric"), message, seconds, can_retry=False)
    if state in FINAL:
        return AttemptOutcome(str(state), None, message, seconds)
    if told_to_stop:
        return AttemptOutcome(STOPPED, None, message or "ended before it could write a checkpoint", seconds)
    if state == FAILED:
        return AttemptOutcome(FAILED, None, message, seconds, can_retry=not status.get("user_error"), counted=True)
    return classify_interrupted(record, status, dispatcher, seconds)


def classify_interrupted(
    record: TrialRecord, status: Mapping[str, Any], dispatcher: Dispatcher, seconds: float
) -> AttemptOutcome:
    """An attempt that something else has ended: in order, with a checkpoint, or by force.

    It counts as a failure unless the site had reasons of its own and the trial has got further than before: it would
    otherwise go on for ever without an end, in jobs that are too short, say.
    """
    assert record.job is not None
    verdict = dispatcher.job_exit(record.job)
    ordered = status.get("state") == STOPPED
    if ordered and status.get("begun") is False:  # its worker ended for another trial's sake
        return AttemptOutcome(STOPPED, None, str(status.get("message", "")), 0.0)
    further = int(status.get("checkpoint") or 0) > record.checkpoint
    if ordered and verdict.cause != "person" and further:
        return AttemptOutcome(STOPPED, None, str(status.get("message", "")), seconds)
    told = f" ({verdict.words})" if verdict.words else ""
    if verdict.cause == "site" and further:
        return AttemptOutcome(STOPPED, None, f"its job was ended by the site{told}; it goes on from a checkpoint", seconds)
    if ordered:
        what = "it was stopped from outside" if verdict.cause == "person" else "it was stopped before it got any further"
    else:
        what, told = "its process ended without a word", told or " (killed, out of memory, or the node was lost)"
    last = dispatcher.log_tail(record.job)
    lines = f"; its last lines:\n{last}" if last else ""
    return AttemptOutcome(FAILED, None, f"{what}{told}{lines}", seconds, counted=True)
