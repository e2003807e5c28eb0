"""Ranking that says what it does not know: intervals, probabilities, what a metric depends on, the edge of the space."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sweeps import RNG, make_sweep
from rich.console import Console
from scipy import stats
from trl.experimental.orpo import ORPOTrainer

from isaerft_sweep.cli import main
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.metrics import METRICS, depends_on_beta
from isaerft_sweep.results import leaderboard
from isaerft_sweep.results.caveats import dependence, edges
from isaerft_sweep.results.finding import find_adapter
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.statistics import interval, pair_values, show_probability
from isaerft_sweep.search.distributions import Categorical, Numeric
from isaerft_sweep.search.sampler import Point


def test_pair_values_are_trls() -> None:
    chosen, rejected = -RNG.gamma(2, 1, 100) - 1e-3, -RNG.gamma(2, 1, 100) - 1e-3
    fake = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    _, good, bad, ratio, odds = ORPOTrainer.odds_ratio_loss(fake, torch.tensor(chosen), torch.tensor(rejected))
    scores = {"chosen": chosen, "rejected": rejected}
    expected = {
        "eval/log_odds_chosen": odds,
        "eval/log_odds_ratio": ratio,
        "eval/rewards/chosen": good.mean(),
        "eval/rewards/rejected": bad.mean(),
        "eval/rewards/margins": (good - bad).mean(),
        "eval/rewards/accuracies": (good > bad).float().mean(),
        "eval/logps/chosen": chosen.mean(),
        "eval/logps/rejected": rejected.mean(),
    }
    for name, value in expected.items():
        found = pair_values(name, scores, 0.3)
        assert found is not None and found.mean() == pytest.approx(float(value), rel=1e-5), name
    assert pair_values("eval/nll_loss", scores, 0.3) is None and pair_values("train/logps/chosen", scores, 0.3) is None


def test_the_interval_is_scipys() -> None:
    values = RNG.normal(1, 2, 60)
    assert interval(values[:7]) is None, "so few tell nothing"
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.06)
    # all pairs agree: Wilson's interval does not collapse. (1 + z²/2n ± z√(z²/4n²)) / (1 + z²/n) with z = 1.96, n = 10
    assert interval(np.ones(10)) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0), abs=1e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = [low <= 0 <= high for low, high in (interval(RNG.normal(0, 1, 50)) for _ in range(300))]
    assert 0.90 <= np.mean(covered) <= 0.985


@pytest.mark.parametrize(
    ("metric", "swept", "words"),
    [
        ("eval/rewards/margins", ["orpo.beta"], "contains beta itself"),
        ("eval/loss", ["orpo.beta"], "contains beta itself"),
        ("eval/log_odds_chosen", ["orpo.beta", "orpo.learning_rate"], None),
        ("eval/rewards/margins", ["orpo.learning_rate"], None),
        ("eval/log_odds_chosen", ["data.eval_size"], "different text"),
        ("eval/nll_loss", ["orpo.max_length"], "different text"),
        ("eval/log_odds_chosen", ["model.name"], "different models"),
    ],
)
def test_what_a_metric_depends_on(metric: str, swept: list[str], words: str | None) -> None:
    said = dependence(metric, swept)
    assert bool(said) == bool(words) and (words is None or words in said[0])


@pytest.mark.parametrize("loss", ["orpo", "dpo", "simpo", "cpo"])
@pytest.mark.parametrize("goal", ["maximize", "minimize"])
@pytest.mark.parametrize("metric", [name for name in METRICS if depends_on_beta(name)])
def test_the_caveat_names_the_beta_that_the_formula_favours(metric: str, goal: str, loss: str) -> None:
    """The same log-probabilities, scored by the formulas with a small and a large beta: which of the two comes first?"""
    kind, sign = metric.partition("/")[2], 1 if goal == "maximize" else -1

    def score(beta: float, chosen: float, rejected: float) -> float:
        if loss == "dpo":  # against a reference between the two
            chosen, rejected = chosen + 1.5, rejected + 1.5
        rewards = {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected}
        rewards["rewards/margins"] = rewards["rewards/chosen"] - rewards["rewards/rejected"]
        if kind in rewards:
            return rewards[kind]
        if loss != "orpo":
            return np.log1p(np.exp(-rewards["rewards/margins"]))
        odds = chosen - np.log1p(-np.exp(chosen)) - rejected + np.log1p(-np.exp(rejected))
        return 2.0 + beta * np.log1p(np.exp(-odds))

    def first(chosen: float, rejected: float) -> str:
        return "large beta" if sign * score(5.0, chosen, rejected) > sign * score(0.1, chosen, rejected) else "small beta"

    said = dependence(metric, ["orpo.beta"], goal, loss)[0]
    good, bad = first(-1.0, -2.0), first(-2.0, -1.0)
    if loss == "dpo" and kind == "rewards/rejected":  # the rejected one's reward is below 0 in the first
        good, bad = bad, good
    if good == bad:
        assert f"favours {good}." in said
    else:
        what = "reward" if loss == "dpo" and kind in ("rewards/chosen", "rewards/rejected") else "margin"
        assert f"favours {good} where the {what} is above 0 and {bad} where it is below." in said


def test_a_probability_is_never_said_to_be_certain() -> None:
    shown = [show_probability(p) for p in (1.0, 0.9985, 0.991, 0.99, 0.5, 0.01, 0.004, 0.0)]
    assert shown == [">99%", ">99%", ">99%", "99%", "50%", "1%", "<1%", "<1%"]


def test_a_pair_without_a_score_does_not_spoil_the_others(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s")
    for trial, bad in (("run-tiny-4", float("nan")), ("run-tiny-1", 0.0)):  # log odds of probability 1 are infinite
        kept = json.loads(folder.trial(trial).evaluation.read_text())
        kept["trained"]["chosen"][3] = bad
        write_json(folder.trial(trial).evaluation, kept)
    sweep = read_sweep_folder(folder.path)
    low, high = sweep.best().interval or (np.nan, np.nan)
    assert np.isfinite([low, high]).all()
    assert sum(e.probability_best or 0 for e in sweep.entries) == pytest.approx(1)
    assert "over seeds and the 39 held-out pairs (1 without a finite score left out)" in shown(folder)


def test_repeats_of_a_point_are_one_candidate(tmp_path: Path) -> None:
    """The winner run three times, with two seeds: each of its trials has the point's probability."""
    folder = make_sweep(tmp_path / "s")
    once = read_sweep_folder(folder.path).best()
    journal = Journal(folder)
    for index, seed in ((5, None), (6, 7)):
        params = {**once.params, **({"orpo.seed": seed} if seed else {})}
        name = f"run-tiny-{index}"
        shutil.copytree(folder.trial("run-tiny-4").path, folder.trial(name).path)
        journal.write("trial", index=index, name=name, run_id=f"r{index}", params=params, unit={})
        journal.write("dispatch", index=index, attempt=1, job={"kind": "local", "pid": 1})
        value = once.value("eval/log_odds_chosen")
        journal.write("end", index=index, state="completed", metric=value, message="", seconds=10.0, given_up=False)
    journal.close()
    sweep = read_sweep_folder(folder.path)
    of_winner = [e.probability_best for e in sweep.entries if e.record.index in (4, 5, 6)]
    assert len(set(of_winner)) == 1 and (of_winner[0] or 0) > 0.9, "not a third each"


@pytest.mark.parametrize(
    ("value", "u", "words"),
    [(0.099, 0.99, "upper end"), (0.00011, 0.01, "lower end"), (0.003, 0.5, None)],
)
def test_the_edge_of_a_continuous_parameter(value: float, u: float, words: str | None) -> None:
    space = {"orpo.learning_rate": Numeric("log_uniform_values", 1e-4, 1e-1)}
    for unit in ({"orpo.learning_rate": u}, {}):  # a sweep of W&B tells values alone
        said = edges(space, Point({"orpo.learning_rate": value}, unit))
        assert bool(said) == bool(words) and (words is None or words in said[0])


def test_the_edge_of_values() -> None:
    def said(values: tuple[Any, ...], value: Any) -> list[str]:
        return edges({"orpo.beta": Categorical(values, (1 / len(values),) * len(values))}, Point({"orpo.beta": value}))

    assert "largest value" in said((0.05, 0.1, 0.2), 0.2)[0] and "smallest" in said((0.05, 0.1, 0.2), 0.05)[0]
    assert (
        not said((0.05, 0.1, 0.2), 0.1)
        and not said((0.1, 0.2), 0.2)
        and not said(("cosine", "linear", "constant"), "linear")
    )


def shown(folder: SweepFolder, metric: str | None = None) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    leaderboard.show(console, read_sweep_folder(folder.path, metric))
    return console.export_text()


def test_the_leaderboard_says_how_sure_it_is(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s")
    sweep = read_sweep_folder(folder.path)
    assert [e.record.index for e in sweep.entries] == [4, 3, 2, 1, 0] and [e.rank for e in sweep.entries] == [1, 2, 3, 4, 5]
    best = sweep.best()
    low, high = best.interval or (0, 0)
    assert low < best.metrics["eval/log_odds_chosen"] < high
    assert sum(e.probability_best or 0 for e in sweep.entries) == pytest.approx(1)
    text = shown(folder)
    assert "40 held-out pairs" in text and "isaerft-sweep confirm" in text and "contains beta" not in text


def test_a_metric_with_beta_in_it_is_named_and_another_can_be_asked_for(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s", "eval/rewards/margins")
    assert "contains beta itself" in shown(folder) and "--metric eval/log_odds_chosen" in shown(folder)
    other = shown(folder, "eval/log_odds_chosen")
    assert "contains beta itself" not in other and "Leaderboard: eval/log_odds_chosen, maximize" in other
    by_nll = read_sweep_folder(folder.path, "eval/nll_loss")
    assert by_nll.metric.goal == "minimize" and by_nll.best().record.index == 4


def test_best_as_json_and_bad_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path / "s")
    assert main(["best", str(folder.path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == "run-tiny-4" and facts["interval_95"][0] < facts["metric"]["eval/log_odds_chosen"]
    assert main(["best", str(folder.path), "--as", "overrides"]) == 0
    assert capsys.readouterr().out.startswith("orpo.learning_rate=0.0")
    assert main(["leaderboard", str(folder.path), "--metric", "eval/log_odds"]) == 2
    assert "metric 'eval/log_odds' is not logged" in (said := capsys.readouterr().err) and "eval/log_odds_chosen" in said


def test_a_broken_file_of_a_trial_is_named(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s")
    folder.trial("run-tiny-2").status.write_text("{half")
    folder.trial("run-tiny-3").evaluation.write_text('{"trained": {"pairs": ["a"], "chosen": [-1], "rejected": []}}')
    folder.definition.write_text("a: 1")
    text = shown(folder)
    assert text.count("unreadable") == 2 and "Trial 3: status.json or evaluation.json in" in text and "run-tiny-2" in text
    assert [e.record.index for e in read_sweep_folder(folder.path).entries if e.rank] == [4, 1, 0], "the others are ranked"
    assert "is no longer a valid sweep file" in text


def test_a_metric_that_nobody_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path / "s")
    assert main(["best", str(folder.path), "--metric", "eval/logps/chosen"]) == 2
    said = capsys.readouterr().err
    assert "5 trials have completed but none has eval/logps/chosen" in said and "eval/log_odds_chosen" in said
    assert "5 trials have completed but none has" in shown(folder, "eval/logps/chosen")


@pytest.mark.parametrize(
    "metric", ["eval/log_odds_chosen", "eval/rewards/margins", "eval/rewards/accuracies", "eval/nll_loss"]
)
@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_number_is_cut_off(metric: str, width: int, tmp_path: Path) -> None:
    sweep = read_sweep_folder(make_sweep(tmp_path / "s").path, metric)
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    if width >= 60:
        console.print(leaderboard.table(sweep, width=width))
        assert "…" not in re.sub(r"\d … ", "", console.export_text())
    pipe = Console(width=width, record=True, force_terminal=False, file=io.StringIO())
    leaderboard.show(pipe, sweep)
    line = next(row for row in pipe.export_text().splitlines() if row.strip().startswith("1 "))
    assert line.rstrip().endswith("10 s"), "a pipe gets all columns"


def test_an_interval_is_shown_with_the_digits_it_needs(tmp_path: Path) -> None:
    entry = read_sweep_folder(make_sweep(tmp_path / "s").path).best()
    entry.interval = (-0.0012, 0.0034)
    assert leaderboard.show_interval(entry) == "-0.0012 … 0.0034"
    entry.interval = (-0.1, 0.3)
    assert leaderboard.show_interval(entry) == "-0.10 … 0.30"


def test_a_trial_without_scores_is_ranked_without_an_interval(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s")
    folder.trial("run-tiny-4").evaluation.unlink()
    sweep = read_sweep_folder(folder.path)
    assert sweep.best().record.index == 4 and sweep.best().interval is None
    assert sum(e.probability_best or 0 for e in sweep.entries[1:]) == pytest.approx(1)


def test_the_best_trial_of_a_sweep_is_best_by_a_metric_of_ones_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_sweep(tmp_path / "s", "eval/rewards/margins")
    find_adapter(folder.path)
    said = capsys.readouterr().err
    assert "best trial by eval/rewards/margins" in said and "contains beta itself" in said
    find_adapter(folder.path, "eval/log_odds_chosen")
    said = capsys.readouterr().err
    assert "best trial by eval/log_odds_chosen" in said and "beta itself" not in said
    assert main(["best", str(folder.path), "--as", "path"]) == 0
    shown = capsys.readouterr()
    assert "contains beta itself" in shown.err and shown.out.strip().startswith(str(folder.path)), "on standard error alone"


def test_few_pairs_say_nothing_of_sureness(tmp_path: Path) -> None:
    sweep = read_sweep_folder(make_sweep(tmp_path / "s", pairs=6).path)
    assert not {"95 %", "best", "best (prior)"} & {str(column.header) for column in leaderboard.table(sweep).columns}
    assert any(
        "6 held-out pairs are too few to say how sure the ranking is: at least 8" in text
        for text in leaderboard.caveats(sweep)
    )


@pytest.mark.parametrize(("goal", "favoured"), [("minimize", "small gamma"), ("maximize", "large gamma")])
def test_simpos_loss_contains_gamma(goal: str, favoured: str) -> None:
    (said,) = dependence("eval/loss", ["orpo.gamma"], goal, "simpo")
    assert favoured in said
    margins = torch.tensor([0.3, -0.2])
    small, large = (-torch.nn.functional.logsigmoid(2.0 * margins - gamma).mean() for gamma in (0.1, 1.0))
    assert small < large, "by the formula: the loss rises with gamma"
    assert dependence("eval/loss", ["orpo.gamma"], goal, "orpo") == []


def test_a_dumb_terminal_cuts_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = read_sweep_folder(make_sweep(tmp_path / "s").path)
    wide = leaderboard.needed_width(leaderboard.table(sweep))
    monkeypatch.setenv("TERM", "dumb")
    assert leaderboard.needed_width(leaderboard.table(sweep)) == wide > 80
    assert leaderboard.needed_width(leaderboard.table(sweep, width=80)) <= 80
