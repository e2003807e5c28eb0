"""A trial's rank in its sweep, for its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from isaerft_sweep.results.confirmation import Candidate, read_confirmation
from isaerft_sweep.results.statistics import show_probability
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults, shared_untrained
from isaerft_sweep.search.distributions import Categorical, Conditional, Constant, Distribution, Numeric
from isaerft_sweep.search.sweep_file import Metric


@dataclass(frozen=True)
class Standing:
    """One trial compared with the others of its sweep.

    ``seconds``: device time of all attempts. ``untrained``: the untrained model's metrics, which one trial measured for
    all, without those that a swept parameter changes. ``space``: descriptions by key. ``seeds``: results with new seeds.
    """

    rank: int | None
    completed: int
    metric: Metric
    value: float | None
    interval: tuple[float, float] | None
    probability_best: float | None
    seconds: float
    untrained: Mapping[str, float] = field(default_factory=dict)
    space: Mapping[str, str] = field(default_factory=dict)
    seeds: Candidate | None = None
    seeds_known: bool = False

    def as_markdown(self) -> str:
        """A table of space, rank, interval and spread over seeds."""
        lines = ["| | |", "| --- | --- |"]
        lines += [f"| space: {key} | {description} |" for key, description in self.space.items()]
        lines.append(f"| rank | {self.rank} of {self.completed} completed trials by `{self.metric.name}` |")
        if self.value is not None and self.interval:
            low, high = self.interval
            lines.append(
                f"| {self.metric.name} | {self.value:.4f}; over seeds and held-out pairs, 95 % {low:.4f} to {high:.4f} |"
            )
        if self.probability_best is not None:
            prior = "" if self.seeds_known else " (spread over seeds assumed)"
            lines.append(f"| probability of being the best{prior} | {show_probability(self.probability_best)} |")
        if self.seeds and self.seeds.mean is not None:
            spread = f" ± {self.seeds.spread:.4f}" if self.seeds.spread is not None else ""
            lines.append(
                f"| mean over {len(self.seeds.values)} new seeds | {self.seeds.mean:.4f}{spread} (standard deviation) |"
            )
        return "\n".join(lines)


def standings(sweep: SweepResults) -> list[tuple[RankedTrial, Standing]]:
    """Every completed trial with its standing."""
    ranked = [entry for entry in sweep.entries if entry.rank]
    space = {key: describe(distribution) for key, distribution in sweep.space.items()}
    untrained = shared_untrained(sweep)
    candidates = {candidate.first.record.index: candidate for candidate in read_confirmation(sweep)}
    return [
        (
            entry,
            Standing(
                rank=entry.rank,
                completed=len(ranked),
                metric=sweep.metric,
                value=entry.value(sweep.metric.name),
                interval=entry.interval,
                probability_best=entry.probability_best,
                seconds=entry.device_s,
                untrained=untrained,
                space=space,
                seeds=candidates.get(entry.record.index),
                seeds_known=sweep.seeds_known,
            ),
        )
        for entry in ranked
    ]


def describe(distribution: Distribution) -> str:
    """A distribution as text: ``log_uniform_values from 1e-06 to 5e-05``."""
    if isinstance(distribution, Constant):
        return f"{distribution.value!r}"
    if isinstance(distribution, Categorical):
        return "one of " + ", ".join(str(value) for value in distribution.values)
    if isinstance(distribution, Conditional):
        return "; ".join(f"{value}: {describe(case)}" for value, case in distribution.cases)
    return _describe_numeric(distribution)


def _describe_numeric(distribution: Numeric) -> str:
    step = f" in steps of {distribution.q:g}" if distribution.q else ""
    if distribution.family in ("normal", "log_normal"):
        return f"{distribution.kind}, mu {distribution.a:g}, sigma {distribution.b:g}{step}"
    if distribution.family == "beta":
        return f"{distribution.kind}, a {distribution.a:g}, b {distribution.b:g}{step}"
    low, high = distribution.limits
    return f"{distribution.kind} from {low:g} to {high:g}{step}"
