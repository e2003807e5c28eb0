"""What GraphQL shows of the server's objects: one class per type, one attribute or method per field, in snake case."""

from __future__ import annotations

import json
import math
import mimetypes
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isaerft_sweep.serve import artifacts
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve.caller import Caller, global_id, stamp, thinned
from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.filters import page, select
from isaerft_sweep.serve.fleet import ServedAgent
from isaerft_sweep.serve.runs import EVENTS, HISTORY, OUTPUT, RunKey, ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep

TAIL = 1
SAMPLES = 500
AGENT_SILENCE_S = 60.0


@dataclass(frozen=True)
class UserView:
    """Who asks."""

    name: str
    entity: str
    email: str = ""
    flags: str = "{}"
    admin: bool = False
    deleted_at: None = None
    capabilities: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return global_id("User", self.name)

    @property
    def username(self) -> str:
        return self.name

    @property
    def teams(self) -> Any:
        return {"edges": [{"node": {"id": global_id("Entity", self.entity), "name": self.entity}}]}

    @property
    def api_keys(self) -> Any:
        return {"edges": []}


@dataclass(frozen=True)
class ProjectView:
    """A project, with its runs and sweeps."""

    caller: Caller
    key: tuple[str, str]
    access = "PRIVATE"
    views = "{}"
    description = ""
    is_benchmark = False
    read_only = False

    @property
    def id(self) -> str:
        return global_id("Project", *self.key)

    @property
    def internal_id(self) -> str:
        return str(list(self.caller.server.projects).index(self.key) + 1)

    @property
    def name(self) -> str:
        return self.key[1]

    @property
    def entity_name(self) -> str:
        return self.key[0]

    @property
    def entity(self) -> Any:
        return entity_view(self.key[0])

    @property
    def created_at(self) -> str:
        return stamp(self.caller.server.projects[self.key])

    @property
    def user(self) -> UserView:
        return UserView(self.caller.user, self.key[0])

    def _runs(self) -> list[ServedRun]:
        runs = list(self.caller.server.runs.values())
        return [run for run in runs if (run.key.entity, run.key.project) == self.key and run.created]

    def run_count(self, filters: str | None = None) -> int:
        return len(select(self._runs(), filters, None))

    def runs(
        self, filters: str | None = None, after: str | None = None, first: int | None = None, order: str | None = None
    ) -> Any:
        return page(select(self._runs(), filters, order), after, first, lambda run: RunView(self.caller, run))

    buckets = runs

    def run(self, name: str) -> RunView | None:
        run = self.caller.server.runs.get(RunKey(*self.key, name))
        return RunView(self.caller, run) if run is not None else None

    def bucket(self, name: str, missing_ok: bool = False) -> RunView | None:
        """What a client asks before it goes on with a run."""
        found = self.run(name)
        if found is not None:
            found.run.resuming = True
        elif not missing_ok:
            raise RequestError(f"there is no run {'/'.join(self.key)}/{name} on this server.", 404)
        return found if found is not None and found.run.created else None

    def artifact(self, name: str) -> Any:
        return artifacts.find_named(self.caller, self.key, name)

    def _sweeps(self) -> list[ServedSweep]:
        return [s for s in self.caller.server.sweeps.values() if (s.entity, s.project) == self.key]

    @property
    def total_sweeps(self) -> int:
        return len(self._sweeps())

    def sweeps(self, after: str | None = None, first: int | None = None, filters: str | None = None) -> Any:
        return page(self._sweeps(), after, first, lambda sweep: SweepView(self.caller, sweep))

    def sweep(self, sweep_name: str) -> SweepView | None:
        found = next((s for s in self._sweeps() if s.id == sweep_name), None)
        return SweepView(self.caller, found) if found else None


def entity_view(name: str) -> Any:
    """An entity; this server has no organizations."""
    return {"id": global_id("Entity", name), "name": name, "isTeam": False, "entityType": "user", "readOnly": False}


@dataclass(frozen=True)
class RunView:
    """A run, with its rows and files."""

    caller: Caller
    run: ServedRun
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

    @property
    def history_line_count(self) -> int:
        return self.run.lines[HISTORY]

    @property
    def events_line_count(self) -> int:
        return self.run.lines[EVENTS]

    @property
    def log_line_count(self) -> int:
        return self.run.lines[OUTPUT]

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
        count = self.run.lines[HISTORY]
        last = json.loads(self.run.last[HISTORY]) if HISTORY in self.run.last else {}
        kinds = {key: {"typeCounts": [{"type": "number", "count": count}]} for key in json.loads(self.run.summary)}
        return {"lastStep": int(last.get("_step", count - 1)), "keys": kinds, "sets": []}

    def sampled_history(self, specs: list[str]) -> list[Any]:
        found = []
        for text in specs:
            spec = json.loads(text)
            keys, samples = list(spec.get("keys") or ()), int(spec.get("samples") or SAMPLES)
            rows = list(self.run.steps())
            if keys:
                rows = [{k: row[k] for k in keys} for row in rows if all(k in row for k in keys)]
            found.append(thinned(rows, samples))
        return found

    def history(self, min_step: Any = None, max_step: Any = None, samples: int | None = None) -> list[str]:
        if min_step is None and max_step is None:
            return thinned(self.run.rows(), samples or SAMPLES)
        low, high = int(min_step or 0), int(max_step) if max_step is not None else math.inf
        inside = [row for row in self.run.steps() if low <= row["_step"] < high]
        return [json.dumps(row) for row in inside[: samples or None]]

    def events(self, samples: int | None = None) -> list[str]:
        return thinned(self.run.rows(EVENTS), samples or SAMPLES)

    def parquet_history(self, live_keys: list[str]) -> Any:
        return {"parquetUrls": [], "liveData": []}

    @property
    def user(self) -> UserView:
        return UserView(self.caller.user, self.run.key.entity)

    @property
    def project(self) -> ProjectView:
        return ProjectView(self.caller, (self.run.key.entity, self.run.key.project))

    @property
    def project_id(self) -> int:
        return int(self.project.internal_id)

    @property
    def sweep_name(self) -> str | None:
        return self.run.sweep or None

    @property
    def sweep(self) -> SweepView | None:
        found = self.caller.server.sweeps.get(self.run.sweep)
        return SweepView(self.caller, found) if found else None

    def _paths(self) -> list[Path]:
        folder = self.caller.server.files_of(self.run)
        return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".upload"))

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
            found = [(name, path) for name, path in found if name in names]
        if pattern:
            found = [(name, path) for name, path in found if _like(name, pattern)]
        return page(found, after, first, lambda one: FileView(self.caller, self.run, *one))


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
        key = self.run.key
        return f"/uploads/runs/{key.entity}/{key.project}/{key.name}/{self.name}"


@dataclass(frozen=True)
class SweepView:
    """A sweep, with its runs and agents."""

    caller: Caller
    sweep: ServedSweep
    early_stop_job_running = False
    controller = None
    scheduler = None
    controller_run_name = None

    @property
    def id(self) -> str:
        return global_id("Sweep", self.sweep.id, self.sweep.project, self.sweep.entity)

    @property
    def name(self) -> str:
        return self.sweep.id

    @property
    def display_name(self) -> Any:
        return self.sweep.facts.get("displayName") or self.sweep.raw.get("name")

    @property
    def description(self) -> Any:
        return self.sweep.facts.get("description") or self.sweep.raw.get("description")

    @property
    def method(self) -> str:
        return str(self.sweep.raw.get("method", ""))

    @property
    def state(self) -> str:
        return self.sweep.state

    @property
    def config(self) -> str:
        return self.sweep.config

    @property
    def best_loss(self) -> float | None:
        values = [run.summary_value(self.sweep.metric) for run in self._runs() if run.state == states.FINISHED]
        found = [value for value in values if value is not None]
        return (max if self.sweep.goal == "maximize" else min)(found) if found else None

    @property
    def created_at(self) -> str:
        return stamp(self.sweep.created)

    @property
    def updated_at(self) -> str:
        return stamp(self.sweep.updated)

    @property
    def heartbeat_at(self) -> str | None:
        heard = [agent.heard for agent in self._agents()]
        return stamp(max(heard)) if heard else None

    def _runs(self) -> list[ServedRun]:
        return list(self.caller.server.runs_of(self.sweep))

    @property
    def run_count(self) -> int:
        return len(self._runs())

    @property
    def run_count_expected(self) -> int | None:
        cap = self.sweep.cap if self.sweep.definition is not None else math.inf
        return None if cap == math.inf else int(cap)

    @property
    def project(self) -> ProjectView:
        return ProjectView(self.caller, (self.sweep.entity, self.sweep.project))

    def runs(
        self, filters: str | None = None, after: str | None = None, first: int | None = None, order: str | None = None
    ) -> Any:
        return page(select(self._runs(), filters, order), after, first, lambda run: RunView(self.caller, run))

    def _agents(self) -> Iterable[ServedAgent]:
        return [agent for agent in self.caller.server.agents.values() if agent.sweep == self.sweep.id]

    @property
    def agents(self) -> Any:
        return {"edges": [{"node": AgentView(self.caller, agent)} for agent in self._agents()]}

    def agent(self, agent_name: str) -> AgentView | None:
        found = next((agent for agent in self._agents() if agent.id == agent_name), None)
        return AgentView(self.caller, found) if found else None


@dataclass(frozen=True)
class AgentView:
    """An agent of a sweep."""

    caller: Caller
    agent: ServedAgent

    @property
    def id(self) -> str:
        return self.agent.id

    @property
    def name(self) -> str:
        return self.agent.id

    @property
    def host(self) -> str:
        return self.agent.host

    @property
    def state(self) -> str:
        silent = time.monotonic() - self.agent.heard_at > AGENT_SILENCE_S
        return "FINISHED" if self.agent.gone else "CRASHED" if silent else "RUNNING"

    @property
    def total_runs(self) -> int:
        return len(self._runs())

    @property
    def created_at(self) -> str:
        return stamp(self.agent.created)

    @property
    def heartbeat_at(self) -> str:
        return stamp(self.agent.heard)

    def _runs(self) -> list[ServedRun]:
        return [run for run in self.caller.server.runs.values() if run.agent == self.agent.id]

    def runs(
        self,
        after: str | None = None,
        before: str | None = None,
        first: int | None = None,
        last: int | None = None,
        order: str | None = None,
    ) -> Any:
        return page(select(self._runs(), None, order), after, first, lambda run: RunView(self.caller, run))


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
