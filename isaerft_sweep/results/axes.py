"""The scale on which a swept parameter is searched, so that plots show the space as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isaerft_sweep.results.columns import Column
from isaerft_sweep.results.reading import ReadSweep
from isaerft_sweep.search.distributions import Categorical, Distribution, Numeric
from isaerft_sweep.spec_fields import canonical_json

LOG_FAMILIES = ("log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values", "log_normal")
WIDE = 10.0
"""Listed values of a parameter whose largest is this many times the smallest are drawn on a log scale."""


@dataclass(frozen=True)
class Axis:
    """One parameter. ``kind``: log, linear, or category (``values`` in order, drawn by their number).

    ``ticks``: values that deserve a tick, when they are few.
    """

    key: str
    kind: str
    values: tuple[Any, ...] = ()
    ticks: tuple[float, ...] = ()
    label: str = ""

    def place(self, value: Any) -> float:
        """Where ``value`` is drawn, before any logarithm."""
        return float(self.values.index(value)) if self.kind == "category" else float(value)

    def on_scale(self, value: Any) -> float:
        """Where ``value`` lies on the axis itself: its logarithm on a log axis."""
        return math.log10(self.place(value)) if self.kind == "log" else self.place(value)


def axes(sweep: ReadSweep) -> list[Axis]:
    """The swept parameters, learning rate and beta first."""
    names, several = {column.key: column.name for column in sweep.columns}, sweep.swept
    return [replace(axis(key, sweep), label=name) for key, name in names.items() if key in several]


def axis(key: str, sweep: ReadSweep) -> Axis:
    """The axis of one swept parameter, from its distribution, or from its values where that is not known."""
    found = list({canonical_json(e.params[key]): e.params[key] for e in sweep.entries if key in e.params}.values())
    numbers = [value for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(found):
        others = sorted((value for value in found if value not in numbers), key=canonical_json)
        return Axis(key, "category", (*others, *sorted(numbers)))
    distribution = sweep.space.get(key)
    listed = _listed(distribution)
    ticks = tuple(sorted(float(v) for v in listed)) if len(listed) <= 12 and set(found) <= set(listed) else ()
    return Axis(key, _scale(distribution, found), ticks=ticks)


def _listed(distribution: Distribution | None) -> Sequence[Any]:
    numbers = distribution.values if isinstance(distribution, Categorical) else ()
    return [v for v in numbers if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _scale(distribution: Distribution | None, found: Sequence[float]) -> str:
    if isinstance(distribution, Numeric):
        return "log" if distribution.family in LOG_FAMILIES and min(found) > 0 else "linear"
    values = _listed(distribution) or found
    return "log" if min(values) > 0 and max(values) >= WIDE * min(values) else "linear"


def show_value(value: Any) -> str:
    """A parameter's value for a table or a tick."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:60]


def by_label(params: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """``lr 3.6e-05, beta 0.2`` and the like: the swept parameters of a trial in a few words."""
    return ", ".join(f"{column.name} {column.show(params)}" for column in columns if column.key in params)
