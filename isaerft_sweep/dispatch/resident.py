"""Workers that stay: one start, one model and one tokenisation for many trials, on top of any other dispatcher."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.dispatch.base import Dispatcher, JobRef
from isaerft_sweep.dispatch.job import Job, TrialJob, WorkerJob
from isaerft_sweep.journal.workers import WorkerFolder

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
    so that another controller finds both again.
    """

    def __init__(self, inner: Dispatcher, folder: Path) -> None:
        self.inner, self.folder = inner, folder
        self.slots, self.threads = inner.slots, inner.threads
        self._workers: dict[str, _Worker] = {}
        self._busy: set[str] = set()

    def submit(self, job: Job) -> JobRef:
        assert isinstance(job, TrialJob)
        worker = self._idle()
        if worker is None:
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
            worker = _Worker(WorkerFolder(self.folder / name), {})
            number = worker.folder.assign(job.folder, job.attempt)  # before it starts, so that it never waits
            worker.job = self.inner.submit(WorkerJob(str(worker.folder.path), self.threads))
            self._workers[name] = worker
        else:
            number = worker.folder.assign(job.folder, job.attempt)
        name = worker.folder.path.name
        self._busy.add(name)
        return {"kind": "resident", "worker": name, "task": number, "job": dict(worker.job)}

    def alive(self, refs: Iterable[JobRef]) -> list[bool]:
        asked = list(refs)
        found = []
        for ref, living in zip(asked, self.inner.alive([ref["job"] for ref in asked]), strict=True):
            worker = self._known(ref)
            done, ending = worker.folder.done()
            over = done >= ref["task"]
            if over or not living:
                self._busy.discard(ref["worker"])
            if not living or ending:
                self._workers.pop(ref["worker"], None)
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
        """End the workers that wait; one that does not listen is killed."""
        waiting = list(self._workers.values())
        for worker in waiting:
            worker.folder.assign(None)
        end = time.monotonic() + CLOSING_S
        while waiting and time.monotonic() < end:
            alive = self.inner.alive([worker.job for worker in waiting])
            waiting = [worker for worker, living in zip(waiting, alive, strict=True) if living]
            time.sleep(0.05)
        for worker in waiting:
            self.inner.kill(worker.job)
        self._workers.clear()
        self.inner.close()

    def _idle(self) -> _Worker | None:
        free = [worker for name, worker in self._workers.items() if name not in self._busy]
        for worker, living in zip(free, self.inner.alive([worker.job for worker in free]), strict=True):
            if living and not worker.folder.done()[1]:
                return worker
            self._workers.pop(worker.folder.path.name, None)
        return None

    def _known(self, ref: JobRef) -> _Worker:
        """The reference's worker, also one that another controller has started."""
        name = ref["worker"]
        if name not in self._workers:
            self._workers[name] = _Worker(WorkerFolder(self.folder / name), ref["job"])
            self._busy.add(name)
        return self._workers[name]
