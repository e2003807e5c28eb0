from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.paths import folder
from isaerft_sweep.search.distributions import Categorical, Constant, Numeric
from isaerft_sweep.search.parameters import DISTRIBUTIONS, read_parameter
from isaerft_sweep.search.strict_yaml import parse_yaml
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
        ({"values": [1, 1.0, 2]}, "different from each other"),
        ({"values": [[1, 2], [1.0, 2]]}, "different from each other"),
        ({"distribution": "q_uniform", "min": 0.05, "max": 0.4}, "q is 1, which is W&B's when it is left out"),
        (
            {"distribution": "q_uniform", "min": 0.05, "max": 0.4, "q": 0.5},
            "q must leave a multiple of itself between 0.05 and 0.4",
        ),
        ({"distribution": "q_uniform", "min": 0.3, "max": 0.3, "q": 0.2}, "q must leave a multiple"),
        ({"distribution": "q_log_uniform_values", "min": 1e-6, "max": 1e-3}, "q must leave a multiple .* Give a smaller q"),
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
        ({"scheduler": {"engine": "nope"}}, "scheduler.engine must be one of wandb, optuna, ax"),
        ({"scheduler": "optuna"}, "scheduler.engine must be one of wandb, optuna, ax"),
        ({"scheduler": {"engine": "optuna", "enginee": 1}}, "scheduler has an unknown key 'enginee'"),
        ({"scheduler": {"engine": "ax", "source": "s.py"}}, "scheduler.source names Python code of your own"),
        ({"scheduler": {"engine": "optuna", "search_space": "f"}}, "scheduler.search_space names Python code"),
        ({"early_terminate": {"type": "hyperband"}}, "either min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "s": 3}}, "either min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "max_iter": 8}}, "either min_iter, or max_iter and s"),
        ({"parameters": {}}, "parameters must be a mapping"),
        ({"parameters": {"lr": {"value": 1}}}, "must be a config key but got 'lr'"),
        ({"methods": 1}, "unknown key 'methods'. Did you mean 'method'"),
        ({"method": "grid"}, "method grid needs a finite set"),
        ({"settings": {"x": 1}}, "unknown key 'settings'"),
        ({"command": "python -m isaerft_sweep.launch"}, "command must be a list of words but got 'python -m"),
        ({"command": [["a"]]}, "command must be a list of words"),
        ({"program": 3}, "program must be text but got 3"),
        ({"project": ["a"]}, "project must be text"),
        ({"metric": {"name": "eval/loss", "target": "low"}}, "metric.target must be a finite number but got 'low'"),
        ({"metric": {"name": "eval/loss", "impute": "best"}}, "metric.impute must be worst or left out but got 'best'"),
        ({"metric": {"name": "eval/loss", "impute_while_running": "latest"}}, "impute_while_running must be worst"),
        ({"metric": {"name": "eval/loss", "gaol": "minimize"}}, "metric has an unknown key 'gaol'. Did you mean 'goal'"),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": "false"}},
            "strict must be true or false but got 'false'",
        ),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1.5}}, "min_iter must be a whole number of at least 1"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1}}, "eta must be a number above 1"),
        ({"early_terminate": {"type": "hyperband", "min_iter": "2"}}, "min_iter must be a whole number"),
        (
            {"parameters": {"orpo.beta": {"value": 1}, "orpo": {"parameters": {"beta": {"value": 2}}}}},
            "orpo.beta is given twice, with a dot and as a nested block",
        ),
        ({"parameters": {"orpo": {"parameters": {"beta": {"value": 2}}, 3: 4}}}, "a nested block must hold nothing but"),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: random\nmethod: grid\n", "line 2: 'method' is given twice, first in line 1"),
        ("{method: random, method: grid}", "'method' is given twice"),
        (
            "parameters:\n  orpo.beta: {values: [1, 2, 3]}\n  orpo.beta: {value: 1}\n",
            "line 3: 'orpo.beta' is given twice, first in line 2",
        ),
        ("parameters:\n  orpo.beta: {min: 1, max: 2, min: 3}\n", "line 2: 'min' is given twice"),
        ("a: &x {b: 1}\nc: {<<: *x, d: 1, d: 2}\n", "line 2: 'd' is given twice"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("a: 2026-13-45\n", "not valid YAML"),
        ("[" * 3000, "nested too deeply"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_yaml_that_has_two_meanings_or_none(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(SpaceError, match=said) as error:
        read_sweep_file(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_defaults_of_a_merged_mapping_may_be_replaced() -> None:
    assert parse_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\n")["d"] == {"b": 3, "c": 2}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_a_sweep_file_in_another_encoding(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("# größer\n" + yaml.safe_dump(GOOD), encoding=encoding)
    if encoding == "utf-8-sig":
        assert read_sweep_file(file).method == "random"
    else:
        with pytest.raises(SpaceError, match=r"must be text in UTF-8 but byte \d+ is not"):
            read_sweep_file(file)


def test_beta_has_wandbs_defaults() -> None:
    read = read_parameter(LR, {"distribution": "beta"})
    assert [read.at(u) for u in (0.25, 0.5)] == pytest.approx([0.25, 0.5])
    assert read_parameter(LR, {"distribution": "q_beta", "a": 2, "q": 0.25}) == Numeric("q_beta", 2.0, 1.0, 0.25)


def test_the_target_is_reached_from_the_goals_side() -> None:
    lower = read_sweep({**GOOD, "metric": {"name": "eval/loss", "goal": "minimize", "target": 2}})
    assert [lower.reached_by(v) for v in (2.1, 2.0, 1.0, None)] == [False, True, True, False]
    upper = read_sweep({**GOOD, "metric": {"name": "eval/loss", "goal": "maximize", "target": 2.0}})
    assert [upper.reached_by(v) for v in (2.1, 2.0, 1.0, None)] == [True, True, False, False]
    assert not read_sweep(GOOD).reached_by(0.0)


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


@pytest.mark.parametrize("engine", ["wandb", "optuna", "ax"])
def test_the_scheduler_of_wandb_is_read_and_our_search_takes_its_place(engine: str) -> None:
    raw = {
        "method": "bayes",
        "metric": {"name": "eval/loss"},
        "run_cap": 3,
        "scheduler": {"engine": engine},
        "parameters": {"orpo.beta": {"min": 0.1, "max": 1.0}},
    }
    assert read_sweep(raw).notes == (f"scheduler.engine {engine}: the search is this package's own, method bayes",)
