"""The leaders of a sweep with new seeds: which of them is the best, and how sure that is."""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from isaerft_sweep.journal.journal import SweepRecord, replay
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.results.leaderboard import number, short_name
from isaerft_sweep.results.reading import SEED, Entry, ReadSweep, read_sweep_folder, without_seed
from isaerft_sweep.results.statistics import probability_best, show_probability

SUFFIX = "-confirm"


@dataclass
class Candidate:
    """A leader of the first sweep and what came of it with new seeds.

    ``values``: the metric by seed; the first run is not among them, since it was picked for its luck too.
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
    """Where the leaders of ``sweep`` are run again."""
    return SweepFolder(sweep.path.with_name(f"{sweep.path.name}{SUFFIX}"))


def first_sweep(again: SweepFolder) -> SweepFolder | None:
    """The sweep whose leaders ``again`` runs, None when it is a sweep of its own."""
    first = SweepFolder(again.path.with_name(again.path.name.removesuffix(SUFFIX)))
    if first.path == again.path or not first.journal.is_file():
        return None
    asked, records = SweepRecord(), SweepRecord()
    replay(first.journal, asked)
    replay(again.journal, records)
    return first if records.fingerprint == confirmation_fingerprint(asked.fingerprint) else None


def confirmation_fingerprint(question: str) -> str:
    """What the second sweep asks, made of what the first one asks."""
    return hashlib.sha256(f"confirm {question}".encode()).hexdigest()[:12]


def read_confirmation(sweep: ReadSweep) -> list[Candidate]:
    """The candidates that were run again, best mean first; empty when none was."""
    if sweep.folder is None or not confirm_folder(sweep.folder).journal.is_file():
        return []
    again = read_sweep_folder(confirm_folder(sweep.folder).path, sweep.metric.name)
    if again.fingerprint != confirmation_fingerprint(sweep.fingerprint):
        return []  # another sweep that happens to have this name
    found: dict[str, Candidate] = {}
    by_point = {without_seed(entry.params): entry for entry in reversed(sweep.entries) if entry.rank}
    for entry in again.entries:
        key, value = without_seed(entry.params), entry.value(sweep.metric.name)
        if entry.rank is None or key not in by_point or value is None:
            continue
        candidate = found.setdefault(key, Candidate(by_point[key], {}, {}))
        seed = int(entry.params[SEED])
        candidate.values[seed] = value
        scored = entry.pair_values(sweep.metric.name, sweep.beta)
        if scored:
            candidate.pairs[seed] = dict(zip(*scored, strict=True))
    candidates = sorted(found.values(), key=lambda c: -sweep.metric.sign * (c.mean or 0.0))
    _compare(candidates, sweep.metric.sign)
    return candidates


def _compare(candidates: list[Candidate], sign: int) -> None:
    """Fill in the probabilities: pairs and seeds are drawn again; seeds alone for a metric without values per pair.

    One seed tells nothing of how much the seed matters.
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
    """The candidates for a terminal."""
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
    """One sentence for people."""
    best = candidates[0]
    seeds = "1 new seed" if len(best.values) == 1 else f"{len(best.values)} new seeds"
    said = f"With {seeds} trial {best.first.record.index + 1} has the best mean"
    if best.probability_best is not None:
        share = show_probability(best.probability_best)
        said += f"; it comes out first in {share} of the cases when seeds and pairs are drawn again"
    elif len(candidates) > 1 and len(best.values) < 2:
        said += "; how sure that is takes two or more: --seeds"
    return said + ". The first run is not counted: it was picked for its luck too."
