"""Learning curves, downsampled without losing peaks."""

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
    """One metric of one trial: ``steps`` and ``values`` [points]. ``total``: points before thinning."""

    steps: np.ndarray
    values: np.ndarray
    total: int


def curves_of(rows: Iterable[Mapping[str, Any]], names: Sequence[str], points: int = POINTS) -> dict[str, Curve]:
    """The curves of the metrics ``names`` in a trial's rows; metrics without a row are left out.

    So are values that are not finite: they end a trial, whose message reports them.
    """
    series: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in names}
    for row in rows:
        for name, (steps, values) in series.items():
            value = row.get(name)
            if value is not None:
                steps.append(row["step"])
                values.append(value)
    return {name: _curve(*pair, points) for name, pair in series.items() if pair[0]}


def _curve(steps: Sequence[int], values: Sequence[float], points: int) -> Curve:
    x, y = np.asarray(steps, dtype=np.int32), np.asarray(values, dtype=np.float32)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    kept = thinned(y, points)
    return Curve(x[kept], y[kept], len(steps))


def thinned(values: np.ndarray, points: int) -> np.ndarray:
    """Indices of at most ``points`` (4 or more) of ``values`` [n] that keep a line's shape: the extremes of each interval.

    As M4 of Jugel et al. 2014. The first and the last point are always kept, so peaks and ends stay in place.
    """
    if len(values) <= points:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), max(1, (points - 2) // 2) + 1, dtype=int)
    kept = {0, len(values) - 1}
    for start, end in pairwise(edges):
        part = values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return np.array(sorted(kept))
