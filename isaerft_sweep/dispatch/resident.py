"""Workers that stay: one start, one model and one tokenisation for many trials, on top of any other dispatcher."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isaerft_sweep.dispatch.base import Dispatcher, JobRef, Verdict
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
    busy: bool = True
    last: bool = False
    """Whether it has been told that there is nothing more for it."""


class ResidentDispatcher(Dispatcher):
    """Gives trials to workers that wait, and starts a worker when none does.

    A crash costs the trial that its worker was running; the next one gets a new worker. A reference names worker and task,
    so that another controller finds both again; workers that waited for a controller that has gone are told to end.
    """

    def __init__(self, inner: Dispatcher, folder: Path, poll_s: float, trials_per_job: int | None = None) -> None:
        self.inner, self.folder, self.poll_s, self.trials_per_job = inner, folder, poll_s, trials_per_job
        self.slots, self.threads = inner.slots, inner.threads
        self._workers: dict[str, _Worker] = {}
        for old in folder.iterdir() if folder.is_dir() else ():
            if not WorkerFolder(old).done()[1]:
                WorkerFolder(old).claim(Task(None))  # in vain where a trial is being run: that one will be adopted

    def submit_all(self, jobs: Sequence[Job]) -> list[JobRef]:
        tasks = [Task(job.folder, job.attempt) for job in jobs if isinstance(job, TrialJob)]
        assert len(tasks) == len(jobs)
        refs: list[JobRef] = []
        for name, worker in self._free():
            if len(refs) == len(tasks):
                break
            number = worker.folder.claim(tasks[len(refs)])
            if number is None:  # it ends, or does something that this controller does not know of
                worker.last = True
                continue
            worker.busy = True
            refs.append(_reference(name, worker.job, number))
        try:
            return refs + self._start(tasks[len(refs) :])
        except LaunchError:
            if refs:  # what workers that waited have been given counts
                return refs
            raise

    def _free(self) -> list[tuple[str, _Worker]]:
        return [(name, worker) for name, worker in self._workers.items() if not worker.busy and not worker.last]

    @property
    def waiting_workers(self) -> int:  # type: ignore[override]
        return len(self._free())

    def _start(self, tasks: list[Task]) -> list[JobRef]:
        """Start a worker for each task, or for the first of them where no more can be had."""
        if not tasks:
            return []
        names = [f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}" for _ in tasks]
        folders = [WorkerFolder(self.folder / name) for name in names]
        numbers = [folder.claim(task) for folder, task in zip(folders, tasks, strict=True)]  # so that it never waits
        jobs: list[JobRef] = []
        try:
            jobs = self.inner.submit_all([WorkerJob(str(folder.path), self.threads) for folder in folders])
        finally:
            for folder in folders[len(jobs) :]:
                shutil.rmtree(folder.path, ignore_errors=True)
        refs = []
        for name, folder, number, job in zip(names, folders, numbers, jobs, strict=False):
            assert number is not None
            self._workers[name] = _Worker(folder, job)
            refs.append(_reference(name, job, number))
        return refs

    def alive(self, refs: Iterable[JobRef]) -> list[bool]:
        asked = list(refs)
        for ref in asked:
            if ref["worker"] not in self._workers:  # of a controller that has gone
                self._workers[ref["worker"]] = _Worker(WorkerFolder(self.folder / ref["worker"]), ref["job"])
        living = self._living()
        found = []
        for ref in asked:
            name = ref["worker"]
            done, ending = self._workers[name].folder.done()
            over = done >= ref["task"]
            if over:
                self._workers[name].busy = False
                self._retire(self._workers[name], done, ending)
            # a worker that ends keeps its slot until its process is gone
            found.append(living[name] and (self._workers[name].last or not over))
        for name in [name for name, lives in living.items() if not lives]:
            del self._workers[name]
        return found

    def _living(self) -> dict[str, bool]:
        """Which workers live, in one query for all of them."""
        names = list(self._workers)
        alive = self.inner.alive([self._workers[name].job for name in names])
        return dict(zip(names, alive, strict=True))

    def _retire(self, worker: _Worker, done: int, ending: bool) -> None:
        """Tell a worker that has run as many trials as it may that it shall end."""
        if not worker.last and self.trials_per_job is not None and done >= self.trials_per_job and not ending:
            worker.folder.claim(Task(None))
            ending = True
        worker.last = worker.last or ending

    def cancel(self, refs: Sequence[JobRef]) -> None:
        self.inner.cancel([ref["job"] for ref in refs])

    def kill(self, refs: Sequence[JobRef]) -> None:
        self.inner.kill([ref["job"] for ref in refs])

    def log_tail(self, ref: JobRef, lines: int = 8) -> str:
        return self.inner.log_tail(ref["job"], lines)

    def verdict(self, ref: JobRef) -> Verdict:
        return self.inner.verdict(ref["job"])

    def close(self) -> None:
        """End the workers that wait; one that does not listen is killed. Busy ones go on: they will be adopted."""
        for _, worker in self._free():
            worker.folder.claim(Task(None))
            worker.last = True
        end = time.monotonic() + max(CLOSING_S, 2 * self.poll_s)
        while waiting := self._ending():
            if time.monotonic() >= end:
                self.inner.kill([worker.job for worker in waiting])
                break
            time.sleep(min(self.poll_s, 0.2) if self.poll_s < 1 else self.poll_s)
        self.inner.close()

    def _ending(self) -> list[_Worker]:
        """The idle workers that are still there."""
        if all(worker.busy for worker in self._workers.values()):
            return []
        living = self._living()
        return [worker for name, worker in self._workers.items() if living[name] and not worker.busy]


def _reference(name: str, job: JobRef, task: int) -> JobRef:
    return {"kind": "resident", "worker": name, "task": task, "job": dict(job)}
