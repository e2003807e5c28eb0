"""W&B's parameter distributions, each as an inverse cumulative distribution function: u in [0, 1] gives a value.

So every sampler works on the unit cube: quasi-random points are spread by probability, and a model-based sampler sees a
log-uniform parameter on its log scale and a quantised one as steps. Definitions: W&B, "Sweep configuration options".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

MAX_CHOICES = 10_000
"""A parameter with more values than this is sampled and shown as a continuous one."""


@dataclass(frozen=True)
class Constant:
    """One value."""

    value: Any

    def at(self, u: float) -> Any:
        return self.value

    @property
    def choices(self) -> tuple[Any, ...] | None:
        return (self.value,)

    @property
    def size(self) -> float:
        return 1

    def nth(self, index: int) -> Any:
        return self.value


@dataclass(frozen=True)
class Categorical:
    """One of ``values``, with ``probabilities`` that sum to 1."""

    values: tuple[Any, ...]
    probabilities: tuple[float, ...]

    def at(self, u: float) -> Any:
        total = 0.0
        for value, probability in zip(self.values, self.probabilities, strict=True):
            total += probability
            if u < total:
                return value
        return next(v for v, p in zip(reversed(self.values), reversed(self.probabilities), strict=True) if p > 0)

    @property
    def choices(self) -> tuple[Any, ...] | None:
        return tuple(v for v, p in zip(self.values, self.probabilities, strict=True) if p > 0)

    @property
    def size(self) -> float:
        """How many values are possible."""
        return len(self.choices or ())

    def nth(self, index: int) -> Any:
        """The possible value number ``index``, from 0."""
        return (self.choices or ())[index]


@dataclass(frozen=True)
class Numeric:
    """A number: ``kind`` is W&B's name of the distribution, ``a`` and ``b`` its two parameters, ``q`` its step or None.

    ``a, b``: min and max (uniform family), mu and sigma (normal family), or the two shapes of a beta distribution.
    """

    kind: str
    a: float
    b: float
    q: float | None = None
    integer: bool = False

    def at(self, u: float) -> float | int:
        """The value at cumulative probability u, rounded to a multiple of q where there is one."""
        value = INVERSE[self.family](min(max(u, 0.0), 1.0), self.a, self.b)
        if self.q:
            return self._at_step(self._clip_steps(round(value / self.q)))
        return round(value) if self.integer else float(value)

    def place(self, value: float) -> float:
        """The cumulative probability at ``value``, by bisection: the inverse of ``at`` before rounding."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if INVERSE[self.family](middle, self.a, self.b) < value else (low, middle)
        return high

    @property
    def whole(self) -> bool:
        """Whether every value is a whole number."""
        return self.integer or (self.q is not None and float(self.q).is_integer())

    @property
    def family(self) -> str:
        return self.kind.removeprefix("q_")

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest possible value (infinite for the normal family)."""
        if self.family in ("normal", "log_normal"):
            return (0.0 if self.family == "log_normal" else -math.inf), math.inf
        ends = sorted((INVERSE[self.family](0.0, self.a, self.b), INVERSE[self.family](1.0, self.a, self.b)))
        return ends[0], ends[1]

    @cached_property
    def _steps(self) -> tuple[float, float]:
        """First and last step inside the limits, in multiples of q, or of 1 for whole numbers."""
        low, high = self.limits
        q = self.q or 1.0
        first = -math.inf if low == -math.inf else math.ceil(low / q - 1e-9)
        last = math.inf if high == math.inf else math.floor(high / q + 1e-9)
        return first, last

    def _clip_steps(self, steps: int) -> int:
        """The step nearest to ``steps`` inside the limits: rounding must not leave the space."""
        first, last = self._steps
        return int(min(max(steps, first), last))

    @property
    def size(self) -> float:
        """How many values are possible; infinite when there is no step or no limit."""
        first, last = self._steps
        if (self.q is None and not self.integer) or math.inf in (last, -first):
            return math.inf
        return max(0.0, last - first + 1)

    def nth(self, index: int) -> float | int:
        """The possible value number ``index``, from 0, of finitely many."""
        return self._at_step(int(self._steps[0]) + index)

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """All possible values when they are at most ``MAX_CHOICES``, else None."""
        return tuple(self.nth(i) for i in range(int(self.size))) if self.size <= MAX_CHOICES else None

    def _at_step(self, step: int) -> float | int:
        value = step * (self.q or 1.0)
        # 3 * 0.1 must be 0.3: rounded to 12 significant digits
        value = round(value, 12 - math.floor(math.log10(abs(value)))) if value else 0.0
        return round(value) if self.integer else float(value)


@dataclass(frozen=True)
class Truncated(Numeric):
    """A distribution truncated at ``low`` and ``high``.

    The inverse of a truncated distribution is F⁻¹(F(low) + u·(F(high) − F(low))).
    """

    low: float = -math.inf
    high: float = math.inf

    def at(self, u: float) -> float | int:
        first, last = self._share
        return super().at(first + u * (last - first))

    def place(self, value: float) -> float:
        first, last = self._share
        return min(max((super().place(value) - first) / (last - first), 0.0), 1.0)

    @property
    def share(self) -> float:
        """The probability between the limits in the untruncated distribution, from 0 to 1."""
        first, last = self._share
        return last - first

    @cached_property
    def _share(self) -> tuple[float, float]:
        first = 0.0 if self.low == -math.inf else super().place(self.low)
        return first, 1.0 if self.high == math.inf else super().place(self.high)

    @cached_property
    def limits(self) -> tuple[float, float]:
        low, high = super().limits
        return max(low, self.low), min(high, self.high)


@dataclass(frozen=True)
class Conditional:
    """Another distribution for each value of the parameter ``parent``: ``cases`` has them by that value, in its order."""

    parent: str
    cases: tuple[tuple[Any, Constant | Categorical | Numeric], ...]

    def at_point(self, params: Mapping[str, Any]) -> Constant | Categorical | Numeric:
        """The distribution for the parent's value in ``params``."""
        value = params[self.parent]
        return next(case for parent_value, case in self.cases if parent_value == value)

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """All possible values, in any case; None when there are too many."""
        several = [case.choices for _, case in self.cases]
        if any(choices is None for choices in several):
            return None
        return tuple({repr(value): value for choices in several for value in choices or ()}.values())

    @property
    def size(self) -> float:
        """The number of values in the case with the most."""
        return max(case.size for _, case in self.cases)


Distribution = Constant | Categorical | Numeric | Conditional


def is_ordered(values: Sequence[Any]) -> bool:
    """Whether the values are numbers in order, so that neighbours in the list are alike."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return len(numbers) == len(values) and (numbers == sorted(numbers) or numbers == sorted(numbers, reverse=True))


def resolved(space: Mapping[str, Distribution], params: Mapping[str, Any]) -> dict[str, Constant | Categorical | Numeric]:
    """The space with each conditional parameter's distribution at the point ``params``."""
    return {key: d.at_point(params) if isinstance(d, Conditional) else d for key, d in space.items()}


def contains(space: Mapping[str, Distribution], params: Mapping[str, Any]) -> bool:
    """Whether the point is in the space."""
    if set(space) != set(params):
        return False
    for key, distribution in resolved(space, params).items():
        value = params[key]
        if distribution.choices is not None:
            if not any(equivalent(choice, value) for choice in distribution.choices):
                return False
        elif not min(distribution.at(0.0), distribution.at(1.0)) <= value <= max(distribution.at(0.0), distribution.at(1.0)):
            return False
    return True


def equivalent(choice: Any, configured: Any) -> bool:
    """Whether a sweep file's value is the config's, in which options that the file leaves out are None."""
    if isinstance(choice, Mapping) and isinstance(configured, Mapping):
        return all(equivalent(choice.get(key), configured.get(key)) for key in choice.keys() | configured.keys())
    if isinstance(choice, (list, tuple)) and isinstance(configured, (list, tuple)):
        return len(choice) == len(configured) and all(map(equivalent, choice, configured))
    return bool(choice == configured)


def cases_of(space: Mapping[str, Distribution]) -> list[dict[str, Constant | Categorical | Numeric]]:
    """Spaces without conditional parameters that together are ``space``: one for each value of their parents."""
    parents = sorted({d.parent for d in space.values() if isinstance(d, Conditional)})
    spaces = []
    for values in product(*(space[parent].choices or () for parent in parents)):
        point = dict(zip(parents, values, strict=True))
        spaces.append({**resolved(space, point), **{parent: Constant(value) for parent, value in point.items()}})
    return spaces


def _linear(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


def _int_uniform(u: float, low: float, high: float) -> float:
    return min(math.floor(low + u * (high - low + 1)), high)


def _log_values(u: float, low: float, high: float) -> float:
    # the ends are exact: exp(log(x)) is not x
    return low if u == 0 else high if u == 1 else math.exp(_linear(u, math.log(low), math.log(high)))


def _inverse_log(u: float, low: float, high: float) -> float:
    """W&B: log(1 / X) is uniform between the exponents low and high."""
    return math.exp(-_linear(1 - u, low, high))


def _inverse_log_values(u: float, low: float, high: float) -> float:
    """W&B: log(1 / X) is uniform between log(1 / max) and log(1 / min), which is log-uniform in X."""
    return _log_values(u, low, high)


def _inside(u: float) -> float:
    """u clipped away from 0 and 1, where the inverse is infinite or its root finding fails."""
    return min(max(u, 1e-12), 1 - 1e-12)


def _normal(u: float, mu: float, sigma: float) -> float:
    from statistics import NormalDist

    return NormalDist(mu, sigma).inv_cdf(_inside(u)) if sigma else mu


def _beta(u: float, a: float, b: float) -> float:
    from scipy.stats import beta

    return float(beta.ppf(_inside(u), a, b))


INVERSE: dict[str, Callable[[float, float, float], float]] = {
    "uniform": _linear,
    "int_uniform": _int_uniform,
    "log_uniform": lambda u, low, high: math.exp(_linear(u, low, high)),
    "log_uniform_values": _log_values,
    "inv_log_uniform": _inverse_log,
    "inv_log_uniform_values": _inverse_log_values,
    "normal": _normal,
    "log_normal": lambda u, mu, sigma: math.exp(_normal(u, mu, sigma)),
    "beta": _beta,
}
