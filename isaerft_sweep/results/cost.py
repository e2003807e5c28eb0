"""Device time: what trials that ran on one device at the same time have shared is counted once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from isaerft_sweep.journal.journal import TrialRecord


def device_seconds(records: Iterable[TrialRecord], per_device: int = 1) -> dict[int, float]:
    """Each trial's share of its workers' time, by trial number.

    While K trials go through a worker together (``launcher.trials_per_pass``) each counts for 1/K of the time.
    ``per_device``: how many workers have one device (``launcher.trials_per_gpu``).
    """
    spans: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    shares: dict[int, float] = {}
    for record in records:
        shares[record.index] = 0.0
        for worker, start, end in record.spans:
            spans[worker].append((start, end, record.index))
    for ran in spans.values():
        for start, end, index, running in _pieces(ran):
            shares[index] += (end - start) / running / per_device
    return shares


def _pieces(spans: list[tuple[float, float, int]]) -> Iterable[tuple[float, float, int, int]]:
    """Every span cut where another begins or ends: start, end, trial, and how many ran meanwhile."""
    events = sorted(
        [(start, 1, i) for i, (start, _, _) in enumerate(spans)] + [(end, 0, i) for i, (_, end, _) in enumerate(spans)]
    )
    running: set[int] = set()
    before = 0.0
    for at, begins, i in events:
        for other in running:
            yield before, at, spans[other][2], len(running)
        before = at
        if begins:
            running.add(i)
        else:
            running.discard(i)
