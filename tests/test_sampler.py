from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isaerft_sweep.search.distributions import Categorical, Constant, Numeric
from isaerft_sweep.search.sampler import Sampler

LR, BETA = "orpo.learning_rate", "orpo.beta"
SPACE = {LR: Numeric("log_uniform_values", 1e-6, 1e-2), BETA: Categorical((0.05, 0.1, 0.15, 0.2), (0.25,) * 4)}
FINITE = {"orpo.seed": Numeric("int_uniform", 0, 4, integer=True), BETA: Categorical((0.1, 0.2), (0.5, 0.5))}


def objective(params: dict) -> float:
    """Best at lr 1e-4 and beta 0.15."""
    return -((math.log10(params[LR]) + 4) ** 2) - 20 * abs(params[BETA] - 0.15)


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_the_same_seed_and_history_give_the_same_points(method: str) -> None:
    def run(stop_at: int | None) -> list:
        sampler, history = Sampler(SPACE, method, seed=3), []
        for i in range(14):
            if i == stop_at:  # a new process: the history is told again
                sampler = Sampler(SPACE, method, seed=3)
                for point in history:
                    sampler.restore(point)
                    sampler.tell(point, objective(point.params))
            point = sampler.ask()
            history.append(point)
            sampler.tell(point, objective(point.params))
        return [p.key for p in history]

    assert run(None) == run(stop_at=11)


@pytest.mark.parametrize("method", ["random", "bayes", "grid"])
def test_a_finite_space_is_tried_whole_and_never_twice(method: str) -> None:
    sampler = Sampler(FINITE, method, seed=1)
    assert sampler.size == 10
    points = []
    while (point := sampler.ask()) is not None:
        points.append(point.key)
        sampler.tell(point, 0.0)
    assert len(points) == len(set(points)) == 10


def test_repeats_are_allowed_when_asked_for() -> None:
    sampler = Sampler({BETA: Categorical((1, 2), (0.5, 0.5))}, "random", repeats=True)
    assert len([sampler.ask() for _ in range(20)]) == 20


def test_grid_goes_through_the_product_in_order() -> None:
    sampler = Sampler(FINITE, "grid")
    first = [dict(sampler.ask().params) for _ in range(3)]
    assert first == [{"orpo.seed": 0, BETA: 0.1}, {"orpo.seed": 0, BETA: 0.2}, {"orpo.seed": 1, BETA: 0.1}]


def test_random_covers_the_range_evenly_on_its_own_scale() -> None:
    sampler = Sampler(SPACE, "random", seed=0)
    logs = np.array([math.log10(sampler.ask().params[LR]) for _ in range(64)])
    counts, _ = np.histogram(logs, bins=8, range=(-6, -2))
    assert counts.min() >= 6 and counts.max() <= 10, "64 Sobol points put about 8 into each of 8 equal parts"


@given(st.integers(0, 2**31), st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
@settings(max_examples=15, deadline=None)
def test_probabilities_decide_how_often_a_value_is_drawn(seed: int, weights: list[float]) -> None:
    total = sum(weights)
    space = {BETA: Categorical(tuple(range(len(weights))), tuple(w / total for w in weights))}
    sampler = Sampler(space, "random", seed=seed, repeats=True)
    drawn = [sampler.ask().params[BETA] for _ in range(128)]
    for value, weight in enumerate(weights):
        assert abs(drawn.count(value) / 128 - weight / total) < 0.05


def test_pending_points_are_told_apart() -> None:
    """W&B's first parallel bayes agents get the same point (wandb 5215); eight pending ones here are all different."""
    sampler = Sampler(SPACE, "bayes", seed=0)
    for _ in range(10):
        point = sampler.ask()
        sampler.tell(point, objective(point.params))
    pending = [sampler.ask() for _ in range(8)]
    assert len({p.key for p in pending}) == 8


def test_bayes_finds_a_better_point_than_random() -> None:
    def best(method: str, seed: int) -> float:
        sampler, found = Sampler(SPACE, method, seed=seed), []
        for _ in range(30):
            point = sampler.ask()
            found.append(objective(point.params))
            sampler.tell(point, found[-1])
        return max(found)

    bayes, random = ([best(m, seed) for seed in range(6)] for m in ("bayes", "random"))
    assert np.median(bayes) > np.median(random)


def test_goal_minimize_turns_the_search_round() -> None:
    sampler = Sampler(SPACE, "bayes", seed=0, sign=-1)
    for _ in range(30):
        point = sampler.ask()
        sampler.tell(point, -objective(point.params))
    last = [math.log10(sampler.ask().params[LR]) for _ in range(9)]
    assert -5 < np.median(last) < -3


def test_diverged_trials_steer_bayes_away() -> None:
    sampler = Sampler({LR: Numeric("log_uniform_values", 1e-6, 1e-2), BETA: Constant(0.1)}, "bayes", seed=0)
    late = []
    for i in range(40):
        point = sampler.ask()
        sampler.tell(point, None if point.params[LR] > 1e-4 else -abs(math.log10(point.params[LR]) + 5))
        late += [point.params[LR]] if i >= 24 else []
    assert sum(lr > 1e-4 for lr in late) < len(late) / 2, (
        "half of the space diverges; TPE goes there less than half the time"
    )


def test_eight_workers_start_on_quasi_random_points() -> None:
    """Until six outcomes are known, every point is the sequence's next, however many are pending."""
    bayes, random = Sampler(SPACE, "bayes", seed=4), Sampler(SPACE, "random", seed=4)
    asked = [bayes.ask() for _ in range(8)]
    assert [p.key for p in asked] == [random.ask().key for _ in range(8)]
    for point in asked[:5]:
        bayes.tell(point, objective(point.params))
    assert bayes.ask().key == random.ask().key
    bayes.tell(asked[5], objective(asked[5].params))
    assert bayes.ask().key != random.ask().key, "now the model is asked"


def test_a_diverged_point_is_worse_than_all_that_come_later() -> None:
    sampler = Sampler({**SPACE, **{f"p{i}": Numeric("uniform", 0, 1) for i in range(6)}}, "bayes", seed=0)  # TPE
    points = [sampler.ask() for _ in range(4)]
    for point, value in zip(points, [None, 1.0, -5.0, -9.0], strict=True):
        sampler.tell(point, value)
    values = [t.value for t in sampler._model.study.get_trials(deepcopy=False)]
    assert values[0] < min(values[1:])


def test_a_failed_point_says_nothing_of_its_surroundings() -> None:
    """The same history with and without a point that was given up: the model suggests the same."""

    def suggestion(failed: bool) -> str:
        sampler = Sampler(SPACE, "bayes", seed=5)
        lost = sampler.ask()
        told = [sampler.ask() for _ in range(12)]
        for point in told:
            sampler.tell(point, objective(point.params))
        if failed:
            sampler.forget(lost)
        return sampler._model.suggest(99, 0)

    def without() -> str:
        sampler = Sampler(SPACE, "bayes", seed=5)
        sampler.ask()
        told = [sampler.ask() for _ in range(12)]
        clean = Sampler(SPACE, "bayes", seed=5)
        for point in told:
            clean.restore(point)
            clean.tell(point, objective(point.params))
        return clean._model.suggest(99, 0)

    assert suggestion(failed=True) == without() != suggestion(failed=False)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_grid_is_the_product_of_its_values(ints: int, betas: int, seed: int) -> None:
    import itertools

    space = {
        "orpo.seed": Numeric("int_uniform", -1, ints - 2, integer=True),
        BETA: Categorical(tuple(i / 10 for i in range(betas)), (1 / betas,) * betas),
        LR: Numeric("q_uniform", 0.05, 0.35, q=0.1),
    }
    sampler, found = Sampler(space, "grid", seed=seed), []
    while (point := sampler.ask()) is not None:
        found.append(tuple(point.params.values()))
    assert found == list(itertools.product(range(-1, ints - 1), (i / 10 for i in range(betas)), (0.1, 0.2, 0.3)))


def test_a_grid_may_be_larger_than_the_memory() -> None:
    space = {"orpo.seed": Numeric("int_uniform", 0, 10**12, integer=True), BETA: Categorical((0.1, 0.2), (0.5, 0.5))}
    sampler = Sampler(space, "grid")
    assert sampler.size == 2 * (10**12 + 1)
    assert [sampler.ask().params["orpo.seed"] for _ in range(3)] == [0, 0, 1]
