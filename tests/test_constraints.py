"""Constraints: what a sweep file may say, who wins under them, what the sampler learns, and that a restart knows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, events
from hypothesis import given
from hypothesis import strategies as st

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.errors import ConfigError, FolderError, SpaceError
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus, write_status_file
from isaerft_sweep.results.leaderboard import notes, table
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.search.constraints import Constraint, read_constraints, violation
from isaerft_sweep.search.parameters import read_parameter
from isaerft_sweep.search.sampler import Sampler
from isaerft_sweep.search.sweep_file import read_sweep

FILE = {
    "method": "bayes",
    "metric": {"name": "eval/log_odds_chosen", "goal": "maximize"},
    "constraints": {"eval/kl_base": {"at_most": 0.2}},
    "parameters": {"orpo.beta": {"values": [0.1, 0.2, 0.3, 0.4]}},
}


def test_what_a_sweep_file_may_say() -> None:
    found = read_constraints({"eval/kl_base": {"at_most": 0.2}, "eval/neutral_nll": {"at_most": "base + 0.05"}})
    assert found == (Constraint("eval/kl_base", 0.2), Constraint("eval/neutral_nll_rise", 0.05))
    assert read_constraints({"eval/rewards/accuracies": {"at_least": 0.5, "at_most": 0.9}}) == (
        Constraint("eval/rewards/accuracies", 0.5, at_most=False),
        Constraint("eval/rewards/accuracies", 0.9),
    )
    assert read_sweep(FILE).constraints == (Constraint("eval/kl_base", 0.2),) and read_constraints(None) == ()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "must be a mapping"),
        ({}, "must be a mapping"),
        ({"eval/kl_bas": {"at_most": 1}}, "is not logged by any trial. Did you mean 'eval/kl_base'"),
        ({"eval/kl_base": 0.2}, "must have at_most or at_least"),
        ({"eval/kl_base": {"below": 0.2}}, "must have at_most or at_least"),
        ({"eval/kl_base": {"at_most": "0.2"}}, "must be a finite number but got '0.2'"),
        ({"eval/kl_base": {"at_most": math.nan}}, "must be a finite number"),
        ({"eval/kl_base": {"at_most": True}}, "must be a finite number"),
        ({"eval/kl_base": {"at_most": "base + 0.1"}}, "is possible for eval/neutral_nll only"),
        ({"eval/kl_base": {"at_most": 0.1, "at_least": 0.3}}, "at_least must not be above at_most but got 0.3 and 0.1"),
        ({"eval/kl_base": {"at_most": -1}}, "must be 0 or more"),
        ({"eval/neutral_nll": {"at_most": "base - 0.1"}}, "or 'base \\+ NUMBER' but got"),
    ],
)
def test_what_it_may_not_say(raw: Any, said: str) -> None:
    with pytest.raises(SpaceError, match=rf"constraints.*{said}"):
        read_constraints(raw)


def test_a_constraint_needs_its_metric_measured(experiment: Any, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "method: grid\nmetric: {name: eval/loss}\nconstraints: {eval/kl_base: {at_most: 1}}\nparameters: {orpo.beta: {values: [1]}}\n"
    )
    composed = experiment(*TINY, "sweep=none", f"sweep.file={tmp_path}/s.yaml", "orpo.eval_harm=false")
    with pytest.raises(ConfigError, match=r"orpo.eval_harm must be true but is false: the sweep file names eval/kl_base"):
        to_definition(composed.sweep, composed)


@given(st.floats(-10, 10), st.floats(-10, 10), st.booleans())
def test_the_excess_is_zero_exactly_when_it_is_met(value: float, bound: float, at_most: bool) -> None:
    excess = Constraint("m", bound, at_most).excess(value)
    assert (excess == 0) == (value <= bound if at_most else value >= bound) and excess >= 0
    assert violation([Constraint("m", bound, at_most)], {}) == math.inf, "what was not measured is not met"


KL = (0.1, 0.9, 0.15, 0.4)
ODDS = (0.1, 0.9, 0.3, 0.5)


def made(path: Path, kl: tuple[float, ...] = KL) -> SweepFolder:
    """A sweep of four completed trials."""
    folder = SweepFolder(path)
    journal = Journal(folder)
    journal.write("sweep", sweep_id="s", question="q", metric="eval/log_odds_chosen", goal="maximize")
    for i, (divergence, odds) in enumerate(zip(kl, ODDS, strict=True)):
        journal.write("trial", index=i, name=f"run-{i}", run_id=f"r{i}", params={"orpo.beta": 0.1 * (i + 1)}, unit={})
        journal.write("dispatch", index=i, attempt=1, job={"kind": "local", "pid": 1})
        journal.write("end", index=i, state="completed", metric=odds, message="", seconds=1.0, given_up=False)
        trial = folder.trial(f"run-{i}")
        trial.path.mkdir(parents=True)
        metrics = {"eval/log_odds_chosen": odds, "eval/kl_base": divergence}
        write_status_file(trial.status, TrialStatus(1, TrialState.COMPLETED, metrics=metrics))
    journal.close()
    folder.definition.write_text(
        "method: bayes\nmetric: {name: eval/log_odds_chosen, goal: maximize}\n"
        "constraints: {eval/kl_base: {at_most: 0.2}}\nparameters: {orpo.beta: {values: [0.1, 0.2, 0.3, 0.4]}}\n"
    )
    return folder


def test_trials_that_meet_them_rank_first(tmp_path: Path) -> None:
    sweep = read_sweep_folder(made(tmp_path / "s").path)
    assert [entry.record.index for entry in sweep.entries] == [2, 0, 3, 1], "then by how far they break it"
    assert sweep.best().record.index == 2
    shown = table(sweep)
    assert list(shown.columns[0].cells) == ["1", "2", "(3)", "(4)"]
    said = "\n".join(str(text) for text in notes(sweep))
    assert "In brackets: trials that break a constraint (eval/kl_base at most 0.2)." in said


def test_where_none_meets_them_there_is_no_winner(tmp_path: Path) -> None:
    sweep = read_sweep_folder(made(tmp_path / "s", (0.5, 0.9, 0.3, 0.4)).path)
    assert sweep.winner is None
    with pytest.raises(FolderError, match=r"none of 4 completed trials meets the constraints \(eval/kl_base at most 0.2\)"):
        sweep.best()
    assert "The nearest is trial 3: eval/kl_base 0.3" in "\n".join(str(text) for text in notes(sweep))


def test_the_sampler_leaves_the_region_that_breaks_them() -> None:
    """Larger is better everywhere, but beyond one half a constraint is broken: the model's points stay below it."""
    space = {"x": read_parameter("x", {"min": 0.0, "max": 1.0})}

    def points(constrained: bool) -> list[float]:
        sampler, xs = Sampler(space, "bayes", seed=1), []
        for _ in range(16):
            point = sampler.ask()
            assert point is not None
            xs.append(point.params["x"])
            sampler.tell(point, xs[-1], max(0.0, xs[-1] - 0.5) if constrained else 0.0)
        return xs[6:]

    free, kept = points(constrained=False), points(constrained=True)
    assert max(free) > 0.95
    assert sum(x <= 0.55 for x in kept) > 6 and max(x for x in kept if x <= 0.5) > 0.45


@pytest.mark.slow
def test_a_real_sweep_under_a_constraint_is_resumed_with_it(launch: Any, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "method: grid\nmetric: {name: eval/nll_loss, goal: minimize}\nconstraints: {eval/kl_base: {at_most: 1.0e-3}}\n"
        "parameters: {orpo.learning_rate: {values: [0.5, 1.0e-5]}}\n"
    )
    options = (*TINY, "name=s", "sweep=none", "sweep.file=s.yaml", "tracker=disabled", "orpo.warmup_steps=0")
    done = launch(*options)
    assert done.returncode == 0, done.stderr
    assert "eval/kl_base at most 0.001" in done.stdout and "In brackets: trials that break a constraint" in done.stdout
    ended = {e["index"]: e for e in events(tmp_path / "outputs" / "s") if e["event"] == "end"}
    assert ended[0]["violation"] > 0 and "violation" not in ended[1]
    sweep = read_sweep_folder(tmp_path / "outputs" / "s")
    assert sweep.best().record.index == 1
    (tmp_path / "s.yaml").write_text((tmp_path / "s.yaml").read_text().replace("1.0e-3", "2.0e-3"))
    again = launch(*options)
    assert again.returncode == 2 and "holds another sweep" in again.stderr, "another constraint is another sweep"


def test_the_report_draws_gain_against_harm(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from isaerft_sweep.results.report.figures import gain_and_harm, spending, tradeoff
    from isaerft_sweep.results.report.gather import gather
    from isaerft_sweep.results.report.write import write_report

    sweep = read_sweep_folder(made(tmp_path / "s").path)
    data = gain_and_harm(gather(sweep))
    assert data is not None and (data.bound, data.untrained) == (0.2, None)
    assert [entry.record.index for entry in data.entries] == [2, 0, 3, 1]
    assert data.gains == [ODDS[i] for i in (2, 0, 3, 1)] and data.names(gather(sweep))[3].endswith("(breaks a constraint)")
    figure = tradeoff(gather(sweep))
    assert figure is not None and list(figure.data[0].marker.symbol) == ["star", "circle", "circle-open", "circle-open"]
    page, pictures = write_report(sweep)
    assert "figure-tradeoff" in page.read_text() and "tradeoff.png" in {path.name for path in pictures}
    entries, _, values, best = spending(gather(sweep)) or ([], [], [], [])
    allowed = [value for entry, value in zip(entries, values, strict=True) if not entry.violation]
    assert best[-1] == max(allowed) < max(values), "what breaks a constraint is not the best so far"
