"""When to stop a trial early, and when to go on with one after all. Pure: curves in, decisions out.

A curve is a trial's metric at its evaluations in order, larger is better. All trials evaluate after the same shares of their
training, so values at the same place compare like with like.
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
    """Curves that only grow, with all trials' values at each place in order: thousands of trials are not sorted anew."""

    def __init__(self) -> None:
        super().__init__()
        self._at: dict[int, list[float]] = {}

    def __setitem__(self, index: int, curve: Sequence[float]) -> None:
        for place in range(len(self.get(index, ())), len(curve)):
            insort(self._at.setdefault(place, []), curve[place])
        super().__setitem__(index, curve)

    def at(self, place: int) -> list[float]:
        """The values at a place, the least first."""
        return self._at.get(place, [])


class Pruner(ABC):
    """Decides after every evaluation."""

    @abstractmethod
    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        """Whether trial ``index`` should stop, by what it has evaluated after its first ``since`` evaluations."""

    def revived(self, stopped: Iterable[int], curves: Curves) -> int | None:
        """The best stopped trial that has turned out to be worth going on with; None when there is none."""
        return None


class SuccessiveHalving(Pruner):
    """ASHA (Li et al. 2020, arXiv 1810.05934), its stopping variant, with promotion of trials stopped too early.

    A rung is a number of evaluations. A trial that reaches one goes on when it is among the best 1/eta of all that have
    reached it so far; until eta trials have, everybody goes on. As more arrive, a stopped trial may turn out to be among
    the best 1/eta: it is revived. ``strict`` as W&B has it: a trial is judged by its value at the rung, else by its best one
    up to there.
    """

    def __init__(self, rungs: Sequence[int], eta: float, strict: bool = False) -> None:
        self.rungs, self.eta, self.strict = sorted(set(rungs)), eta, strict
        self._standing: dict[int, tuple[int, int, float]] = {}
        """Of stopped trials: evaluations, highest rung, and what they are judged by there."""

    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        rung = self._rung(index, curves)
        if rung is None or rung <= since:
            return False
        threshold = self._threshold(rung, curves)
        return threshold is not None and self._judged(curves[index], rung) < threshold

    def revived(self, stopped: Iterable[int], curves: Curves) -> int | None:
        best: dict[int, tuple[float, int]] = {}
        for index in stopped:
            rung, judged = self._stands(index, curves)
            if rung and (rung not in best or judged > best[rung][0]):
                best[rung] = judged, index
        for rung in sorted(best, reverse=True):  # those that have come furthest first
            threshold = self._threshold(rung, curves)
            if threshold is not None and best[rung][0] >= threshold:
                return best[rung][1]
        return None

    def _stands(self, index: int, curves: Curves) -> tuple[int, float]:
        """The trial's highest rung, 0 before the first, and what it is judged by there."""
        known, count = self._standing.get(index), len(curves.get(index, ()))
        if known is None or known[0] != count:
            rung = self._rung(index, curves) or 0
            known = self._standing[index] = (count, rung, self._judged(curves[index], rung) if rung else 0.0)
        return known[1:]

    def _judged(self, curve: Sequence[float], rung: int) -> float:
        """By what a trial is judged at a rung."""
        return curve[rung - 1] if self.strict else max(curve[:rung])

    def _rung(self, index: int, curves: Curves) -> int | None:
        """The highest rung that the trial has reached."""
        return max((rung for rung in self.rungs if rung <= len(curves.get(index, ()))), default=None)

    def _threshold(self, rung: int, curves: Curves) -> float | None:
        """The least value that is among the best 1/eta of those at the rung; None until eta trials are there."""
        if isinstance(curves, GrowingCurves):
            values = curves.at(rung - 1)
        else:
            values = sorted(curve[rung - 1] for curve in curves.values() if len(curve) >= rung)
        places = math.floor(len(values) / self.eta)
        return values[-places] if places else None


class MedianRule(Pruner):
    """The median stopping rule (Golovin et al. 2017, Google Vizier, section 3.2.2).

    After ``grace`` evaluations a trial stops when its best value so far is below the median of the other trials' running
    means at the same place; three others must have come so far.
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
    max_iter / eta^k for k = 1 … s, rounded down. The last evaluation is no rung: nothing would be saved.
    """
    if early_terminate is None:
        return None
    if early_terminate["type"] == "median":
        return MedianRule(int(early_terminate["min_iter"]))
    eta, strict = float(early_terminate.get("eta", 3)), bool(early_terminate.get("strict", False))
    return SuccessiveHalving(rungs(early_terminate, evaluations), eta, strict)


def evaluations(fraction: float, max_steps: int) -> int:
    """How often a trial is evaluated after its first step: after each ``fraction`` of its steps, in whole steps, and at the
    end. Without ``max_steps`` (0 or less) its steps are the data's, and many enough not to matter."""
    if max_steps > 0:
        return math.ceil(max_steps / steps_between(fraction, max_steps))
    return math.ceil(1 / fraction - 1e-9)


def steps_between(fraction: float, steps: int) -> int:
    """From one evaluation to the next."""
    return max(1, math.ceil(steps * fraction - 1e-9))


def rungs(early_terminate: Mapping[str, Any], evaluations: int) -> list[int]:
    """The numbers of evaluations at which hyperband decides."""
    eta = float(early_terminate.get("eta", 3))
    if "min_iter" in early_terminate:
        found, rung = [], float(early_terminate["min_iter"])
        while rung < evaluations:
            found.append(int(rung))
            rung *= eta
    else:
        found = [int(early_terminate["max_iter"] / eta**k) for k in range(1, int(early_terminate["s"]) + 1)]
    return sorted({rung for rung in found if 0 < rung < evaluations})
