"""The leaders of a sweep rerun with new seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.table import Table

from isaerft_sweep.results.leaderboard import number, short_name, show_interval
from isaerft_sweep.results.statistics import show_probability
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults
from isaerft_sweep.search.seeded import SEED, without_seed


@dataclass
class Candidate:
    """A leader of the first sweep and its results with new seeds.

    ``values``: the metric by seed, without the first run: being the leader biases that one.
    """

    first: RankedTrial
    values: dict[int, float]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


def read_confirmation(sweep: SweepResults) -> list[Candidate]:
    """The rerun candidates in the order of the leaderboard; empty without a confirmation."""
    by_point: dict[str, Candidate] = {}
    entries = {without_seed(entry.params): entry for entry in reversed(sweep.entries) if entry.rank}
    for entry in sweep.confirmation:
        key, value = without_seed(entry.params), entry.value(sweep.metric.name)
        if entry.rank is not None and key in entries and value is not None:
            by_point.setdefault(key, Candidate(entries[key], {})).values[int(entry.params[SEED])] = value
    return sorted(by_point.values(), key=lambda candidate: candidate.first.rank or 0)


def table(sweep: SweepResults, candidates: list[Candidate]) -> Table:
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
        "expected",
        "best",
        "first run",
    ):
        shown.add_column(column, justify="right", no_wrap=True)
    for i, c in enumerate(candidates):
        shown.add_row(
            str(c.first.record.index + 1),
            *(column.show(c.first.params) for column in swept),
            str(len(c.values)),
            number(c.mean),
            number(c.spread),
            number(c.first.expected),
            "" if c.first.probability_best is None else show_probability(c.first.probability_best),
            number(c.first.value(sweep.metric.name)),
            style="bold green" if i == 0 else "",
        )
    return shown


def summary(sweep: SweepResults) -> str:
    """The result in one sentence."""
    best = sweep.best()
    sentence = f"Trial {best.record.index + 1} has the best expected value over seeds and pairs"
    if best.expected is not None and best.interval is not None:
        sentence += f", {best.expected:.4f} (95 %: {show_interval(best)})"
    if best.probability_best is not None:
        sentence += f"; the probability that it is the best of all trials is {show_probability(best.probability_best)}"
    spread = f" Seeds vary by ± {sweep.seed_sd:.2g} (standard deviation)." if sweep.seed_sd is not None else ""
    return f"{sentence}.{spread}"
