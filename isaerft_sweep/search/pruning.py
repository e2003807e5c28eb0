"""When to stop a trial early, and when to go on with one after all. Pure: curves in, decisions out.

A curve is a trial's metric at its evaluations in order, larger is better. All trials evaluate after the same shares of their
training, so values at the same place compare like with like.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Curves = Mapping[int, Sequence[float]]
"""By trial number."""


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

    def stops(self, index: int, curves: Curves, since: int = 0) -> bool:
        rung = self._rung(index, curves)
        if rung is None or rung <= since:
            return False
        threshold = self._threshold(rung, curves)
        return threshold is not None and self._judged(curves[index], rung) < threshold

    def revived(self, stopped: Iterable[int], curves: Curves) -> int | None:
        at_rung: dict[int, list[int]] = {}
        for index in stopped:
            rung = self._rung(index, curves)
            if rung:
                at_rung.setdefault(rung, []).append(index)
        for rung in sorted(at_rung, reverse=True):  # those that have come furthest first
            threshold = self._threshold(rung, curves)
            best = max(at_rung[rung], key=lambda i: self._judged(curves[i], rung))
            if threshold is not None and self._judged(curves[best], rung) >= threshold:
                return best
        return None

    def _judged(self, curve: Sequence[float], rung: int) -> float:
        """By what a trial is judged at a rung."""
        return curve[rung - 1] if self.strict else max(curve[:rung])

    def _rung(self, index: int, curves: Curves) -> int | None:
        """The highest rung that the trial has reached."""
        return max((rung for rung in self.rungs if rung <= len(curves.get(index, ()))), default=None)

    def _threshold(self, rung: int, curves: Curves) -> float | None:
        """The least value that is among the best 1/eta of those at the rung; None until eta trials are there."""
        values = sorted((curve[rung - 1] for curve in curves.values() if len(curve) >= rung), reverse=True)
        places = math.floor(len(values) / self.eta)
        return values[places - 1] if places else None


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
