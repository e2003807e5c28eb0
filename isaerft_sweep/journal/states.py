"""The states of a trial, as journal and status file spell them."""

from __future__ import annotations

from enum import StrEnum


class TrialState(StrEnum):
    """``CREATED`` and ``QUEUED`` are the journal's, ``RUNNING`` is the worker's, the others end an attempt."""

    CREATED = "created"
    QUEUED = "queued"
    """An attempt has been dispatched: its job waits, starts or runs."""
    RUNNING = "running"
    COMPLETED = "completed"
    DIVERGED = "diverged"
    FAILED = "failed"
    STOPPED = "stopped"
    """Asked to end; a checkpoint lets it resume."""
    PRUNED = "pruned"
    """Stopped early by the sweep, with a checkpoint: over, unless the sweep revives it."""


FINAL = frozenset({TrialState.COMPLETED, TrialState.DIVERGED})
"""States that are never run again; ``FAILED`` and ``STOPPED`` are, within bounds."""
EXITED = frozenset({*FINAL, TrialState.PRUNED, TrialState.STOPPED, TrialState.FAILED})
"""States in which the worker has nothing more to do."""
