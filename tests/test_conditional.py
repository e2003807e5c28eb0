"""Parameters whose distribution depends on another one's value: each kind of adapter with its own learning rates."""

from __future__ import annotations

import pytest
from conftest import TINY

from isaerft_sweep.config.boundary import check_definition, variants
from isaerft_sweep.config.compose import compose
from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.results.caveats import EDGE, edges
from isaerft_sweep.results.standing import describe
from isaerft_sweep.search.distributions import contains
from isaerft_sweep.search.sampler import Sampler
from isaerft_sweep.search.sweep_file import SweepDefinition, read_sweep

RATE = {
    "by": "adapter.kind",
    "cases": {
        "bias": {"distribution": "log_uniform_values", "min": 0.01, "max": 0.1},
        "lora": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-4},
    },
}
RANK = {"by": "adapter.kind", "cases": {"bias": {"value": None}, "lora": {"values": [1, 4]}}}
KINDS = {"values": ["bias", "lora"]}


def definition(method: str = "random", **parameters: object) -> SweepDefinition:
    space = {"adapter.kind": KINDS, "orpo.learning_rate": RATE, "adapter.rank": RANK, **parameters}
    metric = {"name": "eval/log_odds_chosen", "goal": "maximize"}
    return read_sweep({"method": method, "metric": metric, "run_cap": 40, "parameters": space})


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_every_point_is_of_its_case(method: str) -> None:
    space = definition(method).parameters
    sampler, seen = Sampler(space, method, seed=3), set()
    for number in range(40):
        point = sampler.ask()
        assert point is not None and contains(space, point.params)
        rate, rank = point.params["orpo.learning_rate"], point.params["adapter.rank"]
        if point.params["adapter.kind"] == "bias":
            assert 0.01 <= rate <= 0.1 and rank is None
        else:
            assert 1e-5 <= rate <= 1e-4 and rank in (1, 4)
        seen.add((point.params["adapter.kind"], rank))
        sampler.tell(point, float(number % 7))
    assert seen == {("bias", None), ("lora", 1), ("lora", 4)}


def test_a_restart_continues_with_the_same_points() -> None:
    space = definition("bayes").parameters
    whole = Sampler(space, "bayes")
    points = []
    for number in range(12):
        points.append(whole.ask())
        whole.tell(points[-1], float(number))
    again = Sampler(space, "bayes")
    for number, point in enumerate(points[:8]):
        again.restore(point)
        again.tell(point, float(number))
    for number, point in enumerate(points[8:], 8):
        assert again.ask() == point
        again.tell(point, float(number))


def test_a_finite_conditional_space_is_exhausted() -> None:
    parameters = {"adapter.kind": KINDS, "adapter.rank": RANK, "orpo.beta": {"values": [0.1, 0.2]}}
    raw = {"method": "random", "metric": {"name": "eval/loss"}, "run_cap": 9, "parameters": parameters}
    sampler = Sampler(read_sweep(raw).parameters, "random")
    assert sampler.size == 2 * (1 + 2)
    points = [sampler.ask() for _ in range(7)]
    assert points[-1] is None and len({p.key for p in points if p}) == 6


def test_it_is_checked_case_by_case() -> None:
    experiment = compose([*TINY, "sweep=none"])
    checked = check_definition(definition(), experiment)
    kinds = [(e.adapter.kind, e.adapter.rank) for e in variants(experiment, checked)]
    assert kinds == [("bias", None), ("lora", 1), ("lora", 4)]
    with pytest.raises(ConfigError, match=r"adapter.kind=bias.*adapter.rank must go with"):
        check_definition(definition(**{"adapter.rank": {"values": [1, 4]}}), experiment)


def test_it_is_described_and_the_edge_is_that_of_the_case() -> None:
    space = definition().parameters
    assert "bias: log_uniform_values from 0.01 to 0.1; lora:" in describe(space["orpo.learning_rate"])
    sampler = Sampler(space, "random")
    for _ in range(60):
        point = sampler.ask()
        assert point is not None
        said = [text for text in edges(space, point) if "learning_rate" in text]
        assert bool(said) == (not EDGE < point.unit["orpo.learning_rate"] < 1 - EDGE)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"by": "adapter.kind", "cases": {"bias": {"value": 0.1}}},
            r"cases must be those of adapter.kind, \['bias', 'lora'\]",
        ),
        ({"by": "adapter.knd", "cases": {"bias": {"value": 0.1}}}, "must name a parameter of the sweep.*adapter.kind"),
        ({"by": "orpo.beta", "cases": {"bias": {"value": 0.1}}}, "must name a parameter of the sweep|a list of values"),
        ({"by": "adapter.kind"}, "cases have a block for each"),
        ({"by": "adapter.kind", "cases": {"bias": RATE, "lora": {"value": 1}}}, "must be a parameter without `by`"),
        (
            {"by": "adapter.kind", "cases": {"bias": {"min": 1}, "lora": {"value": 1}}},
            r"orpo.learning_rate \(bias\) must have",
        ),
    ],
)
def test_bad_blocks(block: object, words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        definition(**{"orpo.learning_rate": block})


def test_grid_is_refused() -> None:
    with pytest.raises(SpaceError, match="method grid takes no parameter with `by`"):
        definition("grid")
