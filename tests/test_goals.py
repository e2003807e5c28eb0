"""Several goals (W&B's ``metrics:``): Pareto fronts, preferences, samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from conftest import TINY, events
from helpers.sweeps import make_sweep
from hypothesis import given, settings
from hypothesis import strategies as st

from isaerft_sweep import load_sweep
from isaerft_sweep.cli import main
from isaerft_sweep.errors import SpaceError
from isaerft_sweep.results.answer import answer
from isaerft_sweep.results.pareto import fronts, preference
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.report.write import write_report
from isaerft_sweep.search.distributions import Numeric
from isaerft_sweep.search.sampler import Sampler
from isaerft_sweep.search.sweep_file import read_sweep

GOALS = [{"name": "eval/log_odds_chosen", "goal": "maximize"}, {"name": "eval/kl_base", "goal": "minimize"}]


def raw(**more: Any) -> dict[str, Any]:
    parameters = {"orpo.learning_rate": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-1}}
    return {"method": "random", "metrics": GOALS, "run_cap": 3, "parameters": parameters, **more}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_the_first_front_is_optunas(rows: list[tuple[int, int, int]]) -> None:
    study = optuna.create_study(directions=["maximize"] * 3)
    for row in rows:
        study.add_trial(optuna.trial.create_trial(values=[float(v) for v in row]))
    numbers = fronts(np.array(rows, dtype=float))
    assert {i for i, number in enumerate(numbers) if number == 0} == {trial.number for trial in study.best_trials}
    assert set(numbers) == set(range(max(numbers) + 1)), "each later front is that of what is left"


def test_the_preferred_one() -> None:
    values = np.array([[1.0, 0.0], [0.9, 0.8], [0.0, 1.0]])
    assert preference(values, [1, 1]).argmax() == 1 and preference(values, [9, 1]).argmax() == 0
    assert preference(values, [1, 30]).argmax() == 2
    assert preference(np.ones((2, 2)), [1, 1]).tolist() == [1, 1]


def sweep_of_goals(path: Path) -> Path:
    """The made-up sweep, whose log odds rise with the trial's number, with a KL that rises faster and a dominated trial."""
    folder = make_sweep(path)
    content = yaml.safe_load(folder.definition.read_text())
    del content["metric"]
    folder.definition.write_text(yaml.safe_dump({**content, "metrics": GOALS}))
    for number, kl in enumerate((0.01, 0.02, 0.6, 0.3, 0.9)):
        status = json.loads(folder.trial(f"run-tiny-{number}").status.read_text())
        status["metrics"]["eval/kl_base"] = kl
        folder.trial(f"run-tiny-{number}").status.write_text(json.dumps(status))
    return folder.path


def test_ranked_by_the_front_and_by_preference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep_of_goals(tmp_path / "s")
    sweep = read_sweep_folder(path)
    front = [entry.record.index for entry in sweep.entries if entry.on_front]
    assert sorted(front) == [0, 1, 3, 4] and sweep.entries[-1].record.index == 2, "trial 3 beats it in both"
    assert [entry.rank for entry in sweep.entries] == [1, 2, 3, 4, 5]
    by_gain = read_sweep_folder(path, prefer={"eval/log_odds_chosen": 9})
    assert by_gain.best().record.index == 4 and load_sweep(path, prefer={"eval/kl_base": 40}).best().name == "run-tiny-0"
    said = answer(by_gain)[0]
    assert "is preferred of the 4 on the Pareto front" in said and "eval/log_odds_chosen 9, eval/kl_base 1" in said
    assert read_sweep_folder(path, "eval/log_odds_chosen").goals == (), "--metric ranks by that alone"
    assert main(["leaderboard", str(path), "--prefer", "eval/kl_base=20"]) == 0
    shown = capsys.readouterr().out
    assert "eval/log_odds_chosen, maximize; eval/kl_base, minimize" in shown and "1 ●" in shown
    assert main(["best", str(path), "--prefer", "eval/los=2"]) == 2
    assert "--prefer must name a goal of the sweep" in capsys.readouterr().err
    assert main(["best", str(path), "--prefer", "eval/kl_base=0", "--prefer", "eval/log_odds_chosen=0"]) == 2
    assert "--prefer must leave a goal with a weight above 0" in capsys.readouterr().err
    assert main(["best", str(path), "--prefer", "eval/kl_base=2", "--metric", "eval/nll_loss"]) == 2
    assert "--prefer must go with a sweep of several goals" in capsys.readouterr().err
    page, _ = write_report(sweep)
    assert "Pareto front" in page.read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": GOALS[0]}, "metric and metrics must not both be given"),
        ({"metrics": GOALS[0]}, "metrics must be a list"),
        ({"metrics": []}, "metrics must be a list"),
        ({"metrics": [GOALS[0], GOALS[0]]}, "must be different"),
        ({"metrics": [{"name": "eval/lss", "goal": "minimize"}]}, "'eval/lss' is not logged"),
        ({"metrics": [{**GOALS[0], "target": 1}]}, "a name and a goal alone"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2}}, "early_terminate must go with a single metric"),
    ],
)
def test_bad_goals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        read_sweep(raw(**change))


def test_one_of_several_is_that_one() -> None:
    definition = read_sweep(raw(metrics=GOALS[:1]))
    assert definition.goals == () and definition.metric.name == "eval/log_odds_chosen"


def test_the_sampler_covers_the_front() -> None:
    """Two goals that pull apart, x and 1 − x − 4·(y − 0.3)²: the front is y = 0.3; half of TPE's points come near it."""
    space = {"x": Numeric("uniform", 0, 1), "y": Numeric("uniform", 0, 1)}
    near = {}
    for method in ("bayes", "random"):
        sampler = Sampler(space, method, seed=1, goals=2)
        points = []
        for _ in range(60):
            point = sampler.ask()
            assert point is not None
            x, y = point.params["x"], point.params["y"]
            sampler.tell(point, x - 4 * (y - 0.3) ** 2, others=[1 - x - 4 * (y - 0.3) ** 2])
            points.append(abs(y - 0.3))
        near[method] = float(np.mean(np.array(points[20:]) < 0.15))
    assert near["bayes"] > near["random"] + 0.15


@pytest.mark.slow
def test_a_real_sweep_with_two_goals(launch, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(raw(method="bayes")))
    command = [*TINY, "sweep=none", "sweep.file=s.yaml", "tracker=disabled", "name=s"]
    done = launch(*command, "launcher.slots=1")
    assert done.returncode == 0, done.stderr
    ends = [event for event in events(tmp_path / "outputs" / "s") if event["event"] == "end"]
    assert all(len(event["others"]) == 1 and event["others"][0] < 0 for event in ends), "minus the KL: larger is better"
    assert "Pareto front" in done.stdout
    again = launch(*command, "launcher.slots=1", "sweep.run_cap=4")
    assert again.returncode == 0 and "3 already ended" in again.stdout, again.stderr
