"""W&B's states of runs, sweeps and agents, as they are spelled on the wire and on disk."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    """The state of a run."""

    PENDING = "pending"
    """Assigned to an agent, but not started yet."""
    RUNNING = "running"
    PREEMPTING = "preempting"
    FINISHED = "finished"
    FAILED = "failed"
    CRASHED = "crashed"
    """No sign of life from the run or its agent."""
    KILLED = "killed"
    """Ended because a user, the sweep or the pruner requested it."""
    PREEMPTED = "preempted"


ACTIVE = frozenset({RunState.PENDING, RunState.RUNNING, RunState.PREEMPTING})
"""States of a run that has not ended."""


class SweepRunState(StrEnum):
    """The state of a sweep."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    FINISHED = "FINISHED"
    CANCELED = "CANCELED"


class AgentState(StrEnum):
    """The state of an agent."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    CRASHED = "CRASHED"
