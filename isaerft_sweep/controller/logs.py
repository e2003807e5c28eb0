"""What a trial has printed, from its first attempt to its last, and as it goes on."""

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
    """The trial of the sweep in ``path`` by its number (as tables have it, from 1), its name or its run id.

    Raises FolderError when there is none.
    """
    runs = SweepFolder(path.expanduser().absolute()).agent_run_folders()
    parts = [SweepMonitor(run.path) for run in runs] or [SweepMonitor(path)]
    wanted = trial.removeprefix("#")
    for seen in parts:
        for record in seen.records:
            if wanted in (record.name, record.run_id) or (wanted == str(record.index + 1) and not runs):
                return seen, record
    count = sum(len(seen.records) for seen in parts)
    numbers = f"a number from 1 to {count}, " if count and not runs else ""
    known = f"{numbers}its name or its run id" if count else "one of its trials, but it has none yet"
    raise FolderError(
        f"the trial of the sweep in {path} must be {known}, but got '{trial}'. Its trials: isaerft-sweep status"
    )


def show_log(path: Path, trial: str, follow: bool, asleep: Callable[[float], None] = time.sleep) -> None:
    """Print what the trial has printed. ``follow``: go on until it has ended. Raises FolderError when there is nothing."""
    seen, record = find_record(path, trial)
    log = log_path(seen.folder, record)
    if not follow and not log.exists():
        raise FolderError(f"trial {record.index + 1}, {record.name}, has printed nothing yet: it is {record.state}.")
    at, shown = _print_from(log, 0), {log}
    while follow and not record.ended:
        asleep(POLL_S)
        seen.update()
        newer = log_path(seen.folder, record)
        log, at = newer, _print_from(newer, at if newer == log else 0)
        shown.add(log)
    _end_of_job(seen.folder, record, shown)


def _print_from(path: Path, at: int) -> int:
    """Print a file from its byte ``at`` on; where it ends."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            content = file.read()
    except FileNotFoundError:
        return at
    sys.stdout.write(content.decode("utf-8", "replace"))
    sys.stdout.flush()
    return at + len(content)


def _end_of_job(folder: SweepFolder, record: TrialRecord, shown: set[Path]) -> None:
    """Of an attempt that ended before the trial could print: what its job printed."""
    log = job_log(folder, record)
    begun = folder.trial(record.name).read_status().attempt == record.attempt
    if log is None or log in shown or begun or not log.exists():
        return
    print(f"--- attempt {record.attempt} ended before the trial began; its job printed ({log}):", file=sys.stderr)
    _print_from(log, 0)
