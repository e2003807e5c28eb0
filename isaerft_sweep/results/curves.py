"""Learning curves, thinned so that nothing that stands out is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

POINTS = 200
"""Points kept of one curve."""


@dataclass(frozen=True)
class Curve:
    """One metric of one trial over its steps. ``total``: points before thinning."""

    steps: np.ndarray
    values: np.ndarray
    total: int


def curves_of(rows: Iterable[Mapping[str, Any]], names: Sequence[str], points: int = POINTS) -> dict[str, Curve]:
    """The curves of ``names`` in a trial's rows; a metric that it never logged is left out.

    Values that are not finite are left out too: they end a trial, and its message says so.
    """
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in names}
    for row in rows:
        for name, (steps, values) in found.items():
            value = row.get(name)
            if value is not None:
                steps.append(row["step"])
                values.append(value)
    return {name: _curve(*pair, points) for name, pair in found.items() if pair[0]}


def _curve(steps: Sequence[int], values: Sequence[float], points: int) -> Curve:
    at, height = np.asarray(steps, dtype=np.int32), np.asarray(values, dtype=np.float32)
    whole = np.isfinite(height)
    at, height = at[whole], height[whole]
    kept = thinned(height, points)
    return Curve(at[kept], height[kept], len(steps))


def thinned(values: np.ndarray, points: int) -> np.ndarray:
    """Places of at most ``points`` of ``values`` that keep a line's shape: the lowest and highest of each stretch.

    (As M4 of Jugel et al. 2014.) First and last are always kept, so peaks and ends are where they were; ``points`` must
    be 4 or more.
    """
    if len(values) <= points:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), max(1, (points - 2) // 2) + 1, dtype=int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(edges):
        part = values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return np.array(sorted(kept))
