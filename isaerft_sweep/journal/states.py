"""The states of a trial, as in the journal and the status file."""

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
    """Ended on request, with a checkpoint from which it resumes."""
    PRUNED = "pruned"
    """Stopped early by the pruner, with a checkpoint; the pruner may revive it."""


FINAL = frozenset({TrialState.COMPLETED, TrialState.DIVERGED})
"""States that never run again; ``FAILED`` and ``STOPPED`` may."""
EXITED = frozenset({*FINAL, TrialState.PRUNED, TrialState.STOPPED, TrialState.FAILED})
"""States in which the worker is done with the trial."""
