"""The columns of swept parameters: the same columns with the same names in every table and figure.

Numbers, strings and lists are shortened as far as the column's values stay distinct.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isaerft_sweep.search.distributions import Distribution
from isaerft_sweep.spec_fields import canonical_json

FIRST_KEYS = ("orpo.learning_rate", "orpo.beta")
SHORT_NAMES = {"orpo.learning_rate": "lr"}
RESERVED_NAMES = (
    "#", "95 %", "best", "first run", "job", "loss", "mean", "node", "rank", "rank then", "seeds", "state", "step", "time",
    "time left", "trial",
)  # fmt: skip
"""Names of other columns in the tables."""
MAX_EXACT_NUMBERS = 20
"""Up to this many different numbers are shown with enough digits to be distinct."""
MAX_CHARACTERS = 24
"""Characters shown of a string, if they make it distinct."""


@dataclass(frozen=True)
class Column:
    """One swept parameter. ``values``: those of all trials; they decide the format."""

    key: str
    name: str
    values: tuple[Any, ...] = ()

    def show(self, params: Mapping[str, Any]) -> str:
        """A trial's value as text; empty when the trial has none."""
        if self.key not in params:
            return ""
        value = params[self.key]
        if is_numeric(value):
            return self._number(value)
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, (Mapping, list, tuple)):
            return self._text(self._parts(value))
        return json.dumps(value)  # null, true, false: as in the config

    def _number(self, value: float) -> str:
        if isinstance(value, int):
            return str(value)
        different = {float(v) for v in self.values if is_numeric(v)}
        max_digits = 17 if len(different) <= MAX_EXACT_NUMBERS else 5
        scientific = self.key in SHORT_NAMES
        for digits in range(2 if scientific else 3, max_digits + 1):
            if len({_float(v, digits, scientific) for v in different}) == len(different):
                break
        return _float(value, digits, scientific)

    def _text(self, value: str) -> str:
        """A short string whole; of a long one the shortest end that is distinct."""
        texts = {
            v if isinstance(v, str) else self._parts(v) for v in self.values if isinstance(v, (str, Mapping, list, tuple))
        }
        if len(value) <= MAX_CHARACTERS:
            return value
        length = MAX_CHARACTERS
        while length < len(value) and len({t[-length:] for t in texts}) < len(texts):
            length += 1
        return value if length >= len(value) else f"…{value[-length:]}"

    def _parts(self, value: Any) -> str:
        """The leaves that differ between the column's lists or mappings: ``layer 20``."""
        leaves = [dict(_leaves(v)) for v in self.values if isinstance(v, (Mapping, list, tuple))]
        own = dict(_leaves(value))
        differing = [
            path for path in own if any(canonical_json(other.get(path)) != canonical_json(own[path]) for other in leaves)
        ]
        shown = differing or list(own)
        return ", ".join(f"{_last(path)} {_plain(own[path])}".strip() for path in shown)


def columns_for(points: Iterable[Mapping[str, Any]], space: Mapping[str, Distribution] | None = None) -> list[Column]:
    """Columns of the parameters that ``space`` searches or that vary in ``points``, learning rate and beta first.

    Without a space every parameter of the points gets a column.
    """
    points, space = list(points), space or {}
    values_by_key: dict[str, dict[str, Any]] = {key: {} for key in space}
    for point in points:
        for key, value in point.items():
            values_by_key.setdefault(key, {})[canonical_json(value)] = value
    searched = {key for key, distribution in space.items() if distribution.choices is None or len(distribution.choices) > 1}
    keys = [key for key, values in values_by_key.items() if key in searched or len(values) > 1 or not space]
    names = labels(keys)
    return [Column(key, names[key], tuple(values_by_key[key].values())) for key in names]


def labels(keys: Sequence[str]) -> dict[str, str]:
    """A short name for each key, in column order; the full key when the short name is ambiguous or taken."""
    ordered = sorted(keys, key=lambda key: FIRST_KEYS.index(key) if key in FIRST_KEYS else len(FIRST_KEYS))
    short = {key: SHORT_NAMES.get(key, key.partition(".")[2] or key) for key in ordered}
    count = Counter(short.values())
    return {key: key if count[name] > 1 or name in RESERVED_NAMES else name for key, name in short.items()}


def is_numeric(value: Any) -> bool:
    """Whether a swept value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _float(value: float, digits: int, scientific: bool) -> str:
    if not math.isfinite(value):
        return str(value)
    if scientific:
        return f"{value:.{digits - 1}e}"
    exact = repr(float(value))
    return exact if len(exact) <= 6 else f"{value:.{digits}g}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The scalars in a list or mapping, with their paths."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    else:
        yield path, value


def _last(path: str) -> str:
    name = path.rpartition(".")[2]
    return "" if name.isdecimal() else name


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
