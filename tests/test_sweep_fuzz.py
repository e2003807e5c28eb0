"""Sweep files from a grammar of right and nearly right ones: refused in one line, or what is drawn is what the file says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from isaerft_sweep.config.boundary import check_definition
from isaerft_sweep.config.compose import compose
from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.search.distributions import Categorical, Constant, Numeric
from isaerft_sweep.search.parameters import DISTRIBUTIONS
from isaerft_sweep.search.sampler import Sampler
from isaerft_sweep.search.strict_yaml import parse_yaml
from isaerft_sweep.search.sweep_file import read_sweep
from isaerft_sweep.specs import TUNABLE, swept_value

EXPERIMENT = compose(["model=tiny", "data.train_size=24"])
BOUNDS = {  # of the specs, written down again
    "orpo.learning_rate": (0.0, math.inf, float),
    "orpo.beta": (0.0, math.inf, float),
    "orpo.eval_fraction": (0.0, 1.0, float),
    "orpo.weight_decay": (0.0, math.inf, float),
    "orpo.batch_size": (1, math.inf, int),
    "orpo.seed": (0, math.inf, int),
    "orpo.max_steps": (-1, math.inf, int),
}
KEYS = st.sampled_from(list(BOUNDS))
NUMBERS = (
    st.integers(-3, 12)
    | st.floats(-3, 12).map(lambda x: float(f"{x:.3g}"))
    | st.sampled_from([1e-6, 5e-5, 0.05, 0.4, 1, 1.0, "1e-4", "0.1", True, None, float("nan"), float("inf"), 10**9])
)
WORDS = st.sampled_from(
    ["distribution", "min", "max", "q", "mu", "sigma", "a", "b", "value", "values", "probabilities", "step"]
)


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    """A parameter's block: of a known distribution with all it needs, or with something missing or too much."""
    kind = draw(st.sampled_from([*DISTRIBUTIONS, "loguniform"]))
    block: dict[str, Any] = {}
    for name in DISTRIBUTIONS.get(kind, ("min", "max")):
        block[name] = draw(st.lists(NUMBERS, max_size=4)) if name in ("values", "probabilities") else draw(NUMBERS)
    if kind.startswith("q_") and draw(st.booleans()):
        block["q"] = draw(st.sampled_from([1, 0.5, 0.1, 2, 1.0, 0.05]) | NUMBERS)
    if draw(st.booleans()):
        block["distribution"] = kind
    if draw(st.integers(0, 5)) == 0:
        block[draw(WORDS)] = draw(NUMBERS)
    return block


SWEEPS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["random", "grid", "bayes"]),
        "metric": st.just({"name": "eval/log_odds_chosen", "goal": "maximize"}),
        "parameters": st.dictionaries(KEYS, blocks(), min_size=1, max_size=3),
    },
    optional={
        "run_cap": st.sampled_from([5, 0, "5", 5.0]),
        "early_terminate": st.fixed_dictionaries(
            {"type": st.sampled_from(["hyperband", "median", "asha"])},
            optional={
                "min_iter": st.sampled_from([1, 2.0, 0, "1", True, 1.5]),
                "eta": st.sampled_from([3, 2.5, 1, "3"]),
                "strict": st.sampled_from([True, False, "false", 0]),
            },
        ),
    },
)


@settings(max_examples=300, deadline=None)
@given(SWEEPS)
@example(
    {
        "method": "random",
        "metric": {"name": "eval/loss"},
        "parameters": {"orpo.beta": {"distribution": "q_uniform", "min": 0.05, "max": 0.4}},
    }
)
@example({"method": "grid", "metric": {"name": "eval/loss"}, "parameters": {"orpo.batch_size": {"values": [1, 1.0, 2]}}})
@example(
    {
        "method": "random",
        "metric": {"name": "eval/loss"},
        "parameters": {"orpo.batch_size": {"distribution": "uniform", "min": 2, "max": 8}},
    }
)
@example(
    {
        "method": "random",
        "metric": {"name": "eval/loss"},
        "parameters": {"orpo.beta": {"distribution": "normal", "mu": 0.2, "sigma": 0.1}},
    }
)
def test_a_sweep_is_refused_in_one_line_or_means_what_it_says(raw: dict[str, Any]) -> None:
    try:
        definition = check_definition(read_sweep(parse_yaml(yaml.safe_dump(raw))), EXPERIMENT)
    except (SpaceError, ConfigError) as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    assume(all(block.get("sigma", 1) > 1e-3 for block in raw["parameters"].values()))  # practically constant
    sampler = Sampler(definition.parameters, definition.method, seed=1)
    points = [point for point in (sampler.ask() for _ in range(12)) if point is not None]
    assert points, "a space has a point"
    assert len({point.key for point in points}) == len(points)
    for point in points:
        experiment = EXPERIMENT.with_params(point.params)  # raises when a trial would
        for key, block in raw["parameters"].items():
            check_value(key, block, point.params[key])
            assert swept_value(experiment, key) == point.params[key]
    assert_all_values_are_there(definition.parameters, raw)


def check_value(key: str, block: dict[str, Any], value: Any) -> None:
    """``value`` is one that the block, by W&B's definitions, and the key allow."""
    low, high, kind = BOUNDS[key]
    assert not isinstance(value, (str, bool)) and low <= value <= high
    assert kind is float or float(value).is_integer()
    if "value" in block or "values" in block:
        assert value in [block.get("value"), *block.get("values", [])]
        return
    q, name = block.get("q", 1), block.get("distribution", "")
    if name.startswith("q_"):
        assert value / q == pytest.approx(round(value / q), abs=1e-6)
    if "min" in block:
        ends = [block["min"], block["max"]]
        if name.endswith("log_uniform"):  # exponents, of 1/x for the inverse one
            ends = [math.exp(-end if name.startswith("inv") else end) for end in ends]
        assert min(ends) * (1 - 1e-9) - 1e-12 <= value <= max(ends) * (1 + 1e-9) + 1e-12


def assert_all_values_are_there(space: dict[str, Any], raw: dict[str, Any]) -> None:
    for key, distribution in space.items():
        block = raw["parameters"][key]
        if isinstance(distribution, Categorical):
            assert list(distribution.values) == block["values"]
        elif isinstance(distribution, Constant):
            assert distribution.value in (block.get("value"), block.get("min")) or block.get("sigma") == 0
        else:
            assert isinstance(distribution, Numeric) and distribution.size >= 1


def test_the_keys_bounds_are_those_of_the_specs() -> None:
    """The table above is right where a spec has a bound."""
    for key, (low, high, kind) in BOUNDS.items():
        section, _, name = key.partition(".")
        meta = TUNABLE[section].__dataclass_fields__[name].metadata
        assert (meta.get("at_least", meta.get("above")), meta.get("at_most", math.inf)) == (low, high)
        assert TUNABLE[section].__annotations__[name] == kind.__name__
