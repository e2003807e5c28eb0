"""Progress that a person can follow: a live table on a terminal, one line per event elsewhere."""

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
AGAIN_S = 60.0
"""Between two lines about the same phase of the same trial."""

Statuses = Mapping[int, TrialStatus]


class LiveView:
    """Shows trials with what they do, the swept parameters, step, loss, metric, time left, job, node and log."""

    def __init__(self, console: Console, metric: str, trials: int, folder: SweepFolder | None = None) -> None:
        """``folder``: the sweep's, for the logs' paths and what is searched."""
        self.console, self.metric, self.trials, self.folder = console, metric, trials, folder
        self._space = read_space(folder) if folder else {}
        self._noted, self._deaf = "", False
        self._said: dict[int, tuple[str, float]] = {}
        self._live = Live(console=console, refresh_per_second=2, transient=True) if is_live(console) else None

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, records: list[TrialRecord], statuses: Statuses) -> None:
        """The present state of every trial."""
        if self._live:
            columns = columns_for((r.point.params for r in records), self._space)
            table = trial_table(records, statuses, self.metric, columns, self.console.width)
            self._live.update(Group(table, self._logs(records, statuses), self._summary(records, statuses)))
        else:
            self._say_phases(records, statuses)

    def event(self, record: TrialRecord) -> None:
        """A trial began or ended."""
        what = f"trial {record.index + 1}/{self.trials} {record.name}: {record.state}"
        if record.state is TrialState.QUEUED:
            what += f", attempt {record.attempt}" if record.attempt > 1 else ""
            what += f", {job}" if (job := job_label(record.job)) else ""
        if record.metric is not None:
            what += f", {self.metric} {record.metric:.4f}, {record.seconds:.0f} s"
        if record.message and record.state not in (TrialState.COMPLETED, TrialState.PRUNED, TrialState.QUEUED):
            what += f": {record.message}"
            what += "" if record.ended or record.state is TrialState.STOPPED else "\n  it will be tried again"
        if record.state in (TrialState.FAILED, TrialState.DIVERGED) and self.folder:
            what += f"\n  its log: {short_path(log_path(self.folder, record))}"
        self._print(what, COLORS.get(record.state, ""))

    def note(self, text: str) -> None:
        """Something about the sweep as a whole; the same words are not said twice in a row."""
        if text != self._noted:
            self._print(text, "yellow")
        self._noted = text

    def _print(self, text: str, style: str = "") -> None:
        """A line; a sweep goes on when nobody reads it any more (a closed pipe, a terminal that has gone)."""
        if not self._deaf:
            try:
                self.console.print(Text(text, style=style), soft_wrap=True)
            except OSError:
                self._deaf = True

    def _say_phases(self, records: list[TrialRecord], statuses: Statuses) -> None:
        """A line for every phase until the first trial trains, and of a trial that is alone until its end."""
        if len(records) > 1 and any(status.trained_since for status in statuses.values()):
            return
        now = time.monotonic()
        for record in records:
            status = statuses.get(record.index, NO_STATUS)
            if record.state is not TrialState.QUEUED or not status.phase:
                continue
            phase = current_activity(record, status)
            before, said_s = self._said.get(record.index, ("", 0.0))
            same = _bare(phase) == _bare(before)
            if not same or (now - said_s > AGAIN_S and (phase != before or status.step)):
                self._said[record.index] = phase, now
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
        """Where the first ones under way write, and how to see it."""
        if self.folder is None:
            return Text("")
        running = [r for r in records if r.state is TrialState.QUEUED and (statuses.get(r.index) or is_process(r.job))]
        lines = [f"log of {r.index + 1}: {short_path(log_path(self.folder, r))}" for r in running[:SHOWN_LOGS]]
        if len(running) > SHOWN_LOGS:
            lines.append(f"{len(running) - SHOWN_LOGS} more: isaerft-sweep logs {short_path(self.folder.path)} TRIAL -f")
        return Text("\n".join(lines), style="dim", overflow="fold")

    def _summary(self, records: list[TrialRecord], statuses: Statuses) -> Text:
        done = [r for r in records if r.ended]
        left_s = time_left_s(records, statuses, self.trials)
        left = f", about {duration(left_s)} left" if left_s is not None else ""
        return Text(f"{len(done)} of {self.trials} trials ended{left}. Ctrl-C stops; the same command goes on.", style="dim")


def trial_table(
    records: list[TrialRecord], statuses: Statuses, metric: str, columns: Sequence[Column], width: int | None = None
) -> Table:
    """One row per trial: those under way, and of the others the latest, ``SHOWN_ROWS`` in all.

    Args:
        records: all trials.
        statuses: the last word of each worker, by the trial's number.
        metric: the sweep's.
        columns: what is swept.
        width: columns of the terminal; what does not fit is left out, never what is swept. None: any.
    """
    short = short_name(metric) if short_name(metric) != "loss" else metric  # beside the training's own
    told = ["step", "loss", short, "time left", "job", "node"]
    for dropped in ("", "node", "job", "loss", "time left", short, "step"):
        told = [name for name in told if name != dropped]
        table = _trial_table(_shown(records, statuses), statuses, short, columns, told)
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
    records: list[TrialRecord], statuses: Statuses, metric: str, columns: Sequence[Column], told: Sequence[str]
) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in (*(column.name for column in columns), *told):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        status = statuses.get(record.index, NO_STATUS)
        color = COLORS.get(record.state) or COLORS.get(status.state or "", "")
        cells = _cells(record, status, metric, _at_work(record, statuses))
        table.add_row(
            str(record.index + 1),
            Text(current_activity(record, status), style=color),
            *(column.show(record.point.params) for column in columns),
            *(cells.get(name, "") for name in told),
        )
    return table


def _cells(record: TrialRecord, status: TrialStatus, metric: str, at_work: bool) -> dict[str, str]:
    """What a row says beside its number, state and swept values."""
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
    """Seconds until the sweep's end, from what trials have taken so far; None while nothing is known of it."""
    running = [r for r in records if _at_work(r, statuses) and statuses.get(r.index)]  # not those whose jobs still wait
    left = {r.index: trial_left_s(statuses.get(r.index, NO_STATUS)) for r in running}
    spent = [
        r.seconds
        for r in records
        if r.state in (TrialState.COMPLETED, TrialState.PRUNED, TrialState.DIVERGED) and r.seconds > 0
    ]
    # before the first one has ended: as long as those that run will have taken
    whole = spent or [_spent_s(statuses[index]) + left_s for index, left_s in left.items() if left_s is not None]
    if not whole:
        return None
    each_s = sum(whole) / len(whole)
    waiting = [r for r in records if not r.ended and r.index not in left and not _ended_alone(r, statuses)]
    left_s = sum(each_s if one is None else one for one in left.values())
    left_s += each_s * (len(waiting) + max(0, trials - len(records)))
    return left_s / max(1, len(running))


def _ended_alone(record: TrialRecord, statuses: Statuses) -> bool:
    return statuses.get(record.index, NO_STATUS).is_final


def _spent_s(status: TrialStatus) -> float:
    return max(0.0, time.time() - status.started) if status.started is not None else 0.0


def trial_left_s(status: TrialStatus) -> float | None:
    """Seconds until a running trial's last step; None before it has taken one in this attempt.

    Reckoned from the steps since this attempt began to train: what came before tells nothing of what comes.
    """
    step, steps = status.step, status.max_steps
    since = status.trained_since or status.started  # an older worker has only its start
    if since is None or not step or not steps:
        return None
    taken = step - status.trained_from
    return (time.time() - since) / taken * max(0, steps - step) if taken > 0 else None


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bare(phase: str) -> str:
    """The phase without how far it is."""
    return phase.rstrip("0123456789 %")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
