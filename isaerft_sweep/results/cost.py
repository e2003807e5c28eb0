"""Device time: trials that ran on one device at the same time share it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from isaerft_sweep.journal.journal import TrialRecord


def device_seconds(records: Iterable[TrialRecord], per_device: int = 1) -> dict[int, float]:
    """Each trial's share of its workers' time in seconds, by trial number.

    While a worker runs K trials at once (``launcher.trials_per_pass``), each gets 1/K of the time.
    ``per_device``: workers per device (``launcher.trials_per_gpu``).
    """
    spans: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    shares: dict[int, float] = {}
    for record in records:
        shares[record.index] = 0.0
        for worker, start, end in record.spans:
            spans[worker].append((start, end, record.index))
    for worker_spans in spans.values():
        for start, end, index, running in _segments(worker_spans):
            shares[index] += (end - start) / running / per_device
    return shares


def _segments(spans: list[tuple[float, float, int]]) -> Iterable[tuple[float, float, int, int]]:
    """The spans, split where another one begins or ends: start, end, trial, and the number of trials running."""
    events = sorted(
        [(start, 1, i) for i, (start, _, _) in enumerate(spans)] + [(end, 0, i) for i, (_, end, _) in enumerate(spans)]
    )
    running: set[int] = set()
    previous = 0.0
    for moment, begins, i in events:
        for other in running:
            yield previous, moment, spans[other][2], len(running)
        previous = moment
        if begins:
            running.add(i)
        else:
            running.discard(i)
