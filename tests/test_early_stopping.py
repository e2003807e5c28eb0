"""Early stopping in whole sweeps: who stops keeps a checkpoint, who turns out to be good comes back, a restart knows it all."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, events

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.build import evaluations_per_trial, make_state
from isaerft_sweep.controller.introduction import describe_early_stopping
from isaerft_sweep.controller.loop import Silent, SweepController
from isaerft_sweep.controller.trial_factory import TrialFactory
from isaerft_sweep.dispatch.base import Dispatcher
from isaerft_sweep.dispatch.job import Job, TrialJob
from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.job_refs import LocalJob
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status_writer import StatusWriter
from isaerft_sweep.scheduling.early_stopping import EarlyStopping
from isaerft_sweep.search.pruning import SuccessiveHalving
from isaerft_sweep.search.sampler import FixedPoints, Point
from isaerft_sweep.search.sweep_file import Metric, SweepDefinition

FILE = """\
method: grid
metric: {name: eval/nll_loss, goal: minimize}
early_terminate: {type: hyperband, min_iter: 2, eta: 2}
parameters: {orpo.learning_rate: {values: [0.3, 0.2, 1.0e-5, 2.0e-5]}}
"""


@pytest.mark.slow
@pytest.mark.long
def test_poor_trials_are_stopped_and_keep_a_checkpoint(launch, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(FILE)
    options = (*TINY, "name=s", "sweep=none", "sweep.file=s.yaml", "orpo.max_steps=160", "orpo.eval_fraction=0.05")
    done = launch(*options)
    assert done.returncode == 0, done.stderr
    assert "stopped early (hyperband) after evaluation 2, 4, 8, 16 of 20" in done.stdout
    sweep = tmp_path / "outputs" / "s"
    ended = {e["index"]: e for e in events(sweep) if e["event"] == "end"}
    assert ended[0]["state"] == "completed", "the first one has nobody to lose against"
    assert ended[2]["state"] == ended[3]["state"] == "pruned"
    names = {e["index"]: e["name"] for e in events(sweep) if e["event"] == "trial"}
    for index in (2, 3):
        folder = TrialFolder(sweep / "trials" / names[index])
        status = folder.read_status()
        assert status.state == "pruned" and 16 <= status.step < 160 and len(status.evaluations) >= 2
        assert list(folder.checkpoints.glob("checkpoint-*/.complete")), "it can be revived"
        assert [f.name for f in folder.path.glob("wandb/wandb/offline-run-*")]
    rows = {row["trial"]: row for row in csv.DictReader((sweep / "leaderboard.csv").read_text().splitlines())}
    assert rows[names[0]]["rank"] in ("1", "2") and rows[names[2]]["rank"] == "" and rows[names[2]]["state"] == "pruned"
    before = events(sweep)
    again = launch(*options)
    assert again.returncode == 0 and events(sweep) == before, "what was stopped early stays so"


class Scripted(Dispatcher):
    """Stands in for processes: every poll, each trial evaluates once more and does what it was asked to."""

    threads = None

    def __init__(self, curves: dict[float, list[float]], slots: int) -> None:
        self.curves, self.slots, self.jobs = curves, slots, {}
        self.order: list[float] = []
        self.folders: list[str] = []

    def submit_all(self, jobs: Sequence[Job]) -> list[LocalJob]:
        return [self._start(job) for job in jobs]

    def _start(self, job: Job) -> LocalJob:
        assert isinstance(job, TrialJob)
        folder = TrialFolder(Path(job.folder))
        beta = folder.read_spec().experiment.orpo.beta
        self.order.append(beta)
        known = len(folder.read_status().evaluations)
        self.jobs[job.folder] = [folder, StatusWriter(folder, job.attempt), beta, known]
        self.folders.append(job.folder)
        return LocalJob(len(self.folders) - 1)

    def alive(self, refs: Iterable[LocalJob]) -> list[bool]:
        return [self._step(self.folders[ref.pid]) for ref in refs]

    def _step(self, name: str) -> bool:
        folder, writer, beta, count = self.jobs[name]
        curve = self.curves[beta]
        if folder.stop_requested() == TrialState.PRUNED or count == len(curve):
            state = TrialState.COMPLETED if count == len(curve) else TrialState.PRUNED
            writer.write(state, metric=curve[count - 1], evaluations=tuple(curve[:count]), ended=time.time())
            return False
        self.jobs[name][3] = count + 1
        writer.write(TrialState.RUNNING, evaluations=tuple(curve[: count + 1]), metric=curve[count])
        return True

    def cancel(self, refs: Sequence[LocalJob]) -> None: ...

    def kill(self, refs: Sequence[LocalJob]) -> None: ...

    def log_tail(self, ref: LocalJob, lines: int = 8) -> str:
        return ""


def run(
    path: Path, experiment: Any, curves: dict[float, list[float]], trials: int, slots: int = 1
) -> tuple[Scripted, Journal]:
    folder = SweepFolder(path)
    journal = Journal(folder)
    if not journal.record.sweep_id:
        journal.write("sweep", sweep_id="s1", question="q", metric="eval/log_odds_chosen", goal="maximize")
    composed = experiment("model=tiny", "launcher.poll_s=0.001")
    definition = SweepDefinition("given", Metric("eval/log_odds_chosen", "maximize"), {})
    factory = TrialFactory(composed, definition, folder, "s1", None)
    dispatcher = Scripted(curves, slots)
    early = EarlyStopping(SuccessiveHalving([1, 3], 3), 1, 6)
    sampler = FixedPoints([Point({"orpo.beta": beta}) for beta in curves][:trials])
    state = make_state(journal, sampler, factory, trials, early)
    state.restore()
    SweepController(state, folder, dispatcher, composed.launcher, Silent(), lambda: 0).run()
    return dispatcher, journal


def test_a_trial_stopped_too_early_comes_back_where_it_was(experiment: Any, tmp_path: Path) -> None:
    # 0.3 is the second best of three and is stopped at the first rung; the later ones are worse, so it comes back
    first = {0.1: [0.5] * 6, 0.2: [0.4] * 6, 0.3: [0.45, 0.5, 0.6, 0.6, 0.6, 0.6]}
    more = {0.4: [0.1] * 6, 0.5: [0.2] * 6, 0.6: [0.1] * 6}
    dispatcher, journal = run(tmp_path / "s", experiment, {**first, **more}, trials=6)
    states = {r.point.params["orpo.beta"]: r.state for r in journal.record.trials.values()}
    assert states[0.1] == states[0.3] == "completed" and {states[b] for b in (0.4, 0.5, 0.6)} == {"pruned"}
    assert dispatcher.order.count(0.3) == 2, "stopped once, revived once"
    trial = next(r for r in journal.record.trials.values() if r.point.params["orpo.beta"] == 0.3)
    assert trial.attempt == 2 and len(SweepFolder(tmp_path / "s").trial(trial.name).read_status().evaluations) == 6
    journal.close()


def test_trials_that_evaluate_together_are_judged_together(experiment: Any, tmp_path: Path) -> None:
    """As co-batched trials do: the first of them is not let through because the others have not been read yet."""
    curves = {0.1: [0.1] * 6, 0.2: [0.2] * 6, 0.3: [0.4] * 6, 0.4: [0.3] * 6}
    _, journal = run(tmp_path / "s", experiment, curves, trials=4, slots=4)
    folder = SweepFolder(tmp_path / "s")
    lengths = {
        r.point.params["orpo.beta"]: len(folder.trial(r.name).read_status().evaluations)
        for r in journal.record.trials.values()
    }
    assert lengths == {0.1: 1, 0.2: 1, 0.3: 6, 0.4: 1}
    journal.close()


def test_a_controller_that_comes_back_remembers_the_curves(experiment: Any, tmp_path: Path) -> None:
    curves = {0.1: [0.5] * 6, 0.2: [0.4] * 6, 0.3: [0.45] * 6, 0.4: [0.1] * 6, 0.5: [0.2] * 6, 0.6: [0.1] * 6}
    _, journal = run(tmp_path / "s", experiment, curves, trials=4)
    assert sum(r.state == "pruned" for r in journal.record.trials.values()) == 2
    journal.close()
    dispatcher, journal = run(tmp_path / "s", experiment, curves, trials=6)
    assert dispatcher.order == [0.5, 0.6, 0.3], "two new trials, then the one that they have shown to be good"
    journal.close()


def test_a_diverged_trial_is_the_worst_one_at_every_rung() -> None:
    early = EarlyStopping(SuccessiveHalving([1, 3], 3), -1, 6)
    early.note(0, [float("nan")], diverged=True)
    early.note(1, [], diverged=True)
    assert early.curves == {0: [-math.inf] * 6, 1: [-math.inf] * 6}
    assert not early.stops(2, [3.0]), "better than those that diverged"
    assert early.stops(3, [4.0]) and not early.stops(3, [4.0]), "judged once"
    early.forget(3)
    assert early.stops(3, [4.0]), "its worker died before it could stop: judged again"
    assert early.revived([3]) is None


def test_the_sampler_hears_of_a_trial_once(experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, float | None]] = []
    monkeypatch.setattr(
        FixedPoints, "tell", lambda self, point, value, _violation, _others: told.append((point.params["orpo.beta"], value))
    )
    first = {0.1: [0.5] * 6, 0.2: [0.4] * 6, 0.3: [0.45, 0.5, 0.6, 0.6, 0.6, 0.7]}
    _, journal = run(tmp_path / "s", experiment, {**first, 0.4: [0.1] * 6, 0.5: [0.2] * 6, 0.6: [0.1] * 6}, trials=6)
    journal.close()
    assert sorted(told) == [(0.1, 0.5), (0.2, 0.4), (0.3, 0.7)], "the last value of those that ran to their end"


def test_what_is_said_and_refused(experiment: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(FILE)
    composed = experiment("model=tiny", "sweep=none", f"sweep.file={path}", "orpo.eval_fraction=1.0")
    assert evaluations_per_trial(composed) == 1
    assert "stops nothing" in describe_early_stopping(composed, to_definition(composed.sweep, composed))
    path.write_text(FILE.replace("eval/nll_loss", "train/loss"))
    with pytest.raises(ConfigError, match="a metric of evaluations"):
        to_definition(composed.sweep, composed)
    assert [evaluations_per_trial(experiment("orpo.max_steps=-1", f"orpo.eval_fraction={f}")) for f in (0.2, 0.3, 0.1)] == [
        5,
        4,
        10,
    ]
