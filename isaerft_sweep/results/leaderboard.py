"""Which trial is best: the ranking at a sweep's end."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isaerft_sweep.journal.files import write_text
from isaerft_sweep.journal.folders import COMPLETED, SweepFolder
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.metrics import depends_on_beta
from isaerft_sweep.naming import show_beta
from isaerft_sweep.search.sweep_file import Metric

ALWAYS_SHOWN = ("eval/log_odds_chosen", "eval/rewards/accuracies", "eval/nll_loss")


@dataclass(frozen=True)
class Entry:
    """One trial on the leaderboard; ``rank`` is None when it did not complete."""

    rank: int | None
    record: TrialRecord
    metrics: dict[str, float]
    untrained: dict[str, float]


def rank(records: Iterable[TrialRecord], folder: SweepFolder, metric: Metric) -> list[Entry]:
    """Completed trials from best to worst, then the others by number."""
    ordered = sorted(
        records,
        key=lambda r: (r.state != COMPLETED, -metric.sign * (r.metric or 0.0) if r.state == COMPLETED else r.index),
    )
    entries = []
    for i, record in enumerate(ordered):
        status = folder.trial(record.name).read_status()
        place = i + 1 if record.state == COMPLETED else None
        entries.append(Entry(place, record, status.get("metrics", {}), status.get("untrained", {})))
    return entries


def columns(metric: Metric) -> list[str]:
    """The sweep's own metric first, then those that every reader asks for."""
    return list(dict.fromkeys([metric.name, *ALWAYS_SHOWN]))


def table(entries: list[Entry], metric: Metric, rows: int = 20) -> Table:
    """The leaderboard for a terminal, with the untrained model's row to compare with."""
    shown = Table(title=f"Leaderboard: {metric.name}, {metric.goal}", title_justify="left", title_style="bold", box=None)
    for name in ("rank", "trial", "lr", "beta", *(short_name(name) for name in columns(metric)), "time"):
        shown.add_column(name, justify="right", no_wrap=True)
    untrained = next((e.untrained for e in entries if e.untrained), None)
    for entry in entries[:rows]:
        params = entry.record.point.params
        shown.add_row(
            str(entry.rank or "–"),
            str(entry.record.index + 1),
            f"{params['orpo.learning_rate']:.1e}" if "orpo.learning_rate" in params else "",
            show_beta(params["orpo.beta"]) if "orpo.beta" in params else "",
            *(_number(entry.metrics.get(name)) if entry.rank else "" for name in columns(metric)),
            f"{entry.record.seconds:.0f} s" if entry.rank else entry.record.state,
            style="bold green" if entry.rank == 1 else "",
        )
    if untrained:
        row = ["", "untrained", "", "", *(_number(untrained.get(name)) for name in columns(metric)), ""]
        shown.add_row(*row, style="dim")
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


def notes(entries: list[Entry], metric: Metric, folder: SweepFolder) -> list[Text]:
    """What a reader must know to trust the winner, and the command that uses it."""
    best = next((e for e in entries if e.rank == 1), None)
    if best is None:
        return [Text("No trial completed.", style="red")]
    said = []
    if depends_on_beta(metric.name) and len({e.record.point.params.get("orpo.beta") for e in entries}) > 1:
        said.append(
            Text(
                f"{metric.name} contains beta itself, and beta was swept: this ranking favours large beta by "
                "construction. eval/log_odds_chosen and eval/rewards/accuracies do not.",
                style="yellow",
            )
        )
    path = folder.trial(best.record.name).path
    said.append(Text(f"Best trial: {path}"))
    said.append(Text(f"Try it:     isaerft-sweep generate {shlex.quote(_short(path))}"))
    return said


def show(console: Console, entries: list[Entry], metric: Metric, folder: SweepFolder) -> None:
    """Print the leaderboard and its notes."""
    console.print(table(entries, metric))
    console.print(*notes(entries, metric, folder), sep="\n", soft_wrap=True)


def write_csv(entries: list[Entry], path: Path) -> None:
    """All trials and metrics as a CSV file."""
    params = sorted({key for e in entries for key in e.record.point.params})
    metrics = sorted({key for e in entries for key in e.metrics})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rank", "trial", "run_id", "state", *params, *metrics, "seconds", "message"])
    for e in entries:
        r = e.record
        values: list[Any] = [e.rank or "", r.name, r.run_id, r.state, *(r.point.params.get(k, "") for k in params)]
        writer.writerow([*values, *(e.metrics.get(k, "") for k in metrics), round(r.seconds, 1), r.message])
    write_text(path, text.getvalue())


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
