"""Constraints of a sweep file: what a trial's other metrics must be, so that its rank counts.

constraints:
  eval/kl_base: {at_most: 0.2}
  eval/neutral_nll: {at_most: base + 0.05}    # the same as eval/neutral_nll_rise: {at_most: 0.05}
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from isaerft_sweep.errors import SpaceError, suggest
from isaerft_sweep.metrics import METRICS

FORM = "constraints: {eval/kl_base: {at_most: 0.2}}"
NOT_NEGATIVE = ("eval/kl_base", "eval/nll_loss", "eval/neutral_nll", "eval/loss")
RISES = {"eval/neutral_nll": "eval/neutral_nll_rise"}
"""Metrics whose difference from the base model's is a metric too."""
_OVER_BASE = re.compile(r"base\s*\+\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)")


@dataclass(frozen=True)
class Constraint:
    """A bound of a metric: an upper one when ``at_most``, else a lower one."""

    metric: str
    bound: float
    at_most: bool = True

    def excess(self, value: float | None) -> float:
        """How far ``value`` is beyond the bound, in units of its size; 0 when it is met, infinite without a finite value."""
        if value is None or not math.isfinite(value):
            return math.inf
        beyond = value - self.bound if self.at_most else self.bound - value
        return max(0.0, beyond) / max(abs(self.bound), 1e-3)

    def __str__(self) -> str:
        return f"{self.metric} at {'most' if self.at_most else 'least'} {self.bound:g}"


def violation(constraints: Iterable[Constraint], metrics: Mapping[str, float]) -> float:
    """The sum of all constraints' excess; 0 when every one is met."""
    return sum(constraint.excess(metrics.get(constraint.metric)) for constraint in constraints)


def read_constraints(raw: Any, ours: bool = True) -> tuple[Constraint, ...]:
    """The ``constraints`` of a sweep file. Raises SpaceError with the key, its value and the right form."""
    if raw is None:
        return ()
    if not isinstance(raw, Mapping) or not raw:
        raise SpaceError(f"constraints must be a mapping of metrics to bounds but got {raw!r}. Right form: {FORM}.")
    return tuple(one for name, bounds in raw.items() for one in _read_bounds(str(name), bounds, ours))


def _read_bounds(name: str, bounds: Any, ours: bool) -> list[Constraint]:
    if ours and name not in METRICS:
        raise SpaceError(f"constraints.{name} is not logged by any trial." + suggest(name, METRICS))
    if not isinstance(bounds, Mapping) or not bounds or not set(bounds) <= {"at_most", "at_least"}:
        raise SpaceError(f"constraints.{name} must have at_most or at_least but got {bounds!r}. Right form: {FORM}.")
    read = {one.at_most: one for one in (_read_bound(name, side, bound) for side, bound in bounds.items())}
    if len(read) == 2 and read[False].metric == read[True].metric and read[False].bound > read[True].bound:
        raise SpaceError(
            f"constraints.{name}: at_least must not be above at_most but got {read[False].bound:g} and {read[True].bound:g}."
        )
    if name in NOT_NEGATIVE and True in read and read[True].bound < 0:
        raise SpaceError(
            f"constraints.{name}.at_most must be 0 or more, since no trial is below, but got {read[True].bound:g}."
        )
    return list(read.values())


def _read_bound(name: str, side: str, bound: Any) -> Constraint:
    if isinstance(bound, str) and (over_base := _OVER_BASE.fullmatch(bound.strip())):
        if name not in RISES:
            raise SpaceError(f"constraints.{name}.{side}: '{bound}' is possible for {', '.join(RISES)} only. Give a number.")
        return Constraint(RISES[name], float(over_base[1]), side == "at_most")
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
        also = " or 'base + NUMBER'" if name in RISES else ""
        raise SpaceError(f"constraints.{name}.{side} must be a finite number{also} but got {bound!r}. Right form: {FORM}.")
    return Constraint(name, float(bound), side == "at_most")
