from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.resources import folder
from isaerft_sweep.search.distributions import Categorical, Constant, Numeric
from isaerft_sweep.search.parameters import DISTRIBUTIONS, read_parameter
from isaerft_sweep.search.sweep_file import read_sweep, read_sweep_file

UNIT = st.floats(min_value=0, max_value=1)
LR = "orpo.learning_rate"
GOOD = {"method": "random", "metric": {"name": "eval/loss"}, "parameters": {LR: {"min": 0.1, "max": 0.5}}}

# scipy's own inverse distribution functions, of W&B's definitions
SCIPY = {
    "uniform": (lambda a, b: stats.uniform(a, b - a), {"min": -2.0, "max": 3.0}),
    "log_uniform_values": (lambda a, b: stats.loguniform(a, b), {"min": 1e-6, "max": 5e-5}),
    "inv_log_uniform_values": (lambda a, b: stats.loguniform(a, b), {"min": 1e-6, "max": 5e-5}),
    "log_uniform": (lambda a, b: stats.loguniform(math.exp(a), math.exp(b)), {"min": -13.8, "max": -2.0}),
    "inv_log_uniform": (lambda a, b: stats.loguniform(math.exp(-b), math.exp(-a)), {"min": 2.0, "max": 13.8}),
    "normal": (lambda mu, sigma: stats.norm(mu, sigma), {"mu": 1.0, "sigma": 2.0}),
    "log_normal": (lambda mu, sigma: stats.lognorm(s=sigma, scale=math.exp(mu)), {"mu": -3.0, "sigma": 0.5}),
    "beta": (lambda a, b: stats.beta(a, b), {"a": 2.0, "b": 5.0}),
}


@pytest.mark.parametrize("kind", SCIPY)
def test_distributions_agree_with_scipy(kind: str) -> None:
    make, block = SCIPY[kind]
    read = read_parameter(LR, {"distribution": kind, **block})
    expected = make(*block.values())
    for u in np.linspace(0.001, 0.999, 57):
        assert read.at(u) == pytest.approx(expected.ppf(u), rel=1e-9), u


@pytest.mark.parametrize("kind", [k for k in DISTRIBUTIONS if k.startswith("q_")])
@given(u=UNIT)
def test_quantised_values_are_multiples_inside_the_limits(kind: str, u: float) -> None:
    block = {"q_normal": {"mu": 5, "sigma": 2}, "q_log_normal": {"mu": 1, "sigma": 0.5}, "q_beta": {"a": 2, "b": 3}}.get(
        kind, {"min": 1.0, "max": 4.55}
    )
    read = read_parameter(LR, {"distribution": kind, "q": 0.1, **block})
    value = read.at(u)
    assert value / 0.1 == pytest.approx(round(value / 0.1), abs=1e-6)
    assert len(repr(value)) < 12, "0.3, not 0.30000000000000004"
    if "max" in block:
        low, high = (block["min"], block["max"]) if "values" in kind or kind == "q_uniform" else (math.e, math.exp(4.55))
        assert low - 1e-9 <= value <= high + 1e-9


@given(st.integers(-50, 50), st.integers(0, 60), UNIT)
def test_int_uniform_covers_both_ends(low: int, width: int, u: float) -> None:
    assume(width > 0)
    read = read_parameter(LR, {"min": low, "max": low + width})
    assert isinstance(read, Numeric)
    assert read.at(0.0) == low and read.at(1.0) == low + width
    assert isinstance(read.at(u), int) and low <= read.at(u) <= low + width
    assert read.choices == tuple(range(low, low + width + 1))


def test_probabilities_are_kept() -> None:
    block = {"distribution": "categorical_w_probabilities", "values": ["a", "b", "c"], "probabilities": [0.5, 0.0, 0.5]}
    read = read_parameter(LR, block)
    drawn = [read.at(u) for u in np.linspace(0, 1, 1001)]
    assert drawn.count("b") == 0 and abs(drawn.count("a") - 500) <= 1
    assert read.choices == ("a", "c")


def test_defaults_are_wandbs() -> None:
    assert read_parameter(LR, {"value": 3}) == Constant(3)
    assert read_parameter(LR, {"values": [1, 2]}) == Categorical((1, 2), (0.5, 0.5))
    assert read_parameter(LR, {"min": 0.0, "max": 1.0}).kind == "uniform"
    assert read_parameter(LR, {"min": 1, "max": 9}).kind == "int_uniform"
    assert read_parameter(LR, {"mu": 0.0, "sigma": 1.0}).kind == "normal"


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"min": 0.5, "max": 0.1}, "min must not be above max but got min=0.5, max=0.1"),
        ({"distribution": "log_uniform", "min": 1e-6, "max": 5e-5}, "use distribution log_uniform_values"),
        ({"distribution": "log_uniform", "min": 1, "max": 1000}, "exponents within ±700"),
        (
            {"distribution": "log_uniform_values", "min": -14, "max": -10},
            "For natural-log exponents use distribution log_uniform.",
        ),
        ({"distribution": "loguniform", "min": 1, "max": 2}, "Did you mean 'log_uniform'"),
        (
            {"min": "1e-4", "max": 1},
            "min is the text '1e-4', not a number. YAML needs a point and a signed exponent: 1.0e-04.",
        ),
        ({"values": ["1e-4", "1e-3"]}, r"values\[0\] is the text '1e-4'"),
        ({"value": "1e-4"}, "value is the text '1e-4'"),
        ({"distribution": "uniform", "min": 1}, "needs min and max, but max is missing"),
        ({"distribution": "uniform", "min": 1, "max": 2, "q": 1}, "'q' does not go with distribution uniform"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 0}, "q must be above 0"),
        ({"distribution": "normal", "mu": 0, "sigma": -1}, "sigma must be at least 0"),
        ({"distribution": "beta", "a": 0, "b": 1}, "a and b must be above 0"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "whole numbers"),
        ({"values": []}, "at least one value"),
        ({"values": [1, 1]}, "different from each other"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6], "distribution": "categorical"}, "must sum to 1 but sum to 1.1"),
        ({"values": [1, 2], "probabilities": [1.0], "distribution": "categorical"}, "2 numbers"),
        ({"min": True, "max": 2}, "must be a finite number but got True"),
        ({"min": float("nan"), "max": 2}, "finite"),
        ({}, "must have a value, values, or min and max"),
        (0.1, "must be a mapping"),
    ],
)
def test_mistakes_in_a_parameter_name_key_value_and_right_form(block: object, said: str) -> None:
    with pytest.raises(SpaceError, match=said) as error:
        read_parameter(LR, block)
    assert LR in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "genetic"}, "method must be one of grid, random, bayes but got 'genetic'"),
        ({"method": None}, "method must be one of"),
        ({"metric": None}, "metric must have a name and a goal"),
        ({"metric": {"name": "eval/accuracy"}}, "'eval/accuracy' is not logged by any trial"),
        ({"metric": {"name": "eval/loss", "goal": "min"}}, "goal must be one of minimize, maximize"),
        ({"run_cap": 0}, "run_cap must be a whole number of at least 1"),
        ({"run_cap": "3"}, "run_cap must be a whole number"),
        ({"early_terminate": {"type": "envelope"}}, "must be hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "either min_iter, or max_iter and s"),
        ({"parameters": {}}, "parameters must be a mapping"),
        ({"parameters": {"lr": {"value": 1}}}, "must be a config key but got 'lr'"),
        ({"methods": 1}, "unknown key 'methods'. Did you mean 'method'"),
        ({"method": "grid"}, "method grid needs a finite set"),
    ],
)
def test_mistakes_in_a_sweep(change: dict, said: str) -> None:
    with pytest.raises((SpaceError, ConfigError), match=said):
        read_sweep({**GOOD, **change})


def test_a_file_that_is_no_yaml_or_not_there_is_named(tmp_path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("method: [")
    with pytest.raises(SpaceError, match=r"bad.yaml: not valid YAML"):
        read_sweep_file(bad)
    with pytest.raises(SpaceError, match="cannot be read"):
        read_sweep_file(tmp_path / "none.yaml")


def test_nested_parameters_become_dotted() -> None:
    nested = {"orpo": {"parameters": {"learning_rate": {"min": 0.1, "max": 0.5}, "beta": {"value": 1}}}}
    read = read_sweep({**GOOD, "parameters": nested})
    assert list(read.parameters) == [LR, "orpo.beta"]


def test_the_reference_sweep_is_the_published_one() -> None:
    read = read_sweep_file(folder("sweeps") / "reference.yaml")
    assert (read.method, read.metric.name, read.metric.goal, read.run_cap) == (
        "random",
        "eval/rewards/margins",
        "maximize",
        10,
    )
    assert read.parameters == {
        LR: Numeric("log_uniform_values", 1e-6, 5e-5),
        "orpo.beta": Categorical((0.05, 0.1, 0.15, 0.2), (0.25,) * 4),
    }


@pytest.mark.parametrize("path", sorted(folder("sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_file_is_valid_and_names_itself_in_its_command(path) -> None:
    read = read_sweep_file(path)
    assert f"sweep={path.stem}" in read.command and "${args_no_hyphens}" in read.command
