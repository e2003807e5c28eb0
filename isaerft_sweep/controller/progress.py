"""Progress that a person can follow: a live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from isaerft_sweep.journal.folders import COMPLETED, PRUNED, RUNNING
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.naming import show_beta
from isaerft_sweep.results.leaderboard import short_name

COLORS = {
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "diverged": "yellow",
    "stopped": "yellow",
    "pruned": "dim",
}
SHOWN_ROWS = 30


class Progress:
    """Shows trials with state, learning rate, beta, step, loss, metric and time left."""

    def __init__(self, console: Console, metric: str, trials: int) -> None:
        self.console, self.metric, self.trials = console, metric, trials
        self._noted = ""
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, records: list[TrialRecord], statuses: dict[int, dict[str, Any]]) -> None:
        """The present state of every trial."""
        if self._live:
            self._live.update(Group(trial_table(records, statuses, self.metric), self._summary(records, statuses)))

    def event(self, record: TrialRecord) -> None:
        """A trial began or ended."""
        what = f"trial {record.index + 1}/{self.trials} {record.name}: {record.state}"
        if record.state == "queued" and record.attempt > 1:
            what += f", attempt {record.attempt}"
        if record.metric is not None:
            what += f", {self.metric} {record.metric:.4f}, {record.seconds:.0f} s"
        if record.message and record.state not in (COMPLETED, PRUNED, "queued"):
            what += f": {record.message}"
            what += "" if record.ended or record.state == "stopped" else "\n  it will be tried again"
        self.console.print(Text(what, style=COLORS.get(record.state, "")), soft_wrap=True)

    def note(self, text: str) -> None:
        """Something about the sweep as a whole; the same words are not said twice in a row."""
        if text != self._noted:
            self.console.print(Text(text, style="yellow"), soft_wrap=True)
        self._noted = text

    def _summary(self, records: list[TrialRecord], statuses: dict[int, dict[str, Any]]) -> Text:
        done = [r for r in records if r.ended]
        left_s = time_left_s(records, statuses, self.trials)
        left = f", about {duration(left_s)} left" if left_s is not None else ""
        return Text(f"{len(done)} of {self.trials} trials ended{left}. Ctrl-C stops; the same command goes on.", style="dim")


def trial_table(records: list[TrialRecord], statuses: dict[int, dict[str, Any]], metric: str) -> Table:
    """One row per trial: those under way, and of the others the latest, ``SHOWN_ROWS`` in all."""
    under_way = [record for record in records if record.state == "queued"][:SHOWN_ROWS]
    others = [record for record in records if record.state != "queued"]
    shown = sorted(under_way + others[max(0, len(others) - SHOWN_ROWS + len(under_way)) :], key=lambda r: r.index)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (("#", "right"), ("state", "left"), ("lr", "right"), ("beta", "right"), ("step", "right"),
                          ("loss", "right"), (short_name(metric), "right"), ("time left", "right")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for record in shown:
        status = statuses.get(record.index, {})
        state = status.get("state", record.state) if record.state == "queued" else record.state
        params = record.point.params
        step = f"{status.get('step', 0)}/{status['max_steps']}" if status.get("max_steps") else ""
        left_s = _trial_left_s(status) if state == RUNNING else None
        table.add_row(
            str(record.index + 1),
            Text(state, style=COLORS.get(state, "")),
            f"{params['orpo.learning_rate']:.1e}" if "orpo.learning_rate" in params else "",
            show_beta(params["orpo.beta"]) if "orpo.beta" in params else "",
            step,
            _number(status.get("loss")),
            _number(record.metric if record.metric is not None else status.get("metric")),
            duration(left_s) if left_s is not None else "",
        )
    return table


def time_left_s(records: list[TrialRecord], statuses: dict[int, dict[str, Any]], trials: int) -> float | None:
    """Seconds until the sweep's end, from the trials so far and how many really run; None before the first one ended."""
    spent = [r.seconds for r in records if r.state == COMPLETED]
    if not spent:
        return None
    each_s = sum(spent) / len(spent)
    running = [statuses[r.index] for r in records if r.state == "queued" and statuses.get(r.index)]
    waiting = max(trials, len(records)) - sum(r.ended for r in records) - len(running)
    left_s = sum(_trial_left_s(status) or each_s for status in running) + each_s * waiting
    return left_s / max(1, len(running))


def _trial_left_s(status: dict[str, Any]) -> float | None:
    step, steps = status.get("step"), status.get("max_steps")
    if not step or not steps:
        return None
    return float((time.time() - status["started"]) / step * (steps - step))


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
