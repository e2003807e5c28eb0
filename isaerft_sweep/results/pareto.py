"""Several goals: which trials no other one beats in all of them, and which of those to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def fronts(values: np.ndarray) -> np.ndarray:
    """The number of each trial's front, from 0: the non-dominated sorting of NSGA-II (Deb et al. 2002, section III-A).

    ``values`` [trials, goals]: larger is better. A trial dominates another when it is at least as good in every goal and
    better in one.
    """
    at_least = np.asarray((values[:, None, :] >= values[None, :, :]).all(axis=-1))
    dominates = at_least & ~at_least.T
    numbers = np.full(len(values), -1)
    number = 0
    while (numbers < 0).any():
        left = numbers < 0
        numbers[left & ~dominates[left].any(axis=0)] = number
        number += 1
    return numbers


def preference(values: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """A number for each trial of a front, larger for the preferred one: the weighted mean of the goals, each from 0 (the
    worst value on the front) to 1 (the best).

    ``values`` [trials, goals]: larger is better.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    scaled = np.divide(values - low, high - low, out=np.ones_like(values), where=high > low)
    return np.asarray(scaled @ np.asarray(weights, dtype=float) / sum(weights))


def weights_of(names: Sequence[str], prefer: Mapping[str, float]) -> list[float]:
    """The weight of each goal: that of ``prefer``, else 1."""
    return [prefer.get(name, 1.0) for name in names]
