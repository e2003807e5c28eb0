"""The leaders of a sweep rerun with new seeds: which one is best, and with what probability."""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from isaerft_sweep.journal.journal import read_record
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.results.leaderboard import number, short_name
from isaerft_sweep.results.reading import SEED, Entry, ReadSweep, read_sweep_folder, without_seed
from isaerft_sweep.results.statistics import probability_best, show_probability

SUFFIX = "-confirm"


@dataclass
class Candidate:
    """A leader of the first sweep and its results with new seeds.

    ``values``: the metric by seed, without the first run: being the leader biases that one.
    ``pairs``: by seed, the metric of each held-out pair by name.
    ``probability_best``: None until every candidate has the same number of seeds, at least two.
    """

    first: Entry
    values: dict[int, float]
    pairs: dict[int, dict[str, float]]
    probability_best: float | None = None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


def confirm_folder(sweep: SweepFolder) -> SweepFolder:
    """The folder of the sweep that reruns the leaders of ``sweep``."""
    return SweepFolder(sweep.path.with_name(f"{sweep.path.name}{SUFFIX}"))


def first_sweep(again: SweepFolder) -> SweepFolder | None:
    """The sweep whose leaders ``again`` reruns; None when ``again`` is no confirmation."""
    first = SweepFolder(again.path.with_name(again.path.name.removesuffix(SUFFIX)))
    if first.path == again.path or not first.journal.is_file():
        return None
    original, rerun = read_record(first), read_record(again)
    return first if rerun.fingerprint == confirmation_fingerprint(original.fingerprint) else None


def confirmation_fingerprint(fingerprint: str) -> str:
    """The fingerprint of the confirmation of the sweep with ``fingerprint``."""
    return hashlib.sha256(f"confirm {fingerprint}".encode()).hexdigest()[:12]


def read_confirmation(sweep: ReadSweep) -> list[Candidate]:
    """The rerun candidates, best mean first; empty without a confirmation."""
    if sweep.folder is None or not confirm_folder(sweep.folder).journal.is_file():
        return []
    again = read_sweep_folder(confirm_folder(sweep.folder).path, sweep.metric.name)
    if again.fingerprint != confirmation_fingerprint(sweep.fingerprint):
        return []  # an unrelated sweep with this name
    by_key: dict[str, Candidate] = {}
    by_point = {without_seed(entry.params): entry for entry in reversed(sweep.entries) if entry.rank}
    for entry in again.entries:
        key, value = without_seed(entry.params), entry.value(sweep.metric.name)
        if entry.rank is None or key not in by_point or value is None:
            continue
        candidate = by_key.setdefault(key, Candidate(by_point[key], {}, {}))
        seed = int(entry.params[SEED])
        candidate.values[seed] = value
        scored = entry.pair_values(sweep.metric.name, sweep.orpo)
        if scored:
            candidate.pairs[seed] = dict(zip(*scored, strict=True))
    candidates = sorted(by_key.values(), key=lambda c: -sweep.metric.sign * (c.mean or 0.0))
    _compare(candidates, sweep.metric.sign)
    return candidates


def _compare(candidates: list[Candidate], sign: int) -> None:
    """Set the probabilities by resampling pairs and seeds; only seeds for a metric without values per pair.

    With one seed per candidate nothing is set, since the variance over seeds is unknown then.
    """
    if len(candidates) < 2 or len({len(c.values) for c in candidates}) != 1 or len(candidates[0].values) < 2:
        return
    if all(len(c.pairs) == len(c.values) for c in candidates):
        scored = [pairs for c in candidates for pairs in c.pairs.values()]
        names = [name for name in scored[0] if all(name in pairs for pairs in scored)]
        runs = [np.array([[p[name] for name in names] for p in c.pairs.values()]) for c in candidates]
        if not names:
            return
    else:
        runs = [np.array([[value] for value in c.values.values()]) for c in candidates]
    for candidate, share in zip(candidates, probability_best(runs, sign), strict=True):
        candidate.probability_best = float(share)


def table(sweep: ReadSweep, candidates: list[Candidate]) -> Table:
    """The candidates as a table for a terminal."""
    name = short_name(sweep.metric.name)
    title = f"Leaders with new seeds: {sweep.metric.name}, {sweep.metric.goal}"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None)
    swept = sweep.columns
    for column in (
        "trial",
        *(column.name for column in swept),
        "seeds",
        f"{name}, mean",
        "± seeds",
        "best",
        "first run",
        "rank then",
    ):
        shown.add_column(column, justify="right", no_wrap=True)
    for i, c in enumerate(candidates):
        shown.add_row(
            str(c.first.record.index + 1),
            *(column.show(c.first.params) for column in swept),
            str(len(c.values)),
            number(c.mean),
            number(c.spread),
            "" if c.probability_best is None else show_probability(c.probability_best),
            number(c.first.value(sweep.metric.name)),
            str(c.first.rank),
            style="bold green" if i == 0 else "",
        )
    return shown


def summary(candidates: list[Candidate]) -> str:
    """The result in one sentence."""
    best = candidates[0]
    seeds = "1 new seed" if len(best.values) == 1 else f"{len(best.values)} new seeds"
    sentence = f"With {seeds} trial {best.first.record.index + 1} has the best mean"
    if best.probability_best is not None:
        share = show_probability(best.probability_best)
        sentence += f"; it comes out first in {share} of resamples of seeds and pairs"
    elif len(candidates) > 1 and len(best.values) < 2:
        sentence += "; its probability of being best needs two or more: --seeds"
    return sentence + ". The first run is not counted: being the leader biases it."
