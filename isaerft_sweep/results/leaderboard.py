"""The leaderboard: a sweep's trials, best first, and how far to trust the order."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isaerft_sweep.journal.atomic_files import write_text
from isaerft_sweep.paths import quoted
from isaerft_sweep.results.answer import answer
from isaerft_sweep.results.caveats import edges
from isaerft_sweep.results.statistics import MIN_PAIRS, show_probability
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults

ALWAYS_SHOWN = ("eval/log_odds_chosen", "eval/rewards/accuracies", "eval/neutral_nll_rise", "eval/kl_base", "eval/nll_loss")
FRONT = " ●"
ALSO_SHOWN = ("eval/generation_repeated", "eval/generation_base_nll")


MOST_POINTS = 5
"""Points whose seeds are listed."""


def columns(sweep: SweepResults) -> list[str]:
    """The metrics that get a column, the one that ranks first; of a program that is not ours only what it has measured."""
    measured = {name for entry in sweep.entries for name in entry.metrics}
    always = ALWAYS_SHOWN if not measured or any(name in measured for name in ALWAYS_SHOWN) else ()
    others = [*(constraint.metric for constraint in sweep.constraints), *ALSO_SHOWN]
    shown = [*(goal.name for goal in sweep.goals), *always, *(name for name in others if name in measured)]
    return list(dict.fromkeys([sweep.metric.name, *shown]))


def table(sweep: SweepResults, rows: int = 20, width: int | None = None) -> Table:
    """The leaderboard for a terminal, with the untrained model as the last row.

    ``width``: characters of the terminal. Less important columns are dropped until the table fits: a truncated number is
    wrong. None: all columns.
    """
    extra = columns(sweep)[1:]
    choices = [(extra[:n], True, True) for n in range(len(extra), -1, -1)] + [([], False, True), ([], False, False)]
    for metrics, with_best, with_time in choices:
        shown = _table(sweep, rows, metrics, with_best, with_time)
        if width is None or needed_width(shown) <= width:
            break
    return shown


def print_whole(console: Console, shown: Table) -> None:
    """Print a table untruncated: a pipe has no width, and a terminal that is too narrow wraps lines."""
    console.width = max(console.width, needed_width(shown))
    console.print(shown)


def needed_width(shown: Table) -> int:
    """Characters per line that the untruncated table needs."""
    return Console(width=1000, height=100).measure(shown).maximum  # without a height rich ignores it where TERM=dumb


def _table(sweep: SweepResults, rows: int, extra: list[str], with_best: bool, with_time: bool) -> Table:
    name = sweep.metric.name
    swept = sweep.columns
    goals = "; ".join(f"{goal.name}, {goal.goal}" for goal in sweep.goals or (sweep.metric,))
    shown = Table(title=f"Leaderboard: {goals}", title_justify="left", title_style="bold", box=None,
                  padding=(0, 0, 0, 1))  # fmt: skip
    headers = ["rank", "trial", *(column.name for column in swept), short_name(name), *expected_column(sweep)]
    headers += interval_column(sweep)
    with_best = with_best and bool(best_column(sweep))
    headers += best_column(sweep) if with_best else []
    headers += [*(short_name(n) for n in extra), *(["time"] if with_time else [])]
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)
    for entry in sweep.entries[:rows]:
        cells = [
            show_rank(entry),
            str(entry.record.index + 1),
            *(column.show(entry.params) for column in swept),
            number(entry.metrics.get(name)) if entry.rank else "",
            *([number(entry.expected)] if sweep.seeds_known else []),
            *([show_interval(entry)] if interval_column(sweep) else []),
        ]
        chance = "" if entry.probability_best is None else show_probability(entry.probability_best)
        cells += [chance] if with_best else []
        cells += [number(entry.metrics.get(n)) if entry.rank else "" for n in extra]
        cells += [f"{entry.record.seconds:.0f} s" if entry.rank else entry.state] if with_time else []
        shown.add_row(*cells, style="bold green" if entry is sweep.winner else "dim" if entry.violation else "")
    untrained = next((e.untrained for e in sweep.entries if e.untrained), None)
    if untrained:
        cells = ["", "untrained", *([""] * len(swept)), number(untrained.get(name))]
        cells += [""] * (len(expected_column(sweep)) + len(interval_column(sweep)) + with_best)
        cells += [number(untrained.get(n)) for n in extra]
        shown.add_row(*cells, *([""] if with_time else []), style="dim")
    return shown


def expected_column(sweep: SweepResults) -> list[str]:
    """The header of the expected value, shown once it ranks the trials."""
    return ["expected"] if sweep.seeds_known else []


def interval_column(sweep: SweepResults) -> list[str]:
    """The header of the intervals, if a trial has one."""
    return ["95 %"] if any(entry.interval for entry in sweep.entries) else []


def best_column(sweep: SweepResults) -> list[str]:
    """The header of the probability of being best, if it is known: it says when the spread over seeds is only assumed."""
    if all(entry.probability_best is None for entry in sweep.entries):
        return []
    return ["best" if sweep.seeds_known else "best (prior)"]


def short_name(metric: str) -> str:
    """A metric's short name for a narrow column."""
    short = {
        "eval/log_odds_chosen": "log odds",
        "eval/rewards/accuracies": "accuracy",
        "eval/rewards/margins": "margin",
        "eval/nll_loss": "NLL",
        "eval/kl_base": "KL to base",
        "eval/neutral_nll_rise": "neutral +",
        "eval/generation_repeated": "repeated",
        "eval/generation_base_nll": "NLL of answers",
    }
    return short.get(metric, metric.removeprefix("eval/"))


def show_rank(entry: RankedTrial) -> str:
    """The rank; in brackets for a trial that breaks a constraint, with ``FRONT`` on the Pareto front, a dash for none."""
    if not entry.rank:
        return "–"
    return f"({entry.rank})" if entry.violation else f"{entry.rank}{FRONT * entry.on_front}"


def show_interval(entry: RankedTrial) -> str:
    """``0.02 … 0.23``, with as many digits as its width needs; empty without an interval."""
    if not entry.rank or not entry.interval:
        return ""
    low, high = entry.interval
    digits = min(6, max(2, 1 - math.floor(math.log10(high - low)))) if high > low else 2
    return f"{low:.{digits}f} … {high:.{digits}f}"


def caveats(sweep: SweepResults) -> list[str]:
    """Problems while reading the sweep, and reasons why the ranking may mislead."""
    texts = [*sweep.problems, *(f"Trial {e.record.index + 1}: {e.problem}" for e in sweep.entries if e.problem)]
    best = sweep.winner
    if best is None:
        return texts
    if any(entry.rank and entry.violation for entry in sweep.entries):
        texts.append(f"In brackets: trials that break a constraint ({', '.join(map(str, sweep.constraints))}).")
    if sweep.goals:
        texts.append("●: on the Pareto front, where no other trial is at least as good in every goal and better in one.")
    if points := sweep.points_with_seeds():
        shown = "; ".join(_over_seeds(entries, sweep) for entries in points[:MOST_POINTS])
        texts.append(f"Points over their seeds (mean ± standard deviation of {short_name(sweep.metric.name)}): {shown}.")
    texts += sweep.dependence
    texts += edges(sweep.space, best.record.point)
    scored = best.pair_values(sweep.metric.name, sweep.orpo)
    if sweep.folder is None:
        texts.append(
            "Read from W&B, which has no scores of single pairs: so there are no intervals, no probabilities and no "
            "comparison with the untrained model. The sweep's folder has them."
        )
    if best.probability_best is None and scored and len(scored[0]) < MIN_PAIRS:
        texts.append(
            f"{len(scored[0])} held-out pairs are too few to say how sure the ranking is: at least {MIN_PAIRS}, better "
            "hundreds (data.eval_size)."
        )
    if best.probability_best is not None:
        can_confirm = sweep.folder is not None and not sweep.folder.agent_run_folders()
        hint = "; isaerft-sweep confirm measures it" if can_confirm else ""
        pairs, scores = len(scored[0]) if scored else 0, len(best.scores["trained"]["pairs"])
        without = f" ({scores - pairs} without a finite score left out)" if pairs < scores else ""
        counted = f"the expected value over seeds and the {pairs} held-out pairs{without}"
        if sweep.seeds_known:
            texts.append(
                f"expected, 95 %: {counted}, which ranks the trials, and its interval. best: the probability that it is the "
                f"best of all trials. Beyond the noise of pairs, seeds vary by ± {sweep.seed_sd:.2g} (standard deviation)."
            )
        else:
            texts.append(
                f"95 %: interval of {counted}. best (prior): the probability that it is the best of all trials. No point "
                f"has two seeds yet, so their spread is assumed{hint}."
            )
    return texts


def _over_seeds(entries: Sequence[RankedTrial], sweep: SweepResults) -> str:
    """One point's trials: which they are, their mean and spread, and how many seeds."""
    values = [value for entry in entries if (value := entry.value(sweep.metric.name)) is not None]
    numbers = ", ".join(str(entry.record.index + 1) for entry in entries)
    return f"trials {numbers}: {statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}, {len(values)} seeds"


def notes(sweep: SweepResults) -> list[Text]:
    """The caveats and the commands that use the winner."""
    best = sweep.winner
    if best is None:
        reasons = [Text(text, style="yellow") for text in caveats(sweep)]
        return [*reasons, Text(f"No winner{' yet' if sweep.is_running else ''}: {sweep.why_unranked()}", style="red")]
    lines = [Text(" ".join(answer(sweep)))]
    lines += [Text(text, style="dim" if text.startswith(("95 %", "expected")) else "yellow") for text in caveats(sweep)]
    if best.folder:
        lines.append(Text(f"Best trial: {best.folder.path}"))
        lines.append(Text(f"Try it:     isaerft-sweep generate {quoted(short_path(best.folder.path))}"))
        if sweep.folder:
            lines.append(Text(f"See all:    isaerft-sweep report {quoted(short_path(sweep.folder.path))}"))
    return lines


def show(console: Console, sweep: SweepResults) -> None:
    """Print the leaderboard and its notes."""
    print_whole(console, table(sweep, width=console.width if console.is_terminal else None))
    console.print(*notes(sweep), sep="\n", soft_wrap=True)


def write_csv(sweep: SweepResults, path: Path) -> None:
    """Write all trials and metrics as a CSV file."""
    entries = sweep.entries
    params = sorted({key for e in entries for key in e.params})
    metrics = sorted({key for e in entries for key in e.metrics})
    text = io.StringIO()
    writer = csv.writer(text)
    added = ("expected", "low_95", "high_95", "probability_best", "violation")
    writer.writerow(["rank", "trial", "run_id", "state", *params, *metrics, *added, "seconds", "message"])
    for e in entries:
        r = e.record
        values: list[Any] = [e.rank or "", r.name, r.run_id, r.state, *(e.params.get(k, "") for k in params)]
        low, high = e.interval or ("", "")
        chance = "" if e.probability_best is None else e.probability_best
        uncertainty = ["" if e.expected is None else e.expected, low, high, chance, e.violation if e.rank else ""]
        writer.writerow([*values, *(e.metrics.get(k, "") for k in metrics), *uncertainty, round(r.seconds, 1), r.message])
    write_text(path, text.getvalue())


def short_path(path: Path) -> str:
    """``path`` relative to the current folder if it is inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def number(value: float | None) -> str:
    """``value`` with four decimals; empty for None."""
    return "" if value is None else f"{value:.4f}"
