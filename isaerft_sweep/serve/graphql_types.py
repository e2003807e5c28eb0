"""The GraphQL types that hold data: one class per type, one attribute or method per field, in snake case."""

from __future__ import annotations

import itertools
import json
import math
import mimetypes
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from isaerft_sweep.serve import artifact_changes, artifacts, query_cost
from isaerft_sweep.serve.agent_registry import ServedAgent
from isaerft_sweep.serve.artifacts import MANIFEST, Collection, collection_of
from isaerft_sweep.serve.caller import Caller, global_id, stamp, thinned
from isaerft_sweep.serve.checks import RequestError, json_object, whole_number
from isaerft_sweep.serve.filters import FILES_PAGE_SIZE, matches, page, read_filter, select, snake
from isaerft_sweep.serve.run_state import AgentState, RunState
from isaerft_sweep.serve.runs import EVENTS, HISTORY, OUTPUT, RunKey, ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep
from isaerft_sweep.tracking.metric_names import is_number, value_at


@dataclass(frozen=True)
class UserView:
    """The user who sent the request."""

    name: str
    entity: str
    email: str = ""
    flags: str = "{}"
    admin: bool = False
    deleted_at: None = None
    capabilities: tuple[str, ...] = ()
    typename = "User"

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
        """The run that a client wants to resume."""
        view = self.run(name)
        if view is not None:
            view.run.request_resume()
        elif not missing_ok:
            raise RequestError(f"there is no run {'/'.join(self.key)}/{name} on this server.", 404)
        return view if view is not None and view.run.created else None

    def artifact(self, name: str, enable_tracking: bool = False) -> ArtifactView | None:
        record = named(self.caller, self.key, name)
        return ArtifactView(self.caller, record) if record else None

    def artifact_collection_membership(self, name: str) -> MembershipView | None:
        record = named(self.caller, self.key, name)
        return MembershipView(self.caller, record) if record else None

    def artifact_collection(self, name: str) -> CollectionView | None:
        return next((view for view in collections(self.caller, self.key) if view.name == name), None)

    def artifact_collections(
        self, after: str | None = None, first: int | None = None, filters: str | None = None, order: str | None = None
    ) -> Any:
        refuse_filters(filters)
        return page(collections(self.caller, self.key), after, first, lambda view: view)

    def artifact_type(self, name: str) -> TypeView | None:
        return next((view for view in types(self.caller, self.key) if view.name == name), None)

    def artifact_types(self, after: str | None = None, first: int | None = None) -> Any:
        return page(types(self.caller, self.key), after, first, lambda view: view)

    def _sweeps(self) -> list[ServedSweep]:
        return [s for s in self.caller.server.sweeps.values() if (s.entity, s.project) == self.key]

    @property
    def total_sweeps(self) -> int:
        return len(self._sweeps())

    def sweeps(self, after: str | None = None, first: int | None = None, filters: str | None = None) -> Any:
        if read_filter(filters):
            raise RequestError("this server cannot filter sweeps: leave filters out.")
        return page(self._sweeps(), after, first, lambda sweep: SweepView(self.caller, sweep))

    def sweep(self, sweep_name: str) -> SweepView | None:
        served = next((s for s in self._sweeps() if s.id == sweep_name), None)
        return SweepView(self.caller, served) if served else None


def entity_view(name: str) -> Any:
    """An entity; this server has no organizations."""
    return {"id": global_id("Entity", name), "name": name, "isTeam": False, "entityType": "user", "readOnly": False}


AGENT_SILENCE_S = 60.0


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
        return self.sweep.metadata.get("displayName") or self.sweep.raw.get("name")

    @property
    def description(self) -> Any:
        return self.sweep.metadata.get("description") or self.sweep.raw.get("description")

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
        sweep = self.sweep
        values = [run.summary_value(sweep.metric, sweep.goal) for run in self._runs() if run.state is RunState.FINISHED]
        losses = [value for value in values if value is not None]
        return (max if sweep.goal == "maximize" else min)(losses) if losses else None

    @property
    def created_at(self) -> str:
        return stamp(self.sweep.created)

    @property
    def updated_at(self) -> str:
        return stamp(self.sweep.updated)

    @property
    def heartbeat_at(self) -> str | None:
        times = [agent.last_seen_wall for agent in self._agents()]
        return stamp(max(times)) if times else None

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
        agent = next((agent for agent in self._agents() if agent.id == agent_name), None)
        return AgentView(self.caller, agent) if agent else None


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
    def state(self) -> AgentState:
        if self.agent.dismissed:
            return AgentState.FINISHED
        silent = time.monotonic() - self.agent.last_seen_monotonic > AGENT_SILENCE_S
        return AgentState.CRASHED if silent else AgentState.RUNNING

    @property
    def total_runs(self) -> int:
        return len(self._runs())

    @property
    def created_at(self) -> str:
        return stamp(self.agent.created)

    @property
    def heartbeat_at(self) -> str:
        return stamp(self.agent.last_seen_wall)

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


SAMPLES = 500
FREE_KEYS = 20
"""How many keys of a history cost nothing more than reading it."""
MISSING = object()


@dataclass(frozen=True)
class HistorySpec:
    """A spec of ``sampledHistory``: at most ``samples`` rows with ``low`` <= step < ``high`` that have all ``keys``."""

    keys: tuple[str, ...]
    low: float
    high: float
    samples: int

    @classmethod
    def read(cls, text: str) -> HistorySpec:
        """Parse a spec. Raises RequestError.

        ``maxStep`` is inclusive, as on W&B's server, except when the client requests no more samples than there are steps
        below it: wandb up to 0.27 uses it as the first step of the next page.
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
        return str(self.run.metadata.get("displayName") or self.run.key.name)

    @property
    def group(self) -> Any:
        return self.run.metadata.get("groupName")

    def __getattr__(self, name: str) -> Any:
        """Fields that are returned as the client sent them."""
        fields = {"description": "description", "notes": "notes", "group_name": "groupName", "job_type": "jobType",
                  "commit": "commit", "host": "host"}  # fmt: skip
        if name in fields:
            return self.run.metadata.get(fields[name])
        raise AttributeError(name)

    @property
    def tags(self) -> list[str]:
        return list(self.run.metadata.get("tags") or [])

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
        return self.run.state in (RunState.FAILED, RunState.CRASHED)

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
        # Heartbeats are not written to disk, so ``updated`` may be older than the last one.
        silent_s = time.monotonic() - self.run.last_seen_monotonic
        return stamp(max(self.run.updated, time.time() - silent_s if self.run.active else 0.0))

    def _lines(self, name: str) -> int:
        # The client continues to count from here, so a restarted one has to start at 0.
        return 0 if self.run.restart_pending else self.run.line_counts[name]

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
        return json.dumps([self.run.last_rows.get(HISTORY, "{}")])  # wandb 0.18 cannot take an empty list

    @property
    def events_tail(self) -> str:
        return json.dumps([self.run.last_rows.get(EVENTS, "{}")])

    def wandb_config(self, keys: list[str] | None = None) -> str:
        inner = self.run.config_values().get("_wandb") or {}
        return json.dumps({key: inner.get(key, {}) for key in keys or inner})

    @property
    def history_keys(self) -> Any:
        query_cost.spend_reading(self.run.line_counts[HISTORY] - self.run.names_counted)
        last = json.loads(self.run.last_rows[HISTORY]) if HISTORY in self.run.last_rows else {}
        step = float(last["_step"]) if is_number(last.get("_step")) else self.run.line_counts[HISTORY] - 1.0
        kinds = {
            name: {"typeCounts": [{"type": kind, "count": count} for kind, count in counts.items()]}
            for name, counts in self.run.logged_names().items()
        }
        return {"lastStep": int(step), "keys": kinds, "sets": []}

    def sampled_history(self, specs: list[str]) -> list[Any]:
        samples = []
        for text in specs:
            samples.append(self._sampled(HistorySpec.read(text)))
            query_cost.spend(len(samples[-1]) * query_cost.ROW)
        return samples

    def _sampled(self, spec: HistorySpec) -> list[Any]:
        query_cost.spend_reading(self.run.line_counts[HISTORY])
        rows = list(self.run.steps(spec.low, spec.high))
        query_cost.spend(query_cost.FIELD + len(rows) * max(0, len(spec.keys) - FREE_KEYS) // query_cost.CHECKS_PER_UNIT)
        if spec.keys:
            selected = ({key: value_at(row, key, MISSING) for key in spec.keys} for row in rows)
            rows = [row for row in selected if MISSING not in row.values()]
        return thinned(rows, spec.samples)

    def history(self, min_step: Any = None, max_step: Any = None, samples: int | None = None) -> list[str]:
        query_cost.spend_reading(self.run.line_counts[HISTORY])
        if min_step is None and max_step is None:
            return _counted(thinned(self.run.rows(), samples or SAMPLES))
        low, high = whole_number("minStep", min_step), whole_number("maxStep", max_step)
        rows = self.run.steps(low or 0, math.inf if high is None else high)
        return _counted([json.dumps(row) for row in itertools.islice(rows, samples or None)])

    def events(self, samples: int | None = None) -> list[str]:
        query_cost.spend_reading(self.run.line_counts[EVENTS])
        return _counted(thinned(self.run.rows(EVENTS), samples or SAMPLES))

    def parquet_history(self, live_keys: list[str]) -> Any:
        # No history is in Parquet files. Clients read here from which step on they have to request rows.
        first = next(self.run.steps(), None)
        return {"parquetUrls": [], "liveData": [{key: first.get(key) for key in live_keys}] if first else []}

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
        served = self.caller.server.sweeps.get(self.run.sweep)
        return SweepView(self.caller, served) if served else None

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
        files = [(path.relative_to(folder).as_posix(), path) for path in self._paths()]
        if names:
            wanted = set(names)
            files = [(name, path) for name, path in files if name in wanted]
        if pattern:
            files = [(name, path) for name, path in files if _like(name, pattern)]
        return page(files, after, first, lambda file: FileView(self.caller, self.run, *file), FILES_PAGE_SIZE)

    def output_artifacts(self, after: str | None = None, first: int | None = None) -> Any:
        """The artifacts that the run has logged."""
        return self._artifacts(lambda record: record.get("run") == self.run.key.name, after, first)

    def input_artifacts(self, after: str | None = None, first: int | None = None) -> Any:
        """The artifacts that the run has used."""
        key = [self.run.key.entity, self.run.key.project, self.run.key.name]
        return self._artifacts(lambda record: key in (record.get("users") or ()), after, first)

    def _artifacts(self, selects: Callable[[Mapping[str, Any]], bool], after: str | None, first: int | None) -> Any:
        project, artifacts = (self.run.key.entity, self.run.key.project), self.caller.server.artifacts
        versions = [record for key in artifacts.collections for record in artifacts.versions(key)]
        selected = [a for a in versions if selects(a) and ("users" in a or (a["entity"], a["project"]) == project)]
        return page(selected, after, first, lambda record: ArtifactView(self.caller, record))


@dataclass(frozen=True)
class FileView:
    """A file of a run, uploaded or to be uploaded."""

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


def _counted(rows: list[str]) -> list[str]:
    """``rows``, after counting their cost."""
    query_cost.spend(len(rows) * query_cost.ROW)
    return rows


def _like(name: str, pattern: str) -> bool:
    """SQL's LIKE, with % as the only wildcard."""
    parts = pattern.split("%")
    if not name.startswith(parts[0]) or not name.endswith(parts[-1]):
        return False
    at = len(parts[0])
    for part in parts[1:-1]:
        index = name.find(part, at)
        if index < 0:
            return False
        at = index + len(part)
    return len(parts) > 1 or name == pattern


@dataclass(frozen=True)
class ArtifactView:
    """A version of an artifact. ``record``: its stored fields."""

    caller: Caller
    record: Mapping[str, Any]
    typename = "Artifact"
    ttl_duration_seconds = -2
    """W&B's code for "as the collection says". This server never deletes artifacts."""
    ttl_is_inherited = True
    commit_hash = None

    def __getattr__(self, name: str) -> Any:
        """Fields that are returned as the client sent them."""
        fields = {"state": "state", "digest": "digest", "metadata": "metadata", "description": "description",
                  "digest_algorithm": "digestAlgorithm", "history_step": "historyStep"}  # fmt: skip
        if name in fields:
            return self.record.get(fields[name])
        raise AttributeError(name)

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def created_at(self) -> str:
        return stamp(self.record["created"])

    @property
    def updated_at(self) -> str:
        return stamp(self.record["updated"])

    @property
    def version_index(self) -> int | None:
        return self.caller.server.artifacts.version_of(self.record)

    @property
    def artifact_type(self) -> TypeView:
        return TypeView(self.caller, collection_of(self.record)[:2], self.record["type"])

    @property
    def artifact_sequence(self) -> CollectionView:
        return CollectionView(self.caller, collection_of(self.record))

    @property
    def tags(self) -> list[Any]:
        return [{"id": global_id("Tag", tag), "name": tag} for tag in self.record.get("tags") or ()]

    @property
    def aliases(self) -> list[Any]:
        names = self.record["aliases"] if self.record["state"] == artifacts.COMMITTED else ()
        return [
            {"id": global_id("Alias", self.id, a), "alias": a, "artifactCollection": self.artifact_sequence} for a in names
        ]

    @property
    def _manifest(self) -> dict[str, dict[str, Any]]:
        return self.caller.server.artifacts.manifest(self.id)

    @property
    def size(self) -> int:
        return sum(int(entry.get("size") or 0) for entry in self._manifest.values())

    @property
    def file_count(self) -> int:
        return len(self._manifest)

    @property
    def current_manifest(self) -> Any:
        return manifest_view(self.caller, self.record)

    def files(self, names: list[str] | None = None, after: str | None = None, first: int | None = None) -> Any:
        wanted = set(names or ())
        entries = [(n, e) for n, e in self._manifest.items() if not e.get("ref") and (not wanted or n in wanted)]
        return page(entries, after, first, lambda file: ArtifactFileView(self.caller, self.id, *file), FILES_PAGE_SIZE)

    def files_by_manifest_entries(self, entries: list[dict[str, Any]] | None = None, **_how: Any) -> Any:
        files = [ArtifactFileView(self.caller, self.id, entry["name"], entry) for entry in entries or ()]
        return page(files, None, None, lambda view: view, max_size=len(files))

    @property
    def artifact_memberships(self) -> Any:
        return {"edges": [{"node": MembershipView(self.caller, self.record)}]}

    @property
    def created_by(self) -> RunView | None:
        entity, project, _ = collection_of(self.record)
        run = self.caller.server.runs.get(RunKey(entity, project, self.record.get("run") or ""))
        return RunView(self.caller, run) if run else None

    @property
    def used_by(self) -> Any:
        runs = (self.caller.server.runs.get(RunKey(*user)) for user in self.record.get("users") or ())
        return {"edges": [{"node": RunView(self.caller, run)} for run in runs if run]}


@dataclass(frozen=True)
class ArtifactFileView:
    """A file of an artifact; ``entry`` is its entry in the manifest."""

    caller: Caller
    artifact_id: str
    name: str
    entry: Mapping[str, Any]
    updated_at = None

    @property
    def id(self) -> str:
        return global_id("File", self.artifact_id, self.name)

    @property
    def display_name(self) -> str:
        return self.name

    @property
    def digest(self) -> str | None:
        return self.entry.get("digest")

    md5 = digest

    @property
    def size_bytes(self) -> int:
        return int(self.entry.get("size") or 0)

    @property
    def mimetype(self) -> str:
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    @property
    def storage_path(self) -> str:
        return f"{self.artifact_id}/files/{self.name}"

    def url(self, upload: bool = False) -> str | None:
        return self.upload_url if upload else self.direct_url

    @property
    def direct_url(self) -> str:
        path = self.caller.server.artifacts.path_of(self.artifact_id, self.name, self.entry)
        if path is None:
            raise RequestError(f"the artifact {self.artifact_id} has no file '{self.name[:200]}' here.", 404)
        return self._address(path, "GET")

    @property
    def upload_url(self) -> str:
        return self._address(self.caller.server.artifacts.upload_path(self.artifact_id, self.name), "PUT")

    upload_headers: Sequence[str] = ()

    @property
    def artifact(self) -> ArtifactView:
        return ArtifactView(self.caller, artifact_changes.find(self.caller, self.artifact_id))

    def _address(self, path: Path, method: str) -> str:
        return self.caller.file_url(f"/uploads/{path.relative_to(self.caller.server.folder).as_posix()}", method)


def manifest_view(caller: Caller, record: Mapping[str, Any]) -> Any:
    """The manifest, with its URLs for upload and download."""
    path, headers = f"/uploads/artifacts/{record['id']}/{MANIFEST}", list[str]()
    urls = {"uploadUrl": caller.file_url(path, "PUT"), "directUrl": caller.file_url(path, "GET"), "uploadHeaders": headers}
    return {"id": record["id"], "file": {"id": f"{record['id']}/{MANIFEST}", "name": MANIFEST, **urls}}


@dataclass(frozen=True)
class CollectionView:
    """The versions of one name, W&B's sequence. W&B's portfolios (links to other projects) are not supported."""

    caller: Caller
    key: Collection
    typename = "ArtifactSequence"
    description = None
    state = "READY"
    tags = {"edges": ()}  # noqa: RUF012

    @property
    def _versions(self) -> list[dict[str, Any]]:
        return self.caller.server.artifacts.versions(self.key)

    @property
    def id(self) -> str:
        return global_id("ArtifactCollection", *self.key)

    @property
    def name(self) -> str:
        return self.key[2]

    @property
    def project(self) -> ProjectView:
        return ProjectView(self.caller, self.key[:2])

    @property
    def created_at(self) -> str | None:
        return stamp(self._versions[0]["created"]) if self._versions else None

    @property
    def updated_at(self) -> str | None:
        return stamp(self._versions[-1]["updated"]) if self._versions else None

    @property
    def default_artifact_type(self) -> TypeView:
        return TypeView(self.caller, self.key[:2], self._versions[0]["type"])

    @property
    def digest_algorithm(self) -> Any:
        return self._versions[-1].get("digestAlgorithm") if self._versions else None

    @property
    def latest_artifact(self) -> ArtifactView | None:
        return ArtifactView(self.caller, self._versions[-1]) if self._versions else None

    def aliases(self, after: str | None = None, first: int | None = None) -> Any:
        aliases = [alias for record in self._versions for alias in ArtifactView(self.caller, record).aliases]
        return page(aliases, after, first, lambda alias: alias)

    def artifacts(
        self, after: str | None = None, first: int | None = None, order: str | None = None, filters: str | None = None
    ) -> Any:
        conditions = read_filter(filters)
        versions = [a for a in self._versions if matches(partial(_field_of, a), conditions)]
        versions = versions if (order or "").startswith("+") else versions[::-1]
        listed = page(versions, after, first, lambda record: ArtifactView(self.caller, record))
        for edge in listed["edges"]:
            edge["version"] = f"v{edge['node'].version_index}"
        return listed

    def artifact_membership(self, alias_name: str) -> MembershipView | None:
        record = self.caller.server.artifacts.named(self.key, alias_name)
        return MembershipView(self.caller, record) if record else None


def _field_of(record: Mapping[str, Any], name: str) -> Any:
    """A version's value for a filter. Raises RequestError when versions cannot be filtered by that field."""
    fields = {"state": "state", "tags": "tags", "digest": "digest", "created_at": "created", "updated_at": "updated"}
    if snake(name) not in fields:
        raise RequestError(f"artifacts cannot be filtered by '{name[:200]}'. Valid: {', '.join(fields)}.")
    return record.get(fields[snake(name)])


@dataclass(frozen=True)
class MembershipView:
    """A version in its collection."""

    caller: Caller
    record: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in ("version_index", "created_at", "aliases", "files"):
            return getattr(self.artifact, name)
        raise AttributeError(name)

    @property
    def id(self) -> str:
        return global_id("ArtifactMembership", self.record["id"])

    @property
    def artifact(self) -> ArtifactView:
        return ArtifactView(self.caller, self.record)

    @property
    def artifact_collection(self) -> CollectionView:
        return self.artifact.artifact_sequence


@dataclass(frozen=True)
class TypeView:
    """A type of artifacts in a project, with its collections."""

    caller: Caller
    project: tuple[str, str]
    name: str
    description = None

    @property
    def id(self) -> str:
        return global_id("ArtifactType", *self.project, self.name)

    @property
    def created_at(self) -> str | None:
        return min((view.created_at for view in self._collections() if view.created_at), default=None)

    def _collections(self) -> list[CollectionView]:
        return [view for view in collections(self.caller, self.project) if view.default_artifact_type.name == self.name]

    def artifact_collection(self, name: str) -> CollectionView | None:
        return next((view for view in self._collections() if view.name == name), None)

    artifact_sequence = artifact_collection

    def artifact(self, name: str) -> ArtifactView | None:
        record = named(self.caller, self.project, name)
        return ArtifactView(self.caller, record) if record and record["type"] == self.name else None

    def artifact_collections(
        self, after: str | None = None, first: int | None = None, filters: str | None = None, order: str | None = None
    ) -> Any:
        refuse_filters(filters)
        return page(self._collections(), after, first, lambda view: view)


def collections(caller: Caller, project: tuple[str, str]) -> list[CollectionView]:
    """The collections of a project, oldest first."""
    return [CollectionView(caller, key) for key in caller.server.artifacts.collections if key[:2] == project]


def types(caller: Caller, project: tuple[str, str]) -> list[TypeView]:
    """The types of a project's artifacts."""
    names = dict.fromkeys(view.default_artifact_type.name for view in collections(caller, project))
    return [TypeView(caller, project, name) for name in names]


def named(caller: Caller, project: tuple[str, str], name: str) -> dict[str, Any] | None:
    """The version that ``NAME``, ``NAME:v3`` or ``NAME:ALIAS`` refers to in a project."""
    collection, alias = artifacts.split_name(name)
    return caller.server.artifacts.named((*project, collection), alias)


def refuse_filters(filters: str | None) -> None:
    """Raise RequestError when there are filters, rather than ignore them."""
    if read_filter(filters):
        raise RequestError("this server cannot filter collections: leave filters out.")
