"""Early stopping in a running sweep: the trials' curves for the pruner, and how many of their evaluations it has judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from isaerft_sweep.search.pruning import GrowingCurves, Pruner


class EarlyStopping:
    """Keeps the curves, which a restarted controller reads again from the workers' status files."""

    def __init__(self, pruner: Pruner, sign: int, evaluations: int) -> None:
        """``sign``: 1 when larger metrics are better, else -1. ``evaluations``: the number in a complete trial."""
        self.pruner, self.sign, self.evaluations = pruner, sign, evaluations
        self.curves = GrowingCurves()
        self._judged: dict[int, int] = {}
        self._new_values = False

    def note(self, index: int, evaluations: Sequence[float], diverged: bool = False) -> None:
        """Record a trial's metric at each of its evaluations. A diverged trial ranks last from there on."""
        values = [self.sign * float(value) for value in evaluations]
        values = [value if math.isfinite(value) else -math.inf for value in values]
        if diverged:
            values += [-math.inf] * (self.evaluations - len(values))
        if len(values) > len(self.curves.get(index, ())):
            self.curves[index] = values
            self._new_values = True

    def stops(self, index: int, evaluations: Sequence[float]) -> bool:
        """Whether a running trial should stop; each evaluation is judged once."""
        self.note(index, evaluations)
        count, judged = len(self.curves.get(index, ())), self._judged.get(index, 0)
        if count <= judged:
            return False
        self._judged[index] = count
        return self.pruner.stops(index, self.curves, judged)

    def forget(self, index: int) -> None:
        """Judge a trial again: its attempt ended before it could be stopped."""
        self._judged.pop(index, None)

    def revived(self, pruned: Iterable[int]) -> int | None:
        """The pruned trial to resume, if any. Calls the pruner only after new evaluations."""
        if not self._new_values:
            return None
        index = self.pruner.revived(pruned, self.curves)
        self._new_values = index is not None
        return index
