"""Which trial is best: the ranking at a sweep's end."""

from __future__ import annotations

import csv
import io
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isaerft_sweep.journal.files import write_text
from isaerft_sweep.naming import show_beta
from isaerft_sweep.results.caveats import dependence, edges
from isaerft_sweep.results.reading import Entry, ReadSweep
from isaerft_sweep.search.sweep_file import Metric

ALWAYS_SHOWN = ("eval/log_odds_chosen", "eval/rewards/accuracies", "eval/nll_loss")


def columns(metric: Metric) -> list[str]:
    """The sweep's own metric first, then those that every reader asks for."""
    return list(dict.fromkeys([metric.name, *ALWAYS_SHOWN]))


def table(sweep: ReadSweep, rows: int = 20) -> Table:
    """The leaderboard for a terminal, with the untrained model's row to compare with."""
    metric, entries = sweep.metric, sweep.entries
    title = f"Leaderboard: {metric.name}, {metric.goal}"
    # one space between columns: the whole must fit into 80 columns
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 0, 0, 1))
    first, *others = (short_name(name) for name in columns(metric))
    for name in ("rank", "trial", "lr", "beta", first, "95 %", "best", *others, "time"):
        shown.add_column(name, justify="right", no_wrap=True, min_width=len("untrained") if name == "trial" else None)
    for entry in entries[:rows]:
        value, *rest = (number(entry.metrics.get(name)) if entry.rank else "" for name in columns(metric))
        shown.add_row(
            str(entry.rank or "–"),
            str(entry.record.index + 1),
            show_lr(entry.params),
            show_beta(entry.params["orpo.beta"]) if "orpo.beta" in entry.params else "",
            value,
            show_interval(entry),
            "" if entry.probability_best is None else f"{entry.probability_best:.0%}",
            *rest,
            f"{entry.record.seconds:.0f} s" if entry.rank else entry.record.state,
            style="bold green" if entry.rank == 1 else "",
        )
    untrained = next((e.untrained for e in entries if e.untrained), None)
    if untrained:
        value, *rest = (number(untrained.get(name)) for name in columns(metric))
        shown.add_row("", "untrained", "", "", value, "", "", *rest, "", style="dim")
    return shown


def short_name(metric: str) -> str:
    """A metric's name for a narrow column."""
    known = {
        "eval/log_odds_chosen": "log odds",
        "eval/rewards/accuracies": "accuracy",
        "eval/rewards/margins": "margin",
        "eval/nll_loss": "NLL",
    }
    return known.get(metric, metric.removeprefix("eval/"))


def show_lr(params: Any) -> str:
    """The learning rate as names have it; empty when it was not swept."""
    return f"{params['orpo.learning_rate']:.1e}" if "orpo.learning_rate" in params else ""


def show_interval(entry: Entry) -> str:
    """``0.02 … 0.23``; empty when there is none."""
    return f"{entry.interval[0]:.2f} … {entry.interval[1]:.2f}" if entry.rank and entry.interval else ""


def caveats(sweep: ReadSweep) -> list[str]:
    """What a reader must know to trust the winner."""
    best = next((e for e in sweep.entries if e.rank == 1), None)
    if best is None:
        return []
    said = dependence(sweep.metric.name, sweep.swept)
    said += edges(sweep.space, best.record.point)
    if best.probability_best is not None:
        pairs = len(best.scores["trained"]["pairs"])
        said.append(
            f"95 %: bootstrap interval over the {pairs} held-out pairs. best: how often the trial is the best one when they "
            "are drawn again. Neither knows of seeds: isaerft-sweep confirm reruns the leaders with new ones."
        )
    return said


def notes(sweep: ReadSweep) -> list[Text]:
    """The caveats and the command that uses the winner."""
    best = next((e for e in sweep.entries if e.rank == 1), None)
    if best is None:
        return [Text("No trial completed.", style="red")]
    said = [Text(text, style="dim" if text.startswith("95 %") else "yellow") for text in caveats(sweep)]
    if best.folder:
        said.append(Text(f"Best trial: {best.folder.path}"))
        said.append(Text(f"Try it:     isaerft-sweep generate {shlex.quote(short_path(best.folder.path))}"))
        if sweep.folder:
            said.append(Text(f"See all:    isaerft-sweep report {shlex.quote(short_path(sweep.folder.path))}"))
    return said


def show(console: Console, sweep: ReadSweep) -> None:
    """Print the leaderboard and its notes."""
    console.print(table(sweep))
    console.print(*notes(sweep), sep="\n", soft_wrap=True)


def write_csv(sweep: ReadSweep, path: Path) -> None:
    """All trials and metrics as a CSV file."""
    entries = sweep.entries
    params = sorted({key for e in entries for key in e.params})
    metrics = sorted({key for e in entries for key in e.metrics})
    text = io.StringIO()
    writer = csv.writer(text)
    added = ("low_95", "high_95", "probability_best")
    writer.writerow(["rank", "trial", "run_id", "state", *params, *metrics, *added, "seconds", "message"])
    for e in entries:
        r = e.record
        values: list[Any] = [e.rank or "", r.name, r.run_id, r.state, *(e.params.get(k, "") for k in params)]
        low, high = e.interval or ("", "")
        trust = [low, high, "" if e.probability_best is None else e.probability_best]
        writer.writerow([*values, *(e.metrics.get(k, "") for k in metrics), *trust, round(r.seconds, 1), r.message])
    write_text(path, text.getvalue())


def short_path(path: Path) -> str:
    """Relative to the current folder where it is below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def number(value: float | None) -> str:
    """Four digits behind the point; empty for None."""
    return "" if value is None else f"{value:.4f}"
