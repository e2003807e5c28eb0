"""Decides which trial runs next, what a finished attempt means, what is retried, and when a sweep is over.

One state machine for the controller and the server. It reads no files, clocks or queues. It writes every change to the
journal before the change takes effect: after a restart, replay the journal, call ``restore``, and continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from isaerft_sweep.journal.job_refs import JobRef
from isaerft_sweep.journal.journal import SweepRecord, TrialRecord
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.scheduling.early_stopping import EarlyStopping
from isaerft_sweep.search.sampler import Point, PointSource


class EventLog(Protocol):
    """The journal: ``write`` also applies the event to ``record``."""

    record: SweepRecord

    def write(self, event: str, **fields: Any) -> None: ...


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended. ``metric``: the sweep's, when it completed. ``message``: for display."""

    state: TrialState
    metric: float | None = None
    message: str = ""
    seconds: float = 0.0
    can_retry: bool = True
    """False when another attempt would end the same way, or is not wanted."""
    counted: bool = False
    """Whether it counts against ``SweepLimits.max_retries``."""
    violation: float = 0.0
    """How far the trial's metrics break the sweep's constraints."""
    others: tuple[float, ...] = ()
    """The sweep's other goals, larger is better."""
    checkpoint: int = 0
    """The last step that a checkpoint was written after."""


@dataclass(frozen=True)
class SweepLimits:
    """When a sweep ends. ``reached``: whether a metric has reached the target; None: the sweep has no target.

    ``violation``: how far a trial's metrics break the sweep's constraints; 0 when they meet all. ``others``: its values of
    the goals after the first; None when one is missing.
    """

    trials: float
    """The number of trials of the sweep; infinite without a limit."""
    max_retries: int
    """How often a trial is retried after counted failures before it is given up."""
    max_failures: float = math.inf
    """The sweep ends when this many trials are given up and none has completed."""
    reached: Callable[[float | None], bool] | None = None
    violation: Callable[[Mapping[str, float]], float] = lambda _metrics: 0.0
    others: Callable[[Mapping[str, float]], tuple[float, ...] | None] = lambda _metrics: ()
    enough: Callable[[], str] = lambda: ""
    """Why no further trial is to start although the limit is not reached; empty while they may."""

    def judged(self, outcome: AttemptOutcome, metrics: Mapping[str, float]) -> AttemptOutcome:
        """The outcome of a completed trial with what its metrics say of constraints and of further goals."""
        others = self.others(metrics)
        metric = outcome.metric if others is not None else None  # without one of its goals a trial cannot be compared
        return replace(outcome, metric=metric, violation=self.violation(metrics), others=others or ())


class SweepState:
    """The trials of one sweep, each in one place: ``waiting``, ``starting``, ``active``, or ended.

    Args:
        journal: records every change first.
        sampler: gives new points and learns the outcomes.
        limits: see ``SweepLimits``.
        name_trial: creates a new trial's folder and returns its name and run id.
        early: stops poor trials early and revives good ones; None: every trial runs to its end.
    """

    def __init__(
        self,
        journal: EventLog,
        sampler: PointSource,
        limits: SweepLimits,
        name_trial: Callable[[int, Point], tuple[str, str]],
        early: EarlyStopping | None = None,
    ) -> None:
        self.journal, self.sampler, self.limits, self.early = journal, sampler, limits, early
        self.name_trial = name_trial
        self.records = journal.record.trials
        self.waiting: list[TrialRecord] = []
        self.starting: dict[int, TrialRecord] = {}
        """Returned by ``next_trial``, and neither dispatched nor put back yet."""
        self.active: dict[int, TrialRecord] = {}
        self._exhausted = False
        self._unrecorded: Point | None = None
        """A point of the sampler's that could not be written to the journal yet."""
        self._completed = self._given_up = 0

    def restore(self, *, retry_given_up: bool = True, revive_pruned: bool = False) -> None:
        """Take over the journal's trials; call it once, before anything else.

        ``retry_given_up``: retry trials that were given up, since a user who runs the sweep again has fixed the cause.
        ``revive_pruned``: resume trials that were stopped early.
        """
        for record in sorted(self.records.values(), key=lambda r: r.index):
            self.sampler.restore(record.point)
            if record.given_up and retry_given_up:
                record.grant_retries()
            if record.ended:
                self._settle(record)
                if revive_pruned and record.state is TrialState.PRUNED:
                    self.waiting.append(record)
            elif record.job is not None:
                self.active[record.index] = record
            else:
                self.waiting.append(record)

    # -- what runs next

    def next_trial(self) -> TrialRecord | None:
        """The trial to start now; None when there is none. Then call ``dispatched`` or ``put_back``."""
        if self.nothing_completes:
            return None
        record = self._revived() or (self.waiting.pop(0) if self.waiting else self._new_trial())
        if record is not None:
            self.starting[record.index] = record
        return record

    def put_back(self, records: Sequence[TrialRecord]) -> None:
        """Put back trials that could not be started, or whose jobs did not receive them: they are next, in this order."""
        for record in records:
            self.starting.pop(record.index, None)
            self.active.pop(record.index, None)
        self.waiting[:0] = records

    def dispatched(self, record: TrialRecord, attempt: int, job: JobRef, event: str = "dispatch") -> None:
        """Record that a job has an attempt.

        Args:
            record: the trial's.
            attempt: its number.
            job: which runs it.
            event: the journal's; ``takeover`` after ``unassign``.
        """
        self.journal.write(event, index=record.index, attempt=attempt, job=job.to_json())
        self.starting.pop(record.index, None)
        self.active[record.index] = record

    def adopt(self, record: TrialRecord) -> None:
        """Make a waiting trial active that ran without this controller."""
        self.waiting.remove(record)
        self.active[record.index] = record

    def unassign(self, record: TrialRecord) -> None:
        """Take a trial from a job that has not started it; then call ``dispatched`` with another job."""
        self.journal.write("takeover", index=record.index, attempt=record.attempt, job=None)
        self.starting[record.index] = self.active.pop(record.index)

    def _revived(self) -> TrialRecord | None:
        """A trial that was stopped early and is worth resuming."""
        if self.early is None:
            return None
        taken = {*self.active, *self.starting, *(record.index for record in self.waiting)}
        pruned = [i for i, record in self.records.items() if record.state is TrialState.PRUNED and i not in taken]
        index = self.early.revived(pruned)
        return None if index is None else self.records[index]

    def _new_trial(self) -> TrialRecord | None:
        if self.has_all_trials:
            return None
        point = self._unrecorded = self._unrecorded or self.sampler.ask()
        if point is None:
            self._exhausted = True
            return None
        index = len(self.records)
        name, run_id = self.name_trial(index, point)
        params, unit = dict(point.params), dict(point.unit)
        note = {"note": point.note} if point.note else {}
        self.journal.write("trial", index=index, name=name, run_id=run_id, params=params, unit=unit, **note)
        self._unrecorded = None
        return self.records[index]

    def make_all(self) -> None:
        """Create every trial now, for jobs that run them without a controller."""
        while (record := self._new_trial()) is not None:
            self.waiting.append(record)

    # -- what an attempt's end means

    def finished(self, record: TrialRecord, outcome: AttemptOutcome) -> None:
        """Record an attempt's end. The trial has ended with it, or waits for another attempt."""
        failures = record.failures + outcome.counted
        resumable = outcome.state in (TrialState.FAILED, TrialState.STOPPED)
        over_limit = outcome.counted and failures > self.limits.max_retries
        if self.early and outcome.state is not TrialState.PRUNED:
            self.early.forget(record.index)
        self.journal.write(
            "end",
            index=record.index,
            state=outcome.state,
            metric=outcome.metric,
            message=outcome.message,
            seconds=outcome.seconds,
            given_up=resumable and (over_limit or not outcome.can_retry),
            counted=outcome.counted,
            checkpoint=outcome.checkpoint,
            **({"violation": outcome.violation} if outcome.violation else {}),
            **({"others": outcome.others} if outcome.others else {}),
        )
        self.active.pop(record.index, None)
        self.starting.pop(record.index, None)
        if record.ended:
            self._settle(record)
        else:
            self.waiting.append(record)

    def retry(self, record: TrialRecord) -> None:
        """Retry a trial that was given up, with all its retries."""
        record.grant_retries()
        self._reopen(record)
        self.waiting.append(record)

    def retry_only(self, index: int) -> None:
        """Start no other trial than this one."""
        self.waiting = [record for record in self.waiting if record.index == index]
        self.change_cap(0)

    def resume_attempt(self, record: TrialRecord, job: JobRef) -> None:
        """Continue an attempt that seemed dead and is alive, unless another has begun."""
        was_given_up = record.given_up
        self.dispatched(record, record.attempt, job)
        self.waiting = [other for other in self.waiting if other is not record]
        if was_given_up:
            self._reopen(record)

    def _reopen(self, record: TrialRecord) -> None:
        self._given_up -= 1
        self.sampler.pending_again(record.point)

    def _settle(self, record: TrialRecord) -> None:
        """Count a trial that has ended, and report it to the sampler."""
        if record.state in FINAL:
            self.sampler.tell(record.point, record.metric, record.violation, record.others)
        elif record.state is not TrialState.PRUNED:  # out of memory, a lost node, a user: unrelated to the point
            self.sampler.forget(record.point)
        # a pruned one may be revived: it stays pending, which counts as bad
        self._exhausted = False  # an outcome may have earned its point another seed
        self._completed += record.state is TrialState.COMPLETED
        self._given_up += record.given_up

    # -- when the sweep is over

    @property
    def nothing_completes(self) -> bool:
        """Whether no trial has completed and ``max_failures`` were given up."""
        return self._completed == 0 and self._given_up >= self.limits.max_failures

    @property
    def has_all_trials(self) -> bool:
        """Whether no more trials are created: the limit, the end of the space or the target is reached."""
        if self._exhausted or len(self.records) >= self.limits.trials or self.limits.enough():
            return True
        reached = self.limits.reached
        return reached is not None and any(
            reached(record.metric) and not record.violation for record in self.records.values()
        )

    @property
    def nothing_to_start(self) -> bool:
        """Whether nothing can be started, unless a running attempt fails."""
        return self.nothing_completes or (not self.waiting and self.has_all_trials)

    @property
    def is_over(self) -> bool:
        """Whether nothing runs and nothing will."""
        return not self.active and not self.starting and self.nothing_to_start

    def change_cap(self, trials: float) -> None:
        """Change the number of trials of a running sweep."""
        self.limits = replace(self.limits, trials=trials)

    def stop_early_with(self, early: EarlyStopping) -> None:
        """Begin to stop poor trials early, once the number of evaluations is known."""
        self.early = early
