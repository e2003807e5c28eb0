"""Reads everything that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isaerft_sweep.errors import DataError, FolderError
from isaerft_sweep.journal.atomic_files import read_json
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.results.axes import Axis, axes, params_text
from isaerft_sweep.results.columns import Column
from isaerft_sweep.results.confirmation import Candidate, read_confirmation
from isaerft_sweep.results.curves import Curve, curves_of
from isaerft_sweep.results.importance import Importance, importance
from isaerft_sweep.results.latents import Agreement, SiteLatents, agreement, cosines, read_labels, read_latents
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults, shared_untrained

COMPARED = 30
"""Leaders whose steering vectors are compared."""
ENVIRONMENT_KEYS = ("host", "processors", "platform", "python", "git_commit", "packages")
SAMPLE_KEYS = ("made", "max_new_tokens", "trials", "columns", "prompts")
ALWAYS_DRAWN = ("train/loss", "eval/nll_loss")


@dataclass(frozen=True)
class SiteAcrossTrials:
    """One site over the leading trials: ``sites`` in the order of ``entries``, ``cosines`` [n, n] of their vectors."""

    entries: list[RankedTrial]
    sites: list[SiteLatents]
    cosines: np.ndarray
    agreed: list[Agreement]
    labels: Mapping[int, str]


@dataclass(frozen=True)
class Report:
    """The data of a report.

    ``axes``: of parameters with several values; ``columns``: of all swept parameters. ``curves``: by metric, then by trial
    number. ``samples``: answers to prompts.
    """

    sweep: SweepResults
    axes: list[Axis]
    columns: list[Column]
    curves: dict[str, dict[int, Curve]]
    importance: Importance | None
    latents: list[SiteAcrossTrials]
    confirmed: list[Candidate]
    samples: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def completed(self) -> list[RankedTrial]:
        return [entry for entry in self.sweep.entries if entry.rank]

    def label(self, entry: RankedTrial) -> str:
        """``#3, lr 3.6e-05, beta 0.2``."""
        params = params_text(entry.params, self.columns)
        return f"#{entry.record.index + 1}" + (f", {params}" if params else "")


def gather(sweep: SweepResults, labels: Mapping[int | None, Path] | None = None) -> Report:
    """Read curves, latents and the rest of a report. What cannot be read becomes one of the sweep's ``problems``.

    ``labels``: files by layer; the key None is the only site. Raises DataError when they do not match the sites.
    """
    names = list(dict.fromkeys([sweep.metric.name, *ALWAYS_DRAWN]))
    curves: dict[str, dict[int, Curve]] = {name: {} for name in names}
    untrained = shared_untrained(sweep)
    for entry in sweep.entries:
        for name, curve in curves_of(_rows(entry, sweep, untrained), names).items():
            curves[name][entry.record.index] = curve
    folder = sweep.folder
    return Report(
        sweep=sweep,
        axes=axes(sweep),
        columns=sweep.columns,
        curves={name: by_trial for name, by_trial in curves.items() if by_trial},
        importance=importance(sweep),
        latents=_latents(sweep, labels or {}),
        confirmed=read_confirmation(sweep),
        samples=_side_file(sweep, folder.samples, SAMPLE_KEYS) if folder else {},
        environment=_side_file(sweep, folder.environment, ENVIRONMENT_KEYS) if folder else {},
    )


def _side_file(sweep: SweepResults, path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The ``keys`` of a JSON file; empty when it is missing, or unreadable, which becomes a problem of the sweep."""
    try:
        content = read_json(path)
        if content is None:
            return {}
        return {key: content[key] for key in keys}
    except (ValueError, KeyError, TypeError, OSError) as error:
        sweep.problems.append(f"{path} cannot be read ({type(error).__name__}: {error}). Delete it, or make it again.")
        return {}


def _rows(entry: RankedTrial, sweep: SweepResults, untrained: Mapping[str, float]) -> list[dict[str, Any]]:
    """The trial's rows. ``untrained`` is row 0 of a trial that did not evaluate the untrained model itself."""
    try:
        rows = sweep.read_rows(entry)
        steps = [row["step"] for row in rows]
    except (ValueError, KeyError, TypeError, OSError) as error:
        source = entry.folder.metrics if entry.folder else entry.record.name
        sweep.problems.append(f"the curves of trial {entry.record.index + 1} cannot be read from {source}: {error}.")
        return []
    complete = not rows or steps[0] == 0
    return rows if complete else [{"step": 0, **untrained}, *rows]


def _latents(sweep: SweepResults, labels: Mapping[int | None, Path]) -> list[SiteAcrossTrials]:
    leaders = [e for e in sweep.entries if e.record.state == TrialState.COMPLETED and e.folder][:COMPARED]
    # by SAE too: latents of different SAEs are unrelated
    by_site: dict[tuple[int, int, str], list[tuple[RankedTrial, SiteLatents]]] = {}
    for entry in leaders:
        for site in _read_latents(sweep, entry):
            by_site.setdefault((site.layer, site.d_sae, site.fingerprint), []).append((entry, site))
    layers = {layer for layer, _, _ in by_site}
    unknown = [layer for layer in labels if layer is not None and layer not in layers]
    if labels and (unknown or not layers or (None in labels and len(by_site) > 1)):
        raise DataError(
            f"labels must be for a layer that the trials of {sweep.source} have recorded ({sorted(layers) or 'none yet'}); "
            "with several sites or SAEs name the layer: --labels LAYER=FILE."
        )
    across_trials = []
    for (layer, d_sae, _), pairs in sorted(by_site.items()):
        labels_file = labels.get(layer, labels.get(None))
        sites = [site for _, site in pairs]
        across_trials.append(
            SiteAcrossTrials(
                entries=[entry for entry, _ in pairs],
                sites=sites,
                cosines=cosines([site.vector for site in sites]),
                agreed=agreement(sites),
                labels=read_labels(labels_file, d_sae) if labels_file else {},
            )
        )
    return across_trials


def _read_latents(sweep: SweepResults, entry: RankedTrial) -> list[SiteLatents]:
    try:
        return read_latents(entry.folder.latents) if entry.folder else []
    except FolderError as error:
        sweep.problems.append(str(error))
        return []
