"""The sweep's journal: one JSON line per event, flushed to disk before the controller acts on it.

One process writes it, under a lock that the kernel frees if the process dies. A torn last line (a crash while writing) is
cut off: no process acted on it. A broken line further up is an error that names it, since a guess could lose a trial.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from isaerft_sweep.errors import FolderError, JournalError
from isaerft_sweep.journal.append_log import AppendLog, whole_lines
from isaerft_sweep.journal.job_refs import JobRef, job_from_json
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import FINAL, TrialState
from isaerft_sweep.search.sampler import Point


@dataclass
class TrialRecord:
    """The state of one trial, from the journal. ``job``: the current attempt's; None when no attempt is under way."""

    index: int
    name: str
    run_id: str
    point: Point
    attempt: int = 0
    job: JobRef | None = None
    state: TrialState = TrialState.CREATED
    metric: float | None = None
    message: str = ""
    seconds: float = 0.0
    failures: int = 0
    violation: float = 0.0
    """How far its metrics break the sweep's constraints; see ``search/constraints.py``."""
    others: tuple[float, ...] = ()
    """The sweep's goals after the first, larger is better."""
    checkpoint: int = 0
    """The last step that a checkpoint was written after."""
    given_up: bool = False
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """For each ended attempt: the worker that ran it, its start and its end (seconds since the epoch)."""
    last_job: JobRef | None = None

    @property
    def ended(self) -> bool:
        """Whether this trial will not run again; a pruned one still may be revived."""
        return self.state in (*FINAL, TrialState.PRUNED) or self.given_up

    def grant_retries(self) -> None:
        """Let a trial that was given up run again, with all its retries."""
        self.given_up, self.failures = False, 0


@dataclass
class SweepRecord:
    """A journal, replayed."""

    sweep_id: str = ""
    fingerprint: str = ""
    metric: str = ""
    goal: str = "maximize"
    trials: dict[int, TrialRecord] = field(default_factory=dict)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Apply one event. Raises KeyError, TypeError or ValueError when it is not valid."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is None:
            raise ValueError(f"unknown event {event['event']!r}")
        handler(event)

    def _on_sweep(self, event: Mapping[str, Any]) -> None:
        self.sweep_id, self.fingerprint = event["sweep_id"], event["question"]
        self.metric, self.goal = event["metric"], event["goal"]

    def _on_trial(self, event: Mapping[str, Any]) -> None:
        point = Point(event["params"], event["unit"], event.get("note", ""))
        self.trials[event["index"]] = TrialRecord(event["index"], event["name"], event["run_id"], point)

    def _on_dispatch(self, event: Mapping[str, Any]) -> None:
        trial = self.trials[event["index"]]
        trial.attempt, trial.job = event["attempt"], job_from_json(event["job"])
        trial.state, trial.last_job = TrialState.QUEUED, trial.job
        if trial.given_up:
            trial.grant_retries()

    def _on_takeover(self, event: Mapping[str, Any]) -> None:
        """The first event, without a job, takes the trial from a job that has not started it; the second adds a job."""
        trial = self.trials[event["index"]]
        trial.attempt, trial.job = event["attempt"], job_from_json(event["job"]) if event["job"] else None
        trial.state = TrialState.QUEUED if trial.job else TrialState.CREATED

    def _on_end(self, event: Mapping[str, Any]) -> None:
        trial = self.trials[event["index"]]
        if event["seconds"] > 0 and "time" in event:
            worker = (trial.job and trial.job.worker) or f"trial {trial.index}"  # no job: a static array
            trial.spans.append((worker, event["time"] - event["seconds"], event["time"]))
        trial.job, trial.state, trial.message = None, TrialState(event["state"]), event["message"]
        trial.metric, trial.given_up = event["metric"], event["given_up"]
        trial.violation = event.get("violation", 0.0)
        trial.others = tuple(event.get("others", ()))
        trial.seconds += event["seconds"]
        trial.failures += event.get("counted", trial.state is TrialState.FAILED)
        trial.checkpoint = max(trial.checkpoint, event.get("checkpoint", 0))


class Journal:
    """The journal of one sweep, open for writing by this process alone."""

    def __init__(self, folder: SweepFolder) -> None:
        """Lock and replay. Raises FolderError when another process runs this sweep, JournalError on a broken line."""
        self.folder = folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            self._lock = folder.lock.open("a+", encoding="utf-8")
            _lock_exclusively(self._lock)
        except BlockingIOError as error:
            self._lock.close()
            raise FolderError(
                f"the sweep in {folder.path} is being run by another process. Wait for it or stop it; or start another "
                "sweep: name=NAME."
            ) from error
        except OSError as error:
            raise FolderError(
                f"the output folder {folder.path} cannot be written or locked ({error.strerror}). Choose another: "
                "output=PATH."
            ) from error
        self.record = SweepRecord()
        try:
            self._log = AppendLog(folder.journal, replay(folder.journal, self.record))
        except BaseException:
            self._lock.close()
            raise

    def write(self, event: str, **fields: Any) -> None:
        """Append an event, flush it to disk, then apply it."""
        content = {"event": event, "time": round(time.time(), 3), **fields}
        try:
            self._log.append(content)
        except OSError as error:
            raise FolderError(
                f"{self.folder.journal} cannot be written ({error.strerror}). Make room or repair the disk, then run the "
                "same command again: nothing that is in the journal is lost."
            ) from error
        self.record.apply(content)

    def close(self) -> None:
        """Release the sweep's lock."""
        self._log.close()
        self._lock.close()


class JournalReader:
    """Reads a journal that another process writes. ``record``: what the lines read so far say."""

    def __init__(self, folder: SweepFolder) -> None:
        """Nothing is read before ``update``."""
        self.folder, self.record = folder, SweepRecord()
        self._read_bytes = 0

    def update(self, until: int | None = None) -> list[tuple[str, TrialRecord | None]]:
        """Read the new lines: the name of each event, and the trial that it is about.

        ``until``: read no further than this byte. Raises JournalError on a broken line.
        """
        with self.folder.journal.open("rb") as file:
            file.seek(self._read_bytes)
            content = file.read(-1 if until is None else until - self._read_bytes)
        lines = content[: content.rfind(b"\n") + 1]  # an incomplete last line is read next time
        self._read_bytes += len(lines)
        events: list[tuple[str, TrialRecord | None]] = []
        for line in lines.splitlines():
            try:
                event = json.loads(line)
                self.record.apply(event)
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(f"{self.folder.journal} has a broken line ({error}): {line[:80]!r}.") from error
            events.append((event["event"], self.record.trials.get(event.get("index"))))
        return events


def is_held(folder: SweepFolder) -> bool:
    """Whether a process has the journal open for writing, on this machine or on another one that shares the folder."""
    try:
        with folder.lock.open(encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False  # the lock file does not exist or cannot be read, so no process holds it


def _lock_exclusively(handle: IO[str]) -> None:
    """Raise BlockingIOError when another process holds the lock for longer than ``is_held`` does."""
    for attempts_left in range(5, 0, -1):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempts_left == 1:
                raise
            time.sleep(0.05)


def read_record(folder: SweepFolder) -> SweepRecord:
    """The journal of a sweep, replayed; empty when there is none."""
    record = SweepRecord()
    replay(folder.journal, record)
    return record


def replay(path: Path, record: SweepRecord) -> int:
    """Apply the journal in ``path`` to ``record``; returns the length of its complete lines, in bytes."""
    lines, end = whole_lines(path)
    for number, line in enumerate(lines, 1):
        try:
            record.apply(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"{path}, line {number} is not a journal entry ({error}): {line[:80]!r}. Nothing was changed. Restore "
                "the file from a backup, or delete that line: a trial whose line is missing runs again, and every "
                f"finished trial's results stay in {path.parent / 'trials'}."
            ) from error
    return end
