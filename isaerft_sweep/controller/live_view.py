"""Displays a sweep's progress: a live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from isaerft_sweep.controller.trial_activity import current_activity, is_process, job_label, log_path
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import NO_STATUS, TrialStatus
from isaerft_sweep.paths import quoted
from isaerft_sweep.results.columns import Column, columns_for
from isaerft_sweep.results.leaderboard import needed_width, short_name, short_path
from isaerft_sweep.results.reading import read_space
from isaerft_sweep.terminal import is_live

COLORS = {
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "given up": "red",
    "diverged": "yellow",
    "stopped": "yellow",
    "pruned": "dim",
}
SHOWN_ROWS = 30
SHOWN_LOGS = 4
REPEAT_S = 60.0
"""Seconds between two lines about the same phase of a trial."""

Statuses = Mapping[int, TrialStatus]


class LiveView:
    """Shows each trial's phase, swept parameters, step, loss, metric, time left, job, node and log."""

    def __init__(self, console: Console, metric: str, trials: int, folder: SweepFolder | None = None) -> None:
        """``trials``: how many the sweep has. ``folder``: the sweep's, for the paths of logs and the search space."""
        self.console, self.metric, self.trials, self.folder = console, metric, trials, folder
        self._space = read_space(folder) if folder else {}
        self._last_note, self._output_closed = "", False
        self._printed_phase: dict[int, tuple[str, float]] = {}
        """The phase of each trial that was printed last, and when (``time.monotonic``)."""
        self._live = Live(console=console, refresh_per_second=2, transient=True) if is_live(console) else None

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, records: list[TrialRecord], statuses: Statuses) -> None:
        """Show the current state of every trial."""
        if self._live:
            columns = columns_for((r.point.params for r in records), self._space)
            table = trial_table(records, statuses, self.metric, columns, self.console.width)
            self._live.update(Group(table, self._logs(records, statuses), self._summary(records, statuses)))
        else:
            self._print_phases(records, statuses)

    def event(self, record: TrialRecord) -> None:
        """Print a trial's new state."""
        line = f"trial {record.index + 1}/{self.trials} {record.name}: {record.state}"
        if record.state is TrialState.QUEUED:
            line += f", attempt {record.attempt}" if record.attempt > 1 else ""
            line += f", {job}" if (job := job_label(record.job)) else ""
            line += f"\n  {record.point.note}" if record.point.note and record.attempt == 1 else ""
        if record.metric is not None:
            line += f", {self.metric} {record.metric:.4f}, {record.seconds:.0f} s"
        if record.message and record.state not in (TrialState.COMPLETED, TrialState.PRUNED, TrialState.QUEUED):
            line += ": " + record.message.replace("\n", "\n    ")
            line += "" if record.ended or record.state is TrialState.STOPPED else "\n  it will be tried again"
        if record.state in (TrialState.FAILED, TrialState.DIVERGED) and self.folder:
            line += f"\n  its log: {short_path(log_path(self.folder, record))}"
        self._print(line, COLORS.get(record.state, ""))

    def note(self, text: str) -> None:
        """Print a note about the sweep, unless it repeats the last one."""
        if text != self._last_note:
            self._print(text, "yellow")
        self._last_note = text

    def _print(self, text: str, style: str = "") -> None:
        """Print a line; the sweep continues when the output is closed (a pipe, a lost terminal)."""
        if not self._output_closed:
            try:
                self.console.print(Text(text, style=style), soft_wrap=True)
            except OSError:
                self._output_closed = True

    def _print_phases(self, records: list[TrialRecord], statuses: Statuses) -> None:
        """Print a line for every phase until the first trial trains; of a single trial until its end."""
        if len(records) > 1 and any(status.trained_since for status in statuses.values()):
            return
        now = time.monotonic()
        for record in records:
            status = statuses.get(record.index, NO_STATUS)
            if record.state is not TrialState.QUEUED or not status.phase:
                continue
            phase = current_activity(record, status)
            before, printed_s = self._printed_phase.get(record.index, ("", 0.0))
            same = _without_percent(phase) == _without_percent(before)
            if not same or (now - printed_s > REPEAT_S and (phase != before or status.step)):
                self._printed_phase[record.index] = phase, now
                self._print(self._phase_line(record, status, phase, first=not before))

    def _phase_line(self, record: TrialRecord, status: TrialStatus, phase: str, first: bool) -> str:
        line = f"trial {record.index + 1}/{self.trials} {record.name}: {phase}"
        if status.step:
            line += f", step {status.step}/{status.max_steps or '?'}"
        if (left_s := trial_left_s(status)) is not None:
            line += f", about {duration(left_s)} left"
        if first:
            line += f" ({job_label(record.job)} on {status.host or '?'})"
            line += f"\n  its log: {short_path(log_path(self.folder, record))}" if self.folder else ""
        return line

    def _logs(self, records: Sequence[TrialRecord], statuses: Statuses) -> Text:
        """The logs of the first running trials."""
        if self.folder is None:
            return Text("")
        running = [r for r in records if r.state is TrialState.QUEUED and (statuses.get(r.index) or is_process(r.job))]
        lines = [f"log of {r.index + 1}: {short_path(log_path(self.folder, r))}" for r in running[:SHOWN_LOGS]]
        if len(running) > SHOWN_LOGS:
            lines.append(
                f"{len(running) - SHOWN_LOGS} more: isaerft-sweep logs {quoted(short_path(self.folder.path))} TRIAL -f"
            )
        return Text("\n".join(lines), style="dim", overflow="fold")

    def _summary(self, records: list[TrialRecord], statuses: Statuses) -> Text:
        done = [r for r in records if r.ended]
        left_s = time_left_s(records, statuses, self.trials)
        left = f", about {duration(left_s)} left" if left_s is not None else ""
        return Text(f"{len(done)} of {self.trials} trials ended{left}. Ctrl-C stops; the same command resumes.", style="dim")


def trial_table(
    records: list[TrialRecord], statuses: Statuses, metric: str, columns: Sequence[Column], width: int | None = None
) -> Table:
    """One row per trial: the running ones and the latest of the others, ``SHOWN_ROWS`` in all.

    Args:
        records: all trials.
        statuses: each worker's latest status, by the trial's index.
        metric: the sweep's.
        columns: the swept parameters.
        width: columns of the terminal; other columns than the swept parameters are dropped to fit it. None: any.
    """
    short = short_name(metric) if short_name(metric) != "loss" else metric  # the training loss has that name
    names = ["step", "loss", short, "time left", "job", "node"]
    for dropped in ("", "node", "job", "loss", "time left", short, "step"):
        names = [name for name in names if name != dropped]
        table = _trial_table(_shown(records, statuses), statuses, short, columns, names)
        if width is None or needed_width(table) <= width:
            break
    return table


def _shown(records: list[TrialRecord], statuses: Statuses) -> list[TrialRecord]:
    at_work = [r for r in records if _at_work(r, statuses)][:SHOWN_ROWS]
    others = [r for r in records if not _at_work(r, statuses)]
    return sorted(at_work + others[max(0, len(others) - SHOWN_ROWS + len(at_work)) :], key=lambda r: r.index)


def _at_work(record: TrialRecord, statuses: Statuses) -> bool:
    return record.state is TrialState.QUEUED or (not record.ended and statuses.get(record.index, NO_STATUS).is_running)


def _trial_table(
    records: list[TrialRecord], statuses: Statuses, metric: str, columns: Sequence[Column], names: Sequence[str]
) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in (*(column.name for column in columns), *names):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        status = statuses.get(record.index, NO_STATUS)
        color = COLORS.get(record.state) or COLORS.get(status.state or "", "")
        cells = _cells(record, status, metric, _at_work(record, statuses))
        table.add_row(
            str(record.index + 1),
            Text(current_activity(record, status), style=color),
            *(column.show(record.point.params) for column in columns),
            *(cells.get(name, "") for name in names),
        )
    return table


def _cells(record: TrialRecord, status: TrialStatus, metric: str, at_work: bool) -> dict[str, str]:
    """The cells of a row beside its number, state and swept values."""
    cells = {
        "step": f"{status.step or 0}/{status.max_steps}" if status.max_steps else "",
        "loss": _number(status.loss),
        metric: _number(record.metric if record.metric is not None else status.metric),
    }
    if at_work:
        left_s = trial_left_s(status)
        cells["time left"] = duration(left_s) if left_s is not None else ""
        cells["job"], cells["node"] = job_label(record.job), status.host
    return cells


def time_left_s(records: list[TrialRecord], statuses: Statuses, trials: int) -> float | None:
    """Estimated seconds until the sweep's end, from the trials' durations; None before any is known."""
    running = [r for r in records if _at_work(r, statuses) and statuses.get(r.index)]  # without those whose jobs are pending
    left = {r.index: trial_left_s(statuses.get(r.index, NO_STATUS)) for r in running}
    spent = [
        r.seconds
        for r in records
        if r.state in (TrialState.COMPLETED, TrialState.PRUNED, TrialState.DIVERGED) and r.seconds > 0
    ]
    # before the first trial has ended, the estimated durations of the running ones
    durations = spent or [_spent_s(statuses[index]) + left_s for index, left_s in left.items() if left_s is not None]
    if not durations:
        return None
    each_s = sum(durations) / len(durations)
    waiting = [r for r in records if not r.ended and r.index not in left and not _ended_unattended(r, statuses)]
    left_s = sum(each_s if trial_s is None else trial_s for trial_s in left.values())
    left_s += each_s * (len(waiting) + max(0, trials - len(records)))
    return left_s / max(1, len(running))


def _ended_unattended(record: TrialRecord, statuses: Statuses) -> bool:
    """Whether the trial has ended without a controller, in an array."""
    return statuses.get(record.index, NO_STATUS).is_final


def _spent_s(status: TrialStatus) -> float:
    return max(0.0, time.time() - status.started) if status.started is not None else 0.0


def trial_left_s(status: TrialStatus) -> float | None:
    """Estimated seconds until a running trial's last step; None before its first step in this attempt.

    The estimate uses the time per step since this attempt began to train, without its start-up.
    """
    step, steps = status.step, status.max_steps
    since = status.trained_since or status.started  # workers of older versions report only their start
    if since is None or not step or not steps:
        return None
    steps_taken = step - status.trained_from
    return (time.time() - since) / steps_taken * max(0, steps - step) if steps_taken > 0 else None


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _without_percent(phase: str) -> str:
    """The phase without its percentage."""
    return phase.rstrip("0123456789 %")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
