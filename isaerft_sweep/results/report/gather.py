"""All that a report shows, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isaerft_sweep.errors import DataError
from isaerft_sweep.journal.files import read_json
from isaerft_sweep.journal.folders import COMPLETED
from isaerft_sweep.results.axes import Axis, axes, by_label
from isaerft_sweep.results.confirmation import Candidate, read_confirmation
from isaerft_sweep.results.curves import Curve, curves_of
from isaerft_sweep.results.importance import Importance, importance
from isaerft_sweep.results.latents import Agreement, SiteLatents, agreement, cosines, read_labels, read_latents
from isaerft_sweep.results.reading import Entry, ReadSweep, shared_untrained

COMPARED = 30
"""Leaders whose steering vectors are compared with each other."""
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
    """A sweep, read for its report. ``curves``: by metric, then by trial number. ``samples``: answers to prompts."""

    sweep: ReadSweep
    axes: list[Axis]
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
        words = by_label(entry.params, [axis.key for axis in self.axes])
        return f"#{entry.record.index + 1}" + (f", {words}" if words else "")


def gather(sweep: ReadSweep, labels: Path | None = None) -> Report:
    """Read curves, latents and all that is drawn. Raises DataError when ``labels`` do not fit the SAE."""
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
        curves={name: found for name, found in curves.items() if found},
        importance=importance(sweep),
        latents=_latents(sweep, labels),
        confirmed=read_confirmation(sweep),
        samples=(read_json(folder.samples) or {}) if folder else {},
        environment=(read_json(folder.environment) or {}) if folder else {},
    )


def _rows(entry: Entry, sweep: ReadSweep, untrained: Mapping[str, float]) -> list[dict[str, Any]]:
    """The trial's rows, from ``untrained`` on: every trial begins there, also those that did not evaluate it themselves."""
    rows = sweep.read_rows(entry)
    own = not rows or rows[0]["step"] == 0
    return rows if own else [{"step": 0, **untrained}, *rows]


def _latents(sweep: ReadSweep, labels: Path | None) -> list[SiteAcrossTrials]:
    leaders = [e for e in sweep.entries if e.record.state == COMPLETED and e.folder][:COMPARED]
    by_site: dict[tuple[int, int], list[tuple[Entry, SiteLatents]]] = {}
    for entry in leaders:
        for site in read_latents(entry.folder.latents) if entry.folder else []:
            by_site.setdefault((site.layer, site.d_sae), []).append((entry, site))
    if labels and not by_site:
        raise DataError(f"labels were given ({labels}), but no trial of {sweep.source} has recorded its latents yet.")
    found = []
    for (_, d_sae), pairs in sorted(by_site.items()):
        sites = [site for _, site in pairs]
        found.append(
            SiteAcrossTrials(
                entries=[entry for entry, _ in pairs],
                sites=sites,
                cosines=cosines([site.vector for site in sites]),
                agreed=agreement(sites),
                labels=read_labels(labels, d_sae) if labels else {},
            )
        )
    return found
