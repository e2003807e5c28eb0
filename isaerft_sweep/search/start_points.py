"""Points that a sweep runs before those that its method chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isaerft_sweep.errors import SpaceError, suggest
from isaerft_sweep.search.distributions import Categorical, Constant, Distribution, Numeric, equivalent, resolved
from isaerft_sweep.search.sampler import Gain, Point, PointSource


class StartPoints:
    """Gives the points of a list first, then those of another source, which learns all outcomes."""

    def __init__(self, source: PointSource, points: Sequence[Point]) -> None:
        self.source, self.points = source, list(points)
        self.method, self.repeats = source.method, source.repeats
        self._tried: set[str] = set()

    @property
    def size(self) -> float:
        return self.source.size

    @property
    def foreseeable(self) -> float:
        return max(len(self.points), self.source.foreseeable)

    def ask(self) -> Point | None:
        point = next((p for p in self.points if p.key not in self._tried), None)
        if point is not None:
            self.restore(point)
            return point
        return self.source.ask()

    def tell(self, point: Point, value: float | None, violation: float = 0.0, others: Sequence[float] = ()) -> None:
        self.source.tell(point, value, violation, others)

    def expected_gain(self) -> Gain | None:
        return self.source.expected_gain()

    def forget(self, point: Point) -> None:
        self.source.forget(point)

    def restore(self, point: Point) -> None:
        self._tried.add(point.key)
        self.source.restore(point)

    def pending_again(self, point: Point) -> None:
        self.source.pending_again(point)


def point_in(space: Mapping[str, Distribution], values: Mapping[str, Any], default: Callable[[str], Any]) -> Point:
    """The point of the space with these values. Raises SpaceError that names a key whose value is outside of the space.

    Args:
        space: distributions by dotted key.
        values: some of the keys' values.
        default: the value of a key that is left out.
    """
    for key in values:
        if key not in space:
            raise SpaceError(f"sweep.start names {key}, which the sweep does not vary." + suggest(key, space))
    params = {key: values[key] if key in values else default(key) for key in space}
    unit: dict[str, float] = {}
    for key, distribution in resolved(space, params).items():
        params[key] = _value_in(key, distribution, params[key], is_default=key not in values)
        if not isinstance(space[key], Constant):
            unit[key] = _place(distribution, params[key])
    return Point(params, unit)


def _value_in(key: str, distribution: Constant | Categorical | Numeric, value: Any, is_default: bool) -> Any:
    """The value as the space has it (1.0 for 1)."""
    source = "it leaves it out, and the config has" if is_default else "it has"
    choices = distribution.choices
    if choices is not None:
        for choice in choices:
            if equivalent(choice, value):
                return choice
        listed = ", ".join(map(str, choices[:10])) + (", …" if len(choices) > 10 else "")
        raise SpaceError(f"sweep.start: {key} must be one of {listed} but {source} {value!r}.")
    low, high = sorted((float(distribution.at(0.0)), float(distribution.at(1.0))))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise SpaceError(f"sweep.start: {key} must be a number from {low:g} to {high:g} but {source} {value!r}.")
    return value if isinstance(distribution, Numeric) and distribution.whole else float(value)


def _place(distribution: Constant | Categorical | Numeric, value: Any) -> float:
    """The u of a value, as the samplers see it: for a value of a list the middle of its share."""
    if isinstance(distribution, Numeric):
        return distribution.place(value)
    if isinstance(distribution, Constant):
        return 0.5
    index = distribution.values.index(value)
    return sum(distribution.probabilities[:index]) + distribution.probabilities[index] / 2
