"""The answer to a sweep in a few sentences, and the methods (``adapter.kind``) that it compares, each by its best trial."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from isaerft_sweep.results.columns import Column
from isaerft_sweep.results.statistics import show_probability
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults, kind_of, paired_gain, shared_untrained
from isaerft_sweep.search.seeded import without_seed

KL, NEUTRAL = "eval/kl_base", "eval/neutral_nll_rise"


@dataclass(frozen=True)
class Method:
    """One kind of adapter in a sweep.

    ``best``: its first trial that meets the constraints, else its first one; None when none completed.
    ``probability_best``: that the best of all trials is one of this kind; None when it is not known.
    """

    kind: str
    trials: int
    completed: int
    best: RankedTrial | None
    probability_best: float | None


def methods(sweep: SweepResults) -> list[Method]:
    """The kinds of adapter that the sweep compares, best first; empty when all trials are of one kind."""
    by_kind: dict[str, list[RankedTrial]] = {}
    for entry in sweep.entries:
        by_kind.setdefault(kind_of(entry, sweep), []).append(entry)
    if len(by_kind) < 2:
        return []
    compared = []
    for kind, entries in by_kind.items():
        ranked = [entry for entry in entries if entry.rank]
        best = next((entry for entry in ranked if not entry.violation), ranked[0] if ranked else None)
        points = {without_seed(e.params): e.probability_best for e in ranked if e.probability_best is not None}
        chance = sum(share for share in points.values() if share is not None) if points else None
        compared.append(Method(kind, len(entries), len(ranked), best, chance))
    return sorted(compared, key=lambda m: (m.best is None, m.best.rank if m.best and m.best.rank else 0))


def answer(sweep: SweepResults) -> list[str]:
    """Which trial is best and how surely, what it gains and harms, and how the other methods do, a sentence each.

    Empty without a winner.
    """
    winner = sweep.winner
    if winner is None:
        return []
    sentences = [_best(winner, sweep)]
    sentences += _gain(winner, sweep)
    sentences += [_method(method, winner, sweep) for method in methods(sweep) if method.best and method.best is not winner]
    return sentences


def _best(winner: RankedTrial, sweep: SweepResults) -> str:
    if sweep.goals:
        front = sum(entry.on_front for entry in sweep.entries)
        weights = ", ".join(f"{goal.name} {sweep.prefer.get(goal.name, 1.0):g}" for goal in sweep.goals)
        return (
            f"Trial {winner.record.index + 1}{_described(winner, sweep.columns)} is preferred of the {front} on the Pareto "
            f"front, with the weights {weights} (--prefer METRIC=WEIGHT sets others)."
        )
    trials = len({without_seed(entry.params) for entry in sweep.entries if entry.rank and not entry.violation})
    sentence = f"Trial {winner.record.index + 1}{_described(winner, sweep.columns)} is the best by {sweep.metric.name}"
    if winner.probability_best is not None and trials > 1:
        assumed = "" if sweep.seeds_known else ", if seeds vary as assumed"
        bound = any(entry.rank and entry.violation for entry in sweep.entries)
        compared = f"the {trials} that meet the constraints" if bound else f"{trials}"
        sentence += f", with a probability of {show_probability(winner.probability_best)} among {compared}{assumed}"
    own = next((entries for entries in sweep.points_with_seeds() if winner in entries), [])
    if own:
        sentence += f": the first of the {len(own)} trials of its point, which are compared by their mean"
    return f"{sentence}."


def _described(entry: RankedTrial, columns: list[Column]) -> str:
    shown = ", ".join(f"{column.name} {column.show(entry.params)}" for column in columns if column.key in entry.params)
    return f" ({shown})" if shown else ""


def _gain(winner: RankedTrial, sweep: SweepResults) -> list[str]:
    """Its gain over the untrained model, and its harm."""
    name, value = sweep.metric.name, winner.value(sweep.metric.name)
    before = shared_untrained(sweep).get(name)
    sentences = []
    if value is not None:
        what = f"Its value is {value:.4f}" if winner.expected is None else f"Its expected value is {winner.expected:.4f}"
        interval = f" (95 %: {winner.interval[0]:.3g} to {winner.interval[1]:.3g})" if winner.interval else ""
        change = f", from {before:.4f} untrained" if before is not None else ""
        sentences.append(f"{what}{interval}{change}.")
        sentences += _over_untrained(winner, sweep, before)
    if name.startswith("eval/"):
        sentences += _test(winner, name.replace("eval/", "test/"), sweep)
    harm = [
        f"{winner.metrics[metric]:{style}} {unit}"
        for metric, style, unit in (
            (KL, ".3f", "nats of KL from the base model per answer token"),
            (NEUTRAL, "+.3f", "nats per token on unrelated text"),
        )
        if metric in winner.metrics
    ]
    return [*sentences, f"Its price: {' and '.join(harm)}."] if harm else sentences


def _over_untrained(winner: RankedTrial, sweep: SweepResults, before: float | None) -> list[str]:
    """Whether training has helped at all, on the same pairs."""
    gain = paired_gain(winner, sweep)
    if gain is None:
        value = winner.value(sweep.metric.name)
        is_worse = before is not None and value is not None and sweep.metric.sign * (value - before) <= 0
        return ["No trial is better than the untrained model."] if is_worse else []
    mean, interval, pairs = gain
    on = f"on the same {pairs} pairs" + (f" (95 %: {interval[0]:.3g} to {interval[1]:.3g})" if interval else "")
    if mean <= 0:
        return [f"It is no better than the untrained model: {mean:+.4f} {on}. None of these settings helps."]
    unsure = " The interval contains 0: whether it helps at all is not sure." if interval and interval[0] <= 0 else ""
    return [f"It gains {mean:.4f} over the untrained model {on}.{unsure}"]


def _test(winner: RankedTrial, name: str, sweep: SweepResults) -> list[str]:
    """The metric on the test pairs; empty when there are none."""
    if name not in winner.metrics:
        return []
    pairs = len(winner.scores.get("test_trained", {}).get("pairs", ())) or "the"
    before = shared_untrained(sweep).get(name)
    change = f", from {before:.4f} untrained" if before is not None else ""
    gain = paired_gain(winner, sweep, "test_")
    between = f" (a gain of {gain[1][0]:.3g} to {gain[1][1]:.3g}, 95 %)" if gain and gain[1] else ""
    return [f"On {pairs} test pairs, which no ranking has seen, it has {winner.metrics[name]:.4f}{change}{between}."]


def _method(method: Method, winner: RankedTrial, sweep: SweepResults) -> str:
    """How the best of another method compares."""
    assert method.best is not None
    name, best = sweep.metric.name, method.best
    value, winners = best.value(name), winner.value(name)
    sentence = f"The best {method.kind} is trial {best.record.index + 1}"
    if value is not None and winners is not None:
        sentence += f", {abs(value - winners):.4f} {'behind' if sweep.metric.sign * (winners - value) >= 0 else 'ahead'}"
    if KL in best.metrics:
        sentence += f" at a KL of {best.metrics[KL]:.3f}"
    sentence += " (breaks a constraint)" if best.violation else ""
    if method.probability_best is not None:
        sentence += f"; the probability that a {method.kind} is best is {show_probability(method.probability_best)}"
    return f"{sentence}."


def trials_by_kind(entries: list[RankedTrial], sweep: SweepResults) -> dict[str, list[RankedTrial]]:
    """The entries by kind, in the order of their first appearance."""
    order = {kind_of(entry, sweep): None for entry in entries}
    grouped = groupby(sorted(entries, key=lambda e: list(order).index(kind_of(e, sweep))), key=lambda e: kind_of(e, sweep))
    return {kind: list(group) for kind, group in grouped}
