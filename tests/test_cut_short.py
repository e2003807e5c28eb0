"""What the controller makes of attempts that something else ends, and of a queue that takes no jobs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, events

from isaerft_sweep.controller.build import make_state
from isaerft_sweep.controller.loop import SweepController
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import Dispatcher, JobExit, SchedulerUnavailable
from isaerft_sweep.dispatch.job import TrialJob
from isaerft_sweep.errors import LaunchError
from isaerft_sweep.journal.job_refs import LocalJob
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.search.sampler import FixedPoints, Point
from isaerft_sweep.search.sweep_file import Metric, SweepDefinition
from isaerft_sweep.specs import Experiment

SCHEDULER, USER, TRIAL = (
    JobExit("SLURM: PREEMPTED", "scheduler"),
    JobExit("SLURM: CANCELLED", "user"),
    JobExit("SLURM: FAILED"),
)
DONE = (TrialState.COMPLETED, 0, TRIAL)
UNBEGUN, SILENT = "unbegun", "silent"
"""States of an attempt that its worker gave back, and of one that died before it said a word."""


class StandInCluster(Dispatcher):
    """Stands in for a cluster: attempt n of a trial ends as ``script[n]`` says, at once; what it takes is scripted too."""

    threads = None

    def __init__(
        self, script: Sequence[tuple[str, int, JobExit]], takes: Iterable[int | Exception] = (), slots: int = 1
    ) -> None:
        self.script, self.takes, self.slots = script, list(takes), slots
        self.asked: list[int] = []
        self.times: list[float] = []

    def submit_all(self, jobs: Sequence[Any]) -> list[LocalJob]:
        self.asked.append(len(jobs))
        taken = self.takes.pop(0) if self.takes else len(jobs)
        if isinstance(taken, Exception):
            raise taken
        return [self._run(job) for job in jobs[:taken]]

    def _run(self, job: TrialJob) -> LocalJob:
        folder = TrialFolder(Path(job.folder))
        started = len(
            [
                e
                for e in events(folder.path.parent.parent)
                if e["event"] == "dispatch" and e["index"] == folder.read_spec().index
            ]
        )
        state, checkpoint, _ = self.script[min(started, len(self.script) - 1)]
        self.times.append(time.monotonic())
        if state == SILENT:
            return LocalJob(started)
        writer = StatusWriter(folder, job.attempt)
        if state == UNBEGUN:
            writer.write(TrialState.STOPPED, begun=False, message="its worker ended before it began")
            return LocalJob(started)
        facts = {"metric": 0.5, "ended": time.time()} if state == TrialState.COMPLETED else {}
        writer.write(state, checkpoint=checkpoint, **facts)
        return LocalJob(started)

    def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
        return [False for _ in refs]

    def job_exit(self, ref: LocalJob) -> JobExit:
        return self.script[min(ref.pid, len(self.script) - 1)][2]

    def cancel(self, refs: Sequence[LocalJob]) -> None: ...

    def kill(self, refs: Sequence[LocalJob]) -> None: ...

    def log_tail(self, ref: LocalJob, lines: int = 8) -> str:
        return "its last line"


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def update(self, *_: Any) -> None: ...

    def event(self, *_: Any) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def run(experiment: Callable[..., Experiment], tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], Notes]]:
    """Run a sweep of ``trials`` trials on a cluster; how the attempts ended, and what was said."""

    def run_on(cluster: StandInCluster, trials: int = 1, poll_s: float = 0.001) -> tuple[list[dict[str, Any]], Notes]:
        composed = experiment(*TINY, f"launcher.poll_s={poll_s}", "launcher.max_retries=1")
        folder, view = SweepFolder(tmp_path / "s"), Notes()
        journal = Journal(folder)
        journal.write("sweep", sweep_id="s", question="q", metric="eval/loss", goal="minimize")
        definition = SweepDefinition("given points", Metric("eval/loss", "minimize"), {})
        points = FixedPoints([Point({"orpo.beta": 0.1 * (i + 1)}) for i in range(trials)])
        factory = TrialFactory(composed, definition, folder, "s", None)
        state = make_state(journal, points, factory, trials)
        state.restore()
        with closing(journal):
            SweepController(state, folder, cluster, composed.launcher, view, lambda: 0).run()
        return [e for e in events(folder.path) if e["event"] == "end"], view

    return run_on


@pytest.mark.parametrize(
    ("script", "states"),
    [
        # by the site, further each time: as often as it likes
        ([(TrialState.RUNNING, n, SCHEDULER) for n in (5, 10, 15, 20, 25)] + [DONE], ["stopped"] * 5 + ["completed"]),
        ([(TrialState.STOPPED, n, SCHEDULER) for n in (5, 10, 15)] + [DONE], ["stopped"] * 3 + ["completed"]),
        # in order, and nobody knows by whom
        ([(TrialState.STOPPED, 5, TRIAL), (TrialState.STOPPED, 9, TRIAL), DONE], ["stopped", "stopped", "completed"]),
        # never any further: jobs that are too short must not go on for ever
        (
            [(TrialState.RUNNING, 5, SCHEDULER), (TrialState.RUNNING, 5, SCHEDULER), (TrialState.RUNNING, 5, SCHEDULER)],
            ["stopped", "failed", "failed"],
        ),
        ([(TrialState.STOPPED, 0, SCHEDULER)], ["failed", "failed"]),
        # never begun, since its worker ended for another trial's sake: nobody's fault, however often
        ([(UNBEGUN, 0, TRIAL)] * 4 + [DONE], ["stopped"] * 4 + ["completed"]),
        # by a person: counted, whatever it has reached
        ([(TrialState.STOPPED, 5, USER), (TrialState.STOPPED, 10, USER)], ["failed", "failed"]),
        # of its own
        ([(TrialState.RUNNING, 5, TRIAL), (TrialState.RUNNING, 10, TRIAL)], ["failed", "failed"]),
        ([(TrialState.RUNNING, 5, TRIAL), DONE], ["failed", "completed"]),
    ],
)
def test_who_ended_an_attempt_and_whether_it_got_further(
    script: list[tuple[str, int, JobExit]], states: list[str], run: Callable[..., Any]
) -> None:
    ends, _ = run(StandInCluster(script))
    assert [e["state"] for e in ends] == states
    assert [e["counted"] for e in ends] == [e["state"] == "failed" for e in ends]
    assert ends[-1]["given_up"] == (states[-1] == "failed")
    for end in ends:
        if end["state"] == "failed":
            assert "SLURM: " in end["message"] and "its last line" in end["message"]


def test_a_queue_that_takes_some_and_then_none(run: Callable[..., Any]) -> None:
    busy = SchedulerUnavailable("sbatch takes no job now: AssocMaxSubmitJobLimit.")
    cluster = StandInCluster([DONE], takes=[2, busy, busy, 1], slots=4)
    ends, view = run(cluster, trials=6)
    assert len(ends) == 6 and all(e["state"] == "completed" for e in ends)
    assert cluster.asked[:4] == [4, 4, 4, 4], "two of four were taken, then none, twice"
    assert len(view.notes) == 2 and "tries again" in view.notes[0]


def test_trials_that_die_without_a_word_wait_longer_each_time(run: Callable[..., Any]) -> None:
    cluster = StandInCluster([(SILENT, 0, TRIAL)])
    ends, _ = run(cluster, poll_s=0.2)
    assert [e["state"] for e in ends] == ["failed", "failed"] and ends[1]["given_up"]
    assert cluster.times[1] - cluster.times[0] >= 0.4


def test_workers_that_wait_get_trials_while_the_queue_takes_no_jobs(run: Callable[..., Any]) -> None:
    """Two of four were taken; the pause before the next try is for new jobs alone."""
    cluster = StandInCluster([DONE], takes=[2, 2, 2], slots=4)
    cluster.free_worker_slots = 2
    started = time.monotonic()
    ends, _ = run(cluster, trials=6, poll_s=1.0)
    assert len(ends) == 6 and cluster.asked[:3] == [4, 2, 2]
    assert time.monotonic() - started < 6


def test_a_refusal_for_good_ends_the_sweep_when_nothing_runs(run: Callable[..., Any]) -> None:
    with pytest.raises(LaunchError, match="invalid partition"):
        run(StandInCluster([DONE], takes=[LaunchError("sbatch refused the job: invalid partition")]))


def test_a_deleted_folder_costs_its_own_trial_alone(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    composed, folder = experiment(*TINY, "launcher.poll_s=0.001"), SweepFolder(tmp_path / "s")
    journal, points = Journal(folder), FixedPoints([Point({"orpo.beta": 0.1 * (i + 1)}) for i in range(2)])
    journal.write("sweep", sweep_id="s", question="q", metric="eval/loss", goal="minimize")
    definition = SweepDefinition("given points", Metric("eval/loss", "minimize"), {})
    factory = TrialFactory(composed, definition, folder, "s", None)
    make_state(journal, FixedPoints(points.points[:1]), factory, 2).make_all()
    shutil.rmtree(folder.trial(journal.record.trials[0].name).path)
    state = make_state(journal, points, factory, 2)
    state.restore()
    SweepController(state, folder, StandInCluster([DONE]), composed.launcher, Notes(), lambda: 0).run()
    journal.close()
    ends = {e["index"]: e for e in events(folder.path) if e["event"] == "end"}
    assert ends[1]["state"] == "completed" and ends[0]["given_up"] and "is missing, so it cannot run" in ends[0]["message"]
