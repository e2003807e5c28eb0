"""The state machine of a sweep: whatever happens in whatever order, with restarts in between, nothing is lost or doubled."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isaerft_sweep.journal.job_refs import LocalJob
from isaerft_sweep.journal.journal import SweepRecord, TrialRecord
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.scheduling.early_stopping import EarlyStopping
from isaerft_sweep.scheduling.sweep_state import AttemptOutcome, SweepLimits, SweepState
from isaerft_sweep.search.pruning import SuccessiveHalving
from isaerft_sweep.search.sampler import Point


class MemoryJournal:
    """A journal without a file. ``full``: its disk is."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.full = lines, False
        self.record = SweepRecord()
        for line in lines:
            self.record.apply(json.loads(line))

    def write(self, event: str, **fields: Any) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.lines.append(json.dumps({"event": event, **fields}))
        self.record.apply(json.loads(self.lines[-1]))


class CountingSampler:
    """Gives ``size`` points; knows which are pending and what it was told of each."""

    method, repeats = "counting", False

    def __init__(self, size: int) -> None:
        self.size = float(size)
        self.asked: list[int] = []
        self.pending: set[int] = set()
        self.told: dict[int, float | None] = {}

    def ask(self) -> Point | None:
        number = len(self.asked)
        if number >= self.size:
            return None
        self.restore(Point({"x": number}))
        return Point({"x": number})

    def restore(self, point: Point) -> None:
        assert point.params["x"] not in self.asked, "a point was asked for twice"
        self.asked.append(point.params["x"])
        self.pending.add(point.params["x"])

    def tell(self, point: Point, value: float | None, violation: float = 0.0, others: object = ()) -> None:
        self._close(point)
        self.told[point.params["x"]] = value

    def forget(self, point: Point) -> None:
        self._close(point)

    def pending_again(self, point: Point) -> None:
        assert point.params["x"] not in self.pending
        self.told.pop(point.params["x"], None)
        self.pending.add(point.params["x"])

    def _close(self, point: Point) -> None:
        assert point.params["x"] in self.pending, "an outcome was told twice"
        self.pending.remove(point.params["x"])


class SweepMachine(RuleBasedStateMachine):
    """Events of a controller and of a server, restarts and full disks, in any order."""

    @initialize(
        trials=st.one_of(st.integers(1, 6), st.just(math.inf)),
        points=st.integers(1, 8),
        retries=st.integers(0, 2),
        failures=st.integers(1, 4),
        goal=st.sampled_from([None, 3.0]),
        early=st.booleans(),
        server=st.booleans(),
    )
    def begin(
        self, trials: float, points: int, retries: int, failures: int, goal: float | None, early: bool, server: bool
    ) -> None:
        reached = None if goal is None else lambda metric: metric is not None and metric >= goal
        self.limits = SweepLimits(trials, retries, math.inf if server else failures, reached)
        self.points, self.early, self.server = points, early, server
        self.lines: list[str] = []
        self.folders: set[int] = set()
        self.running: dict[int, int] = {}
        """Which attempt of each trial really runs."""
        self.attempts: dict[int, int] = {}
        self.ended_as: dict[int, str] = {}
        self.taken: list[TrialRecord] = []
        self.curves: dict[int, list[float]] = {}
        self.failed = 0
        self._open()

    def _open(self) -> None:
        self.journal, self.sampler = MemoryJournal(self.lines), CountingSampler(self.points)
        early = EarlyStopping(SuccessiveHalving([1, 2], 2), 1, 4) if self.early else None
        self.state = SweepState(self.journal, self.sampler, self.limits, self._name, early)
        self.state.restore(retry_given_up=not self.server)
        for index, curve in self.curves.items():
            if self.state.early:
                self.state.early.note(index, curve)
        self.taken = []

    def _name(self, index: int, _point: Point) -> tuple[str, str]:
        self.folders.add(index)
        return f"run-{index}", f"id{index}"

    @rule()
    def take(self) -> None:
        record = self.state.next_trial()
        if record is not None:
            assert record.index not in self.running, "a trial that runs was given out"
            assert record.state not in FINAL and not record.given_up
            self.taken.append(record)

    @precondition(lambda self: self.taken)
    @rule(full=st.booleans())
    def dispatch(self, full: bool) -> None:
        record, attempt = self.taken[0], self.taken[0].attempt + 1
        self.journal.full = full
        try:
            self.state.dispatched(record, attempt, LocalJob(record.index))
        except OSError:
            return
        finally:
            self.journal.full = False
        self.taken.pop(0)
        assert attempt > self.attempts.get(record.index, 0), "an attempt number was used twice"
        self.attempts[record.index] = self.running[record.index] = attempt

    @precondition(lambda self: self.taken)
    @rule()
    def refuse(self) -> None:
        self.state.put_back(self.taken)
        assert self.state.waiting[: len(self.taken)] == self.taken
        self.taken = []

    @rule()
    def a_new_trial_meets_a_full_disk(self) -> None:
        self.journal.full = True
        before = len(self.lines)
        try:
            record = self.state.next_trial()
            if record is not None:
                self.state.put_back([record])
        except OSError:
            pass
        finally:
            self.journal.full = False
        assert len(self.lines) == before

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        state=st.sampled_from(["completed", "diverged", "failed", "stopped", "pruned"]),
        metric=st.sampled_from([None, 1.0, 2.0, 3.0]),
        can_retry=st.booleans(),
        counted=st.booleans(),
    )
    def end(self, data: st.DataObject, state: str, metric: float | None, can_retry: bool, counted: bool) -> None:
        index = data.draw(st.sampled_from(sorted(self.running)))
        record, before = self.journal.record.trials[index], self.journal.record.trials[index].failures
        outcome = AttemptOutcome(
            TrialState(state), metric if state == "completed" else None, can_retry=can_retry, counted=counted
        )
        self.state.finished(record, outcome)
        del self.running[index]
        if record.ended:
            self.ended_as[index] = state
        resumable = state in ("failed", "stopped")
        over = counted and before + 1 > self.limits.max_retries
        assert record.ended == (not resumable or not can_retry or over), "one rule decides about another attempt"
        assert record.given_up == (record.ended and resumable)

    @precondition(lambda self: self.running and self.early)
    @rule(data=st.data(), value=st.sampled_from([1.0, 2.0, 3.0]))
    def evaluate(self, data: st.DataObject, value: float) -> None:
        index = data.draw(st.sampled_from(sorted(self.running)))
        self.curves.setdefault(index, []).append(value)
        assert self.state.early is not None
        self.state.early.note(index, self.curves[index])

    @precondition(lambda self: any(record.given_up for record in self.journal.record.trials.values()))
    @rule(data=st.data(), alive=st.booleans())
    def another_chance(self, data: st.DataObject, alive: bool) -> None:
        given_up = [record for record in self.journal.record.trials.values() if record.given_up]
        record = data.draw(st.sampled_from(given_up))
        self.ended_as.pop(record.index)
        if (
            alive or self.server
        ):  # it was only taken for dead; only a controller is asked for retries, and its restart retries all
            self.state.resume_attempt(record, LocalJob(record.index))
            self.running[record.index] = record.attempt
        else:
            self.state.retry(record)
            assert record.failures == 0
        assert not record.given_up and record in (*self.state.waiting, *self.state.active.values())

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.running)))
        record = self.journal.record.trials[index]
        self.state.unassign(record)
        attempt = self.attempts[index] + 1
        self.state.dispatched(record, attempt, LocalJob(99), "takeover")
        self.attempts[index] = self.running[index] = attempt

    @rule()
    def restart(self) -> None:
        """The process dies here; what it had taken and not dispatched was never started."""
        record = self.journal.record
        before = {i: (t.state, t.metric, t.attempt, t.failures) for i, t in record.trials.items() if not t.given_up}
        if not self.server:  # the same command tries again what was given up
            self.ended_as = {i: state for i, state in self.ended_as.items() if not record.trials[i].given_up}
        self._open()
        after = {i: (t.state, t.metric, t.attempt, t.failures) for i, t in self.journal.record.trials.items()}
        assert all(after[i] == known for i, known in before.items()), "the journal knew less than the process"
        assert self.state.active.keys() == self.running.keys()

    @invariant()
    def every_trial_is_in_one_place(self) -> None:
        records = self.journal.record.trials
        waiting = [record.index for record in self.state.waiting]
        places = [*waiting, *self.state.starting, *self.state.active, *self.ended_as]
        again = [i for i in places if places.count(i) > 1]  # revived: pruned, and given out again
        assert all(records[i].state is TrialState.PRUNED or self.ended_as.get(i) == "pruned" for i in again)
        assert set(places) == set(records), "a trial was lost"
        assert len(set(waiting)) == len(waiting) and self.state.active.keys() == self.running.keys()

    @invariant()
    def no_more_trials_than_asked_for(self) -> None:
        assert len(self.journal.record.trials) <= min(self.limits.trials, self.points)
        assert set(self.journal.record.trials) <= self.folders

    @invariant()
    def the_sampler_knows_what_has_ended(self) -> None:
        for index, record in self.journal.record.trials.items():
            open_again = index in self.state.active or record in self.state.waiting or index in self.state.starting
            settled = record.ended and record.state is not TrialState.PRUNED and not open_again
            assert (index in self.sampler.pending) != settled
            if record.state in FINAL:
                assert self.sampler.told[index] == record.metric

    @invariant()
    def it_is_over_when_nothing_is_left(self) -> None:
        if self.state.is_over:
            assert not self.running and self.state.next_trial() is None
            given_up = sum(record.given_up for record in self.journal.record.trials.values())
            completed = any(record.state is TrialState.COMPLETED for record in self.journal.record.trials.values())
            if given_up < self.limits.max_failures or completed:
                assert all(record.ended for record in self.journal.record.trials.values())


TestSweepMachine = SweepMachine.TestCase
TestSweepMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_retries_are_counted_through_a_restart() -> None:
    lines: list[str] = []
    for attempt in range(1, 4):
        journal = MemoryJournal(lines)
        state = SweepState(journal, CountingSampler(1), SweepLimits(1, 2), lambda i, _: (f"run-{i}", f"id{i}"))
        state.restore()
        record = state.next_trial()
        assert record is not None and record.attempt == attempt - 1
        state.dispatched(record, attempt, LocalJob(1))
        state.finished(record, AttemptOutcome(TrialState.FAILED, counted=True))
        assert record.given_up == (attempt == 3) and state.is_over == (attempt == 3)


def test_a_sweep_that_only_fails_ends_and_the_same_command_tries_again() -> None:
    lines: list[str] = []
    state = SweepState(MemoryJournal(lines), CountingSampler(9), SweepLimits(9, 0, 2), lambda i, _: (f"run-{i}", f"id{i}"))
    state.restore()
    while (record := state.next_trial()) is not None:
        state.dispatched(record, 1, LocalJob(1))
        state.finished(record, AttemptOutcome(TrialState.FAILED, counted=True))
    assert state.is_over and state.nothing_completes and len(state.records) == 2
    again = SweepState(MemoryJournal(lines), CountingSampler(9), SweepLimits(9, 0, 2), lambda i, _: (f"run-{i}", f"id{i}"))
    again.restore()
    assert not again.is_over and [record.index for record in again.waiting] == [0, 1]
    served = SweepState(MemoryJournal(lines), CountingSampler(2), SweepLimits(2, 0), lambda i, _: (f"run-{i}", f"id{i}"))
    served.restore(retry_given_up=False)
    assert served.is_over, "a server that was restarted hands nothing out that was given up"


@pytest.mark.parametrize("metric", [None, 0.5])
def test_a_reached_target_starts_no_further_trial(metric: float | None) -> None:
    limits = SweepLimits(5, 1, reached=lambda value: value is not None and value >= 0.5)
    state = SweepState(MemoryJournal([]), CountingSampler(5), limits, lambda i, _: (f"run-{i}", f"id{i}"))
    state.restore()
    record = state.next_trial()
    assert record is not None
    state.dispatched(record, 1, LocalJob(1))
    state.finished(record, AttemptOutcome(TrialState.COMPLETED, metric))
    assert state.is_over == (metric is not None) == (state.next_trial() is None)
