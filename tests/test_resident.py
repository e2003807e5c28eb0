"""Workers that run many trials: the same numbers, one crash costs one trial, memory stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY, events, processes_of
from helpers.sweeps import ended_states, serve, start, statuses, stepping
from helpers.trials import OFF, Made, rows_of
from helpers.waiting import wait_for

from isaerft_sweep.controller.build import make_state
from isaerft_sweep.controller.live_view import time_left_s
from isaerft_sweep.controller.loop import Silent, SweepController
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.dispatch.job import TrialJob, WorkerJob
from isaerft_sweep.dispatch.worker_pool import ResidentDispatcher
from isaerft_sweep.journal.job_refs import LocalJob
from isaerft_sweep.journal.journal import Journal, TrialRecord
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.journal.worker_queue import Task, TaskProgress, WorkerFolder
from isaerft_sweep.search.sampler import FixedPoints, Point
from isaerft_sweep.search.sweep_file import Metric, SweepDefinition
from isaerft_sweep.trial.pair_tokenizer import PairTokenizer
from isaerft_sweep.trial.runner import run_trial
from isaerft_sweep.trial.stop_request import StopFlags
from isaerft_sweep.trial.worker import serve_trials


@pytest.mark.slow
@pytest.mark.parametrize("cache_gb", [0, 1])
@pytest.mark.parametrize("kind", ["bias", "mlp"])
def test_a_trial_has_the_same_numbers_after_others_in_one_process(
    kind: str, cache_gb: int, trial: Made, tmp_path: Path
) -> None:
    options = (*OFF, f"adapter={kind}", f"launcher.activation_cache_gb={cache_gb}", "orpo.learning_rate=0.1")
    alone = trial(*options, name="alone")
    assert run_trial(alone, 1) == "completed"
    others = [
        trial(*OFF, "adapter=scale", "orpo.seed=7", f"launcher.activation_cache_gb={cache_gb}", name="scale"),
        trial(*options, "orpo.beta=2.0", name="beta"),
        trial(*options, "model.architecture=gemma2", name="gemma"),
    ]
    last = trial(*options, name="last")
    assert serve(WorkerFolder(tmp_path / "worker"), [*others, last]) == 4
    assert rows_of(last) == rows_of(alone)
    weights = [(t.adapter / "adapter_model.safetensors").read_bytes() for t in (alone, last)]
    assert weights[0] == weights[1], "equal to the last bit"
    assert "step 4/4" in last.log.read_text() and "step 4/4" in others[0].log.read_text(), "each trial has a log of its own"


@pytest.mark.slow
def test_the_model_and_the_data_are_loaded_once(trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import isaerft_sweep.trial.process_cache as process_cache
    import isaerft_sweep.trial.runner as runner

    calls: Counter[str] = Counter()
    rows: list[int] = []
    tokenise = PairTokenizer.__call__
    monkeypatch.setattr(PairTokenizer, "__call__", lambda self, row: rows.append(1) or tokenise(self, row))
    for place, name in ((runner, "load"), (runner, "load_pairs"), (process_cache, "stored_activations")):
        original = getattr(place, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(place, name, counted)
    trials = [trial(*OFF, f"orpo.beta={i + 1}.0", name=f"t{i}") for i in range(3)]
    assert serve(WorkerFolder(tmp_path / "worker"), trials) == 3
    assert calls == {"load": 1, "load_pairs": 1, "stored_activations": 1}
    assert len(rows) == 24 + 8 + 8, "every pair was tokenised once for three trials"
    assert serve(WorkerFolder(tmp_path / "other"), [trial(*OFF, "data.eval_size=4", name="less")]) == 1
    assert calls["load_pairs"] == 2


@pytest.mark.slow
def test_a_diverged_trial_leaves_the_model_as_it_was(trial: Made, tmp_path: Path) -> None:
    half = (*OFF, "model.dtype=float16")
    alone = trial(*half, name="alone")
    assert run_trial(alone, 1) == "completed"
    bad = trial(*half, "orpo.learning_rate=1.0e+6", "orpo.warmup_steps=0", name="bad")
    after = trial(*half, name="after")
    assert serve(WorkerFolder(tmp_path / "worker"), [bad, after]) == 2
    assert bad.read_status().state == "diverged" and rows_of(after) == rows_of(alone)


@pytest.mark.slow
def test_what_a_stopped_trial_had_switched_on_is_switched_off_again(trial: Made, tmp_path: Path) -> None:
    options = (*OFF, "orpo.learning_rate=0.1", "data.eval_size=6")
    alone = trial(*options, name="alone")
    assert run_trial(alone, 1) == "completed"
    stopped = trial(*OFF, "orpo.gradient_checkpointing=true", name="stopped")
    stopped.ask_to_stop(TrialState.PRUNED)
    after = trial(*options, f"launcher.scratch={tmp_path / 'cache'}", name="after")
    assert serve(WorkerFolder(tmp_path / "worker"), [stopped, after]) == 2
    assert stopped.read_status().state == "pruned" and rows_of(after) == rows_of(alone)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torn", "gone"])
def test_a_trial_whose_folder_cannot_be_read_costs_only_itself(how: str, trial: Made, tmp_path: Path) -> None:
    trials = [trial(*OFF, name=name) for name in ("before", "unreadable", "after")]
    if how == "torn":
        trials[1].spec.write_text('{"index": 1,')
    else:
        shutil.rmtree(trials[1].path)
    worker = WorkerFolder(tmp_path / "worker")
    assert serve(worker, trials) == 2 and worker.progress() == TaskProgress(3, ending=True)
    assert [trials[i].read_status().state for i in (0, 2)] == ["completed", "completed"]
    status = trials[1].read_status()
    assert not status if how == "gone" else (status.state == "failed" and "could not be used" in status.message)


def test_a_worker_that_is_started_again_does_not_repeat_what_is_done(trial: Made, tmp_path: Path) -> None:
    done = trial(*OFF, name="done")
    assert run_trial(done, 1) == "completed"
    before, worker = done.status.read_text(), WorkerFolder(tmp_path / "worker")
    assert serve(worker, [done]) == 1 and worker.progress() == TaskProgress(1, ending=True)
    assert serve_trials(worker, idle_s=0.1) == 0, "a scheduler starts it once more: it returns at once"
    assert done.status.read_text() == before


class FakeJobs(Dispatcher):
    """Stands in for processes: jobs live until they are told otherwise."""

    slots, threads = 4, None

    def __init__(self) -> None:
        self.started: list[WorkerJob] = []
        self.dead: set[int] = set()
        self.killed: list[int] = []
        self.waiting: set[int] = set()
        """Those that the place has not started."""

    def submit_all(self, jobs: Sequence[Any]) -> list[LocalJob]:
        return [self._start(job) for job in jobs]

    def _start(self, job: Any) -> LocalJob:
        self.started.append(job)
        return LocalJob(len(self.started) - 1)

    def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
        return [ref.pid not in self.dead for ref in refs]

    def cancel(self, refs: Sequence[LocalJob]) -> None: ...

    def kill(self, refs: Sequence[LocalJob]) -> None:
        self.killed += [ref.pid for ref in refs]

    def log_tail(self, ref: LocalJob, lines: int = 8) -> str:
        return ""

    def queued(self, ref: LocalJob) -> bool:
        return ref.pid in self.waiting

    def worker(self, number: int) -> WorkerFolder:
        return WorkerFolder(Path(self.started[number].folder))


def test_the_dispatcher_and_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isaerft_sweep.dispatch.worker_pool.CLOSING_S", 0.3)
    jobs = FakeJobs()
    pool = ResidentDispatcher(jobs, tmp_path / "workers", 0.05)
    first = pool.submit(TrialJob("a", 1, None))
    assert pool.alive([first]) == [True] and jobs.worker(0).task(1) == Task("a", 1)
    jobs.worker(0).note(TaskProgress(1))
    assert pool.alive([first]) == [False]
    second = pool.submit(TrialJob("b", 1, None))
    assert second.task == 2 and len(jobs.started) == 1, "the waiting worker gets it"
    third = pool.submit(TrialJob("c", 1, None))
    assert third.task == 1 and len(jobs.started) == 2, "it is busy: another one starts"
    jobs.worker(0).note(TaskProgress(2, ending=True))
    assert pool.alive([second, third]) == [True, True], "one that ends keeps its slot until it has gone"
    jobs.dead.add(0)
    assert pool.alive([second, third]) == [False, True]
    # the second worker waits, then decides to end just before it would be given a trial
    jobs.worker(1).note(TaskProgress(1))
    assert pool.alive([third]) == [False]
    assert jobs.worker(1).claim(Task(None)) == 2
    fourth = pool.submit(TrialJob("d", 1, None))
    assert fourth.task == 1 and len(jobs.started) == 3, "nothing is given to a worker that ends"

    # another controller: the one that is busy is found again, nobody gives it more, and the one that waits ends
    jobs.worker(2).note(TaskProgress(1))
    assert pool.alive([fourth]) == [False]
    fifth = pool.submit(TrialJob("e", 1, None))
    waiting = pool.submit(TrialJob("f", 1, None))
    jobs.worker(3).note(TaskProgress(1))
    other = ResidentDispatcher(jobs, tmp_path / "workers", 0.05)
    assert jobs.worker(3).task(2) == Task(None) and waiting.name != fifth.name
    assert other.alive([fifth]) == [True]
    sixth = other.submit(TrialJob("g", 1, None))
    assert sixth.name not in (fifth.name, waiting.name)
    other.close()
    assert jobs.killed == [], "busy workers go on: the next controller adopts them"
    jobs.worker(2).note(TaskProgress(2))
    assert other.alive([fifth]) == [False]
    other.close()
    assert jobs.worker(2).task(3) == Task(None) and jobs.killed == [2], "one that does not end is killed"


def test_the_dispatcher_and_workers_of_packed_trials(tmp_path: Path) -> None:
    jobs = FakeJobs()
    jobs.slots = 2
    pool = ResidentDispatcher(jobs, tmp_path / "workers", 0.05, trials_per_pass=2)
    assert pool.slots == 4
    refs = pool.submit_all([TrialJob(name, 1, None) for name in "abcde"])
    assert [(ref.job.pid, ref.task) for ref in refs] == [(0, 1), (1, 1), (0, 2), (1, 2)], "spread, then packed"
    assert pool.free_worker_slots == 0 and pool.alive(refs) == [True] * 4
    jobs.worker(0).note(TaskProgress(0, (2,)))
    assert pool.alive(refs) == [True, True, False, True] and pool.free_worker_slots == 1 and pool.slots == 4
    assert pool.submit(TrialJob("e", 1, None)).task == 3
    # after an error a worker ends: what is over comes back at once, its place when the others are over and it has gone
    jobs.worker(1).note(TaskProgress(1, ending=True))
    assert pool.alive([refs[1], refs[3]]) == [False, True] and pool.slots == 3
    jobs.worker(1).note(TaskProgress(2, ending=True))
    assert pool.alive([refs[3]]) == [True] and pool.slots == 3
    jobs.dead.add(1)
    assert pool.alive([refs[3]]) == [False] and pool.slots == 4
    assert pool.submit(TrialJob("f", 1, None)).job.pid == 2

    # measured: a worker takes one trial until it has said how many
    measuring = ResidentDispatcher(jobs, tmp_path / "measuring", 0.05, trials_per_pass=None)
    measuring.submit_all([TrialJob("a", 1, None)])
    assert measuring.slots == 2
    jobs.worker(3).note_room(4)
    assert measuring.slots == 5 and measuring.free_worker_slots == 3
    limited = ResidentDispatcher(jobs, tmp_path / "limited", 0.05, trials_per_job=3, trials_per_pass=2)
    first = limited.submit_all([TrialJob(name, 1, None) for name in "abcd"])
    jobs.worker(4).note(TaskProgress(2))
    assert limited.alive(first) == [False, True, False, True] and limited.free_worker_slots == 1, "a third one and no fourth"


def test_a_worker_ends_after_an_error_and_when_nobody_wants_it(trial: Made, tmp_path: Path) -> None:
    broken = trial(*OFF, name="broken")
    spec = json.loads(broken.spec.read_text())
    spec["experiment"]["data"]["path"] = str(tmp_path / "nothing.jsonl")
    spec["experiment"]["data"]["source"] = "files"
    broken.spec.write_text(json.dumps(spec))
    worker = WorkerFolder(tmp_path / "worker")
    assert serve(worker, [broken, trial(*OFF, name="never")]) == 1
    assert broken.read_status().state == "failed" and worker.progress() == TaskProgress(1, ending=True)
    nobody = WorkerFolder(tmp_path / "nobody")
    assert serve_trials(nobody, idle_s=0.3) == 0
    assert nobody.progress() == TaskProgress(ending=True)


def test_a_trial_that_a_worker_has_not_begun_goes_back_when_it_ends(trial: Made, tmp_path: Path) -> None:
    """The second one cannot go with the first, whose error ends the worker."""
    broken, waiting = trial(*OFF, name="broken"), trial(*OFF, "adapter.sites.0.layer=1", name="waiting")
    spec = json.loads(broken.spec.read_text())
    spec["experiment"]["data"] |= {"path": str(tmp_path / "nothing.jsonl"), "source": "files"}
    broken.spec.write_text(json.dumps(spec))
    worker = WorkerFolder(tmp_path / "worker")
    for one in (broken, waiting):
        worker.claim(Task(str(one.path), 1), room=None)
    assert serve_trials(worker, trials_per_pass=2) == 1
    assert broken.read_status().state == "failed"
    assert (waiting.read_status().state, waiting.read_status().begun) == ("stopped", False)
    assert worker.progress() == TaskProgress(2, ending=True) and worker.task(3) == Task(None)


def test_a_worker_told_to_stop_within_a_step_is_given_nothing_more(
    trial: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial given between the word that the last one is over and the word that the worker ends would be lost with it."""

    def stopped_in_its_last_step(_trial: TrialFolder, _attempt: int, _shared: Any, flags: StopFlags) -> Any:
        flags.stop_requested = True
        return TrialState.STOPPED
        yield  # a generator, as a trial is

    said: list[TaskProgress] = []
    monkeypatch.setattr("isaerft_sweep.trial.worker.trial_steps", stopped_in_its_last_step)
    monkeypatch.setattr(WorkerFolder, "note", lambda _folder, progress: said.append(progress))
    worker = WorkerFolder(tmp_path / "worker")
    worker.claim(Task(str(trial(*OFF, name="t").path), 1))
    assert serve_trials(worker, idle_s=5) == 1
    assert said and all(progress.ending for progress in said)


class Workers(FakeJobs):
    """Stands in for a queue that starts ``running`` of the workers; each call runs what those have been given."""

    def __init__(self, slots: int, running: int) -> None:
        super().__init__()
        self.slots, self.running = slots, running
        self.runs: Counter[str] = Counter()

    def _start(self, job: Any) -> LocalJob:
        if len(self.started) >= self.running:
            self.waiting.add(len(self.started))
        return super()._start(job)

    def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
        for number in range(len(self.started)):
            if number not in self.waiting and number not in self.dead:
                self._work(number)
        return super().alive(refs)

    def kill(self, refs: Sequence[LocalJob]) -> None:
        super().kill(refs)
        self.dead |= {ref.pid for ref in refs}

    def _work(self, number: int) -> None:
        worker = self.worker(number)
        progress = worker.progress()
        task = worker.task(progress.upto + 1)
        if task is None:
            return
        if task.trial is None:
            self.dead.add(number)
            worker.note(TaskProgress(progress.upto, ending=True))
            return
        folder = TrialFolder(Path(task.trial))
        if folder.current_attempt() == task.attempt:
            self.runs[folder.path.name] += 1
            StatusWriter(folder, task.attempt).write(TrialState.COMPLETED, metric=0.5, ended=time.time())
        worker.note(progress.with_over(progress.upto + 1))


@pytest.mark.parametrize(("trials", "slots", "running"), [(200, 64, 8), (10, 64, 8), (9, 8, 1), (8, 8, 8)])
def test_idle_workers_take_over_what_waits_for_others_to_be_started(
    trials: int, slots: int, running: int, experiment: Callable[..., Any], tmp_path: Path
) -> None:
    composed = experiment(*TINY, "launcher.poll_s=0.001")
    folder = SweepFolder(tmp_path / "s")
    journal = Journal(folder)
    journal.write("sweep", sweep_id="s", question="q", metric="eval/loss", goal="minimize")
    definition = SweepDefinition("given points", Metric("eval/loss", "minimize"), {})
    points = FixedPoints([Point({"orpo.beta": 0.1 * (i + 1)}) for i in range(trials)])
    factory, jobs = TrialFactory(composed, definition, folder, "s", None), Workers(slots, running)
    pool = ResidentDispatcher(jobs, folder.workers, 0.001)
    state = make_state(journal, points, factory, trials)
    state.restore()
    SweepController(state, folder, pool, composed.launcher, Silent(), lambda: 0).run()
    records = list(journal.record.trials.values())
    assert all(record.state == "completed" and record.failures == 0 for record in records) and len(records) == trials
    taken = Counter(e["index"] for e in events(folder.path) if e["event"] == "takeover")
    assert set(taken.values()) <= {2} and bool(taken) == (running < min(slots, trials)), "each from one worker to one other"
    assert set(jobs.runs.values()) == {1} and len(jobs.runs) == trials, "each once"
    assert len(jobs.started) == min(slots, trials) and not jobs.waiting - set(jobs.killed), "the superfluous ones have gone"
    assert time_left_s(records, {}, trials) == 0.0
    journal.close()


def test_the_time_left_counts_what_really_runs() -> None:
    records = [TrialRecord(i, f"r{i}", f"{i}", Point({})) for i in range(10)]
    for i, record in enumerate(records):
        record.state = TrialState("completed" if i < 2 else "queued" if i < 8 else "created")
        record.seconds = 100.0 if i < 2 else 0.0
    half = TrialStatus(1, TrialState.RUNNING, step=5, max_steps=10, started=time.time() - 50)
    left_s = time_left_s(records, {2: half, 3: half, 4: TrialStatus()}, 12)
    assert left_s == pytest.approx((50 + 50 + 100 * (4 + 2 + 2)) / 2, rel=0.01), "two run: four in the queue are yet to come"


def test_a_job_that_survives_being_killed_is_given_up(
    experiment: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that hangs in the kernel: its trial goes on in another job, and it may write nothing more."""
    monkeypatch.setattr("isaerft_sweep.controller.loop.EXIT_S", 0.2)
    composed = experiment(*TINY, "launcher.poll_s=0.01", "launcher.heartbeat_s=0.1")

    class Hanging(FakeJobs):
        slots = 1

        def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
            for number, job in enumerate(self.started):
                folder = TrialFolder(Path(WorkerFolder(Path(job.folder)).task(1).trial))  # type: ignore[union-attr,arg-type]
                if number == 0 and not folder.read_status():
                    StatusWriter(folder, 1).write(TrialState.RUNNING, checkpoint=0)
                elif number == 1 and folder.current_attempt() == 2:
                    StatusWriter(folder, 2).write(TrialState.COMPLETED, metric=0.5, ended=time.time())
                    self.worker(1).note(TaskProgress(1))
            return super().alive(refs)

    folder, jobs = SweepFolder(tmp_path / "s"), Hanging()
    journal = Journal(folder)
    journal.write("sweep", sweep_id="s", question="q", metric="eval/loss", goal="minimize")
    factory = TrialFactory(composed, SweepDefinition("given points", Metric("m", "minimize"), {}), folder, "s", None)
    pool = ResidentDispatcher(jobs, folder.workers, 0.01)
    points = FixedPoints([Point({"orpo.beta": 0.1})])
    state = make_state(journal, points, factory, 1)
    state.restore()
    SweepController(state, folder, pool, composed.launcher, Silent(), lambda: 0).run()
    assert journal.record.trials[0].state == "completed" and journal.record.trials[0].attempt == 2
    assert 0 in jobs.killed and len(jobs.started) == 2
    journal.close()


def test_a_worker_passes_over_what_another_one_has_taken(trial: Made, tmp_path: Path) -> None:
    """It was started at the last moment: the newer attempt is not disturbed, and it goes on with its next trial."""
    taken, own = trial(*OFF, name="taken"), trial(*OFF, name="own")
    taken.begin_attempt(2)
    worker = WorkerFolder(tmp_path / "worker")
    worker.claim(Task(str(taken.path), 1))
    worker.claim(Task(str(own.path), 1), room=None)
    worker.claim(Task(None), room=None)
    assert serve_trials(worker, idle_s=5) == 1 and worker.progress() == TaskProgress(2, ending=True)
    assert not taken.read_status() and own.read_status().state == "completed"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.long
def test_memory_does_not_grow_over_100_trials(trial: Made, tmp_path: Path) -> None:
    shared = (
        "orpo.max_steps=1",
        "orpo.eval_untrained=never",
        "data.train_size=4",
        "data.eval_size=2",
        "orpo.max_length=120",
    )
    process, sizes = psutil.Process(), []
    trials = [trial(*OFF, *shared, f"orpo.learning_rate={0.001 * (i + 1)}", name=f"t{i}") for i in range(100)]

    def controller() -> None:
        for one in trials:
            number = worker.claim(Task(str(one.path), 1))
            wait_for(lambda n=number: worker.progress().over(n))
            sizes.append(process.memory_info().rss / 2**20)
        worker.claim(Task(None))

    worker = WorkerFolder(tmp_path / "worker")
    thread = threading.Thread(target=controller)
    thread.start()
    assert serve_trials(worker) == 100
    thread.join()
    assert all(one.read_status().state == "completed" for one in trials)
    # the first ones load code and fill caches; a trial that stayed would cost its model's or trainer's size each time
    assert sizes[-1] - sizes[29] < 30, [round(s) for s in sizes[::10]]


@pytest.mark.slow
def test_one_worker_runs_a_whole_sweep_and_a_crash_costs_one_trial(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    options = (*TINY, "name=s", "sweep.run_cap=3", "orpo.max_steps=30", "orpo.checkpoint_every_steps=5")
    controller = start(tmp_path, *options)
    wait_for(lambda: (sweep / "journal.jsonl").exists() and ended_states(sweep)["completed"] == 1)
    victim = wait_for(lambda: [s for s in stepping(sweep) if s["step"] > 10])[0]
    os.kill(victim["pid"], signal.SIGKILL)
    assert controller.wait(240) == 0, (tmp_path / "controller.out").read_text()
    assert ended_states(sweep) == {"completed": 3, "failed": 1}
    pids = {s["pid"] for s in statuses(sweep)}
    assert len(pids) == 2 and victim["pid"] in pids, "two processes for three trials: a new one after the crash"
    assert len(list((sweep / "workers").iterdir())) == 2
    assert processes_of(tmp_path) == [], "the waiting worker was told to end"
    runs = {p.name.rsplit("-", 1)[1] for p in sweep.glob("trials/*/wandb/wandb/offline-run-*")}
    assert runs == {e["run_id"] for e in events(sweep) if e["event"] == "trial"}, "each trial has its own W&B run"


@pytest.mark.slow
@pytest.mark.usefixtures("paced")
@pytest.mark.long
def test_a_controller_that_comes_back_finds_the_worker_and_goes_on_with_it(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "s"
    # long enough that the trial still runs when the next controller is there
    options = (*TINY, "name=s", "sweep.run_cap=2", "orpo.max_steps=40", "tracker=disabled")
    controller = start(tmp_path, *options)
    wait_for(lambda: (sweep / "journal.jsonl").exists() and stepping(sweep))
    controller.kill()
    controller.wait()
    assert start(tmp_path, *options).wait(480) == 0
    assert len({s["pid"] for s in statuses(sweep)}) == 1 and ended_states(sweep) == {"completed": 2}
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_without_residents_every_trial_has_a_process_of_its_own(launch, tmp_path: Path) -> None:
    done = launch(*TINY, "name=s", "sweep.run_cap=2", "launcher.resident=false", "tracker=disabled")
    assert done.returncode == 0, done.stderr
    assert len({s["pid"] for s in statuses(tmp_path / "outputs" / "s")}) == 2
