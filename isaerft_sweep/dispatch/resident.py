"""Workers that stay: one start, one model and one tokenisation for many trials, on top of any other dispatcher."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.dispatch.base import Dispatcher, JobRef
from isaerft_sweep.dispatch.job import Job, TrialJob, WorkerJob
from isaerft_sweep.journal.workers import Task, WorkerFolder

CLOSING_S = 30.0
"""How long an idle worker may take to end when it is told to."""


@dataclass
class _Worker:
    folder: WorkerFolder
    job: JobRef
    """The inner dispatcher's reference."""


class ResidentDispatcher(Dispatcher):
    """Gives trials to workers that wait, and starts a worker when none does.

    A crash costs the trial that its worker was running; the next one gets a new worker. A reference names worker and task,
    so that another controller finds both again; workers that waited for a controller that has gone are told to end.
    """

    def __init__(self, inner: Dispatcher, folder: Path, poll_s: float) -> None:
        self.inner, self.folder, self.poll_s = inner, folder, poll_s
        self.slots, self.threads = inner.slots, inner.threads
        self._workers: dict[str, _Worker] = {}
        self._busy: set[str] = set()
        for old in folder.iterdir() if folder.is_dir() else ():
            if not WorkerFolder(old).done()[1]:
                WorkerFolder(old).claim(Task(None))  # in vain where a trial is being run: that one will be adopted

    def submit(self, job: Job) -> JobRef:
        assert isinstance(job, TrialJob)
        task = Task(job.folder, job.attempt)
        for name, worker in self._waiting().items():
            number = worker.folder.claim(task)
            if number is not None:
                return self._given(name, worker, number)
            del self._workers[name]  # it ends, or does something that this controller does not know of
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = WorkerFolder(self.folder / name)
        number = folder.claim(task)  # before the worker starts, so that it never waits
        assert number is not None
        worker = _Worker(folder, self.inner.submit(WorkerJob(str(folder.path), self.threads)))
        self._workers[name] = worker
        return self._given(name, worker, number)

    def _given(self, name: str, worker: _Worker, number: int) -> JobRef:
        self._busy.add(name)
        return {"kind": "resident", "worker": name, "task": number, "job": dict(worker.job)}

    def alive(self, refs: Iterable[JobRef]) -> list[bool]:
        asked = list(refs)
        found = []
        for ref, living in zip(asked, self.inner.alive([ref["job"] for ref in asked]), strict=True):
            name = ref["worker"]
            if name not in self._workers:  # of a controller that has gone
                self._workers[name] = _Worker(WorkerFolder(self.folder / name), ref["job"])
                self._busy.add(name)
            done, ending = self._workers[name].folder.done()
            over = done >= ref["task"]
            if over or not living:
                self._busy.discard(name)
            if not living or ending:
                del self._workers[name]
            # a worker that ends keeps its slot until its process is gone
            found.append(living and (ending or not over))
        return found

    def cancel(self, ref: JobRef) -> None:
        self.inner.cancel(ref["job"])

    def kill(self, ref: JobRef) -> None:
        self.inner.kill(ref["job"])

    def log_tail(self, ref: JobRef, lines: int = 8) -> str:
        return self.inner.log_tail(ref["job"], lines)

    def close(self) -> None:
        """End the workers that wait; one that does not listen is killed. Busy ones go on: they will be adopted."""
        waiting = list(self._waiting().values())
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

    def _waiting(self) -> dict[str, _Worker]:
        """The workers that wait for a task."""
        free = {name: worker for name, worker in self._workers.items() if name not in self._busy}
        alive = self.inner.alive([worker.job for worker in free.values()])
        for name, living in zip(list(free), alive, strict=True):
            if not living:
                del free[name], self._workers[name]
        return free
