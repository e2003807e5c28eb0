"""Workers that stay: one start, one model and one tokenisation for many trials, on top of any other dispatcher."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from isaerft_sweep.dispatch.base import Dispatcher, JobRef
from isaerft_sweep.dispatch.job import Job, TrialJob, WorkerJob
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.workers import Task, WorkerFolder

CLOSING_S = 30.0
"""How long an idle worker may take to end when it is told to."""


@dataclass
class _Worker:
    folder: WorkerFolder
    job: JobRef
    """The inner dispatcher's reference."""
    open: set[int] = field(default_factory=set)
    """Numbers of the tasks that this controller waits for."""
    ending: bool = False


class ResidentDispatcher(Dispatcher):
    """Gives trials to workers that have room, and starts workers while there are fewer than the inner dispatcher's slots.

    A crash costs the trials that its worker was running; the next ones get a new worker. A reference names worker and task,
    so that another controller finds both again; workers that waited for a controller that has gone are told to end.

    ``packed``: how many trials a worker runs at a time; None: each worker says it when it has measured.
    """

    def __init__(self, inner: Dispatcher, folder: Path, poll_s: float, packed: int | None = 1) -> None:
        self.inner, self.folder, self.poll_s, self.packed = inner, folder, poll_s, packed
        self.threads = inner.threads
        self._workers: dict[str, _Worker] = {}
        for old in folder.iterdir() if folder.is_dir() else ():
            if not WorkerFolder(old).progress().ending:
                WorkerFolder(old).claim(Task(None))  # in vain where a trial is being run: that one will be adopted

    @property
    def slots(self) -> int:  # type: ignore[override]
        """How many trials run at a time; grows when workers have measured how many they take."""
        taken = sum(len(w.open) if w.ending else max(len(w.open), self._room(w)) for w in self._workers.values())
        return taken + max(0, self.inner.slots - len(self._workers)) * (self.packed or 1)

    def submit(self, job: Job) -> JobRef:
        assert isinstance(job, TrialJob)
        task = Task(job.folder, job.attempt)
        self._forget_the_dead()
        for name, worker in self._by_room():
            if worker.open and len(self._workers) < self.inner.slots:
                break  # a worker of its own is better than room in another's
            number = worker.folder.claim(task, self._room(worker))
            if number is not None:
                return self._given(name, worker, number)
            worker.ending = True  # or it does something that this controller does not know of
            if not worker.open:
                del self._workers[name]
        if len(self._workers) >= self.inner.slots:
            raise LaunchError("every worker has as many trials as it takes.")
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = WorkerFolder(self.folder / name)
        number = folder.claim(task)  # before the worker starts, so that it never waits
        assert number is not None
        worker = _Worker(folder, self.inner.submit(WorkerJob(str(folder.path), self.threads, packed=self.packed)))
        self._workers[name] = worker
        return self._given(name, worker, number)

    def _given(self, name: str, worker: _Worker, number: int) -> JobRef:
        worker.open.add(number)
        return {"kind": "resident", "worker": name, "task": number, "job": dict(worker.job)}

    def _room(self, worker: _Worker) -> int:
        return self.packed or worker.folder.room() or 1

    def _by_room(self) -> list[tuple[str, _Worker]]:
        """The workers that can take a trial, the least busy first."""
        able = [(n, w) for n, w in self._workers.items() if not w.ending and len(w.open) < self._room(w)]
        return sorted(able, key=lambda item: len(item[1].open))

    def _forget_the_dead(self) -> None:
        """Idle workers may have ended; those with open tasks are asked for in ``alive``."""
        idle = {name: worker for name, worker in self._workers.items() if not worker.open}
        for name, living in zip(idle, self.inner.alive([w.job for w in idle.values()]), strict=True):
            if not living:
                del self._workers[name]

    def alive(self, refs: Iterable[JobRef]) -> list[bool]:
        asked = list(refs)
        jobs = {ref["worker"]: ref["job"] for ref in asked}
        living = dict(zip(jobs, self.inner.alive(jobs.values()), strict=True))
        for ref in asked:
            if ref["worker"] not in self._workers:  # of a controller that has gone
                self._workers[ref["worker"]] = _Worker(WorkerFolder(self.folder / ref["worker"]), ref["job"])
            self._workers[ref["worker"]].open.add(ref["task"])
        for name in jobs:
            self._look_at(name, living[name])
        return [ref["worker"] in self._workers and ref["task"] in self._workers[ref["worker"]].open for ref in asked]

    def _look_at(self, name: str, living: bool) -> None:
        """Take note of what is over. The last tasks of a worker that ends keep their slots until its process is gone."""
        worker = self._workers[name]
        if not living:
            del self._workers[name]
            return
        progress = worker.folder.progress()
        worker.ending = worker.ending or progress.ending
        left = {number for number in worker.open if not progress.over(number)}
        if left or not worker.ending:
            worker.open = left

    def cancel(self, ref: JobRef) -> None:
        self.inner.cancel(ref["job"])

    def kill(self, ref: JobRef) -> None:
        self.inner.kill(ref["job"])

    def log_tail(self, ref: JobRef, lines: int = 8) -> str:
        return self.inner.log_tail(ref["job"], lines)

    def close(self) -> None:
        """End the workers that wait; one that does not listen is killed. Busy ones go on: they will be adopted."""
        self._forget_the_dead()
        waiting = [worker for worker in self._workers.values() if not worker.open]
        for worker in waiting:
            worker.folder.claim(Task(None))
        end = time.monotonic() + max(CLOSING_S, 2 * self.poll_s)
        while waiting and time.monotonic() < end:
            time.sleep(min(self.poll_s, 0.2) if self.poll_s < 1 else self.poll_s)
            alive = self.inner.alive([worker.job for worker in waiting])
            waiting = [worker for worker, living in zip(waiting, alive, strict=True) if living]
        for worker in waiting:
            self.inner.kill(worker.job)
        self.inner.close()
