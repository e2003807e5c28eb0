"""The controller's loop over the trials of one sweep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from isaerft_sweep.controller.attempt_outcome import classify_exit
from isaerft_sweep.controller.early import EarlyStopping
from isaerft_sweep.controller.stop_signal import wait
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import Dispatcher, JobRef, SchedulerUnavailable
from isaerft_sweep.dispatch.job import TrialJob
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.journal import Journal, TrialRecord
from isaerft_sweep.journal.layout import COMPLETED, FAILED, FINAL, PRUNED, RUNNING, STOPPED
from isaerft_sweep.search.sampler import PointSource, Sampler
from isaerft_sweep.specs import LauncherSpec

ENDING_S = 120.0
"""How long a worker may take to exit after it has said that its trial is over."""
ALIVE_S = 120.0
"""A worker that has said nothing for so long is taken for dead when nobody can be asked whether it lives."""
LONGEST_PAUSE_S = 60.0
"""Between two tries to submit jobs to a queue that takes none, or where they die before they say a word."""


class View(Protocol):
    """Who is told what happens."""

    def update(self, records: list[TrialRecord], statuses: dict[int, dict[str, Any]]) -> None: ...

    def event(self, record: TrialRecord) -> None: ...

    def note(self, text: str) -> None: ...


class Silent(View):
    """Tells nobody."""

    def update(self, records: list[TrialRecord], statuses: dict[int, dict[str, Any]]) -> None: ...

    def event(self, record: TrialRecord) -> None: ...

    def note(self, text: str) -> None: ...


class SweepController:
    """Runs trials until the sweep has as many as it should, or until ``stopping`` says so.

    Everything it knows is in the journal and in the trials' folders: a new controller goes on where the last one was.
    """

    def __init__(
        self,
        journal: Journal,
        sampler: PointSource,
        factory: TrialFactory,
        dispatcher: Dispatcher,
        launcher: LauncherSpec,
        trials: int,
        view: View,
        stopping: Callable[[], int],
        early: EarlyStopping | None = None,
        revive: bool = False,
    ) -> None:
        """``revive``: whether trials that were stopped early go on."""
        self.journal, self.sampler, self.factory, self.dispatcher = journal, sampler, factory, dispatcher
        self.launcher, self.trials, self.view, self.stopping, self.early = launcher, trials, view, stopping, early
        self.records = journal.record.trials
        self.active: dict[int, TrialRecord] = {}
        self.waiting: list[TrialRecord] = []
        self.statuses: dict[int, dict[str, Any]] = {}
        self.exhausted = False
        self._told_to_stop: dict[int, float] = {}
        self._killed: dict[int, float] = {}
        self._held: dict[int, float] = {}
        """When a trial was last seen suspended by its place."""
        self._pause_s = self._pause_until = 0.0
        self._completed = self._given_up = 0
        self._restore(revive)

    def run(self) -> None:
        """Return when every trial has ended, or after a request to stop when no job is left running."""
        while True:
            self._poll()
            if self.stopping():
                self._stop_jobs()
                if not self.active:
                    return
            elif not self._fill():
                return
            self.view.update(list(self.records.values()), self.statuses)
            wait(self.launcher.poll_s, self.stopping)

    @property
    def nothing_completes(self) -> bool:
        """Whether trials only fail: none has completed and as many as allowed were given up."""
        return self._completed == 0 and self._given_up >= self.launcher.max_failures

    @property
    def _target_reached(self) -> bool:
        """Whether a trial has reached the sweep file's ``metric.target``: no further one is started."""
        return any(self.factory.definition.reached_by(record.metric) for record in self.records.values())

    def _restore(self, revive: bool) -> None:
        elsewhere = []
        for record in sorted(self.records.values(), key=lambda r: r.index):
            self.sampler.restore(record.point)
            if record.given_up:  # whoever gives the command again has mended what made it fail
                record.given_up, record.failures = False, 0
            if self.early and record.attempt:
                self.early.note(record.index, self.factory.folder.trial(record.name).read_status())
            if record.ended:
                self._count_ended(record)
                if revive and record.state == PRUNED:
                    self.waiting.append(record)
            elif record.job is not None:
                self.active[record.index] = record
            elif status := self._status_from_elsewhere(record):
                elsewhere.append((record, status))
            else:
                self.waiting.append(record)
        for record, status in elsewhere:
            self.active[record.index] = record
            self._finish_attempt(record, status)

    def _status_from_elsewhere(self, record: TrialRecord) -> dict[str, Any]:
        """The word of a worker that finished the trial while no controller was there: in an array of trials made for it, or
        started by a controller that died before it could note so. Raises LaunchError when such a worker seems to run."""
        folder = self.factory.folder.trial(record.name)
        status = folder.read_status()
        if not status or status.get("attempt") != folder.current_attempt() or status["attempt"] <= record.attempt:
            return {}
        made = not record.attempt and self.factory.folder.static_array.exists()
        if made and status["state"] == RUNNING and time.time() - status["heartbeat"] < ALIVE_S:
            raise LaunchError(
                f"the trial {record.name} is being run by process {status['pid']} on {status['host']}, which no controller "
                f"started (an array of slurm/trials.sbatch?). Wait for it, or end it and try again after {ALIVE_S:g} s."
            )
        return status if status["state"] in FINAL else {}

    def _fill(self) -> bool:
        """Use the free slots, all in one turn; False when nothing is left to do."""
        self._take_retries()
        chosen: list[TrialRecord] = []
        room = self.dispatcher.slots - len(self.active)
        if time.monotonic() < self._pause_until:
            room = min(room, self.dispatcher.waiting_workers)
        while len(chosen) < room and not self.nothing_completes:
            record = self._revived(chosen) or (self.waiting.pop(0) if self.waiting else self._new_trial())
            if record is None:
                break
            if self.factory.folder.trial(record.name).path.is_dir():
                chosen.append(record)
            else:
                self._give_up_lost(record)
        if chosen:
            self._dispatch(chosen)
        elif not self.waiting and not self.nothing_completes and (self.exhausted or len(self.records) >= self.trials):
            self._take_over()
        return bool(self.active or (self.waiting and not self.nothing_completes))

    def _take_retries(self) -> None:
        """Give trials that were given up another chance, where somebody has asked for it."""
        for index in self.factory.folder.take_retries():
            record = self.records.get(index)
            if record is not None and record.given_up:
                record.given_up, record.failures = False, 0
                self._given_up -= 1
                if isinstance(self.sampler, Sampler):
                    self.sampler.pending_again(record.point)
                self.waiting.append(record)

    def _take_over(self) -> None:
        """Let workers that have nothing more to do run what waits for others to be started, which is then not needed; end
        those that are left without anything. Where trials may be revived, workers wait for that as long as they do."""
        idle = self.dispatcher.idle_workers
        unstarted = [r for r in self.active.values() if r.job is not None and not self.statuses.get(r.index)]
        # the last ones: a scheduler starts an array's jobs in their order
        taken = [r for r in unstarted if idle and r.job is not None and self.dispatcher.queued(r.job)][-idle:]
        refs = [record.job for record in taken if record.job is not None]
        for record in taken:
            self.journal.write("takeover", index=record.index, attempt=record.attempt, job=None)
            del self.active[record.index]
        if taken:
            self._dispatch(taken, "takeover")
            self.dispatcher.withdraw(refs)
        elif idle and self.early is None:
            self.dispatcher.dismiss_idle()

    def _revived(self, chosen: list[TrialRecord]) -> TrialRecord | None:
        """A trial that was stopped early and has turned out to be worth going on with."""
        if self.early is None:
            return None
        taken = [*self.waiting, *chosen]
        pruned = [i for i, record in self.records.items() if record.state == PRUNED and record not in taken]
        index = self.early.revived(pruned)
        return None if index is None else self.records[index]

    def _new_trial(self) -> TrialRecord | None:
        if self.exhausted or len(self.records) >= self.trials or self._target_reached:
            return None
        point = self.sampler.ask()
        if point is None:
            self.exhausted = True
            return None
        return self.factory.add(self.journal, point)

    def _dispatch(self, records: list[TrialRecord], event: str = "dispatch") -> None:
        """Start the next attempt of each; those that the queue does not take wait."""
        jobs, attempts = [], []
        for record in records:
            folder = self.factory.folder.trial(record.name)
            # the folder may know of an attempt that the journal does not: a controller died right after dispatching it
            attempts.append(max(record.attempt, folder.current_attempt()) + 1)
            folder.begin_attempt(attempts[-1])
            jobs.append(TrialJob(str(folder.path), attempts[-1], self.dispatcher.threads))
        refs: list[JobRef] = []
        try:
            refs = self.dispatcher.submit_all(jobs)
        except LaunchError as error:
            if not self.active and not isinstance(error, SchedulerUnavailable):
                raise
            self.view.note(f"{error} It is tried again while the sweep goes on.")
        for record, attempt, job in zip(records, attempts, refs, strict=False):
            self.journal.write(event, index=record.index, attempt=attempt, job=dict(job))
            self.active[record.index] = record
            self.statuses.pop(record.index, None)
            self.view.event(record)
        self.waiting[:0] = records[len(refs) :]
        if len(refs) < len(records):
            self._pause_s = min(LONGEST_PAUSE_S, 2 * max(self._pause_s, self.launcher.poll_s))
            self._pause_until = time.monotonic() + self._pause_s
        elif time.monotonic() >= self._pause_until:
            self._pause_s = 0.0

    def _poll(self) -> None:
        records = list(self.active.values())
        alive = self.dispatcher.alive([r.job for r in records if r.job is not None])
        statuses = [self._read_status(record) for record in records]
        if self.early:  # all are heard before one is judged: trials of a pack evaluate at the same moment
            for record, status in zip(records, statuses, strict=True):
                self.early.note(record.index, status)
        for record, living, status in zip(records, alive, statuses, strict=True):
            if not living:
                self._finish_attempt(record, self._read_status(record))
            elif self._overdue(record, status):
                assert record.job is not None
                self.dispatcher.kill([record.job])
                if self._survives(record, ENDING_S):
                    self._finish_attempt(record, status)
            elif self.early and status.get("state") == RUNNING and self.early.stops(record.index, status):
                self.factory.folder.trial(record.name).ask_to_stop(PRUNED)

    def _read_status(self, record: TrialRecord) -> dict[str, Any]:
        """The worker's last word in this attempt."""
        status = self.factory.folder.trial(record.name).read_status()
        if status.get("attempt") != record.attempt:
            return {}
        self.statuses[record.index] = status
        return status

    def _overdue(self, record: TrialRecord, status: dict[str, Any]) -> bool:
        """Whether a living worker has hung: over but not gone, or silent for too long while it could speak."""
        if not status:
            return False
        assert record.job is not None
        if self.dispatcher.suspended(record.job):
            self._held[record.index] = time.time()
        limit_s = ENDING_S if status["state"] in (*FINAL, PRUNED, STOPPED, FAILED) else self.launcher.heartbeat_s
        return time.time() - max(float(status["heartbeat"]), self._held.get(record.index, 0.0)) > limit_s

    def _survives(self, record: TrialRecord, limit_s: float) -> bool:
        """Whether its job is still there so long after it was first killed (a process that hangs in the kernel, a node that
        does not answer). It is given up then: a newer attempt fences it off should it come back."""
        first = self._killed.setdefault(record.index, time.monotonic())
        if time.monotonic() - first <= limit_s:
            return False
        assert record.job is not None
        self.dispatcher.abandon(record.job)
        return True

    def _finish_attempt(self, record: TrialRecord, status: dict[str, Any]) -> None:
        if self.early:
            self.early.note(record.index, status)
        ending = classify_exit(record, status, self.dispatcher, told_to_stop=record.index in self._told_to_stop)
        failures = record.failures + ending.counted
        if self.early and ending.state != PRUNED:
            self.early.forget(record.index)
        given_up = ending.state == FAILED and (not ending.can_retry or failures > self.launcher.max_retries)
        self.journal.write(
            "end",
            index=record.index,
            state=ending.state,
            metric=ending.metric,
            message=ending.message,
            seconds=ending.seconds,
            given_up=given_up,
            counted=ending.counted,
            checkpoint=int(status.get("checkpoint") or 0),
        )
        del self.active[record.index]
        for told in (self._told_to_stop, self._held, self._killed):
            told.pop(record.index, None)
        if record.ended:
            self._count_ended(record)
        else:
            self.waiting.append(record)
            if not status and ending.counted:  # a node that ends every job at once must not use up the trials' retries
                pause_s = min(LONGEST_PAUSE_S, self.launcher.poll_s * 2**failures)
                self._pause_until = max(self._pause_until, time.monotonic() + pause_s)
        self.view.event(record)

    def _give_up_lost(self, record: TrialRecord) -> None:
        """A trial whose folder somebody has deleted cannot be run; the others can."""
        path = self.factory.folder.trial(record.name).path
        message = f"its folder {path} is not there any more, so it cannot be run. Restore it"
        facts = {"state": FAILED, "metric": None, "message": message, "seconds": 0.0}
        self.journal.write("end", index=record.index, **facts, given_up=True, counted=True, checkpoint=0)
        self._count_ended(record)
        self.view.event(record)

    def _count_ended(self, record: TrialRecord) -> None:
        if record.state == FAILED:  # memory, a disk or a node: nothing about the point
            self.sampler.forget(record.point)
        elif record.state != PRUNED:  # it may come back; until then it counts as pending, which is to say as bad
            self.sampler.tell(record.point, record.metric)
        self._completed += record.state == COMPLETED
        self._given_up += record.given_up

    def _stop_jobs(self) -> None:
        """Ask every job once to checkpoint and end; end it by force after the grace period or a second request."""
        ask, force = [], []
        for record in self.active.values():
            assert record.job is not None
            asked = self._told_to_stop.get(record.index)
            if asked is None:
                self.factory.folder.trial(record.name).ask_to_stop()
                self._told_to_stop[record.index] = time.monotonic()
                ask.append(record.job)
            elif self.stopping() > 1 or time.monotonic() - asked > self.launcher.grace_s:
                force.append(record.job)
        if ask:
            self.dispatcher.cancel(ask)
        if force:
            self.dispatcher.kill(force)
        for record in [r for r in self.active.values() if r.job in force]:
            if self._survives(record, ENDING_S):
                self._finish_attempt(record, self._read_status(record))
