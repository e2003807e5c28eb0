"""Early stopping: rungs, who stops, who comes back; checked against W&B's brackets and against formulas written out."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isaerft_sweep.errors import SpaceError
from isaerft_sweep.search.pruning import GrowingCurves, MedianRule, SuccessiveHalving, evaluations, make_pruner, rungs
from isaerft_sweep.search.sweep_file import read_sweep

SWEEP = {
    "method": "random",
    "metric": {"name": "eval/log_odds_chosen", "goal": "maximize"},
    "parameters": {"orpo.beta": {"values": [0.1, 0.2]}},
}


@pytest.mark.parametrize(
    ("early", "evaluations", "expected"),
    [
        ({"type": "hyperband", "min_iter": 3}, 30, [3, 9, 27]),
        ({"type": "hyperband", "min_iter": 3, "eta": 2}, 27, [3, 6, 12, 24]),
        ({"type": "hyperband", "max_iter": 27, "s": 2}, 27, [3, 9]),
        ({"type": "hyperband", "max_iter": 81, "s": 3}, 20, [3, 9]),
        ({"type": "hyperband", "min_iter": 1, "eta": 1.5}, 5, [1, 2, 3]),
        ({"type": "hyperband", "min_iter": 5}, 5, []),
        ({"type": "hyperband", "max_iter": 20, "s": 9}, 20, [2, 6]),
    ],
)
def test_rungs_are_w_and_bs_brackets(early: dict, evaluations: int, expected: list[int]) -> None:
    assert rungs(early, evaluations) == expected


def test_a_trial_goes_on_when_it_is_among_the_best_third() -> None:
    asha = SuccessiveHalving([1, 3], eta=3, strict=True)
    assert not asha.stops(0, {0: [-5.0]}), "nobody to compare with"
    assert not asha.stops(1, {0: [0.1], 1: [-9.0]}), "until eta have come, everybody goes on"
    curves = {0: [0.1], 1: [0.2], 2: [0.3]}
    assert [asha.stops(i, curves) for i in curves] == [True, True, False]
    assert not asha.stops(0, {**curves, 0: [0.1, 0.0]}, since=1), "it decides at rungs alone"
    assert asha.stops(0, {**curves, 0: [0.1, 0.0]}, since=0), "also when it is looked at a little late"
    assert SuccessiveHalving([2], 3, strict=True).stops(0, {0: [0.9, 0.1], 1: [0.2, 0.2], 2: [0.3, 0.3]})
    assert not SuccessiveHalving([2], 3).stops(0, {0: [0.9, 0.1], 1: [0.2, 0.2], 2: [0.3, 0.3]}), "its best counts"
    later = {0: [0.1, 0.5, 0.9], 1: [0.2, 0.5, 1.0], 2: [0.3, 0.4, 0.8]}
    assert [asha.stops(i, later) for i in later] == [True, False, True], "the third evaluation decides, not the first"


def test_a_stopped_trial_is_revived_when_it_turns_out_to_be_good() -> None:
    asha = SuccessiveHalving([1, 3], eta=3)
    curves = {0: [0.3], 1: [0.5], 2: [0.1]}
    assert asha.revived([0, 2], curves) is None
    worse = {i: [0.0] for i in range(3, 6)}
    assert asha.revived([0, 2], {**curves, **worse}) == 0, "two of six are worth going on with"
    further = {**curves, **worse, 0: [0.3, 0.3, 0.3], 1: [0.5, 0.2, 0.1], 2: [0.1, 0.1, 0.2]}
    assert asha.revived([2, 0], further) == 0, "the one that came furthest first"


def test_the_median_rule() -> None:
    rule = MedianRule(grace=2)
    others = {0: [1.0, 2.0, 3.0], 1: [2.0, 2.0, 2.0], 2: [0.0, 1.0, 5.0]}
    # running means of the others after two evaluations: 1.5, 2.0, 0.5; their median is 1.5
    assert rule.stops(9, {**others, 9: [1.4, 1.2]}) and not rule.stops(9, {**others, 9: [1.6, 0.0]})
    assert not rule.stops(9, {**others, 9: [-9.0]}), "grace"
    assert not rule.stops(9, {0: [1.0, 2.0], 1: [2.0, 2.0], 9: [-9.0, -9.0]}), "too few others"
    assert not rule.stops(9, {**others, 9: [1.4, 1.2]}, since=2)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=9, max_size=9), min_size=3, max_size=40), st.sampled_from([2, 3, 4]))
@settings(max_examples=60, deadline=None)
def test_the_best_at_every_rung_is_never_lost(curves: list[list[float]], eta: int) -> None:
    """Run one after the other as a controller would; whoever is best at a rung is never stopped there, or comes back."""
    asha = SuccessiveHalving([1, 3], eta, strict=True)
    seen: dict[int, list[float]] = {}
    stopped: set[int] = set()

    def run(index: int) -> None:
        stopped.discard(index)
        start = len(seen.setdefault(index, []))
        for value in curves[index][start:]:
            seen[index].append(value)
            if asha.stops(index, seen, since=len(seen[index]) - 1):
                stopped.add(index)
                return

    for index in range(len(curves)):
        run(index)
        while (again := asha.revived(stopped, seen)) is not None:
            run(again)
    best_at_first = max(range(len(curves)), key=lambda i: curves[i][0])
    assert len(seen[best_at_first]) > 1
    for index in stopped:
        rung = len(seen[index])
        reached = sorted((c[rung - 1] for c in seen.values() if len(c) >= rung), reverse=True)
        assert seen[index][-1] < reached[math.floor(len(reached) / eta) - 1]


def test_it_saves_most_of_the_work_and_keeps_the_best_where_curves_keep_their_order() -> None:
    rng = np.random.default_rng(0)
    level = rng.random(60)
    curves = {i: [float(level[i] * (1 - 0.5 ** (t + 1))) for t in range(9)] for i in range(60)}
    asha, seen = SuccessiveHalving([1, 3], 3), {}
    for i, curve in curves.items():
        seen[i] = []
        for value in curve:
            seen[i].append(value)
            if asha.stops(i, seen, since=len(seen[i]) - 1):
                break
    assert len(seen[int(level.argmax())]) == 9
    assert sum(map(len, seen.values())) < 0.5 * 60 * 9


@pytest.mark.parametrize(
    ("early", "words"),
    [
        ({"type": "envelope"}, "must be hyperband or median"),
        ({"type": "hyperband", "min_iter": 3, "eta": 1}, "eta must be a number above 1"),
        ({"type": "median"}, "min_iter"),
        ({"type": "median", "min_iter": 2, "s": 3}, "unknown key 's'"),
        ({"type": "hyperband", "min_iter": 2, "max_iter": 3, "s": 3}, "either min_iter"),
    ],
)
def test_mistakes_are_named(early: dict, words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        read_sweep({**SWEEP, "early_terminate": early})


def test_what_a_sweep_file_asks_for() -> None:
    assert make_pruner(None, 9) is None
    asha = make_pruner({"type": "hyperband", "min_iter": 2, "eta": 4}, 9)
    assert isinstance(asha, SuccessiveHalving) and asha.rungs == [2, 8] and asha.eta == 4
    assert isinstance(make_pruner({"type": "median", "min_iter": 2}, 9), MedianRule)


@given(st.lists(st.lists(st.integers(0, 5).map(float), max_size=6), max_size=12), st.randoms())
def test_curves_that_grow_decide_as_all_sorted_anew(curves: list[list[float]], chance: random.Random) -> None:
    growing, plain, stopped = GrowingCurves(), {}, set()
    quick, slow = SuccessiveHalving([1, 3], 3), SuccessiveHalving([1, 3], 3)
    left = [(i, n) for i, curve in enumerate(curves) for n in range(1, len(curve) + 1)]
    for i, n in sorted(left, key=lambda pair: (pair[1], chance.random())):
        growing[i] = plain[i] = curves[i][:n]
        stops = slow.stops(i, dict(plain), n - 1)
        assert quick.stops(i, growing, n - 1) == stops
        if stops:
            stopped.add(i)
        assert quick.revived(sorted(stopped), growing) == slow.revived(sorted(stopped), dict(plain))


def test_evaluations_are_as_many_as_the_trainer_makes() -> None:
    assert evaluations(0.1, 24) == 8 and evaluations(0.2, 62) == 5 and evaluations(1.0, 7) == 1 and evaluations(0.5, 3) == 2
    assert evaluations(0.1, -1) == 10 and evaluations(0.3, -1) == 4
