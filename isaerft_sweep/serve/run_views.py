"""What GraphQL shows of runs and their files; see ``views``."""

from __future__ import annotations

import itertools
import json
import math
import mimetypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isaerft_sweep.serve import artifact_views, cost, sweep_views, views
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve.caller import Caller, global_id, stamp, thinned
from isaerft_sweep.serve.checks import RequestError, json_object, whole_number
from isaerft_sweep.serve.filters import FILES, page
from isaerft_sweep.serve.runs import EVENTS, HISTORY, OUTPUT, ServedRun
from isaerft_sweep.tracking.metric_names import is_number, value_at

SAMPLES = 500
FEW = 20
"""Keys of a history that cost nothing more than reading it."""


MISSING = object()


@dataclass(frozen=True)
class HistorySpec:
    """What ``sampledHistory`` is asked for: rows from step ``low`` to below ``high`` that have all ``keys``."""

    keys: tuple[str, ...]
    low: float
    high: float
    samples: int

    @classmethod
    def read(cls, text: str) -> HistorySpec:
        """Raises RequestError.

        ``maxStep`` belongs to what is asked for, as on W&B's server, but for clients that ask for as many samples as there
        are steps below it: up to wandb 0.27 they take it for the first step of the next page.
        """
        spec = json_object("a spec of sampledHistory", text)
        keys, samples = spec.get("keys") or [], whole_number("samples", spec.get("samples"))
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise RequestError(f"keys must be a list of names but got {str(keys)[:80]}.")
        first, last = whole_number("minStep", spec.get("minStep")) or 0, whole_number("maxStep", spec.get("maxStep"))
        low = float(first) if first else -math.inf
        if last is None:
            return cls(tuple(keys), low, math.inf, samples or SAMPLES)
        below = samples is not None and samples <= last - first
        return cls(tuple(keys), low, last if below else last + 1, samples or SAMPLES)


@dataclass(frozen=True)
class RunView:
    """A run, with its rows and files."""

    caller: Caller
    run: ServedRun
    typename = "Run"
    read_only = False
    system_metrics = "{}"

    @property
    def id(self) -> str:
        key = self.run.key
        return global_id("Run", key.name, key.project, key.entity)

    @property
    def name(self) -> str:
        return self.run.key.name

    @property
    def display_name(self) -> str:
        return str(self.run.facts.get("displayName") or self.run.key.name)

    @property
    def group(self) -> Any:
        return self.run.facts.get("groupName")

    def __getattr__(self, name: str) -> Any:
        """Facts that are shown as the client has told them."""
        told = {"description": "description", "notes": "notes", "group_name": "groupName", "job_type": "jobType",
                "commit": "commit", "host": "host"}  # fmt: skip
        if name in told:
            return self.run.facts.get(told[name])
        raise AttributeError(name)

    @property
    def tags(self) -> list[str]:
        return list(self.run.facts.get("tags") or [])

    @property
    def state(self) -> str:
        return self.run.state

    @property
    def exitcode(self) -> int | None:
        return self.run.exitcode

    @property
    def stopped(self) -> bool:
        return bool(self.run.stop)

    should_stop = stopped

    @property
    def failed(self) -> bool:
        return self.run.state in (states.FAILED, states.CRASHED)

    @property
    def running(self) -> bool:
        return self.run.active

    @property
    def config(self) -> str:
        return self.run.config

    @property
    def summary_metrics(self) -> str:
        return self.run.summary

    @property
    def created_at(self) -> str:
        return stamp(self.run.created)

    @property
    def updated_at(self) -> str:
        return stamp(self.run.updated)

    @property
    def heartbeat_at(self) -> str:
        # the run's own word, which is not written to the disk each time
        return stamp(max(self.run.updated, time.time() - (time.monotonic() - self.run.heard) if self.run.active else 0.0))

    def _lines(self, name: str) -> int:
        # a client counts on from here: one that has begun the run anew from 0
        return 0 if self.run.begun_anew else self.run.lines[name]

    @property
    def history_line_count(self) -> int:
        return self._lines(HISTORY)

    @property
    def events_line_count(self) -> int:
        return self._lines(EVENTS)

    @property
    def log_line_count(self) -> int:
        return self._lines(OUTPUT)

    @property
    def history_tail(self) -> str:
        return json.dumps([self.run.last.get(HISTORY, "{}")])  # wandb 0.18 cannot take an empty list

    @property
    def events_tail(self) -> str:
        return json.dumps([self.run.last.get(EVENTS, "{}")])

    def wandb_config(self, keys: list[str] | None = None) -> str:
        inner = self.run.config_values().get("_wandb") or {}
        return json.dumps({key: inner.get(key, {}) for key in keys or inner})

    @property
    def history_keys(self) -> Any:
        cost.spend_reading(self.run.lines[HISTORY] - self.run.counted)
        last = json.loads(self.run.last[HISTORY]) if HISTORY in self.run.last else {}
        step = float(last["_step"]) if is_number(last.get("_step")) else self.run.lines[HISTORY] - 1.0
        kinds = {
            name: {"typeCounts": [{"type": kind, "count": count} for kind, count in counts.items()]}
            for name, counts in self.run.logged_names().items()
        }
        return {"lastStep": int(step), "keys": kinds, "sets": []}

    def sampled_history(self, specs: list[str]) -> list[Any]:
        found = []
        for text in specs:
            found.append(self._sampled(HistorySpec.read(text)))
            cost.spend(len(found[-1]) * cost.ROW)
        return found

    def _sampled(self, spec: HistorySpec) -> list[Any]:
        cost.spend_reading(self.run.lines[HISTORY])
        rows = list(self.run.steps(spec.low, spec.high))
        cost.spend(cost.FIELD + len(rows) * max(0, len(spec.keys) - FEW) // cost.LOOKS)
        if spec.keys:
            wanted = ({key: value_at(row, key, MISSING) for key in spec.keys} for row in rows)
            rows = [row for row in wanted if MISSING not in row.values()]
        return thinned(rows, spec.samples)

    def history(self, min_step: Any = None, max_step: Any = None, samples: int | None = None) -> list[str]:
        cost.spend_reading(self.run.lines[HISTORY])
        if min_step is None and max_step is None:
            return _sent(thinned(self.run.rows(), samples or SAMPLES))
        low, high = whole_number("minStep", min_step), whole_number("maxStep", max_step)
        inside = self.run.steps(low or 0, math.inf if high is None else high)
        return _sent([json.dumps(row) for row in itertools.islice(inside, samples or None)])

    def events(self, samples: int | None = None) -> list[str]:
        cost.spend_reading(self.run.lines[EVENTS])
        return _sent(thinned(self.run.rows(EVENTS), samples or SAMPLES))

    def parquet_history(self, live_keys: list[str]) -> Any:
        # nothing has been put into files; clients look up here from which step on they have to ask for rows
        first = next(self.run.steps(), None)
        return {"parquetUrls": [], "liveData": [{key: first.get(key) for key in live_keys}] if first else []}

    @property
    def user(self) -> views.UserView:
        return views.UserView(self.caller.user, self.run.key.entity)

    @property
    def project(self) -> views.ProjectView:
        return views.ProjectView(self.caller, (self.run.key.entity, self.run.key.project))

    @property
    def project_id(self) -> int:
        return int(self.project.internal_id)

    @property
    def sweep_name(self) -> str | None:
        return self.run.sweep or None

    @property
    def sweep(self) -> sweep_views.SweepView | None:
        found = self.caller.server.sweeps.get(self.run.sweep)
        return sweep_views.SweepView(self.caller, found) if found else None

    def _paths(self) -> list[Path]:
        folder = self.caller.server.files_of(self.run)
        return sorted(path for path in folder.rglob("*") if path.is_file())

    @property
    def file_count(self) -> int:
        return len(self._paths())

    def files(
        self,
        names: list[str] | None = None,
        after: str | None = None,
        first: int | None = None,
        pattern: str | None = None,
    ) -> Any:
        folder = self.caller.server.files_of(self.run)
        found = [(path.relative_to(folder).as_posix(), path) for path in self._paths()]
        if names:
            wanted = set(names)
            found = [(name, path) for name, path in found if name in wanted]
        if pattern:
            found = [(name, path) for name, path in found if _like(name, pattern)]
        return page(found, after, first, lambda one: FileView(self.caller, self.run, *one), FILES)

    def output_artifacts(self, after: str | None = None, first: int | None = None) -> Any:
        """Those that the run has logged."""
        return self._artifacts(lambda known: known.get("run") == self.run.key.name, after, first)

    def input_artifacts(self, after: str | None = None, first: int | None = None) -> Any:
        """Those that the run has used."""
        key = [self.run.key.entity, self.run.key.project, self.run.key.name]
        return self._artifacts(lambda known: key in (known.get("users") or ()), after, first)

    def _artifacts(self, wanted: Callable[[Mapping[str, Any]], bool], after: str | None, first: int | None) -> Any:
        place, artifacts = (self.run.key.entity, self.run.key.project), self.caller.server.artifacts
        versions = [known for key in artifacts.collections for known in artifacts.versions(key)]
        used = [a for a in versions if wanted(a) and ("users" in a or (a["entity"], a["project"]) == place)]
        return page(used, after, first, lambda known: artifact_views.ArtifactView(self.caller, known))


@dataclass(frozen=True)
class FileView:
    """An uploaded file, or one that will be."""

    caller: Caller
    run: ServedRun
    name: str
    path: Path

    @property
    def id(self) -> str:
        return global_id("File", self.run.key.name, self.name)

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def mimetype(self) -> str:
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    @property
    def updated_at(self) -> str:
        return stamp(self.path.stat().st_mtime)

    md5 = None

    def url(self, upload: bool = False) -> str:
        return self.upload_url if upload else self.direct_url

    @property
    def direct_url(self) -> str:
        return self.caller.file_url(self._address, "GET")

    @property
    def upload_url(self) -> str:
        return self.caller.file_url(self._address, "PUT")

    @property
    def _address(self) -> str:
        return f"/uploads/{self.path.relative_to(self.caller.server.folder).as_posix()}"


def _sent(rows: list[str]) -> list[str]:
    cost.spend(len(rows) * cost.ROW)
    return rows


def _like(name: str, pattern: str) -> bool:
    """SQL's LIKE with % alone."""
    parts = pattern.split("%")
    if not name.startswith(parts[0]) or not name.endswith(parts[-1]):
        return False
    at = len(parts[0])
    for part in parts[1:-1]:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(parts) > 1 or name == pattern
