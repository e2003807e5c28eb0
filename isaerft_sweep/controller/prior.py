"""What a search learns from earlier sweeps: read once, then kept in the sweep's folder, so that a restart has the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from isaerft_sweep.errors import ConfigError, SpaceError
from isaerft_sweep.journal.atomic_files import read_json, write_json
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.results.from_wandb import read_any_sweep
from isaerft_sweep.results.sweep_results import SweepResults
from isaerft_sweep.search.point import Point
from isaerft_sweep.search.start_points import point_in
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment, swept_value

Result = tuple[Point, float | None]
"""A point and its metric; None for a trial that diverged or broke a constraint."""


def prior_results(folder: SweepFolder | None, experiment: Experiment, definition: SweepDefinition) -> list[list[Result]]:
    """The results of each sweep of ``sweep.prior``; kept in ``folder``, if there is one.

    Raises ConfigError when one of them has no trial in this sweep's space with this sweep's metric, FolderError when it
    cannot be read.
    """
    sources = list(experiment.sweep.prior)
    kept = read_json(folder.prior) if folder else None
    if kept is None or kept["sources"] != sources:
        results = [_results(source, experiment, definition) for source in sources]
        rows = [[{"params": dict(p.params), "unit": dict(p.unit), "value": value} for p, value in one] for one in results]
        kept = {"sources": sources, "results": rows}
        if folder:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.prior, kept)
    return [[(Point(row["params"], row["unit"]), row["value"]) for row in one] for one in kept["results"]]


def _results(source: str, experiment: Experiment, definition: SweepDefinition) -> list[Result]:
    metric = definition.metric.name
    sweep = read_any_sweep(source, metric)
    results = []
    for entry in sweep.entries:
        point = _point(entry.params, sweep, experiment, definition)
        value = entry.value(metric) if entry.rank else None
        if point is None or (value is None and entry.record.state is not TrialState.DIVERGED):
            continue
        is_bad = value is None or not math.isfinite(value) or definition.violation(entry.metrics) > 0
        results.append((point, None if is_bad else value))
    if not any(value is not None for _, value in results):
        raise ConfigError(
            f"sweep.prior: {source} must have a completed trial with {metric} in this sweep's space, but of its "
            f"{len(sweep.entries)} trials none is. Leave it out."
        )
    return results


def _point(
    params: Mapping[str, Any], sweep: SweepResults, experiment: Experiment, definition: SweepDefinition
) -> Point | None:
    """The trial's point in this sweep's space; None when it lies outside."""
    known = {key: value for key, value in params.items() if key in definition.parameters}
    try:
        return point_in(definition.parameters, known, partial(swept_value, sweep.experiment or experiment))
    except SpaceError:
        return None


def summary(results: Sequence[Sequence[Result]], sources: Sequence[str]) -> list[str]:
    """For the user: from how many trials of each sweep the search learns."""
    return [f"learns from {len(one)} trials of {source}" for one, source in zip(results, sources, strict=True)]
