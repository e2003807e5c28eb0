"""Pruners: which trials to stop early, and which of those to resume. Pure functions of the trials' curves.

A curve is a trial's metric at each of its evaluations; larger is better. All trials evaluate after the same fractions of
their training, so values at the same position are comparable.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Curves = Mapping[int, Sequence[float]]
"""By trial number."""


class GrowingCurves(dict[int, Sequence[float]]):
    """Curves that only grow, with the values at each position kept sorted: thousands of trials are not sorted each time."""

    def __init__(self) -> None:
        super().__init__()
        self._at: dict[int, list[float]] = {}

    def __setitem__(self, index: int, curve: Sequence[float]) -> None:
        for position in range(len(self.get(index, ())), len(curve)):
            insort(self._at.setdefault(position, []), curve[position])
        super().__setitem__(index, curve)

    def at(self, position: int) -> list[float]:
        """All trials' values at a position, the smallest first."""
        return self._at.get(position, [])


class Pruner(ABC):
    """Decides after every evaluation."""

    @abstractmethod
    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        """Whether trial ``index`` should stop, judged by its evaluations after the first ``since``."""

    def revived(self, stopped: Iterable[int], curves: Curves) -> int | None:
        """The best stopped trial that is worth resuming; None when none is."""
        return None


class SuccessiveHalving(Pruner):
    """ASHA (Li et al. 2020, arXiv 1810.05934), its stopping variant, with promotion of trials stopped too early.

    A rung is a number of evaluations. A trial that reaches one continues when it is among the best 1/eta of all that have
    reached it so far, or when fewer than eta have. As more trials reach the rung, a stopped trial may come to be among the
    best 1/eta: it is revived. ``strict``, as in W&B: a trial's score is its value at the rung, else its best one so far.
    """

    def __init__(self, rungs: Sequence[int], eta: float, strict: bool = False) -> None:
        self.rungs, self.eta, self.strict = sorted(set(rungs)), eta, strict
        self._standing: dict[int, tuple[int, int, float]] = {}
        """For stopped trials: number of evaluations, highest rung, score there."""

    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        rung = self._rung(index, curves)
        if rung is None or rung <= since:
            return False
        threshold = self._threshold(rung, curves)
        return threshold is not None and self._score(curves[index], rung) < threshold

    def revived(self, stopped: Iterable[int], curves: Curves) -> int | None:
        best: dict[int, tuple[float, int]] = {}
        for index in stopped:
            rung, score = self._rung_and_score(index, curves)
            if rung and (rung not in best or score > best[rung][0]):
                best[rung] = score, index
        for rung in sorted(best, reverse=True):
            threshold = self._threshold(rung, curves)
            if threshold is not None and best[rung][0] >= threshold:
                return best[rung][1]
        return None

    def _rung_and_score(self, index: int, curves: Curves) -> tuple[int, float]:
        """The trial's highest rung, 0 before the first, and its score there."""
        cached, count = self._standing.get(index), len(curves.get(index, ()))
        if cached is None or cached[0] != count:
            rung = self._rung(index, curves) or 0
            cached = self._standing[index] = (count, rung, self._score(curves[index], rung) if rung else 0.0)
        return cached[1:]

    def _score(self, curve: Sequence[float], rung: int) -> float:
        """What decides about a trial at a rung."""
        return curve[rung - 1] if self.strict else max(curve[:rung])

    def _rung(self, index: int, curves: Curves) -> int | None:
        """The highest rung that the trial has reached."""
        return max((rung for rung in self.rungs if rung <= len(curves.get(index, ()))), default=None)

    def _threshold(self, rung: int, curves: Curves) -> float | None:
        """The smallest value among the best 1/eta at the rung; None until eta trials have reached it."""
        if isinstance(curves, GrowingCurves):
            values = curves.at(rung - 1)
        else:
            values = sorted(curve[rung - 1] for curve in curves.values() if len(curve) >= rung)
        survivors = math.floor(len(values) / self.eta)
        return values[-survivors] if survivors else None


class MedianRule(Pruner):
    """The median stopping rule (Golovin et al. 2017, Google Vizier, section 3.2.2).

    After ``grace`` evaluations a trial stops when its best value so far is below the median of the other trials' running
    means at the same evaluation; at least three others must have reached it.
    """

    LEAST = 3

    def __init__(self, grace: int) -> None:
        self.grace = grace

    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        count = len(curves[index])
        others = [statistics.fmean(c[:count]) for i, c in curves.items() if i != index and len(c) >= count]
        if count <= since or count < self.grace or len(others) < self.LEAST:
            return False
        return max(curves[index]) < statistics.median(others)


def make_pruner(early_terminate: Mapping[str, Any] | None, evaluations: int) -> Pruner | None:
    """The pruner of a sweep file's ``early_terminate``, for trials of ``evaluations`` evaluations each.

    ``hyperband`` as W&B defines its brackets: with ``min_iter`` at min_iter · eta^k, with ``max_iter`` and ``s`` at
    max_iter / eta^k for k = 1 … s, rounded down. The last evaluation is no rung: stopping there would save nothing.
    """
    if early_terminate is None:
        return None
    if early_terminate["type"] == "median":
        return MedianRule(int(early_terminate["min_iter"]))
    eta, strict = float(early_terminate.get("eta", 3)), bool(early_terminate.get("strict", False))
    return SuccessiveHalving(rungs(early_terminate, evaluations), eta, strict)


def evaluations(fraction: float, max_steps: int) -> int:
    """The number of evaluations of a trial after its first step: one after each ``fraction`` of its steps, in whole steps,
    and one at the end. Without ``max_steps`` (0 or less) rounding is ignored: epochs have many steps."""
    if max_steps > 0:
        return math.ceil(max_steps / steps_between(fraction, max_steps))
    return math.ceil(1 / fraction - 1e-9)


def steps_between(fraction: float, steps: int) -> int:
    """Steps from one evaluation to the next."""
    return max(1, math.ceil(steps * fraction - 1e-9))


def rungs(early_terminate: Mapping[str, Any], evaluations: int) -> list[int]:
    """The numbers of evaluations at which hyperband decides."""
    eta = float(early_terminate.get("eta", 3))
    if "min_iter" in early_terminate:
        numbers, rung = [], float(early_terminate["min_iter"])
        while rung < evaluations:
            numbers.append(int(rung))
            rung *= eta
    else:
        numbers = [int(early_terminate["max_iter"] / eta**k) for k in range(1, int(early_terminate["s"]) + 1)]
    return sorted({rung for rung in numbers if 0 < rung < evaluations})
