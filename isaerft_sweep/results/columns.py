"""The columns of what is swept: the same ones, under the same names, in every table and figure.

A value has as many digits, and a text or a list as much of it, as tells the column's values apart.
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

FIRST = ("orpo.learning_rate", "orpo.beta")
SHORT = {"orpo.learning_rate": "lr"}
TAKEN = (
    "#", "95 %", "best", "first run", "job", "loss", "mean", "node", "rank", "rank then", "seeds", "state", "step", "time",
    "time left", "trial",
)  # fmt: skip
"""Other columns of the tables."""
FEW = 20
"""Up to so many different numbers are shown with all the digits that tell them apart."""
TEXT = 24
"""Characters of a text that are shown, where they tell it from the others."""


@dataclass(frozen=True)
class Column:
    """One swept parameter. ``values``: what it has in the trials; they decide how one is shown."""

    key: str
    name: str
    values: tuple[Any, ...] = ()

    def show(self, params: Mapping[str, Any]) -> str:
        """A trial's value; empty when it has none."""
        if self.key not in params:
            return ""
        value = params[self.key]
        if is_number(value):
            return self._number(value)
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, (Mapping, list, tuple)):
            return self._text(self._parts(value))
        return json.dumps(value)  # null, true, false: as in the config

    def _number(self, value: float) -> str:
        if isinstance(value, int):
            return str(value)
        different = {float(v) for v in self.values if is_number(v)}
        most = 17 if len(different) <= FEW else 5
        scientific = self.key in SHORT
        for digits in range(2 if scientific else 3, most + 1):
            if len({_float(v, digits, scientific) for v in different}) == len(different):
                break
        return _float(value, digits, scientific)

    def _text(self, value: str) -> str:
        """The whole of a short text; the end of a long one, where that is enough."""
        texts = {
            v if isinstance(v, str) else self._parts(v) for v in self.values if isinstance(v, (str, Mapping, list, tuple))
        }
        if len(value) <= TEXT:
            return value
        length = TEXT
        while length < len(value) and len({t[-length:] for t in texts}) < len(texts):
            length += 1
        return value if length >= len(value) else f"…{value[-length:]}"

    def _parts(self, value: Any) -> str:
        """What is not the same in all of the column's lists or mappings: ``layer 20``."""
        leaves = [dict(_leaves(v)) for v in self.values if isinstance(v, (Mapping, list, tuple))]
        own = dict(_leaves(value))
        differing = [
            path for path in own if any(canonical_json(one.get(path)) != canonical_json(own[path]) for one in leaves)
        ]
        shown = differing or list(own)
        return ", ".join(f"{_last(path)} {_plain(own[path])}".strip() for path in shown)


def columns_for(points: Iterable[Mapping[str, Any]], space: Mapping[str, Distribution] | None = None) -> list[Column]:
    """What is searched in ``space``, and what has more than one value in ``points``: learning rate and beta first.

    All of the points where the space is not known.
    """
    points, space = list(points), space or {}
    found: dict[str, dict[str, Any]] = {key: {} for key in space}
    for point in points:
        for key, value in point.items():
            found.setdefault(key, {})[canonical_json(value)] = value
    searched = {key for key, distribution in space.items() if distribution.choices is None or len(distribution.choices) > 1}
    keys = [key for key, values in found.items() if key in searched or len(values) > 1 or not space]
    names = labels(keys)
    return [Column(key, names[key], tuple(found[key].values())) for key in names]


def labels(keys: Sequence[str]) -> dict[str, str]:
    """A short name for each key, in the order of the columns: the key itself where the short name says too little."""
    ordered = sorted(keys, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    short = {key: SHORT.get(key, key.partition(".")[2] or key) for key in ordered}
    count = Counter(short.values())
    return {key: key if count[name] > 1 or name in TAKEN else name for key, name in short.items()}


def is_number(value: Any) -> bool:
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
    """The scalars in a list or mapping, by their place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{place}")
    else:
        yield path, value


def _last(path: str) -> str:
    name = path.rpartition(".")[2]
    return "" if name.isdecimal() else name


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
