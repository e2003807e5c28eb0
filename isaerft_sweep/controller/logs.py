"""Prints a trial's log, of all its attempts, and follows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from isaerft_sweep.controller.monitor import SweepMonitor
from isaerft_sweep.controller.trial_activity import job_log, log_path
from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder

POLL_S = 0.5


def find_record(path: Path, trial: str) -> tuple[SweepMonitor, TrialRecord]:
    """The trial of the sweep in ``path`` by its number (from 1, as in tables), its name or its run id.

    Raises FolderError when the sweep has no such trial.
    """
    runs = SweepFolder(path.expanduser().absolute()).agent_run_folders()
    parts = [SweepMonitor(run.path) for run in runs] or [SweepMonitor(path)]
    wanted = trial.removeprefix("#")
    for monitor in parts:
        for record in monitor.records:
            if wanted in (record.name, record.run_id) or (wanted == str(record.index + 1) and not runs):
                return monitor, record
    count = sum(len(monitor.records) for monitor in parts)
    numbers = f"a number from 1 to {count}, " if count and not runs else ""
    valid = f"{numbers}its name or its run id" if count else "one of its trials, but it has none yet"
    raise FolderError(
        f"the trial of the sweep in {path} must be {valid}, but got '{trial}'. Its trials: isaerft-sweep status"
    )


def show_log(path: Path, trial: str, follow: bool, sleep: Callable[[float], None] = time.sleep) -> None:
    """Print the trial's log.

    Args:
        path: the sweep's folder.
        trial: number, name or run id, see ``find_record``.
        follow: continue until the trial has ended.
        sleep: waits for seconds; for tests.

    Raises FolderError when there is no log yet, unless it follows.
    """
    monitor, record = find_record(path, trial)
    log = log_path(monitor.folder, record)
    if not follow and not log.exists():
        raise FolderError(f"trial {record.index + 1}, {record.name}, has printed nothing yet: it is {record.state}.")
    position, shown = _print_from(log, 0), {log}
    while follow and not record.ended:
        sleep(POLL_S)
        monitor.update()
        newer = log_path(monitor.folder, record)
        log, position = newer, _print_from(newer, position if newer == log else 0)
        shown.add(log)
    _print_job_log(monitor.folder, record, shown)


def _print_from(path: Path, start: int) -> int:
    """Print a file from byte ``start`` to its end; the end's position."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return start
    sys.stdout.write(content.decode("utf-8", "replace"))
    sys.stdout.flush()
    return start + len(content)


def _print_job_log(folder: SweepFolder, record: TrialRecord, shown: set[Path]) -> None:
    """Print the job's log when the last attempt ended before its trial began."""
    log = job_log(folder, record)
    begun = folder.trial(record.name).read_status().attempt == record.attempt
    if log is None or log in shown or begun or not log.exists():
        return
    print(f"--- attempt {record.attempt} ended before the trial began; its job printed ({log}):", file=sys.stderr)
    _print_from(log, 0)
