"""A sweep of 10,000 trials on 1,000 workers, simulated: how long do workers wait for the controller, and is a trial lost?

    python benchmarks/scale.py [--trials 10000] [--workers 1000]

Controller, sampler, journal (with fsync) and trial folders are real; only the workers are not. Time is the controller's own
real time plus its sleeps, which are not slept. Trials' times are drawn from those of the demo's (``MEASURED_S``), scaled to
a median. Faults: two in a hundred attempts die without a word, as on a lost node; the queue refuses two in a hundred turns;
half-way the controller is killed and another one goes on from the journal. A worker counts as idle from its trial's end
until it is given the next one, as long as there is one to give.
"""

from __future__ import annotations

import argparse
import heapq
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from isaerft_sweep.config.boundary import to_definition, to_experiment
from isaerft_sweep.config.schema import register
from isaerft_sweep.controller.build import make_sampler, make_state
from isaerft_sweep.controller.loop import Silent, SweepController
from isaerft_sweep.controller.sweep_identity import open_journal, sweep_folder
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import Dispatcher, SchedulerUnavailable
from isaerft_sweep.dispatch.job import Job, TrialJob
from isaerft_sweep.journal.job_refs import LocalJob
from isaerft_sweep.journal.layout import TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.paths import folder

MEASURED_S = (30, 28, 53, 53, 59, 27, 28, 28)
"""The demo's trials, as its leaderboard in the README tells."""
DEATHS = REFUSALS = 0.02


class Killed(Exception):
    """Stands in for kill -9 of the controller: whatever it was about to do is not done."""


class SimulatedWorkers(Dispatcher):
    """Stands in for processes on many machines, with a clock of its own."""

    threads = None

    def __init__(self, workers: int, median_s: float, poll_s: float, kill_after: int) -> None:
        self.slots, self.median_s, self.poll_s, self.kill_after = workers, median_s, poll_s, kill_after
        self.random = random.Random(0)
        self.started, self.own_s, self.polls = time.perf_counter(), 0.0, 0
        self.running: dict[int, tuple[float, TrialJob]] = {}
        self.ends: list[tuple[float, int]] = []
        self.free: list[float] = [0.0] * workers
        self.idle_s = self.busy_s = 0.0
        self.runs: Counter[str] = Counter()
        self.number = self.refused = self.killed = 0

    def now(self) -> float:
        """Seconds since the start: the controller's real time, without this stand-in's own, and its sleeps."""
        return time.perf_counter() - self.started - self.own_s + self.polls * self.poll_s

    def submit_all(self, jobs: Sequence[Job]) -> list[LocalJob]:
        if self.number and self.random.random() < REFUSALS:
            self.refused += 1
            raise SchedulerUnavailable("the queue is full")
        return [self._start(job) for job in jobs]

    def _start(self, job: Job) -> LocalJob:
        assert isinstance(job, TrialJob)
        now = self.now()
        if self.number >= self.slots:  # the first trials of all workers start together, before anybody could be faster
            self.idle_s += max(0.0, now - heapq.heappop(self.free))
        else:
            heapq.heappop(self.free)
        duration = self.median_s * self.random.choice(MEASURED_S) / statistics.median(MEASURED_S)
        duration *= self.random.uniform(0.95, 1.05)  # no two trials of a sweep take the same time to the millisecond
        self.number += 1
        self.busy_s += duration
        self.running[self.number] = (now + duration, job)
        return LocalJob(self.number)

    def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
        self.polls += 1
        if not self.killed and len(self.runs) >= self.kill_after:
            self.killed += 1
            raise Killed
        now, begun = self.now(), time.perf_counter()
        found = [self._alive(ref.pid, now) for ref in refs]
        self.own_s += time.perf_counter() - begun
        return found

    def _alive(self, number: int, now: float) -> bool:
        end, job = self.running[number]
        if now < end:
            return True
        del self.running[number]
        heapq.heappush(self.free, end)
        if self.random.random() >= DEATHS:
            self.runs[job.folder] += 1
            StatusWriter(TrialFolder(Path(job.folder)), job.attempt).write(
                TrialState.COMPLETED, metric=0.5, ended=time.time()
            )
        return False

    def cancel(self, refs: Sequence[LocalJob]) -> None: ...

    def kill(self, refs: Sequence[LocalJob]) -> None: ...

    def log_tail(self, ref: LocalJob, lines: int = 8) -> str:
        return ""


def simulate(trials: int, workers: int, median_s: float, output: str) -> dict[str, float]:
    """One sweep; shares, counts and seconds."""
    with initialize_config_dir(str(folder("conf")), version_base="1.3"):
        asked = ["model=tiny", "sweep=reference-bayes", "sweep.method=random", f"sweep.run_cap={trials}", f"output={output}"]
        experiment = to_experiment(compose("config", [*asked, "name=s", "launcher.poll_s=0.000001"]))
    definition = to_definition(experiment.sweep, experiment)
    where = sweep_folder(experiment, definition)
    journal = open_journal(where, ["q"])
    journal.write("sweep", sweep_id="s", question="q", metric=definition.metric.name, goal=definition.metric.goal)
    factory = TrialFactory(experiment, definition, where, "s", None)
    sampler = make_sampler(experiment, definition)
    sampler.ask()  # scipy's import is paid before the clock runs
    # as the launchers do: half a second on one machine, five seconds on a cluster
    pool = SimulatedWorkers(workers, median_s, 0.5 if median_s < 300 else 5.0, kill_after=trials // 2)
    cpu = time.process_time()
    while True:
        sampler = make_sampler(experiment, definition)
        try:
            state = make_state(journal, sampler, factory, trials)
            state.restore()
            SweepController(state, where, pool, experiment.launcher, Silent(), lambda: 0).run()
            break
        except Killed:
            journal.close()
            journal = open_journal(where, ["q"])
    cpu = time.process_time() - cpu
    journal.close()
    states = Counter(record.state for record in journal.record.trials.values())
    return {
        "idle": pool.idle_s / (pool.idle_s + pool.busy_s),
        "hours": pool.now() / 3600,
        "completed": states[TrialState.COMPLETED],
        "lost": trials - states[TrialState.COMPLETED] - sum(r.given_up for r in journal.record.trials.values()),
        "doubled": sum(count > 1 for count in pool.runs.values()),
        "deaths": pool.number - sum(pool.runs.values()),
        "refused": pool.refused,
        "kills": pool.killed,
        "cpu_ms": cpu / trials * 1e3,
    }


def main() -> None:
    """Simulate short and long trials and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--median-s", type=float, nargs="*", default=[60.0, 1500.0], help="of a trial's duration")
    args = parser.parse_args()
    register()
    title = f"{args.trials:,} trials on {args.workers:,} simulated workers, {platform.processor() or platform.machine()}"
    table = Table(title=title)
    counts = ("completed", "deaths", "refused", "kills", "lost", "doubled")
    columns = ("median trial s", "idle", "sweep h", *counts, "controller ms/trial")
    for name in columns:
        table.add_column(name, justify="right")
    for median_s in args.median_s:
        with tempfile.TemporaryDirectory() as output:
            found = simulate(args.trials, args.workers, median_s, output)
        table.add_row(
            f"{median_s:g}",
            f"{found['idle']:.2%}",
            f"{found['hours']:.2f}",
            *(f"{found[key]:,}" for key in counts),
            f"{found['cpu_ms']:.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
