"""Points that a sweep runs first, and grids in random order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isaerft_sweep.config.boundary import to_definition
from isaerft_sweep.controller.agent import run_for_agent
from isaerft_sweep.controller.build import make_sampler
from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.search.distributions import Constant, contains
from isaerft_sweep.search.sampler import Sampler, ShuffledGrid
from isaerft_sweep.search.start_points import StartPoints, point_in
from isaerft_sweep.search.sweep_file import read_parameters
from isaerft_sweep.specs import Experiment

SPACE = read_parameters(
    {
        "orpo.learning_rate": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1.0},
        "orpo.beta": {"values": [0.5, 1.0, 2.0]},
        "orpo.warmup_steps": {"distribution": "q_uniform", "min": 0, "max": 20, "q": 5},
        "orpo.seed": {"value": 3},
    }
)


def no_default(key: str) -> Any:
    raise AssertionError(key)


@given(lr=st.floats(1e-3, 1.0), beta=st.sampled_from([0.5, 1, 2.0]), warmup=st.sampled_from([0, 5, 10, 15, 20]))
@settings(deadline=None)
def test_a_point_in_the_space_is_where_the_samplers_see_it(lr: float, beta: float, warmup: int) -> None:
    values = {"orpo.learning_rate": lr, "orpo.beta": beta, "orpo.warmup_steps": warmup, "orpo.seed": 3}
    point = point_in(SPACE, values, no_default)
    assert point.params == values and contains(SPACE, point.params)
    for key, u in point.unit.items():
        assert SPACE[key].at(u) == pytest.approx(values[key], rel=1e-9)
    assert type(point.params["orpo.beta"]) is float, "as the space has it"


@pytest.mark.parametrize("method", ["random", "bayes", "grid"])
def test_they_come_first_and_once(method: str) -> None:
    space = SPACE if method != "grid" else {**SPACE, "orpo.learning_rate": Constant(0.1)}
    lr = 0.1 if method == "grid" else 0.02
    wanted = [{"orpo.learning_rate": lr, "orpo.beta": b, "orpo.warmup_steps": 5, "orpo.seed": 3} for b in (2.0, 0.5)]
    points = [point_in(space, values, no_default) for values in wanted]

    def made(known: int) -> list[dict[str, Any]]:
        """Nine points, the first ones restored as after a restart."""
        source = StartPoints(Sampler(space, method, 1), points)
        given_out = []
        for number in range(9):
            point = source.ask() if number >= known else before[number]
            assert point is not None
            if number < known:
                source.restore(point)
            source.tell(point, -abs(point.params["orpo.beta"] - 1.0))
            given_out.append(point)
        before[:] = given_out
        return [dict(point.params) for point in given_out]

    before: list[Any] = []
    whole = made(0)
    assert whole[:2] == wanted and len({tuple(p.values()) for p in whole}) == 9
    assert made(5) == whole, "a restart goes on with the same points"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"orpo.betta": 1}, "which the sweep does not vary. Did you mean 'orpo.beta'?"),
        ({"orpo.beta": 3}, "orpo.beta must be one of 0.5, 1.0, 2.0 but it has 3."),
        ({"orpo.learning_rate": 2}, "orpo.learning_rate must be a number from 0.001 to 1 but it has 2."),
        ({"orpo.learning_rate": True}, "must be a number"),
        ({"orpo.warmup_steps": 7}, "orpo.warmup_steps must be one of"),
        ({"orpo.seed": 4}, "orpo.seed must be one of 3"),
        ({}, "orpo.learning_rate must be a number from 0.001 to 1 but it leaves it out, and the config has 9.0."),
    ],
)
def test_a_point_outside_is_refused(values: dict[str, Any], words: str) -> None:
    rest = {"orpo.learning_rate": 0.1, "orpo.beta": 1.0, "orpo.warmup_steps": 0, "orpo.seed": 3}
    with pytest.raises(SpaceError) as error:
        point_in(SPACE, {**rest, **values} if values else {}, lambda _: 9.0)
    assert words in str(error.value)


def test_the_config_fills_what_is_left_out(experiment: Callable[..., Experiment]) -> None:
    composed = experiment(
        "sweep=quick", "orpo.learning_rate=0.05", "sweep.start=[{orpo.beta:5},{orpo.beta:1,orpo.learning_rate:0.1}]"
    )
    source = make_sampler(composed, to_definition(composed.sweep, composed))
    first, second = source.ask(), source.ask()
    assert first is not None and first.params == {"orpo.learning_rate": 0.05, "orpo.beta": 5.0}
    assert second is not None and second.params == {"orpo.learning_rate": 0.1, "orpo.beta": 1.0}


def test_a_shuffled_grid_has_every_point_once_in_an_order_of_its_seed() -> None:
    space = {**SPACE, "orpo.learning_rate": Constant(0.1)}

    def order(kind: type[Sampler], seed: int) -> list[str]:
        source = kind(space, "grid", seed)
        return [point.key for point in iter(source.ask, None)]

    plain = order(Sampler, 0)
    assert len(plain) == 15 and Counter(order(ShuffledGrid, 0)) == Counter(plain)
    assert order(ShuffledGrid, 0) == order(ShuffledGrid, 0) != plain and order(ShuffledGrid, 1) != order(ShuffledGrid, 0)


def test_a_huge_grid_is_shuffled_without_a_list() -> None:
    space = read_parameters({f"orpo.{key}": {"min": 1, "max": 2**40} for key in ("batch_size", "eval_batch_size")})
    source = ShuffledGrid(space, "grid", 0)
    points = [source.ask() for _ in range(50)]
    firsts = [point.params["orpo.batch_size"] for point in points if point]
    assert len(set(firsts)) == 50 and max(firsts) > 2**38


def test_shuffling_goes_with_grids(experiment: Callable[..., Experiment]) -> None:
    composed = experiment("sweep=quick", "sweep.shuffle=true")
    with pytest.raises(ConfigError, match="must go with method grid"):
        make_sampler(composed, to_definition(composed.sweep, composed))


@pytest.mark.parametrize(
    "option", ["sweep.start=[{orpo.beta:5}]", "sweep.shuffle=true", "sweep.seeds=2", "sweep.stop.probability_best=0.9"]
)
def test_under_an_agent_its_server_decides(option: str, experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match="under `wandb agent` the server of the sweep does"):
        run_for_agent(experiment("sweep=quick", option), [], {})


def test_permutations_differ() -> None:
    """The order is no rotation of the plain one."""
    space = read_parameters({"orpo.batch_size": {"min": 1, "max": 12}})
    values = [point.params["orpo.batch_size"] for point in iter(ShuffledGrid(space, "grid", 0).ask, None)]
    steps = {(b - a) % 12 for a, b in itertools.pairwise(values)}
    assert sorted(values) == list(range(1, 13)) and len(steps) > 3
