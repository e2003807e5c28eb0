"""Parses one parameter block of a W&B sweep file into a distribution."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from isaerft_sweep.errors import SpaceError, suggest
from isaerft_sweep.search.distributions import Categorical, Conditional, Constant, Distribution, Numeric

LIMITS = ("min", "max")
MOMENTS = ("mu", "sigma")
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": LIMITS,
    "uniform": LIMITS,
    "q_uniform": LIMITS,
    "log_uniform": LIMITS,
    "log_uniform_values": LIMITS,
    "q_log_uniform": LIMITS,
    "q_log_uniform_values": LIMITS,
    "inv_log_uniform": LIMITS,
    "inv_log_uniform_values": LIMITS,
    "normal": MOMENTS,
    "q_normal": MOMENTS,
    "log_normal": MOMENTS,
    "q_log_normal": MOMENTS,
    "beta": ("a", "b"),
    "q_beta": ("a", "b"),
}
"""W&B's distributions and the keys that each needs; ``q_`` ones also take q, 1 by default."""
DEFAULTS: dict[str, float] = {"mu": 0.0, "sigma": 1.0, "q": 1.0, "a": 1.0, "b": 1.0}
"""The defaults of W&B's schema."""
MAX_EXPONENT = 700
"""exp(709) is the largest power that a float holds."""
TAIL_SIGMAS = 7.1
"""The range of a sampled normal distribution, in sigmas: see ``distributions._inside``."""
_NUMBER_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def read_parameter(key: str, block: Any) -> Distribution:
    """The distribution of one parameter. Raises SpaceError that names the key, its value and the right form."""
    if not isinstance(block, Mapping):
        raise SpaceError(f"{key} must be a mapping but got {block!r}. Right form: {{value: {block!r}}}.")
    return _conditional(key, block) if "by" in block else _unconditional(key, block)


def _unconditional(key: str, block: Mapping[str, Any]) -> Constant | Categorical | Numeric:
    kind = str(block["distribution"] if "distribution" in block else _implied_kind(key, block))
    if kind not in DISTRIBUTIONS:
        raise SpaceError(f"{key}: unknown distribution '{kind}'." + suggest(kind, DISTRIBUTIONS))
    needed = DISTRIBUTIONS[kind]
    allowed = {"distribution", *needed} | ({"q"} if kind.startswith("q_") else set())
    if kind == "categorical":
        allowed.add("probabilities")
    for name in block:
        if name not in allowed:
            raise SpaceError(f"{key}: '{name}' does not go with distribution {kind}." + suggest(str(name), allowed))
    for name in needed:
        if name not in block and name not in DEFAULTS:
            raise SpaceError(f"{key}: distribution {kind} needs {' and '.join(needed)}, but {name} is missing.")
    if kind == "constant":
        return Constant(_plain(key, "value", block["value"]))
    if kind.startswith("categorical"):
        return _categorical(key, block)
    return _numeric(key, kind, block)


def _conditional(key: str, block: Mapping[str, Any]) -> Conditional:
    form = f"Right form: {key}: {{by: adapter.kind, cases: {{bias: {{value: 0.1}}, vector: {{min: 0.1, max: 1.0}}}}}}."
    cases = block.get("cases")
    if set(block) != {"by", "cases"} or not isinstance(block["by"], str) or not isinstance(cases, Mapping) or not cases:
        raise SpaceError(f"{key}: by must name another parameter, and cases have a block for each of its values. {form}")
    for value, inner in cases.items():
        if not isinstance(inner, Mapping) or "by" in inner:
            raise SpaceError(f"{key}: the case of {value!r} must be a parameter without `by` but is {inner!r}. {form}")
    return Conditional(block["by"], tuple((v, _unconditional(f"{key} ({v})", inner)) for v, inner in cases.items()))


def check_conditional(parameters: Mapping[str, Distribution]) -> None:
    """Raise SpaceError unless each conditional parameter has a case for each value of a parameter with a list of values."""
    for key, distribution in parameters.items():
        if not isinstance(distribution, Conditional):
            continue
        parent = parameters.get(distribution.parent)
        if parent is None:
            raise SpaceError(
                f"{key}: by must name a parameter of the sweep but got '{distribution.parent}'."
                + suggest(distribution.parent, parameters)
            )
        if not isinstance(parent, (Categorical, Constant)):
            raise SpaceError(f"{key}: by must name a parameter with a list of values but {distribution.parent} has none.")
        expected, present = list(parent.choices or ()), [value for value, _ in distribution.cases]
        if sorted(map(repr, expected)) != sorted(map(repr, present)):
            raise SpaceError(f"{key}: cases must be those of {distribution.parent}, {expected}, but are {present}.")


def _implied_kind(key: str, block: Mapping[str, Any]) -> str:
    """The distribution of a block without one, by W&B's rule."""
    if "value" in block:
        return "constant"
    if "values" in block:
        return "categorical"
    if "min" in block and "max" in block:
        whole = all(isinstance(block[n], int) and not isinstance(block[n], bool) for n in LIMITS)
        return "int_uniform" if whole else "uniform"
    if "mu" in block or "sigma" in block:
        return "normal"
    raise SpaceError(
        f"{key} must have a value, values, or min and max but got {dict(block)}. "
        "Right form: {distribution: log_uniform_values, min: 1.0e-6, max: 5.0e-5}."
    )


def _plain(key: str, name: str, value: Any) -> Any:
    """``value`` itself. Raises SpaceError when it is a number that YAML has read as text."""
    if isinstance(value, str) and _NUMBER_TEXT.fullmatch(value) and "e" in value.lower():
        raise SpaceError(f"{key}: {name} is the text '{value}', not a number. {_yaml_form(value)}")
    return value


def _yaml_form(text: str) -> str:
    return f"YAML needs a point and a signed exponent: {re.sub(r'e$', '', f'{float(text):.1e}')}."


def _number(key: str, block: Mapping[str, Any], name: str) -> float:
    value = block.get(name, DEFAULTS.get(name))
    if isinstance(value, str) and _NUMBER_TEXT.fullmatch(value):
        raise SpaceError(f"{key}: {name} is the text '{value}', not a number. {_yaml_form(value)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SpaceError(f"{key}: {name} must be a finite number but got {value!r}.")
    return float(value)


def _categorical(key: str, block: Mapping[str, Any]) -> Categorical:
    values = block["values"]
    if not isinstance(values, list) or not values:
        raise SpaceError(f"{key}: values must be a list with at least one value but got {values!r}.")
    values = [_plain(key, f"values[{i}]", value) for i, value in enumerate(values)]
    if len({_comparison_key(v) for v in values}) < len(values):
        raise SpaceError(f"{key}: values must be different from each other but got {values}.")
    weights = block.get("probabilities")
    if weights is None:
        return Categorical(tuple(values), (1 / len(values),) * len(values))
    has_all = isinstance(weights, list) and len(weights) == len(values)
    if not has_all or any(isinstance(w, bool) or not isinstance(w, (int, float)) or w < 0 for w in weights):
        raise SpaceError(f"{key}: probabilities must be {len(values)} numbers of at least 0 but got {weights!r}.")
    if abs(sum(weights) - 1) > 1e-6:
        raise SpaceError(f"{key}: probabilities must sum to 1 but sum to {sum(weights):g}: {weights}.")
    return Categorical(tuple(values), tuple(float(w) for w in weights))


def _comparison_key(value: Any) -> str:
    """Equal for values that make the same trial: 1 and 1.0, but not true and 1."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return "[" + ",".join(map(_comparison_key, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{name!r}:{_comparison_key(inner)}" for name, inner in value.items())) + "}"
    return repr(value)


def _numeric(key: str, kind: str, block: Mapping[str, Any]) -> Constant | Numeric:
    names = DISTRIBUTIONS[kind]
    a, b = (_number(key, block, name) for name in names)
    q = _number(key, block, "q") if kind.startswith("q_") else None
    if q is not None and q <= 0:
        raise SpaceError(f"{key}: q must be above 0 but got {q:g}.")
    if names == LIMITS:
        _check_limits(key, kind, a, b)
    elif names == MOMENTS and b < 0:
        raise SpaceError(f"{key}: sigma must be at least 0 but got {b:g}.")
    elif kind.endswith("log_normal") and abs(a) + TAIL_SIGMAS * b > MAX_EXPONENT:
        raise SpaceError(
            f"{key}: {kind} takes mu and sigma of the natural logarithm, of which mu ± {TAIL_SIGMAS:g} sigma must lie "
            f"within ±{MAX_EXPONENT}, but got mu={a:g}, sigma={b:g}."
        )
    elif names == ("a", "b") and min(a, b) <= 0:
        raise SpaceError(f"{key}: a and b must be above 0 but got a={a:g}, b={b:g}.")
    whole = kind == "int_uniform"
    if whole and not (a.is_integer() and b.is_integer()):
        raise SpaceError(f"{key}: int_uniform needs whole numbers but got min={a:g}, max={b:g}. Use uniform or q_uniform.")
    if names == LIMITS and a == b and q is None and not kind.endswith("log_uniform"):
        return Constant(int(a) if whole else a)
    integer = whole or (q is not None and q.is_integer() and isinstance(block.get("q", 1), int))
    distribution = Numeric(kind, a, b, q, integer)
    if names == MOMENTS and b == 0:
        return Constant(distribution.at(0.5))
    if q is not None and distribution.size == 0:
        low, high = distribution.limits
        default = "" if "q" in block else ", which is W&B's when it is left out"
        raise SpaceError(
            f"{key}: q must leave a multiple of itself between {low:g} and {high:g}, but q is {q:g}{default}. Give a "
            f"smaller q, such as q: {_round_step(low, high)}."
        )
    return distribution


def _round_step(low: float, high: float) -> str:
    """A power of ten with multiples between the two."""
    width = (high - low) or abs(low) or 1.0
    exponent = math.floor(math.log10(width)) - 1
    return f"1.0e{exponent:+d}" if abs(exponent) > 4 else f"{10.0**exponent:g}"


def _check_limits(key: str, kind: str, low: float, high: float) -> None:
    if low > high:
        raise SpaceError(f"{key}: min must not be above max but got min={low:g}, max={high:g}. Swap them.")
    if kind.endswith("log_uniform_values") and low <= 0:
        raise SpaceError(
            f"{key}: {kind} takes the values themselves, which must be above 0, but got min={low:g}, max={high:g}. "
            f"For natural-log exponents use distribution {kind.removesuffix('_values')}."
        )
    if kind.endswith("log_uniform"):
        _check_exponents(key, kind, low, high)


def _check_exponents(key: str, kind: str, low: float, high: float) -> None:
    if max(abs(low), abs(high)) > MAX_EXPONENT:
        raise SpaceError(
            f"{key}: {kind} takes natural-log exponents within ±{MAX_EXPONENT} but got min={low:g}, max={high:g}. "
            f"For the values themselves use distribution {kind}_values."
        )
    if high - low < math.log(1.5):
        raise SpaceError(
            f"{key}: {kind} takes natural-log exponents, so min={low:g}, max={high:g} means values from "
            f"{math.exp(low):.6g} to {math.exp(high):.6g}, hardly a range. If these are the values, use distribution "
            f"{kind}_values; for values from 1e-6 to 5e-5 write min: {math.log(1e-6):.4g}, max: {math.log(5e-5):.4g}."
        )
