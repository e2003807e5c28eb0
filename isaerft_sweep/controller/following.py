"""Looking at a sweep from beside its controller: its journal as it grows, and what its workers say."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from isaerft_sweep.controller.presence import is_run, last_presence
from isaerft_sweep.controller.progress import Progress, duration, time_left_s, trial_table
from isaerft_sweep.dispatch.slurm_site import ask
from isaerft_sweep.errors import FolderError, JournalError, LaunchError
from isaerft_sweep.journal.folders import FINAL, RUNNING, SweepFolder
from isaerft_sweep.journal.journal import SweepRecord, TrialRecord

POLL_S = 1.0


class Follower:
    """A sweep's record, kept up to date by reading only what the journal has got since."""

    def __init__(self, path: Path) -> None:
        """Read what there is. Raises FolderError when ``path`` is no sweep's folder."""
        self.folder = SweepFolder(path.expanduser().absolute())
        if not self.folder.journal.is_file():
            raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, but there is none.")
        self.record = SweepRecord()
        self._read_bytes = 0
        self.update()

    @property
    def records(self) -> list[TrialRecord]:
        return list(self.record.trials.values())

    @property
    def trials(self) -> int:
        """How many trials the sweep shall have."""
        known = last_presence(self.folder)
        return max(known.trials if known else 0, len(self.record.trials))

    def update(self) -> list[TrialRecord]:
        """The trials that something has happened to."""
        with self.folder.journal.open("rb") as file:
            file.seek(self._read_bytes)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a line that is being written is read the next time
        self._read_bytes += len(whole)
        changed = []
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                self.record.apply(event)
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(f"{self.folder.journal} has a broken line ({error}): {line[:80]!r}.") from error
            if "index" in event and event["event"] != "trial":
                changed.append(self.record.trials[event["index"]])
        return changed

    def statuses(self) -> dict[int, dict[str, Any]]:
        """The last word of each worker whose trial is under way, or was in an array that no controller sees to."""
        found, made = {}, self.folder.made.exists()
        for record in self.records:
            if record.state == "queued":
                status = self.folder.trial(record.name).read_status()
                found[record.index] = status if status.get("attempt") == record.attempt else {}
            elif made and not record.attempt and (status := self.folder.trial(record.name).read_status()):
                found[record.index] = status
        return found


def show_status(console: Console, path: Path) -> None:
    """Print how far a sweep is, who runs it, what is under way and what has failed."""
    seen = Follower(path)
    statuses = seen.statuses()
    counts = Counter(shown_state(record, statuses) for record in seen.records)
    ended = sum(record.ended or statuses.get(record.index, {}).get("state") in FINAL for record in seen.records)
    console.print(f"sweep       {seen.folder.path}", soft_wrap=True, highlight=False)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none yet"
    left_s = time_left_s(seen.records, statuses, seen.trials)
    left = f", about {duration(left_s)} left" if left_s is not None and ended < seen.trials else ""
    console.print(f"trials      {ended} of {seen.trials} ended{left}: {told}", soft_wrap=True, highlight=False)
    console.print(f"controller  {controller_words(seen, ended)}", soft_wrap=True, highlight=False)
    under_way = [r for r in seen.records if r.state == "queued" or statuses.get(r.index, {}).get("state") == RUNNING]
    if under_way:
        console.print(trial_table(under_way, statuses, seen.record.metric))
    for reason, count in waiting_reasons([r for r in under_way if not statuses.get(r.index)]).items():
        console.print(f"waiting     {count} in the queue: {reason}", soft_wrap=True, highlight=False)
    for record in [record for record in seen.records if record.given_up][-5:]:
        console.print(f"given up: {record.name}: {record.message}", style="red", soft_wrap=True, highlight=False)


def waiting_reasons(records: list[TrialRecord]) -> Counter[str]:
    """Why SLURM has not started the jobs of these trials yet, in its own words; nothing for jobs of another kind."""
    jobs = [(record.job or {}).get("job", record.job or {}) for record in records]
    ids: dict[str | None, list[str]] = {}
    for job in jobs:
        if job.get("kind") == "slurm":
            ids.setdefault(job.get("cluster"), []).append(str(job["id"]))
    reasons: Counter[str] = Counter()
    for cluster, of_it in ids.items():
        flags = ("--noheader", "--array", "--format=%T|%r", "--jobs", ",".join(sorted(of_it)))
        with suppress(LaunchError):  # it does not answer, or has forgotten one of them: the controller's next poll will tell
            lines = ask("squeue", *flags, cluster=cluster).splitlines()
            reasons.update(line.partition("|")[2] for line in lines if line.startswith("PENDING|"))
    return reasons


def shown_state(record: TrialRecord, statuses: dict[int, dict[str, Any]]) -> str:
    """``given up``, or the worker's own word while a job is under way."""
    if record.given_up:
        return "given up"
    return record.state if record.ended else str(statuses.get(record.index, {}).get("state", record.state))


def controller_words(seen: Follower, ended: int) -> str:
    """Who runs the sweep, and what to do when nobody does."""
    known = last_presence(seen.folder)
    if is_run(seen.folder):
        return str(known) if known else "running"
    if all(record.ended for record in seen.records) and ended >= seen.trials:
        return "none: the sweep has ended"
    return f"none: go on with  isaerft-sweep attach {seen.folder.path}"


def follow(console: Console, path: Path, asleep: Callable[[float], None] = time.sleep) -> bool:
    """Show a sweep that a controller runs until that has ended; False when no controller runs it."""
    seen = Follower(path)
    if not is_run(seen.folder):
        return False
    with Progress(console, seen.record.metric, seen.trials) as view:
        while True:
            running = is_run(seen.folder)
            for record in seen.update():
                view.event(record)
            view.update(seen.records, seen.statuses())
            if not running:
                return True
            asleep(POLL_S)
