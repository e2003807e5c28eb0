"""How far a sweep is, who runs it, what is under way: for people, for programs, and for all sweeps of a folder."""

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
from isaerft_sweep.controller.trial_activity import (
    current_activity,
    given_up_note,
    has_ended,
    log_path,
    state_for_count,
    under_way,
)
from isaerft_sweep.dispatch.cluster import pending_reasons
from isaerft_sweep.errors import FolderError, IsaerftError, LaunchError
from isaerft_sweep.journal.job_refs import SlurmJob
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import NO_STATUS, TrialStatus
from isaerft_sweep.results.columns import columns_for
from isaerft_sweep.results.leaderboard import print_whole
from isaerft_sweep.results.reading import read_space


def show_status(console: Console, path: Path) -> None:
    """Print how far a sweep is, who runs it, what is under way and what has failed; of a folder of sweeps a table."""
    if not SweepFolder(path.expanduser().absolute()).journal.is_file():
        show_overview(console, path)
        return
    seen = SweepMonitor(path)
    statuses, now = seen.statuses(), time.time()
    facts = status_facts(seen, statuses, now)
    console.print(f"sweep       {seen.folder.path}", highlight=False)
    told = ", ".join(f"{count} {state}" for state, count in facts["counts"].items()) or "none yet"
    left = f", about {duration(facts['left_s'])} left" if facts["left_s"] is not None else ""
    console.print(f"trials      {facts['ended']} of {facts['trials']} ended{left}: {told}", highlight=False)
    console.print(f"controller  {describe_controller(seen, facts['ended'])}", highlight=False)
    at_work = [r for r in seen.records if under_way(r, statuses.get(r.index, NO_STATUS), now)]
    if at_work:
        columns = columns_for((r.point.params for r in seen.records), read_space(seen.folder))
        width = console.width if console.is_terminal else None
        print_whole(console, trial_table(at_work, statuses, seen.record.metric, columns, width))
    for record in [r for r in at_work if r.state is TrialState.QUEUED][:SHOWN_LOGS]:
        console.print(f"log of {record.index + 1}    {log_path(seen.folder, record)}", highlight=False)
    for reason, count in waiting_reasons([r for r in at_work if not statuses.get(r.index)]).items():
        console.print(f"waiting     {count} in the queue: {reason}", highlight=False)
    for record in [record for record in seen.records if record.given_up][-5:]:
        console.print(f"given up: {record.name}: {record.message}", style="red", highlight=False)
        console.print(f"          its log: {log_path(seen.folder, record)}", highlight=False)
    if any(record.given_up for record in seen.records):
        console.print(given_up_note(seen.records, seen.folder), highlight=False)
    for record in missing(seen):
        console.print(f"gone: the folder of trial {record.index + 1}, {record.name}, is not there any more.", style="red")


def missing(seen: SweepMonitor) -> list[TrialRecord]:
    """Trials that have begun and whose folder somebody has deleted."""
    return [r for r in seen.records if r.attempt and not seen.folder.trial(r.name).path.is_dir()]


def status_facts(seen: SweepMonitor, statuses: Mapping[int, TrialStatus], now: float) -> dict[str, Any]:
    """How far the sweep is, as plain data: ``isaerft-sweep status --json``."""
    known, runs = last_controller_info(seen.folder), controller_alive(seen.folder)
    status_of = {record.index: statuses.get(record.index, NO_STATUS) for record in seen.records}
    counts = Counter(state_for_count(record, status_of[record.index], now) for record in seen.records)
    ended = sum(has_ended(record, status_of[record.index]) for record in seen.records)
    left_s = time_left_s(seen.records, statuses, seen.trials) if ended < seen.trials else None
    return {
        "sweep": str(seen.folder.path),
        "id": seen.record.sweep_id,
        "metric": {"name": seen.record.metric, "goal": seen.record.goal},
        "trials": seen.trials,
        "ended": ended,
        "counts": dict(sorted(counts.items())),
        "left_s": left_s,
        "controller": {"running": runs, "last": dataclasses.asdict(known) if known else None},
        "rows": [_row(seen, record, status_of[record.index], now) for record in seen.records],
    }


def _row(seen: SweepMonitor, record: TrialRecord, status: TrialStatus, now: float) -> dict[str, Any]:
    running = under_way(record, status, now)
    folder = seen.folder.trial(record.name)
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
        "log": str(log_path(seen.folder, record)),
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


def describe_controller(seen: SweepMonitor, ended: int) -> str:
    """Who runs the sweep, and what to do when nobody does."""
    known = last_controller_info(seen.folder)
    if controller_alive(seen.folder):
        return "checking model, SAE and data" if begins(known) else str(known)
    if known is None and not seen.folder.static_array.exists():
        return "none: it ended before any trial began (a check that failed, or Ctrl-C); give the sweep's command again"
    if all(record.ended for record in seen.records) and ended >= seen.trials:
        return "none: the sweep has ended" + (", with trials that were given up" if _gave_up(seen) else "")
    return f"none: go on with  isaerft-sweep attach {seen.folder.path}"


def begins(known: ControllerInfo | None) -> bool:
    """Whether the controller that holds the sweep's lock has not come to its trials yet: an older one is known."""
    return known is None or (known.host == socket.gethostname() and not psutil.pid_exists(known.pid))


def _gave_up(seen: SweepMonitor) -> bool:
    return any(record.given_up for record in seen.records)


def sweeps_in(path: Path) -> list[tuple[Path, list[SweepFolder]]]:
    """The sweeps in a folder of sweeps, each with the folders of its runs; or the runs of a sweep that agents run.

    Raises FolderError when there are none.
    """
    whole = path.expanduser().absolute()
    if runs := SweepFolder(whole).agent_run_folders():
        return [(run.path, [run]) for run in runs]
    inside = [p for p in sorted(whole.iterdir()) if not p.name.startswith(".")] if whole.is_dir() else []
    parts = [(one, SweepFolder(one).agent_run_folders() or [SweepFolder(one)]) for one in inside]
    found = [(one, folders) for one, folders in parts if folders[0].journal.is_file()]
    if not found:
        raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, or a folder of sweeps, but is neither.")
    return found


def overview(path: Path) -> list[dict[str, Any]]:
    """For each sweep in ``path`` how far it is, as plain data."""
    found = []
    for place, folders in sweeps_in(path):
        try:
            found.append(_summed(place, [SweepMonitor(folder.path) for folder in folders]))
        except IsaerftError as error:
            found.append({"sweep": str(place), "problem": str(error)})
    return found


def _summed(path: Path, parts: list[SweepMonitor]) -> dict[str, Any]:
    """The facts of one sweep, whose runs may have a folder each."""
    facts = [status_facts(part, part.statuses(), time.time()) for part in parts]
    rows = [row for one in facts for row in one["rows"]]
    metric = facts[0]["metric"]
    ended = [row["metric"] for row in rows if row["state"] == TrialState.COMPLETED]
    values = [value for value in ended if value is not None and math.isfinite(value)]
    best = (max if metric["goal"] == "maximize" else min)(values, default=None)
    running = any(one["controller"]["running"] for one in facts)
    states = Counter(row["state"] for row in rows)
    return {
        "sweep": str(path),
        "metric": metric,
        "best": best,
        "trials": sum(one["trials"] for one in facts),
        "ended": sum(one["ended"] for one in facts),
        "counts": dict(sorted(states.items())),
        "left_s": facts[0]["left_s"] if len(facts) == 1 else None,
        "running": running,
        "changed": max(part.folder.journal.stat().st_mtime for part in parts),
    }


def show_overview(console: Console, path: Path) -> None:
    """Print a table of all sweeps in a folder, the last changed one at the end."""
    known = overview(path)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("sweep", "trials", "states", "metric", "best", "runs", "time left", "changed"):
        table.add_column(name, justify="left" if name in ("sweep", "states", "metric") else "right", no_wrap=True)
    for facts in sorted((one for one in known if "problem" not in one), key=lambda one: one["changed"]):
        table.add_row(
            Path(facts["sweep"]).name,
            f"{facts['ended']}/{facts['trials']}",
            ", ".join(f"{count} {state}" for state, count in facts["counts"].items()) or "none yet",
            facts["metric"]["name"],
            "" if facts["best"] is None else f"{facts['best']:.4f}",
            "yes" if facts["running"] else "no",
            "" if facts["left_s"] is None else duration(facts["left_s"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["changed"])),
        )
    print_whole(console, table)
    for facts in known:
        if "problem" in facts:
            console.print(facts["problem"], style="red", highlight=False)


def as_json(path: Path) -> str:
    """The facts of a sweep, or of all sweeps in a folder, as JSON."""
    if SweepFolder(path.expanduser().absolute()).journal.is_file():
        seen = SweepMonitor(path)
        return json.dumps(_finite(status_facts(seen, seen.statuses(), time.time())), indent=1)
    return json.dumps(_finite({"sweeps": overview(path)}), indent=1)


def _finite(content: Any) -> Any:
    """The same without numbers that JSON has not: a diverged trial's loss is null."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
