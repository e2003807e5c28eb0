"""All that a report shows, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isaerft_sweep.errors import DataError, FolderError
from isaerft_sweep.journal.atomic_files import read_json
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.results.axes import Axis, axes, by_label
from isaerft_sweep.results.columns import Column
from isaerft_sweep.results.confirmation import Candidate, read_confirmation
from isaerft_sweep.results.curves import Curve, curves_of
from isaerft_sweep.results.importance import Importance, importance
from isaerft_sweep.results.latents import Agreement, SiteLatents, agreement, cosines, read_labels, read_latents
from isaerft_sweep.results.reading import Entry, ReadSweep, shared_untrained

COMPARED = 30
"""Leaders whose steering vectors are compared with each other."""
ENVIRONMENT = ("host", "processors", "platform", "python", "git_commit", "packages")
SAMPLES = ("made", "max_new_tokens", "trials", "columns", "prompts")
ALWAYS_DRAWN = ("train/loss", "eval/nll_loss")


@dataclass(frozen=True)
class SiteAcrossTrials:
    """One site over the leading trials: ``sites`` in the order of ``entries``, ``cosines`` [n, n] of their vectors."""

    entries: list[Entry]
    sites: list[SiteLatents]
    cosines: np.ndarray
    agreed: list[Agreement]
    labels: Mapping[int, str]


@dataclass(frozen=True)
class Report:
    """A sweep, read for its report.

    ``axes``: of what has several values; ``columns``: of all that is swept. ``curves``: by metric, then by trial number.
    ``samples``: answers to prompts.
    """

    sweep: ReadSweep
    axes: list[Axis]
    columns: list[Column]
    curves: dict[str, dict[int, Curve]]
    importance: Importance | None
    latents: list[SiteAcrossTrials]
    confirmed: list[Candidate]
    samples: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def completed(self) -> list[Entry]:
        return [entry for entry in self.sweep.entries if entry.rank]

    def label(self, entry: Entry) -> str:
        """``#3, lr 3.6e-05, beta 0.2``."""
        words = by_label(entry.params, self.columns)
        return f"#{entry.record.index + 1}" + (f", {words}" if words else "")


def gather(sweep: ReadSweep, labels: Mapping[int | None, Path] | None = None) -> Report:
    """Read curves, latents and all that is drawn. What cannot be read becomes one of the sweep's ``problems``.

    ``labels``: files by layer; None instead of the layer for a sweep with one site. Raises DataError when they do not fit.
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
        curves={name: found for name, found in curves.items() if found},
        importance=importance(sweep),
        latents=_latents(sweep, labels or {}),
        confirmed=read_confirmation(sweep),
        samples=_side_file(sweep, folder.samples, ("made", "max_new_tokens", "trials", "columns", "prompts"))
        if folder
        else {},
        environment=_side_file(sweep, folder.environment, ENVIRONMENT) if folder else {},
    )


def _side_file(sweep: ReadSweep, path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object that has ``keys``; empty when there is none, or when it cannot be used, which is noted."""
    try:
        found = read_json(path)
        if found is None:
            return {}
        return {key: found[key] for key in keys}
    except (ValueError, KeyError, TypeError, OSError) as error:
        sweep.problems.append(f"{path} cannot be read ({type(error).__name__}: {error}). Delete it, or make it again.")
        return {}


def _rows(entry: Entry, sweep: ReadSweep, untrained: Mapping[str, float]) -> list[dict[str, Any]]:
    """The trial's rows, from ``untrained`` on: every trial begins there, also those that did not evaluate it themselves."""
    try:
        rows = sweep.read_rows(entry)
        steps = [row["step"] for row in rows]
    except (ValueError, KeyError, TypeError, OSError) as error:
        where = entry.folder.metrics if entry.folder else entry.record.name
        sweep.problems.append(f"the curves of trial {entry.record.index + 1} cannot be read from {where}: {error}.")
        return []
    own = not rows or steps[0] == 0
    return rows if own else [{"step": 0, **untrained}, *rows]


def _latents(sweep: ReadSweep, labels: Mapping[int | None, Path]) -> list[SiteAcrossTrials]:
    leaders = [e for e in sweep.entries if e.record.state == TrialState.COMPLETED and e.folder][:COMPARED]
    # by SAE too: latents of different ones have nothing to do with each other
    by_site: dict[tuple[int, int, str], list[tuple[Entry, SiteLatents]]] = {}
    for entry in leaders:
        for site in _read_latents(sweep, entry):
            by_site.setdefault((site.layer, site.d_sae, site.fingerprint), []).append((entry, site))
    layers = {layer for layer, _, _ in by_site}
    unknown = [layer for layer in labels if layer is not None and layer not in layers]
    if labels and (unknown or not layers or (None in labels and len(by_site) > 1)):
        raise DataError(
            f"labels must be for a layer that the trials of {sweep.source} have recorded ({sorted(layers) or 'none yet'}); "
            "with several sites or SAEs say which: --labels LAYER=FILE."
        )
    found = []
    for (layer, d_sae, _), pairs in sorted(by_site.items()):
        named = labels.get(layer, labels.get(None))
        sites = [site for _, site in pairs]
        found.append(
            SiteAcrossTrials(
                entries=[entry for entry, _ in pairs],
                sites=sites,
                cosines=cosines([site.vector for site in sites]),
                agreed=agreement(sites),
                labels=read_labels(named, d_sae) if named else {},
            )
        )
    return found


def _read_latents(sweep: ReadSweep, entry: Entry) -> list[SiteLatents]:
    try:
        return read_latents(entry.folder.latents) if entry.folder else []
    except FolderError as error:
        sweep.problems.append(str(error))
        return []
