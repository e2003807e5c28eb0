"""The controller's loop: dispatch what ``SweepState`` says, poll the jobs, report how attempts end."""

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
"""How long a worker may take to exit after its status says that its trial has ended."""
ALIVE_S = 120.0
"""A worker that has been silent for so long is taken for dead where no job can be queried."""
LONGEST_PAUSE_S = 60.0
"""Between two tries to submit jobs to a queue that takes none, or whose jobs die before they write a status."""


class View(Protocol):
    """Shows what happens."""

    def update(self, records: list[TrialRecord], statuses: Mapping[int, TrialStatus]) -> None: ...

    def event(self, record: TrialRecord) -> None: ...

    def note(self, text: str) -> None: ...


class Silent(View):
    """Shows nothing."""

    def update(self, records: list[TrialRecord], statuses: Mapping[int, TrialStatus]) -> None: ...

    def event(self, record: TrialRecord) -> None: ...

    def note(self, text: str) -> None: ...


class SweepController:
    """Runs trials until the sweep is over or ``urgency`` asks it to stop.

    Everything it knows is in the journal and in the trials' folders: a new controller continues where the last one was.

    Args:
        state: which trial runs next; already restored from the journal.
        folder: the sweep's.
        dispatcher: where trials run.
        launcher: intervals and limits.
        view: shows what happens.
        urgency: 0, or how urgently somebody has asked to stop; see ``stop_signal``.
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
        """When a trial's job was last seen suspended."""
        self._pause_s = self._pause_until = 0.0
        self._note_curves()
        self._adopt_finished()

    def run(self) -> None:
        """Return when the sweep is over, or after a request to stop when no job is left running."""
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
        """Take in trials that finished while no controller was there: in an array of jobs made for them, or started by a
        controller that died before it could note so. Raises LaunchError when such a worker seems to run."""
        finished = [(record, self._status_without_job(record)) for record in self.state.waiting]
        for record, status in finished:
            if status:
                self.state.adopt(record)
                self._finish_attempt(record, status)

    def _status_without_job(self, record: TrialRecord) -> TrialStatus:
        """The final status of an attempt that the journal does not know."""
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
        """Use the free slots, all in one turn."""
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
        """Give trials that were given up another chance, where somebody has asked for it."""
        for index in self.folder.take_retries():
            record = self.state.records.get(index)
            if record is not None and record.given_up:
                self.state.retry(record)

    def _take_over(self) -> None:
        """Let idle workers run what waits for other workers to start, which are then not needed; end those that are left
        with nothing to do. Where trials may be revived, idle workers wait for that while their idle time lasts."""
        idle = self.dispatcher.idle_workers
        unstarted = [r for r in self.state.active.values() if r.job is not None and not self.statuses.get(r.index)]
        # the last ones: a scheduler starts an array's jobs in their order
        taken = [r for r in unstarted if idle and r.job is not None and self.dispatcher.queued(r.job)][-idle:]
        jobs = [record.job for record in taken if record.job is not None]
        for record in taken:
            self.state.unassign(record)
        if taken:
            self._dispatch(taken, "takeover")
            self.dispatcher.withdraw(jobs)
        elif idle and self.state.early is None:
            self.dispatcher.dismiss_idle()

    def _dispatch(self, records: list[TrialRecord], event: str = "dispatch") -> None:
        """Start the next attempt of each; those that the queue does not take wait."""
        tasks, attempts = [], []
        for record in records:
            trial = self.folder.trial(record.name)
            # the folder may know of an attempt that the journal does not: a controller died right after dispatching it
            attempts.append(max(record.attempt, trial.current_attempt()) + 1)
            trial.begin_attempt(attempts[-1])
            tasks.append(TrialJob(str(trial.path), attempts[-1], self.dispatcher.threads))
        jobs: list[JobRef] = []
        try:
            jobs = self.dispatcher.submit_all(tasks)
        except LaunchError as error:
            if not self.state.active and not isinstance(error, SchedulerUnavailable):
                raise
            self.view.note(f"{error} It is tried again while the sweep continues.")
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
        # all curves are noted before one is judged: trials that share a forward pass are evaluated at the same moment
        for record, status in zip(records, statuses, strict=True):
            self._note_curve(record, status)
        for record, living, status in zip(records, alive, statuses, strict=True):
            if not living:
                self._finish_attempt(record, self._read_status(record))
            elif self._overdue(record, status):
                assert record.job is not None
                self.dispatcher.kill([record.job])
                if self._survives(record, EXIT_S):
                    self._finish_attempt(record, status)
            elif self.state.early and status.is_running and self.state.early.stops(record.index, status.evaluations):
                self.folder.trial(record.name).ask_to_stop(TrialState.PRUNED)

    def _read_status(self, record: TrialRecord) -> TrialStatus:
        """The worker's last message in this attempt."""
        status = self.folder.trial(record.name).read_status().of_attempt(record.attempt)
        if status:
            self.statuses[record.index] = status
        return status

    def _overdue(self, record: TrialRecord, status: TrialStatus) -> bool:
        """Whether a living worker has hung: its trial has ended but it has not, or it has been silent for too long."""
        if not status:
            return False
        assert record.job is not None
        if self.dispatcher.suspended(record.job):
            self._suspended[record.index] = time.time()
        limit_s = EXIT_S if status.state in EXITED else self.launcher.heartbeat_s
        return time.time() - max(status.heartbeat, self._suspended.get(record.index, 0.0)) > limit_s

    def _survives(self, record: TrialRecord, limit_s: float) -> bool:
        """Whether its job is still there so long after it was first killed (a process that hangs in the kernel, a node that
        does not answer). It is given up then: a newer attempt fences it off should it come back."""
        first = self._killed.setdefault(record.index, time.monotonic())
        if time.monotonic() - first <= limit_s:
            return False
        assert record.job is not None
        self.dispatcher.abandon(record.job)
        return True

    def _finish_attempt(self, record: TrialRecord, status: TrialStatus) -> None:
        self._note_curve(record, status)
        outcome = classify_exit(record, status, self.dispatcher, asked_to_stop=record.index in self._stop_sent)
        self.state.finished(record, outcome)
        for times in (self._stop_sent, self._suspended, self._killed):
            times.pop(record.index, None)
        if not record.ended and not status and outcome.counted:
            # a node that ends every job at once must not use up the trials' retries
            pause_s = min(LONGEST_PAUSE_S, self.launcher.poll_s * 2**record.failures)
            self._pause_until = max(self._pause_until, time.monotonic() + pause_s)
        self.view.event(record)

    def _give_up_lost(self, record: TrialRecord) -> None:
        """A trial whose folder somebody has deleted cannot be run; the others can."""
        path = self.folder.trial(record.name).path
        message = f"its folder {path} is not there any more, so it cannot be run. Restore it"
        self.state.finished(record, AttemptOutcome(TrialState.FAILED, message=message, can_retry=False, counted=True))
        self.view.event(record)

    def _stop_jobs(self) -> None:
        """Ask every job once to checkpoint and end; end it by force after the grace period or a second request."""
        ask, force = [], []
        for record in self.state.active.values():
            assert record.job is not None
            sent = self._stop_sent.get(record.index)
            if sent is None:
                self.folder.trial(record.name).ask_to_stop()
                self._stop_sent[record.index] = time.monotonic()
                ask.append(record.job)
            elif self.urgency() > 1 or time.monotonic() - sent > self.launcher.grace_s:
                force.append(record.job)
        if ask:
            self.dispatcher.cancel(ask)
        if force:
            self.dispatcher.kill(force)
        for record in [r for r in self.state.active.values() if r.job in force]:
            if self._survives(record, EXIT_S):
                self._finish_attempt(record, self._read_status(record))
