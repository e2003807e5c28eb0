"""Several seeds a point: good points run again with new seeds while bad ones stay with one.

A race as in successive halving (arXiv 1502.07943), with seeds as rungs: a point gets seed k + 1 once it is among the better
half of the points that have k. The points' source learns the outcome of every seed as an observation of the point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isaerft_sweep.search.sampler import Gain, Point, PointSource
from isaerft_sweep.spec_fields import canonical_json

SEED = "orpo.seed"


class SeededPoints:
    """Gives points of another source with seeds ``first``, ``first + 1`` … and promotes the good ones.

    Args:
        source: gives points without a seed.
        seeds: at most so many for a point.
        first: the first seed of every point.
        sign: +1 when more is better, −1 when less is.
        varies: whether a trial with these params changes with the seed; one that does not gets a single one.
    """

    def __init__(
        self,
        source: PointSource,
        seeds: int,
        first: int,
        sign: int,
        varies: Callable[[Mapping[str, Any]], bool] = lambda _params: True,
    ) -> None:
        self.source, self.seeds, self.first, self.sign, self.varies = source, seeds, first, sign, varies
        self.method, self.repeats = source.method, False
        self._points: dict[str, Point] = {}
        """The points without a seed, by key, in the order in which they came."""
        self._asked: dict[str, set[int]] = {}
        """Of each point the seeds that were given out."""
        self._values: dict[str, dict[int, float]] = {}
        """Of each point the outcomes by seed, larger is better; a trial that diverged or broke a constraint is the worst."""

    @property
    def size(self) -> float:
        """At most so many runs: the race may end before."""
        return self.source.size * self.seeds

    @property
    def foreseeable(self) -> float:
        """Two: then one of them may have earned a second seed."""
        return min(2, self.source.foreseeable)

    def ask(self) -> Point | None:
        """The next seed of a promoted point, else a new point with the first seed."""
        key = self._promoted()
        if key is not None:
            seed = self.first + len(self._asked[key])
            self._asked[key].add(seed)
            self.source.pending_again(self._points[key])
            return _with_seed(self._points[key], seed)
        point = self.source.ask()
        return None if point is None else self._note(_with_seed(point, self.first))

    def tell(self, point: Point, value: float | None, violation: float = 0.0, others: Sequence[float] = ()) -> None:
        bare, seed = _bare(point)
        is_bad = value is None or violation > 0
        self._values.setdefault(bare.key, {})[seed] = -math.inf if is_bad or value is None else self.sign * value
        self.source.tell(bare, value, violation, others)

    def expected_gain(self) -> Gain | None:
        return self.source.expected_gain()

    def forget(self, point: Point) -> None:
        self.source.forget(_bare(point)[0])

    def restore(self, point: Point) -> None:
        bare, _ = _bare(point)
        if bare.key in self._points:
            self.source.pending_again(bare)
        else:
            self.source.restore(bare)
        self._note(point)

    def pending_again(self, point: Point) -> None:
        bare, seed = _bare(point)
        self._values.get(bare.key, {}).pop(seed, None)
        self.source.pending_again(bare)

    def _note(self, point: Point) -> Point:
        bare, seed = _bare(point)
        self._points.setdefault(bare.key, bare)
        self._asked.setdefault(bare.key, set()).add(seed)
        return point

    def _promoted(self) -> str | None:
        """The best point that has earned a further seed and does not wait for one."""
        for rung in range(self.seeds - 1, 0, -1):
            reached = {key: self._mean(key, rung) for key, values in self._values.items() if len(values) >= rung}
            best = sorted(reached, key=lambda key: -reached[key])[: len(reached) // 2]
            for key in best:
                if not self.varies(self._points[key].params):
                    continue
                if len(self._asked[key]) == rung == len(self._values[key]) and reached[key] > -math.inf:
                    return key
        return None

    def _mean(self, key: str, count: int) -> float:
        """The mean over the point's first ``count`` seeds."""
        values = self._values[key]
        return sum(values[seed] for seed in sorted(values)[:count]) / count


def _with_seed(point: Point, seed: int) -> Point:
    return Point({**point.params, SEED: seed}, point.unit)


def _bare(point: Point) -> tuple[Point, int]:
    params: Mapping[str, Any] = {key: value for key, value in point.params.items() if key != SEED}
    return Point(params, point.unit), int(point.params[SEED])


WITHOUT_SEEDS = ("prompt",)
"""Kinds of adapter that are the same with every seed."""


def without_seed(params: Mapping[str, Any]) -> str:
    """A key that is equal for points that differ only in the seed."""
    return canonical_json({key: value for key, value in params.items() if key != SEED})
