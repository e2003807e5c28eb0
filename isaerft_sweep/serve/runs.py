"""One run as the server knows it: a log of all that was said about it, and in memory what is asked for often.

Everything lands in one append-only file per run, in order: what the client upserts, what it streams, and what the server
decides. Rows of the history stay on the disk; memory holds their number, the last one and the sweep's metric.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.append_log import AppendLog, whole_lines
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.tracking.metric_names import flat, is_number, logged_value, may_hold, number_at

PENDING, RUNNING, FINISHED, FAILED, CRASHED = "pending", "running", "finished", "failed", "crashed"
KILLED, PREEMPTING, PREEMPTED = "killed", "preempting", "preempted"
ACTIVE = (PENDING, RUNNING, PREEMPTING)

HISTORY, SUMMARY, EVENTS, OUTPUT = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log"
STREAMS = (HISTORY, EVENTS, OUTPUT)


@dataclass(frozen=True)
class RunKey:
    """What names a run."""

    entity: str
    project: str
    name: str


@dataclass
class ServedRun:
    """``facts``: what ``upsertBucket`` says, by W&B's names. ``curve``: the metric at each row after step 0 that has it."""

    key: RunKey
    path: Path
    metric: str = ""
    created: float = 0.0
    updated: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    config: str = "{}"
    summary: str = "{}"
    state: str = PENDING
    exitcode: int | None = None
    stop: str = ""
    """Why the run was told to end: by ``pruner``, ``user`` or ``cancel``; empty when it was not."""
    agent: str = ""
    attempt: int = 0
    lines: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    last: dict[str, str] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    resuming: bool = False
    """Whether a client has asked what there is to go on with, and not begun yet."""
    begun_anew: bool = False
    """Whether a new process has begun the run without asking what there is, and has not sent anything yet."""
    heard: float = 0.0
    """When the run, or its agent on its behalf, was last heard of, by this process's monotonic clock."""
    counted: int = 0
    """How many rows of the history ``logged_names`` has gone through."""
    _names: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def sweep(self) -> str:
        return str(self.facts.get("sweep") or "")

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    def load(self, metric_of: Callable[[str], str]) -> None:
        """Replay the log; ``metric_of`` gives a sweep's metric. Raises FolderError on a broken line that is not the last."""
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
        """Take in an event once the disk has it."""
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
        for name, handler in (("set", self._on_set), ("files", self._on_files), ("facts", self._on_facts)):
            if name in event:
                handler(event[name])

    def _on_facts(self, facts: Mapping[str, Any]) -> None:
        rest = dict(facts)
        self.config = rest.pop("config", None) or self.config
        self.summary = rest.pop("summaryMetrics", None) or self.summary
        self.facts.update(rest)

    def _on_set(self, values: Mapping[str, Any]) -> None:
        """What only the server decides."""
        for name, value in values.items():
            if name == "anew":
                self._forget_rows()
            elif name in ("state", "exitcode", "stop", "agent", "attempt"):
                setattr(self, name, value)
            else:
                raise ValueError(f"unknown field {name}")

    def _forget_rows(self) -> None:
        """A client has begun the run again from its start."""
        self.lines, self.last, self.curve, self.summary = dict.fromkeys(STREAMS, 0), {}, [], "{}"
        self._names, self.counted = Counter(), 0

    def _on_files(self, files: Mapping[str, Any]) -> None:
        for name, (_offset, rows) in files.items():
            if name == SUMMARY:
                self.summary = rows[-1] if rows else self.summary
                continue
            self.lines[name] += len(rows)
            if rows and name != OUTPUT:
                self.last[name] = rows[-1]
            if name == HISTORY and self.metric:
                self.curve += values_of(rows, self.metric)

    def overwritten_by(self, files: Mapping[str, tuple[int, list[str]]]) -> bool:
        """Whether a new process writes the run from its start: it overwrites what an older one has left, as on W&B.

        A client that sends rows again sends the same ones; one that goes on sends later steps.
        """
        offset, rows = files.get(HISTORY, (0, []))
        if rows and self._is_later(rows[0]):
            return False
        if self.begun_anew:
            return any(offset < self.lines.get(name, 0) for name, (offset, _) in files.items())
        known = itertools.islice(self.rows(), len(rows)) if rows and offset == 0 else ()
        return any(json.loads(old) != json.loads(new) for old, new in zip(known, rows, strict=False) if old != new)

    def new_rows(self, name: str, offset: int, rows: list[str]) -> list[str]:
        """Those of ``rows`` that are not here yet.

        A client that missed the answer sends them again; `wandb sync` of a run that is partly here sends all of them, behind
        those. A history's steps only grow.
        """
        last = self._last_step
        if name == HISTORY and rows and is_number(last) and is_number(_step_of(rows[0])):
            return [row for row in rows if not is_number(step := _step_of(row)) or step > last]
        return rows[max(0, self.lines[name] - offset) :] if name in STREAMS else rows

    @property
    def _last_step(self) -> Any:
        return _step_of(self.last[HISTORY]) if HISTORY in self.last else None

    def _is_later(self, row: str) -> bool:
        """Whether a row belongs behind the last one."""
        last, step = self._last_step, _step_of(row)
        return not is_number(last) or not is_number(step) or step > last

    def rows(self, name: str = HISTORY) -> Sequence[str]:
        """The lines of a stream, from the disk."""
        return rows_in(self.path, self._length, name) if self.lines[name] else ()

    def steps(self, low: float = -math.inf, high: float = math.inf, most: int | None = None) -> Iterator[dict[str, Any]]:
        """The history's rows whose step is at least ``low`` and less than ``high``; of more than ``most`` every so many."""
        rows = self.rows()
        inside = range(len(rows))
        if rows and (low > -math.inf or high < math.inf):
            steps = steps_in(self.path, self._length)
            inside = range(bisect_left(steps, low), bisect_left(steps, high))
        for i in inside[:: max(1, len(inside) // most) if most else 1]:
            yield {"_step": i, **json.loads(rows[i])}

    def config_values(self) -> dict[str, Any]:
        """The config without W&B's wrapping."""
        raw = json.loads(self.config)
        return {k: v.get("value") if isinstance(v, Mapping) and "value" in v else v for k, v in raw.items()}

    @property
    def said_state(self) -> str:
        """What one of our trials says of its own end in its summary; empty for other programs' runs."""
        summary = json.loads(self.summary)
        return str(summary.get("state", "")) if isinstance(summary, dict) else ""

    def summary_value(self, name: str, goal: str | None = None) -> float | None:
        """A finite number of the summary, see ``number_at``."""
        return number_at(json.loads(self.summary), name, goal)

    def logged_names(self) -> dict[str, dict[str, int]]:
        """How often a value of which kind was logged under each dotted name. What was counted is not counted again."""
        for text in itertools.islice(self.rows(), self.counted, None):
            row = json.loads(text)
            for name, value in row.items() if all(type(value) in PLAIN for value in row.values()) else flat(row):
                self._names[name, kind_of(value)] += 1
        self.counted = self.lines[HISTORY]
        found: dict[str, dict[str, int]] = {}
        for (name, kind), count in self._names.items():
            found.setdefault(name, {})[kind] = count
        return found


def _step_of(row: str) -> Any:
    return json.loads(row).get("_step")


@lru_cache(maxsize=4)
def rows_in(path: Path, length: int, name: str) -> tuple[str, ...]:
    """The lines of a stream in the first ``length`` bytes of a run's log: whoever pages through them asks many times."""
    found: list[str] = []
    quoted = f'"{name}"'.encode()
    for line in path.read_bytes()[:length].split(b"\n"):
        if b'"anew"' in line and json.loads(line).get("set", {}).get("anew"):
            found = []
        if quoted in line:
            found += json.loads(line).get("files", {}).get(name, (0, ()))[1]
    return tuple(found)


@lru_cache(maxsize=4)
def steps_in(path: Path, length: int) -> tuple[float, ...]:
    """The step of each row of the history, which only grow; a row without one has its number."""
    steps = (json.loads(row).get("_step") for row in rows_in(path, length, HISTORY))
    return tuple(itertools.accumulate((step if is_number(step) else i for i, step in enumerate(steps)), max))


def values_of(rows: list[str], metric: str) -> list[float]:
    """The metric in those rows that have it, without the untrained model's (step 0), which not every run measures."""
    found = []
    for row in map(json.loads, (text for text in rows if may_hold(text, metric))):
        value = logged_value(row, metric)
        if row.get("_step") != 0 and value is not None:
            found.append(float(value) if is_number(value) else math.nan)
    return found


KINDS = {bool: "boolean", str: "string", list: "list", int: "number", float: "number"}
PLAIN = frozenset({int, float})


def kind_of(value: Any) -> str:
    """W&B's name for a value's kind, as in a run's ``history_keys``."""
    if isinstance(value, Mapping):
        return str(value.get("_type", "map"))
    return "number" if value in ("NaN", "Infinity", "-Infinity") else KINDS.get(type(value), "nil")


def next_state(run: ServedRun, ending: Mapping[str, Any], held: bool) -> dict[str, Any]:
    """What a stream's request says of the run's state, as far as it changes. ``held``: its agent is still at it."""
    preempting = bool(ending.get("preempting")) or run.state == PREEMPTING
    if not ending.get("complete"):
        wanted = PREEMPTING if preempting else RUNNING
        # one that was thought dead and speaks is alive, or that an older process of it has ended; another stays ended
        alive = run.active or run.state == CRASHED or held
        return {"state": wanted} if alive and run.state != wanted else {}
    code = ending.get("exitcode")
    code = code if isinstance(code, int) and not isinstance(code, bool) else 1
    # one that had come to its end before it heard of the stop has finished; ours end in order when they are stopped
    if run.stop and (code or json.loads(run.summary).get("state") == TrialState.PRUNED):
        state = KILLED
    elif preempting and code:
        state = PREEMPTED
    else:
        state = FAILED if code else FINISHED
    return {} if (run.state, run.exitcode) == (state, code) else {"state": state, "exitcode": code}
