"""Resident workers: one start, one model and one tokenisation for many trials, on top of any other dispatcher."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isaerft_sweep.dispatch.base import Dispatcher, JobExit
from isaerft_sweep.dispatch.job import Job, TrialJob, WorkerJob
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import JobRef, WorkerTask
from isaerft_sweep.journal.worker_queue import Task, TaskProgress, WorkerFolder

CLOSING_S = 30.0
"""How long an idle worker may take to end once it takes no more tasks."""


@dataclass
class _Worker:
    folder: WorkerFolder
    job: JobRef
    """The inner dispatcher's reference."""
    last_task: int = 0
    """The number of its latest task, as far as this controller knows."""
    open: set[int] = field(default_factory=set)
    """Numbers of its unfinished tasks."""
    closed: bool = False
    """Whether it takes no more tasks."""

    def add_task(self, number: int) -> None:
        self.open.add(number)
        self.last_task = max(self.last_task, number)


class ResidentDispatcher(Dispatcher[WorkerTask]):
    """Gives trials to idle workers, starts workers up to the inner dispatcher's slots, and gives the rest to workers that
    have room for more than one.

    A crash costs the trials that its worker was running; the next ones get a new worker. A reference names worker and task,
    so that another controller finds both again. Idle workers of an earlier controller are closed.

    Args:
        inner: starts the workers' jobs.
        folder: the sweep's ``workers``.
        poll_s: seconds between two looks at workers that are to end.
        trials_per_job: how many trials a worker runs before it ends; None: any number.
        trials_per_pass: how many it runs at a time; None: each worker reports it once it has measured.
    """

    def __init__(
        self,
        inner: Dispatcher[Any],
        folder: Path,
        poll_s: float,
        trials_per_job: int | None = None,
        trials_per_pass: int | None = 1,
    ) -> None:
        self.inner, self.folder, self.poll_s = inner, folder, poll_s
        self.trials_per_job, self.trials_per_pass, self.threads = trials_per_job, trials_per_pass, inner.threads
        self._workers: dict[str, _Worker] = {}
        for old in folder.iterdir() if folder.is_dir() else ():
            if not WorkerFolder(old).progress().ending:
                WorkerFolder(old).claim(Task(None))  # fails for a worker that runs a trial: `alive` adopts it

    @property
    def slots(self) -> int:  # type: ignore[override]
        """How many trials run at a time; grows when workers report their ``trials_per_pass``."""
        taken = sum(len(worker.open) + self._room(worker) for worker in self._workers.values())
        return taken + max(0, self.inner.slots - len(self._workers)) * (self.trials_per_pass or 1)

    @property
    def free_worker_slots(self) -> int:  # type: ignore[override]
        return sum(self._room(worker) for worker in self._workers.values())

    @property
    def idle_workers(self) -> int:  # type: ignore[override]
        return sum(not worker.open and self._room(worker) > 0 for worker in self._workers.values())

    def submit_all(self, jobs: Sequence[Job]) -> list[WorkerTask]:
        tasks = [Task(job.folder, job.attempt) for job in jobs if isinstance(job, TrialJob)]
        assert len(tasks) == len(jobs)
        refs, refused = self._give(tasks, to_idle=True), None
        try:
            refs += self._start(tasks[len(refs) :][: max(0, self.inner.slots - len(self._workers))])
        except LaunchError as error:
            refused = error
        # a new worker is faster than a share of another's passes, but a share is better than waiting
        refs += self._give(tasks[len(refs) :], to_idle=False)
        if refused and not refs:
            raise refused
        return refs

    def _room(self, worker: _Worker) -> int:
        """How many more trials a worker can take now."""
        if worker.closed:
            return 0
        room = (self.trials_per_pass or worker.folder.room() or 1) - len(worker.open)
        return max(0, room if self.trials_per_job is None else min(room, self.trials_per_job - worker.last_task))

    def _give(self, tasks: list[Task], to_idle: bool) -> list[WorkerTask]:
        """Give tasks to workers that have room, the least busy ones first. ``to_idle``: only to idle workers."""
        refs: list[WorkerTask] = []
        while len(refs) < len(tasks):
            able = [item for item in self._workers.items() if self._room(item[1]) and not (to_idle and item[1].open)]
            if not able:
                break
            name, worker = min(able, key=lambda item: len(item[1].open))
            number = worker.folder.claim(tasks[len(refs)], len(worker.open) + self._room(worker))
            if number is None:  # it ends, or has tasks that this controller does not know of
                worker.closed = True
                continue
            worker.add_task(number)
            refs.append(WorkerTask(name, number, worker.job))
        return refs

    def _start(self, tasks: list[Task]) -> list[WorkerTask]:
        """Start a worker for each task, or for the first ones only when no more jobs can be started now."""
        if not tasks:
            return []
        names = [f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}" for _ in tasks]
        folders = [WorkerFolder(self.folder / name) for name in names]
        # before the worker starts, so that it never idles
        numbers = [folder.claim(task) for folder, task in zip(folders, tasks, strict=True)]
        jobs: list[JobRef] = []
        try:
            work = [WorkerJob(str(folder.path), self.threads, trials_per_pass=self.trials_per_pass) for folder in folders]
            jobs = self.inner.submit_all(work)
        finally:
            for folder in folders[len(jobs) :]:
                shutil.rmtree(folder.path, ignore_errors=True)
        refs = []
        for name, folder, number, job in zip(names, folders, numbers, jobs, strict=False):
            assert number is not None
            self._workers[name] = _Worker(folder, job)
            self._workers[name].add_task(number)
            refs.append(WorkerTask(name, number, job))
        return refs

    def alive(self, refs: Iterable[WorkerTask]) -> list[bool]:
        refs = list(refs)
        for ref in refs:
            if ref.name not in self._workers:  # of an earlier controller
                self._workers[ref.name] = _Worker(WorkerFolder(self.folder / ref.name), ref.job)
            self._workers[ref.name].add_task(ref.task)
        for name, alive in self._workers_alive().items():
            if alive:
                self._update(self._workers[name])
            else:
                del self._workers[name]
        return [ref.name in self._workers and ref.task in self._workers[ref.name].open for ref in refs]

    def _update(self, worker: _Worker) -> None:
        """Drop finished tasks. The last tasks of a closed worker keep their slots until its process has exited."""
        progress = worker.folder.progress()
        self._close_if_full(worker, progress)
        unfinished = {number for number in worker.open if not progress.over(number)}
        if unfinished or not worker.closed:
            worker.open = unfinished

    def _close_if_full(self, worker: _Worker, progress: TaskProgress) -> None:
        """Close a worker that has run ``trials_per_job`` trials."""
        full = self.trials_per_job is not None and progress.count >= self.trials_per_job
        if full and not worker.closed and not progress.ending:
            worker.folder.claim(Task(None))
        worker.closed = worker.closed or full or progress.ending

    def _workers_alive(self) -> dict[str, bool]:
        """Which workers are alive; one query for all."""
        names = list(self._workers)
        alive = self.inner.alive([self._workers[name].job for name in names])
        return dict(zip(names, alive, strict=True))

    def cancel(self, refs: Sequence[WorkerTask]) -> None:
        self.inner.cancel([ref.job for ref in refs])

    def kill(self, refs: Sequence[WorkerTask]) -> None:
        self.inner.kill([ref.job for ref in refs])

    def log_tail(self, ref: WorkerTask, lines: int = 8) -> str:
        return self.inner.log_tail(ref.job, lines)

    def job_exit(self, ref: WorkerTask) -> JobExit:
        return self.inner.job_exit(ref.job)

    def suspended(self, ref: WorkerTask) -> bool:
        return self.inner.suspended(ref.job)

    def queued(self, ref: WorkerTask) -> bool:
        return self.inner.queued(ref.job)

    def withdraw(self, refs: Sequence[WorkerTask]) -> None:
        """A worker that starts after all skips the attempt, since it is superseded."""
        unneeded = []
        for ref in refs:
            worker = self._workers.get(ref.name)
            if worker is not None:
                worker.open.discard(ref.task)
                unneeded += [] if worker.open or worker.closed else [worker]
        for worker in unneeded:
            worker.folder.claim(Task(None), room=None)
            worker.closed = True
        if unneeded:
            self.inner.kill([worker.job for worker in unneeded])

    def dismiss_idle(self) -> None:
        for worker in self._workers.values():
            if not worker.open and not worker.closed:
                worker.folder.claim(Task(None))
                worker.closed = True

    def abandon(self, ref: WorkerTask) -> None:
        self._workers.pop(ref.name, None)

    def close(self) -> None:
        """End the idle workers; kill those that do not end in time. Busy ones continue: the next controller adopts them."""
        self.dismiss_idle()
        end = time.monotonic() + max(CLOSING_S, 2 * self.poll_s)
        while remaining := self._idle_alive():
            if time.monotonic() >= end:
                self.inner.kill([worker.job for worker in remaining])
                break
            time.sleep(min(self.poll_s, 0.2) if self.poll_s < 1 else self.poll_s)
        self.inner.close()

    def _idle_alive(self) -> list[_Worker]:
        """The idle workers whose processes are still alive."""
        if all(worker.open for worker in self._workers.values()):
            return []
        alive = self._workers_alive()
        return [worker for name, worker in self._workers.items() if alive[name] and not worker.open]
