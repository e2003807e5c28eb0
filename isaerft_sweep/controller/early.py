"""Early stopping in a running sweep: keeps the trials' curves for the pruner, and what it has been asked about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from isaerft_sweep.journal.layout import DIVERGED
from isaerft_sweep.search.pruning import GrowingCurves, Pruner


class EarlyStopping:
    """Curves come from the workers' status files, so a controller that comes back has them again."""

    def __init__(self, pruner: Pruner, sign: int, evaluations: int) -> None:
        self.pruner, self.sign, self.evaluations = pruner, sign, evaluations
        self.curves = GrowingCurves()
        self._asked: dict[int, int] = {}
        self._news = False

    def note(self, index: int, status: Mapping[str, Any]) -> None:
        """Take in what a worker says of its trial's evaluations. A trial that diverges is the worst from there on."""
        values = [self.sign * float(value) for value in status.get("evaluations", ())]
        values = [value if math.isfinite(value) else -math.inf for value in values]
        if status.get("state") == DIVERGED:
            values += [-math.inf] * (self.evaluations - len(values))
        if len(values) > len(self.curves.get(index, ())):
            self.curves[index] = values
            self._news = True

    def stops(self, index: int, status: Mapping[str, Any]) -> bool:
        """Whether a running trial should stop; each evaluation is judged once."""
        self.note(index, status)
        count, since = len(self.curves.get(index, ())), self._asked.get(index, 0)
        if count <= since:
            return False
        self._asked[index] = count
        return self.pruner.stops(index, self.curves, since)

    def forget(self, index: int) -> None:
        """An attempt has ended before a decision about it was carried out: the next one is judged again."""
        self._asked.pop(index, None)

    def revived(self, pruned: Iterable[int]) -> int | None:
        """The stopped trial to go on with, if any; asked again only after something was evaluated."""
        if not self._news:
            return None
        found = self.pruner.revived(pruned, self.curves)
        self._news = found is not None
        return found
