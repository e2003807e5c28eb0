"""The status of a sweep, or of all sweeps in a folder, as text and as JSON: progress, controller, running trials."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from isaerft_sweep.controller.controller_info import ControllerInfo, controller_alive, last_controller_info
from isaerft_sweep.controller.live_view import SHOWN_LOGS, duration, time_left_s, trial_left_s, trial_table
from isaerft_sweep.controller.monitor import SweepMonitor
from isaerft_sweep.controller.static_array import running_arrays
from isaerft_sweep.controller.trial_activity import (
    current_activity,
    given_up_note,
    has_ended,
    log_path,
    state_for_count,
    under_way,
)
from isaerft_sweep.dispatch.base import SchedulerUnavailable
from isaerft_sweep.dispatch.slurm.cluster import pending_reasons
from isaerft_sweep.errors import FolderError, IsaerftError, LaunchError
from isaerft_sweep.journal.job_refs import SlurmJob
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import NO_STATUS, TrialStatus
from isaerft_sweep.paths import quoted
from isaerft_sweep.results.columns import columns_for
from isaerft_sweep.results.leaderboard import print_whole
from isaerft_sweep.results.reading import read_space


def show_status(console: Console, path: Path) -> None:
    """Print a sweep's progress, controller, running and failed trials; for a folder of sweeps a table."""
    if not SweepFolder(path.expanduser().absolute()).journal.is_file():
        show_overview(console, path)
        return
    monitor = SweepMonitor(path)
    statuses, now = monitor.statuses(), time.time()
    report = status_report(monitor, statuses, now)
    console.print(f"sweep       {monitor.folder.path}", highlight=False)
    counts = ", ".join(f"{count} {state}" for state, count in report["counts"].items()) or "none yet"
    left = f", about {duration(report['left_s'])} left" if report["left_s"] is not None else ""
    console.print(f"trials      {report['ended']} of {report['trials']} ended{left}: {counts}", highlight=False)
    console.print(f"controller  {describe_controller(monitor, report['ended'])}", highlight=False)
    at_work = [r for r in monitor.records if under_way(r, statuses.get(r.index, NO_STATUS), now)]
    if at_work:
        columns = columns_for((r.point.params for r in monitor.records), read_space(monitor.folder))
        width = console.width if console.is_terminal else None
        print_whole(console, trial_table(at_work, statuses, monitor.record.metric, columns, width))
    for record in [r for r in at_work if r.state is TrialState.QUEUED][:SHOWN_LOGS]:
        console.print(f"log of {record.index + 1}    {log_path(monitor.folder, record)}", highlight=False)
    for reason, count in waiting_reasons([r for r in at_work if not statuses.get(r.index)]).items():
        console.print(f"waiting     {count} in the queue: {reason}", highlight=False)
    for record in [record for record in monitor.records if record.given_up][-5:]:
        console.print(f"given up: {record.name}: {record.message}", style="red", highlight=False)
        console.print(f"          its log: {log_path(monitor.folder, record)}", highlight=False)
    if any(record.given_up for record in monitor.records):
        console.print(given_up_note(monitor.records, monitor.folder), highlight=False)
    for record in missing(monitor):
        console.print(f"The folder of trial {record.index + 1}, {record.name}, is missing.", style="red")


def missing(monitor: SweepMonitor) -> list[TrialRecord]:
    """Trials that have begun and whose folder is missing."""
    return [r for r in monitor.records if r.attempt and not monitor.folder.trial(r.name).path.is_dir()]


def status_report(monitor: SweepMonitor, statuses: Mapping[int, TrialStatus], now: float) -> dict[str, Any]:
    """The sweep's status as plain data: ``isaerft-sweep status --json``."""
    controller, running = last_controller_info(monitor.folder), controller_alive(monitor.folder)
    status_of = {record.index: statuses.get(record.index, NO_STATUS) for record in monitor.records}
    counts = Counter(state_for_count(record, status_of[record.index], now) for record in monitor.records)
    ended = sum(has_ended(record, status_of[record.index]) for record in monitor.records)
    # an ended sweep may have fewer trials than its run_cap (its target was reached): nothing runs, so nothing is left
    at_work = running or any(under_way(record, status_of[record.index], now) for record in monitor.records)
    left_s = time_left_s(monitor.records, statuses, monitor.trials) if at_work and ended < monitor.trials else None
    return {
        "sweep": str(monitor.folder.path),
        "id": monitor.record.sweep_id,
        "metric": {"name": monitor.record.metric, "goal": monitor.record.goal},
        "trials": monitor.trials,
        "ended": ended,
        "counts": dict(sorted(counts.items())),
        "left_s": left_s,
        "controller": {"running": running, "last": dataclasses.asdict(controller) if controller else None},
        "rows": [_row(monitor, record, status_of[record.index], now) for record in monitor.records],
    }


def _row(monitor: SweepMonitor, record: TrialRecord, status: TrialStatus, now: float) -> dict[str, Any]:
    running = under_way(record, status, now)
    folder = monitor.folder.trial(record.name)
    return {
        "trial": record.index + 1,
        "name": record.name,
        "run_id": record.run_id,
        "state": state_for_count(record, status, now),
        "phase": current_activity(record, status) if running else None,
        "params": dict(record.point.params),
        "attempt": record.attempt,
        "step": status.step,
        "max_steps": status.max_steps,
        "loss": status.loss,
        "metric": record.metric if record.metric is not None else status.metric,
        "left_s": trial_left_s(status) if running else None,
        "seconds": record.seconds,
        "job": record.job.process.to_json() if record.job else None,
        "node": status.host if running else None,
        "message": record.message or None,
        "folder": str(folder.path) if folder.path.is_dir() else None,
        "log": str(log_path(monitor.folder, record)),
    }


def waiting_reasons(records: list[TrialRecord]) -> Counter[str]:
    """SLURM's reasons why the jobs of these trials are pending, counted; empty for jobs of another kind."""
    ids: dict[str | None, list[str]] = {}
    for record in records:
        job = record.job and record.job.process
        if isinstance(job, SlurmJob):
            ids.setdefault(job.cluster, []).append(job.id)
    reasons: Counter[str] = Counter()
    for cluster, jobs in ids.items():
        with suppress(LaunchError):  # it does not answer, or has forgotten one of them: the controller's next poll finds out
            reasons.update(pending_reasons(jobs, cluster))
    return reasons


def describe_controller(monitor: SweepMonitor, ended: int) -> str:
    """The controller that runs the sweep, or what to do without one. ``ended``: how many trials have ended."""
    info = last_controller_info(monitor.folder)
    if controller_alive(monitor.folder):
        return "checking model, SAE and data" if in_preflight(info) else str(info)
    if info is None and not monitor.folder.static_array.exists():
        return "none: it ended before any trial began (a check that failed, or Ctrl-C); give the sweep's command again"
    if all(record.ended for record in monitor.records) and ended >= monitor.trials:
        return "none: the sweep has ended" + (", with trials that were given up" if _gave_up(monitor) else "")
    if monitor.folder.static_array.exists():
        with suppress(SchedulerUnavailable):
            if jobs := running_arrays(monitor.folder.path):
                return f"none: jobs of slurm/trials.sbatch run it ({', '.join(sorted(jobs)[:4])})"
    if monitor.folder.why_ended.is_file():
        return f"none: the sweep has ended after {monitor.folder.why_ended.read_text(encoding='utf-8')}"
    return f"none: resume it with  isaerft-sweep attach {quoted(monitor.folder.path)}"


def in_preflight(info: ControllerInfo | None) -> bool:
    """Whether the controller that holds the sweep's lock has not written its info yet: ``info`` is an older one's."""
    return info is None or (info.host == socket.gethostname() and not psutil.pid_exists(info.pid))


def _gave_up(monitor: SweepMonitor) -> bool:
    return any(record.given_up for record in monitor.records)


def sweeps_in(path: Path) -> list[tuple[Path, list[SweepFolder]]]:
    """The sweeps in a folder of sweeps, each with the folders of its runs; or the runs of a sweep that agents run.

    Raises FolderError when the folder has no sweeps.
    """
    root = path.expanduser().absolute()
    if runs := SweepFolder(root).agent_run_folders():
        return [(run.path, [run]) for run in runs]
    children = [p for p in sorted(root.iterdir()) if not p.name.startswith(".")] if root.is_dir() else []
    runs_of = [(child, SweepFolder(child).agent_run_folders() or [SweepFolder(child)]) for child in children]
    sweeps = [(child, folders) for child, folders in runs_of if folders[0].journal.is_file()]
    if not sweeps:
        raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, or a folder of sweeps, but is neither.")
    return sweeps


def overview(path: Path) -> list[dict[str, Any]]:
    """A summary of each sweep in ``path``, as plain data."""
    summaries = []
    for sweep, folders in sweeps_in(path):
        try:
            summaries.append(_summary(sweep, [SweepMonitor(folder.path) for folder in folders]))
        except IsaerftError as error:
            summaries.append({"sweep": str(sweep), "problem": str(error)})
    return summaries


def _summary(path: Path, runs: list[SweepMonitor]) -> dict[str, Any]:
    """The summary of one sweep, whose runs may have a folder each."""
    reports = [status_report(run, run.statuses(), time.time()) for run in runs]
    rows = [row for report in reports for row in report["rows"]]
    metric = reports[0]["metric"]
    completed = [row["metric"] for row in rows if row["state"] == TrialState.COMPLETED]
    values = [value for value in completed if value is not None and math.isfinite(value)]
    best = (max if metric["goal"] == "maximize" else min)(values, default=None)
    running = any(report["controller"]["running"] for report in reports)
    states = Counter(row["state"] for row in rows)
    return {
        "sweep": str(path),
        "metric": metric,
        "best": best,
        "trials": sum(report["trials"] for report in reports),
        "ended": sum(report["ended"] for report in reports),
        "counts": dict(sorted(states.items())),
        "left_s": reports[0]["left_s"] if len(reports) == 1 else None,
        "running": running,
        "changed": max(run.folder.journal.stat().st_mtime for run in runs),
    }


def show_overview(console: Console, path: Path) -> None:
    """Print a table of all sweeps in a folder, the one that changed last at the end."""
    summaries = overview(path)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("sweep", "trials", "states", "metric", "best", "runs", "time left", "changed"):
        table.add_column(name, justify="left" if name in ("sweep", "states", "metric") else "right", no_wrap=True)
    for summary in sorted((s for s in summaries if "problem" not in s), key=lambda s: s["changed"]):
        table.add_row(
            Path(summary["sweep"]).name,
            f"{summary['ended']}/{summary['trials']}",
            ", ".join(f"{count} {state}" for state, count in summary["counts"].items()) or "none yet",
            summary["metric"]["name"],
            "" if summary["best"] is None else f"{summary['best']:.4f}",
            "yes" if summary["running"] else "no",
            "" if summary["left_s"] is None else duration(summary["left_s"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(summary["changed"])),
        )
    print_whole(console, table)
    for summary in summaries:
        if "problem" in summary:
            console.print(summary["problem"], style="red", highlight=False)


def as_json(path: Path) -> str:
    """The status of a sweep, or of all sweeps in a folder, as JSON."""
    if SweepFolder(path.expanduser().absolute()).journal.is_file():
        monitor = SweepMonitor(path)
        return json.dumps(_finite(status_report(monitor, monitor.statuses(), time.time())), indent=1)
    return json.dumps(_finite({"sweeps": overview(path)}), indent=1)


def _finite(content: Any) -> Any:
    """``content`` with null for numbers that JSON does not have, such as a diverged trial's loss."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
