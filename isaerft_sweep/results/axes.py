"""Plot axes of swept parameters, on the scale on which the sampler searches them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isaerft_sweep.results.columns import Column
from isaerft_sweep.results.sweep_results import SweepResults
from isaerft_sweep.search.distributions import Categorical, Distribution, Numeric
from isaerft_sweep.spec_fields import canonical_json

LOG_FAMILIES = ("log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values", "log_normal")
LOG_SCALE_RATIO = 10.0
"""Listed values are drawn on a log scale when the largest is this many times the smallest."""


@dataclass(frozen=True)
class Axis:
    """One parameter. ``kind``: log, linear, or category (each of ``values`` is drawn at its index).

    ``ticks``: values that get a tick, when they are few.
    """

    key: str
    kind: str
    values: tuple[Any, ...] = ()
    ticks: tuple[float, ...] = ()
    label: str = ""

    def coordinate(self, value: Any) -> float:
        """The plot coordinate of ``value``, before any logarithm."""
        return float(self.values.index(value)) if self.kind == "category" else float(value)

    def on_scale(self, value: Any) -> float:
        """The position of ``value`` along the axis: its log10 on a log axis."""
        return math.log10(self.coordinate(value)) if self.kind == "log" else self.coordinate(value)


def axes(sweep: SweepResults) -> list[Axis]:
    """The swept parameters, learning rate and beta first."""
    labels, swept = {column.key: column.name for column in sweep.columns}, sweep.swept
    return [replace(axis(key, sweep), label=name) for key, name in labels.items() if key in swept]


def axis(key: str, sweep: SweepResults) -> Axis:
    """The axis of one swept parameter, from its distribution, or from its values when the distribution is unknown."""
    values = list({canonical_json(e.params[key]): e.params[key] for e in sweep.entries if key in e.params}.values())
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        others = sorted((value for value in values if value not in numbers), key=canonical_json)
        return Axis(key, "category", (*others, *sorted(numbers)))
    distribution = sweep.space.get(key)
    listed = _listed(distribution)
    ticks = tuple(sorted(float(v) for v in listed)) if len(listed) <= 12 and set(values) <= set(listed) else ()
    return Axis(key, _scale(distribution, values), ticks=ticks)


def _listed(distribution: Distribution | None) -> Sequence[Any]:
    numbers = distribution.values if isinstance(distribution, Categorical) else ()
    return [v for v in numbers if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _scale(distribution: Distribution | None, values: Sequence[float]) -> str:
    if isinstance(distribution, Numeric):
        return "log" if distribution.family in LOG_FAMILIES and min(values) > 0 else "linear"
    listed = _listed(distribution) or values
    return "log" if min(listed) > 0 and max(listed) >= LOG_SCALE_RATIO * min(listed) else "linear"


def show_value(value: Any) -> str:
    """A parameter's value for a table or a tick."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:60]


def params_text(params: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """A trial's swept parameters as short text: ``lr 3.6e-05, beta 0.2``."""
    return ", ".join(f"{column.name} {column.show(params)}" for column in columns if column.key in params)
