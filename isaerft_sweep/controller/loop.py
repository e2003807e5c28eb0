"""The controller's loop: dispatch the trials that ``SweepState`` returns, poll the jobs, record how attempts end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from isaerft_sweep.controller.attempt_outcome import classify_exit
from isaerft_sweep.controller.stop_signal import wait
from isaerft_sweep.dispatch.base import Dispatcher, SchedulerUnavailable
from isaerft_sweep.dispatch.job import TrialJob
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import JobRef
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import EXITED, TrialState
from isaerft_sweep.journal.status import NO_STATUS, TrialStatus
from isaerft_sweep.scheduling.sweep_state import AttemptOutcome, SweepState
from isaerft_sweep.specs import LauncherSpec

EXIT_S = 120.0
"""How long a worker may take to exit after its status reports the trial's end."""
ALIVE_S = 120.0
"""A worker without a job to query counts as dead after this long without a heartbeat."""
LONGEST_PAUSE_S = 60.0
"""Longest pause between two submissions to a queue that takes no jobs, or whose jobs die before they write a status."""


class View(Protocol):
    """Displays a sweep's progress."""

    def update(self, records: list[TrialRecord], statuses: Mapping[int, TrialStatus]) -> None: ...

    def event(self, record: TrialRecord) -> None: ...

    def note(self, text: str) -> None: ...


class Silent(View):
    """Displays nothing."""

    def update(self, records: list[TrialRecord], statuses: Mapping[int, TrialStatus]) -> None: ...

    def event(self, record: TrialRecord) -> None: ...

    def note(self, text: str) -> None: ...


class SweepController:
    """Runs trials until the sweep is over or ``urgency`` asks it to stop.

    Its whole state is in the journal and in the trials' folders: a new controller continues where the last one stopped.

    Args:
        state: decides which trial runs next; already restored from the journal.
        folder: the sweep's.
        dispatcher: runs the trials.
        launcher: intervals and limits.
        view: displays the progress.
        urgency: how urgent the request to stop is, 0 without one; see ``stop_signal``.
    """

    def __init__(
        self,
        state: SweepState,
        folder: SweepFolder,
        dispatcher: Dispatcher[Any],
        launcher: LauncherSpec,
        view: View,
        urgency: Callable[[], int],
    ) -> None:
        self.state, self.folder, self.dispatcher, self.launcher = state, folder, dispatcher, launcher
        self.view, self.urgency = view, urgency
        self.statuses: dict[int, TrialStatus] = {}
        self._stop_sent: dict[int, float] = {}
        self._killed: dict[int, float] = {}
        self._suspended: dict[int, float] = {}
        """When a trial's job was last seen suspended, in seconds since the epoch."""
        self._pause_s = self._pause_until = 0.0
        self._note_curves()
        self._adopt_finished()

    def run(self) -> None:
        """Run until the sweep is over, or after a request to stop until no job is left."""
        while True:
            self._poll()
            if self.urgency():
                self._stop_jobs()
                if not self.state.active:
                    return
            else:
                self._fill()
                if self.state.is_over:
                    return
            self.view.update(list(self.state.records.values()), self.statuses)
            wait(self.launcher.poll_s, self.urgency)

    def _note_curves(self) -> None:
        if self.state.early:
            for record in self.state.records.values():
                if record.attempt:
                    self._note_curve(record, self.folder.trial(record.name).read_status())

    def _note_curve(self, record: TrialRecord, status: TrialStatus) -> None:
        if self.state.early:
            self.state.early.note(record.index, status.evaluations, status.state is TrialState.DIVERGED)

    def _adopt_finished(self) -> None:
        """Record trials that finished without a controller: in a static array, or after their controller died before it
        could write to the journal. Raises LaunchError when such a worker still seems to run."""
        finished = [(record, self._status_without_job(record)) for record in self.state.waiting]
        for record, status in finished:
            if status:
                self.state.adopt(record)
                self._finish_attempt(record, status)

    def _status_without_job(self, record: TrialRecord) -> TrialStatus:
        """The final status of an attempt that is not in the journal; else an empty one."""
        trial = self.folder.trial(record.name)
        status = trial.read_status()
        if not status or status.attempt != trial.current_attempt() or status.attempt <= record.attempt:
            return NO_STATUS
        in_array = not record.attempt and self.folder.static_array.exists()
        if in_array and status.is_running and time.time() - status.heartbeat < ALIVE_S:
            raise LaunchError(
                f"the trial {record.name} is being run by process {status.pid} on {status.host}, which no controller "
                f"started (an array of slurm/trials.sbatch?). Wait for it, or end it and try again after {ALIVE_S:g} s."
            )
        return status if status.is_final else NO_STATUS

    def _fill(self) -> None:
        """Dispatch trials into all free slots."""
        self._take_retries()
        room = self.dispatcher.slots - len(self.state.active)
        if time.monotonic() < self._pause_until:
            room = min(room, self.dispatcher.free_worker_slots)
        chosen: list[TrialRecord] = []
        while len(chosen) < room and (record := self.state.next_trial()) is not None:
            if self.folder.trial(record.name).path.is_dir():
                chosen.append(record)
            else:
                self._give_up_lost(record)
        if chosen:
            self._dispatch(chosen)
        elif self.state.nothing_to_start and not self.state.nothing_completes:
            self._take_over()

    def _take_retries(self) -> None:
        """Retry the given-up trials that a user has asked for."""
        for index in self.folder.take_retries():
            record = self.state.records.get(index)
            if record is not None and record.given_up:
                self.state.retry(record)

    def _take_over(self) -> None:
        """Let idle workers run trials whose workers have not started, and withdraw those; end workers that stay idle.

        With early stopping, idle workers wait for revived trials until their idle time is over.
        """
        idle = self.dispatcher.idle_workers
        unstarted = [r for r in self.state.active.values() if r.job is not None and not self.statuses.get(r.index)]
        # from the end: a scheduler starts an array's jobs in their order
        moved = [r for r in unstarted if idle and r.job is not None and self.dispatcher.queued(r.job)][-idle:]
        jobs = [record.job for record in moved if record.job is not None]
        for record in moved:
            self.state.unassign(record)
        if moved:
            self._dispatch(moved, "takeover")
            self.dispatcher.withdraw(jobs)
        elif idle and self.state.early is None:
            self.dispatcher.dismiss_idle()

    def _dispatch(self, records: list[TrialRecord], event: str = "dispatch") -> None:
        """Start the next attempt of each trial; those that the queue does not take wait."""
        tasks, attempts = [], []
        for record in records:
            trial = self.folder.trial(record.name)
            # the folder may have a later attempt than the journal: of a controller that died right after dispatching it
            attempts.append(max(record.attempt, trial.current_attempt()) + 1)
            trial.begin_attempt(attempts[-1])
            tasks.append(TrialJob(str(trial.path), attempts[-1], self.dispatcher.threads))
        jobs: list[JobRef] = []
        try:
            jobs = self.dispatcher.submit_all(tasks)
        except LaunchError as error:
            if not self.state.active and not isinstance(error, SchedulerUnavailable):
                raise
            self.view.note(f"{error} The controller tries again while the sweep continues.")
        for record, attempt, job in zip(records, attempts, jobs, strict=False):
            self.state.dispatched(record, attempt, job, event)
            self.statuses.pop(record.index, None)
            self.view.event(record)
        self.state.put_back(records[len(jobs) :])
        if len(jobs) < len(records):
            self._pause_s = min(LONGEST_PAUSE_S, 2 * max(self._pause_s, self.launcher.poll_s))
            self._pause_until = time.monotonic() + self._pause_s
        elif time.monotonic() >= self._pause_until:
            self._pause_s = 0.0

    def _poll(self) -> None:
        records = list(self.state.active.values())
        alive = self.dispatcher.alive([r.job for r in records if r.job is not None])
        statuses = [self._read_status(record) for record in records]
        # record all curves before judging any: co-batched trials are evaluated at the same time
        for record, status in zip(records, statuses, strict=True):
            self._note_curve(record, status)
        for record, is_alive, status in zip(records, alive, statuses, strict=True):
            if not is_alive:
                self._finish_attempt(record, self._read_status(record))
            elif self._overdue(record, status):
                assert record.job is not None
                self.dispatcher.kill([record.job])
                if self._survives(record, EXIT_S):
                    self._finish_attempt(record, status)
            elif self.state.early and status.is_running and self.state.early.stops(record.index, status.evaluations):
                self.folder.trial(record.name).ask_to_stop(TrialState.PRUNED)

    def _read_status(self, record: TrialRecord) -> TrialStatus:
        """The worker's latest status in this attempt."""
        status = self.folder.trial(record.name).read_status().of_attempt(record.attempt)
        if status:
            self.statuses[record.index] = status
        return status

    def _overdue(self, record: TrialRecord, status: TrialStatus) -> bool:
        """Whether a living worker hangs: it has not exited after its trial's end, or its last heartbeat is too old."""
        if not status:
            return False
        assert record.job is not None
        if self.dispatcher.suspended(record.job):
            self._suspended[record.index] = time.time()
        limit_s = EXIT_S if status.state in EXITED else self.launcher.heartbeat_s
        return time.time() - max(status.heartbeat, self._suspended.get(record.index, 0.0)) > limit_s

    def _survives(self, record: TrialRecord, limit_s: float) -> bool:
        """Whether its job is still alive ``limit_s`` after it was first killed; abandons the job then.

        Its process hangs in the kernel, or its node does not answer. A newer attempt fences it off if it comes back.
        """
        killed_s = self._killed.setdefault(record.index, time.monotonic())
        if time.monotonic() - killed_s <= limit_s:
            return False
        assert record.job is not None
        self.dispatcher.abandon(record.job)
        return True

    def _finish_attempt(self, record: TrialRecord, status: TrialStatus) -> None:
        self._note_curve(record, status)
        outcome = classify_exit(record, status, self.dispatcher, stop_requested=record.index in self._stop_sent)
        if outcome.state is TrialState.COMPLETED:
            outcome = self.state.limits.judged(outcome, status.metrics)
        self.state.finished(record, outcome)
        for times in (self._stop_sent, self._suspended, self._killed):
            times.pop(record.index, None)
        if not record.ended and not status and outcome.counted:
            # a node on which every job dies at once must not use up the trials' retries
            pause_s = min(LONGEST_PAUSE_S, self.launcher.poll_s * 2**record.failures)
            self._pause_until = max(self._pause_until, time.monotonic() + pause_s)
        self.view.event(record)

    def _give_up_lost(self, record: TrialRecord) -> None:
        """End a trial whose folder was deleted, so that the others can run."""
        path = self.folder.trial(record.name).path
        message = f"its folder {path} is missing, so it cannot run. Restore it"
        self.state.finished(record, AttemptOutcome(TrialState.FAILED, message=message, can_retry=False, counted=True))
        self.view.event(record)

    def _stop_jobs(self) -> None:
        """Ask every job once to checkpoint and end; kill it after the grace period or a second request."""
        to_stop, to_kill = [], []
        for record in self.state.active.values():
            assert record.job is not None
            sent = self._stop_sent.get(record.index)
            if sent is None:
                self.folder.trial(record.name).ask_to_stop()
                self._stop_sent[record.index] = time.monotonic()
                to_stop.append(record.job)
            elif self.urgency() > 1 or time.monotonic() - sent > self.launcher.grace_s:
                to_kill.append(record.job)
        if to_stop:
            self.dispatcher.cancel(to_stop)
        if to_kill:
            self.dispatcher.kill(to_kill)
        for record in [r for r in self.state.active.values() if r.job in to_kill]:
            if self._survives(record, EXIT_S):
                self._finish_attempt(record, self._read_status(record))
