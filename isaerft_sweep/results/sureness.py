"""How sure a sweep's ranking is: the posterior of each trial's quality from the trials, their pairs and their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isaerft_sweep.results.posterior import Trials, posterior
from isaerft_sweep.results.statistics import MIN_PAIRS, interval
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults, kind_of, numbered, shared_untrained
from isaerft_sweep.search.distributions import Categorical, Distribution, is_ordered
from isaerft_sweep.search.seeded import SEED, WITHOUT_SEEDS, without_seed

MAX_COMPARED = 100
"""Leaders that are compared; the others' probability of being best is close to 0."""
LEAST_SEED = 0.02
"""Another seed changes a trial at least by this share of what training changes, until seeds are measured: trials that are
nearly equal would else look sure."""
CATEGORY = 0.5
"""Coordinates of a category's own axis on the unit cube: 0 and this. No category is nearer to one than to another."""


def assess(sweep: SweepResults) -> None:
    """Set ``expected``, ``interval`` and ``probability_best`` of the leaders, and the sweep's ``seeds_known``.

    Only trials that meet the constraints are compared. Trials of one point are one candidate. The trials of a confirmation
    count as further seeds of their points. A metric that is no mean over pairs says something only once seeds are known.
    """
    leaders = [entry for entry in sweep.entries if entry.rank and not entry.violation][:MAX_COMPARED]
    _estimate(sweep, leaders)
    for entry in leaders:
        scored = entry.pair_values(sweep.metric.name, sweep.orpo) if entry.expected is None else None
        if scored:
            entry.interval = interval(scored[1])


def _estimate(sweep: SweepResults, leaders: list[RankedTrial]) -> None:
    """Set what follows from the posterior, where there is one."""
    known = {without_seed(entry.params) for entry in leaders}
    again = [entry for entry in sweep.confirmation if entry.rank and without_seed(entry.params) in known]
    trials = _first_of_each_seed([*leaders, *again], sweep)
    table = _table(trials, sweep)
    keys = list(dict.fromkeys(without_seed(entry.params) for entry in trials))
    if table is None:
        return
    seeds = [_seed(entry, sweep) for entry in trials]
    labels = {seed: number for number, seed in enumerate(dict.fromkeys(seeds))}
    before = shared_untrained(sweep).get(sweep.metric.name)
    known_trials = Trials(
        table,
        np.array([keys.index(without_seed(entry.params)) for entry in trials]),
        np.array([labels[seed] for seed in seeds]),
        _places([next(e for e in trials if without_seed(e.params) == key) for key in keys], sweep.space),
        least_seed_sd=0.0 if before is None else LEAST_SEED * float(np.sqrt(((table.mean(axis=1) - before) ** 2).mean())),
        varies=np.array([kind_of(entry, sweep) not in WITHOUT_SEEDS for entry in trials]),
    )
    sweep.seeds_known = known_trials.seeds_known
    if len(keys) < 2:
        return
    estimate = posterior(known_trials, sweep.metric.sign)
    sweep.seed_sd = estimate.seed_sd
    for entry in leaders:
        if (key := without_seed(entry.params)) in keys:
            index = keys.index(key)
            entry.expected = float(estimate.mean[index])
            entry.interval = (float(estimate.low[index]), float(estimate.high[index]))
            entry.probability_best = float(estimate.probability_best[index])


def _seed(entry: RankedTrial, sweep: SweepResults) -> Any:
    return entry.params.get(SEED, sweep.orpo.seed if sweep.orpo else None)


def _first_of_each_seed(entries: Sequence[RankedTrial], sweep: SweepResults) -> list[RankedTrial]:
    """The entries without those that repeat point and seed of another: they have the same numbers."""
    first: dict[tuple[str, str], RankedTrial] = {}
    for entry in entries:
        first.setdefault((without_seed(entry.params), repr(_seed(entry, sweep))), entry)
    return list(first.values())


def _table(trials: list[RankedTrial], sweep: SweepResults) -> np.ndarray | None:
    """The metric of each trial on the pairs that all were evaluated on [trials, pairs]; [trials, 1] of its means.

    Removes from ``trials`` those without values on pairs when others have them. None when nothing can be compared.
    """
    scored = {id(entry): entry.pair_values(sweep.metric.name, sweep.orpo) for entry in trials}
    by_pair = [entry for entry in trials if (values := scored[id(entry)]) and len(values[0]) >= MIN_PAIRS]
    if not by_pair:
        points = {without_seed(entry.params) for entry in trials}
        means = [entry.value(sweep.metric.name) for entry in trials]
        return np.array(means, dtype=float)[:, None] if 2 <= len(points) < len(trials) else None
    trials[:] = by_pair
    tables = [dict(zip(numbered(v[0]), v[1], strict=True)) for entry in by_pair if (v := scored[id(entry)])]
    common = [pair for pair in tables[0] if all(pair in table for table in tables)]
    if len(common) < MIN_PAIRS:
        return None
    return np.array([[table[pair] for pair in common] for table in tables])


def _places(entries: list[RankedTrial], space: Mapping[str, Distribution]) -> np.ndarray | None:
    """The entries' points on the unit cube [points, coordinates]; None when they are unknown."""
    keys = sorted({key for entry in entries for key in entry.record.point.unit if key != SEED})
    columns: list[np.ndarray] = []
    for key in keys:
        if any(key not in entry.record.point.unit for entry in entries):
            return None
        distribution = space.get(key)
        if isinstance(distribution, Categorical) and not is_ordered(distribution.values):
            columns += [
                np.array([CATEGORY * (entry.params.get(key) == value) for entry in entries]) for value in distribution.values
            ]
        else:
            columns.append(np.array([entry.record.point.unit[key] for entry in entries]))
    return np.stack(columns, axis=1).astype(float) if columns else None
