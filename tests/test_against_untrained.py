"""Does the winner help at all: its gain over the untrained model on the same pairs; and what near-ties and repeats mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sweeps import make_sweep

from isaerft_sweep.controller.confirm import find_leaders
from isaerft_sweep.errors import SpaceError
from isaerft_sweep.journal.atomic_files import write_json
from isaerft_sweep.journal.journal import Journal
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.results.answer import answer
from isaerft_sweep.results.posterior import Trials, posterior
from isaerft_sweep.results.reading import read_sweep_folder
from isaerft_sweep.results.sweep_results import paired_gain


def log_odds(logp: np.ndarray) -> np.ndarray:
    return logp - np.log1p(-np.exp(logp))


def with_untrained(path: Path, shift: float, on: str = "") -> SweepFolder:
    """A sweep whose untrained model is ``shift`` below its winner, trial 5, in log probability of the chosen answers."""
    folder = make_sweep(path)
    scores = {i: json.loads(folder.trial(f"run-tiny-{i}").evaluation.read_text()) for i in range(5)}
    winner = scores[4]["trained"]
    noise = np.random.default_rng(3).normal(0, 0.02, len(winner["pairs"]))
    chosen = np.minimum(np.array(winner["chosen"]) - shift + noise, -0.005)
    untrained = {**winner, "step": 0, "chosen": chosen.tolist()}
    for i, kept in scores.items():
        own = {f"{on}trained": kept["trained"], **({f"{on}untrained": untrained} if i == 0 else {})}
        write_json(folder.trial(f"run-tiny-{i}").evaluation, {**kept, **own})
    status = json.loads(folder.trial("run-tiny-0").status.read_text())
    value = float((log_odds(chosen) - log_odds(np.array(winner["rejected"]))).mean())
    metrics = {"eval/log_odds_chosen": value, **({"test/log_odds_chosen": value} if on else {})}
    write_json(folder.trial("run-tiny-0").status, {**status, "untrained": metrics})
    return folder


def test_the_gain_is_that_of_the_pairs(tmp_path: Path) -> None:
    folder = with_untrained(tmp_path / "s", 0.2)
    sweep = read_sweep_folder(folder.path)
    gain = paired_gain(sweep.best(), sweep)
    assert gain is not None and gain[1] is not None
    trained = json.loads(folder.trial("run-tiny-4").evaluation.read_text())["trained"]
    untrained = json.loads(folder.trial("run-tiny-0").evaluation.read_text())["untrained"]
    of = [log_odds(np.array(s["chosen"])) - log_odds(np.array(s["rejected"])) for s in (trained, untrained)]
    expected = of[0] - of[1]
    half = 1.96 * expected.std(ddof=1) / np.sqrt(len(expected))
    assert gain[0] == pytest.approx(expected.mean()) and gain[2] == len(expected)
    assert gain[1] == pytest.approx((expected.mean() - half, expected.mean() + half), abs=0.2 * half)
    assert f"It gains {expected.mean():.4f} over the untrained model on the same 40 pairs" in "\n".join(answer(sweep))


@pytest.mark.parametrize(("shift", "words"), [(-0.2, "no better than the untrained model"), (0.001, "contains 0")])
def test_what_does_not_help_is_said(shift: float, words: str, tmp_path: Path) -> None:
    assert words in "\n".join(answer(read_sweep_folder(with_untrained(tmp_path / "s", shift).path)))


def test_the_test_pairs_have_their_gain_too(tmp_path: Path) -> None:
    folder = with_untrained(tmp_path / "s", 0.2, on="test_")
    status = json.loads(folder.trial("run-tiny-4").status.read_text())
    status["metrics"]["test/log_odds_chosen"] = 0.5
    write_json(folder.trial("run-tiny-4").status, status)
    assert "(a gain of " in "\n".join(answer(read_sweep_folder(folder.path)))


def test_near_ties_are_not_sure() -> None:
    """Four trials that training moved by 0.02 and that differ by a millionth."""
    rng = np.random.default_rng(0)
    pairs = rng.normal(0, 0.4, 48)
    values = np.stack([pairs + 1e-6 * i for i in range(4)])
    places = np.array([[0.5], [0.5001], [0.5002], [0.5003]])
    stated = posterior(Trials(values, np.arange(4), np.zeros(4, dtype=int), places, least_seed_sd=0.0004))
    assert float(stated.probability_best.max()) < 0.5


@pytest.mark.parametrize(("own", "common"), [(0.0, 4.5e-4), (3e-4, 0.0), (0.05, 0.02)])
def test_measured_seeds_are_what_they_are(own: float, common: float) -> None:
    """However small or large beside the differences of points."""
    rng = np.random.default_rng(1)
    pairs, quality = rng.normal(0, 0.4, 48), 1e-6 * np.arange(6)
    shifts = common * np.array([-1, 1, 0.5])
    values = np.stack([pairs + q + shifts[s] + own * rng.standard_normal() for s in range(3) for q in quality])
    known = posterior(Trials(values, np.tile(np.arange(6), 3), np.repeat(np.arange(3), 6), np.linspace(0, 1, 6)[:, None]))
    assert known.seed_sd == pytest.approx(float(np.hypot(own, common)), rel=0.6)


def test_a_method_without_seeds_has_none(tmp_path: Path) -> None:
    """A system prompt is the same with every seed: it is not run again, and its repeats measure nothing."""
    folder = make_sweep(tmp_path / "s")
    journal = Journal(folder)
    params = {"adapter.kind": "prompt", "orpo.beta": 0.1}
    for index, seed in ((5, 42), (6, 43)):
        folder.trial(f"run-{index}").path.mkdir()
        for name in ("evaluation", "status"):
            getattr(folder.trial(f"run-{index}"), name).write_bytes(getattr(folder.trial("run-tiny-4"), name).read_bytes())
        own: dict[str, Any] = {**params, "orpo.seed": seed}
        journal.write("trial", index=index, name=f"run-{index}", run_id=f"p{index}", params=own, unit={})
        journal.write("dispatch", index=index, attempt=1, job={"kind": "local", "pid": 1})
        journal.write("end", index=index, state="completed", metric=1.0, message="", seconds=1.0, given_up=False)
    journal.close()
    sweep = read_sweep_folder(folder.path)
    assert not sweep.seeds_known
    assert all(entry.params.get("adapter.kind") != "prompt" for entry in find_leaders(sweep))


def test_repeated_pairs_count_each_time(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s")
    for i in range(5):
        kept = json.loads(folder.trial(f"run-tiny-{i}").evaluation.read_text())
        kept["trained"]["pairs"] = [f"{n // 2:08x}" for n in range(40)]  # every pair twice, with its own scores
        write_json(folder.trial(f"run-tiny-{i}").evaluation, kept)
    sweep = read_sweep_folder(folder.path)
    for entry in sweep.entries[:2]:
        assert entry.expected == pytest.approx(entry.value("eval/log_odds_chosen"), abs=0.02)
    assert sweep.entries[0].expected != sweep.entries[1].expected


def test_a_point_meets_a_constraint_by_the_mean_over_its_seeds(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s")
    folder.definition.write_text(folder.definition.read_text() + "constraints: {eval/kl_base: {at_most: 0.2}}\n")
    journal = Journal(folder)
    for seed, index, kl in ((42, 5, 0.1), (43, 6, 0.25), (44, 7, 0.15)):
        folder.trial(f"run-{index}").path.mkdir()
        trial, model = folder.trial(f"run-{index}"), folder.trial("run-tiny-4")
        trial.evaluation.write_bytes(model.evaluation.read_bytes())
        status = json.loads(model.status.read_text())
        write_json(trial.status, {**status, "metrics": {**status["metrics"], "eval/kl_base": kl}})
        params = {"orpo.beta": 0.3, "orpo.seed": seed}
        journal.write("trial", index=index, name=f"run-{index}", run_id=f"p{index}", params=params, unit={})
        journal.write("dispatch", index=index, attempt=1, job={"kind": "local", "pid": 1})
        journal.write("end", index=index, state="completed", metric=1.0, message="", seconds=1.0, given_up=False)
    journal.close()
    sweep = read_sweep_folder(folder.path)
    broken = {entry.record.index: entry.violation for entry in sweep.entries}
    assert broken[5] == broken[6] == broken[7] == 0, "0.25 is above the bound, the mean 0.167 is not"
    assert all(broken[i] > 0 for i in range(5)), "not measured"


def test_a_preference_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "s")
    with pytest.raises(SpaceError, match="--prefer must go with a sweep of several goals"):
        read_sweep_folder(folder.path, prefer={"eval/log_odds_chosen": 2})
