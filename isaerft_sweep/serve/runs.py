"""One run on the server: an append-only log of every event, and an in-memory summary of it for frequent queries.

All events of a run go to one file, in order: the client's upserts, its streams, and the server's decisions. Rows of the
history stay on disk; memory holds their number, the last one and the values of the sweep's metric.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.append_log import AppendLog, whole_lines
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.serve.run_state import ACTIVE, RunState
from isaerft_sweep.tracking.metric_names import flat, is_number, logged_value, may_hold, number_at

HISTORY, SUMMARY, EVENTS, OUTPUT = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log"
STREAMS = (HISTORY, EVENTS, OUTPUT)


@dataclass(frozen=True)
class RunKey:
    """Identifies a run of the server."""

    entity: str
    project: str
    name: str


@dataclass
class ServedRun:
    """``metadata``: fields of ``upsertBucket``, by W&B's names. ``curve``: the metric's values, in order, without step 0."""

    key: RunKey
    path: Path
    metric: str = ""
    created: float = 0.0
    updated: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)
    config: str = "{}"
    summary: str = "{}"
    state: RunState = RunState.PENDING
    exitcode: int | None = None
    stop: str = ""
    """Who requested that the run stops: ``pruner``, ``user`` or ``cancel``; empty when no stop is requested."""
    agent: str = ""
    attempt: int = 0
    line_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    last_rows: dict[str, str] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    resume_pending: bool = False
    """A client has queried the run in order to resume it, and has not started it yet."""
    restart_pending: bool = False
    """A new process has started the run without querying it first, and has not sent any rows yet."""
    last_seen_monotonic: float = 0.0
    """Time of the last sign of life, by the run or by its agent for it; this process's monotonic clock, in seconds."""
    names_counted: int = 0
    """How many rows of the history ``logged_names`` has counted."""
    _names: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def sweep(self) -> str:
        return str(self.metadata.get("sweep") or "")

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    # -- changes in memory

    def seen(self, now: float) -> None:
        """Record a sign of life. ``now``: monotonic, in seconds."""
        self.last_seen_monotonic = now

    def use_metric(self, metric: str) -> None:
        """Set the metric of the run's sweep. Call it before rows arrive: they fill ``curve``."""
        self.metric = metric

    def request_resume(self) -> None:
        """A client has queried the run in order to resume it."""
        self.resume_pending, self.restart_pending = True, False

    def upserted(self, starts: bool, from_run: bool) -> None:
        """Update what is pending after an upsert.

        Args:
            starts: whether a new process has started the run.
            from_run: whether the run's own process sent the upsert.
        """
        self.restart_pending = not self.resume_pending and (starts or self.restart_pending)
        self.resume_pending = self.resume_pending and not from_run

    def streamed(self, names: Container[str]) -> None:
        """The client has sent the streams ``names``."""
        self.restart_pending = self.restart_pending and not any(name in names for name in STREAMS)

    # -- the log

    def load(self, metric_of: Callable[[str], str]) -> None:
        """Replay the log. Raises FolderError on a broken line that is not the last.

        ``metric_of`` returns the metric of a sweep, by its id.
        """
        lines, self._length = whole_lines(self.path)
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
                if not self.metric and (event.get("facts") or {}).get("sweep"):
                    self.metric = metric_of(event["facts"]["sweep"])
                self._apply(event)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FolderError(
                    f"{self.path}, line {number} is not a record of a run ({error}). Restore the file or move it away."
                ) from error

    def write(self, **event: Any) -> None:
        """Apply an event after it is on disk."""
        event["t"] = round(time.time(), 3)
        if not self.path.parent.is_dir():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        log = AppendLog(self.path, self._length)
        try:
            log.append(event)
        finally:
            log.close()
        self._length = self.path.stat().st_size
        self._apply(event)

    _length: int = 0

    def _apply(self, event: Mapping[str, Any]) -> None:
        self.created = self.created or event["t"]
        self.updated = event["t"]
        for name, handler in (("set", self._on_set), ("files", self._on_files), ("facts", self._on_metadata)):
            if name in event:
                handler(event[name])

    def _on_metadata(self, fields: Mapping[str, Any]) -> None:
        metadata = dict(fields)
        self.config = metadata.pop("config", None) or self.config
        self.summary = metadata.pop("summaryMetrics", None) or self.summary
        self.metadata.update(metadata)

    def _on_set(self, values: Mapping[str, Any]) -> None:
        """Set fields that only the server decides."""
        for name, value in values.items():
            if name == "anew":
                self._forget_rows()
            elif name == "state":
                self.state = RunState(value)
            elif name in ("exitcode", "stop", "agent", "attempt"):
                setattr(self, name, value)
            else:
                raise ValueError(f"unknown field {name}")

    def _forget_rows(self) -> None:
        """A client has restarted the run from its beginning."""
        self.line_counts, self.last_rows, self.curve, self.summary = dict.fromkeys(STREAMS, 0), {}, [], "{}"
        self._names, self.names_counted = Counter(), 0

    def _on_files(self, files: Mapping[str, Any]) -> None:
        for name, (_offset, rows) in files.items():
            if name == SUMMARY:
                self.summary = rows[-1] if rows else self.summary
                continue
            self.line_counts[name] += len(rows)
            if rows and name != OUTPUT:
                self.last_rows[name] = rows[-1]
            if name == HISTORY and self.metric:
                self.curve += values_of(rows, self.metric)

    # -- rows

    def overwritten_by(self, files: Mapping[str, tuple[int, list[str]]]) -> bool:
        """Whether a new process writes the run from its start, and so overwrites the rows of an older one, as on W&B.

        A client that repeats rows sends the same ones; one that resumes sends later steps.
        """
        offset, rows = files.get(HISTORY, (0, []))
        if rows and self._is_later(rows[0]):
            return False
        if self.restart_pending:
            return any(offset < self.line_counts.get(name, 0) for name, (offset, _) in files.items())
        stored = itertools.islice(self.rows(), len(rows)) if rows and offset == 0 else ()
        return any(json.loads(old) != json.loads(new) for old, new in zip(stored, rows, strict=False) if old != new)

    def new_rows(self, name: str, offset: int, rows: list[str]) -> list[str]:
        """The rows that are not stored yet.

        A client that missed the response sends its rows again. `wandb sync` of a run that is partly stored sends all rows,
        with an offset after the stored ones. The steps of a history only grow, so they tell new rows from stored ones.

        Args:
            name: the stream.
            offset: the line number of the first row, as the client counts.
            rows: the lines that the client sent.
        """
        last = self._last_step
        if name == HISTORY and rows and is_number(last) and is_number(_step_of(rows[0])):
            return [row for row in rows if not is_number(step := _step_of(row)) or step > last]
        return rows[max(0, self.line_counts[name] - offset) :] if name in STREAMS else rows

    @property
    def _last_step(self) -> Any:
        return _step_of(self.last_rows[HISTORY]) if HISTORY in self.last_rows else None

    def _is_later(self, row: str) -> bool:
        """Whether the row comes after the last stored one."""
        last, step = self._last_step, _step_of(row)
        return not is_number(last) or not is_number(step) or step > last

    @property
    def length(self) -> int:
        """Bytes of the log that are whole lines."""
        return self._length

    def rows(self, name: str = HISTORY) -> Sequence[str]:
        """The lines of a stream, from disk."""
        return rows_in(self.path, self._length, name) if self.line_counts[name] else ()

    def steps(self, low: float = -math.inf, high: float = math.inf, most: int | None = None) -> Iterator[dict[str, Any]]:
        """The history's rows with ``low`` <= step < ``high``; with ``most``, about that many of them, evenly spaced."""
        rows = self.rows()
        selected = range(len(rows))
        if rows and (low > -math.inf or high < math.inf):
            steps = steps_in(self.path, self._length)
            selected = range(bisect_left(steps, low), bisect_left(steps, high))
        for i in selected[:: max(1, len(selected) // most) if most else 1]:
            yield {"_step": i, **json.loads(rows[i])}

    def config_values(self) -> dict[str, Any]:
        """The config without W&B's ``{"value": …}`` wrappers."""
        raw = json.loads(self.config)
        return {k: v.get("value") if isinstance(v, Mapping) and "value" in v else v for k, v in raw.items()}

    @property
    def reported_trial_state(self) -> str:
        """The state that a trial of this package has written to its summary; empty for other programs' runs."""
        summary = json.loads(self.summary)
        return str(summary.get("state", "")) if isinstance(summary, dict) else ""

    def summary_value(self, name: str, goal: str | None = None) -> float | None:
        """A finite number of the summary, see ``number_at``."""
        return number_at(json.loads(self.summary), name, goal)

    def logged_names(self) -> dict[str, dict[str, int]]:
        """How many values of each kind were logged under each dotted name. Each row is counted once."""
        for text in itertools.islice(self.rows(), self.names_counted, None):
            row = json.loads(text)
            for name, value in row.items() if all(type(value) in PLAIN for value in row.values()) else flat(row):
                self._names[name, kind_of(value)] += 1
        self.names_counted = self.line_counts[HISTORY]
        kinds: dict[str, dict[str, int]] = {}
        for (name, kind), count in self._names.items():
            kinds.setdefault(name, {})[kind] = count
        return kinds


def _step_of(row: str) -> Any:
    return json.loads(row).get("_step")


@lru_cache(maxsize=4)
def rows_in(path: Path, length: int, name: str) -> tuple[str, ...]:
    """The lines of a stream in the first ``length`` bytes of a run's log. Cached: clients page through them."""
    rows: list[str] = []
    quoted = f'"{name}"'.encode()
    for line in path.read_bytes()[:length].split(b"\n"):
        if b'"anew"' in line and json.loads(line).get("set", {}).get("anew"):
            rows = []
        if quoted in line:
            rows += json.loads(line).get("files", {}).get(name, (0, ()))[1]
    return tuple(rows)


@lru_cache(maxsize=4)
def steps_in(path: Path, length: int) -> tuple[float, ...]:
    """The step of each row of the history, in ascending order; the step of a row without one is its index."""
    steps = (json.loads(row).get("_step") for row in rows_in(path, length, HISTORY))
    return tuple(itertools.accumulate((step if is_number(step) else i for i, step in enumerate(steps)), max))


def values_of(rows: list[str], metric: str) -> list[float]:
    """The metric's values in the rows that have it, without step 0: that is the untrained model, which some runs measure."""
    values = []
    for row in map(json.loads, (text for text in rows if may_hold(text, metric))):
        value = logged_value(row, metric)
        if row.get("_step") != 0 and value is not None:
            values.append(float(value) if is_number(value) else math.nan)
    return values


KINDS = {bool: "boolean", str: "string", list: "list", int: "number", float: "number"}
PLAIN = frozenset({int, float})


def kind_of(value: Any) -> str:
    """W&B's name for the kind of a value, as in a run's ``history_keys``."""
    if isinstance(value, Mapping):
        return str(value.get("_type", "map"))
    return "number" if value in ("NaN", "Infinity", "-Infinity") else KINDS.get(type(value), "nil")


def next_state(run: ServedRun, ending: Mapping[str, Any], held: bool) -> dict[str, Any]:
    """The fields of the run's state that a stream request changes.

    Args:
        run: the run that the request belongs to.
        ending: the request's ``preempting``, ``complete`` and ``exitcode``, as far as the client sent them.
        held: whether the run's agent may still retry it.
    """
    preempting = bool(ending.get("preempting")) or run.state is RunState.PREEMPTING
    if not ending.get("complete"):
        target = RunState.PREEMPTING if preempting else RunState.RUNNING
        # A crashed run that sends rows is alive, and so is one whose agent may retry it. Every other ended run stays ended.
        alive = run.active or run.state is RunState.CRASHED or held
        return {"state": target} if alive and run.state is not target else {}
    code = ending.get("exitcode")
    code = code if isinstance(code, int) and not isinstance(code, bool) else 1
    # A run that ended before the stop request reached it has finished. When stopped, this package's trials exit with 0.
    if run.stop and (code or json.loads(run.summary).get("state") == TrialState.PRUNED):
        state = RunState.KILLED
    elif preempting and code:
        state = RunState.PREEMPTED
    else:
        state = RunState.FAILED if code else RunState.FINISHED
    return {} if (run.state, run.exitcode) == (state, code) else {"state": state, "exitcode": code}
