"""The server's data and the operations on it. It uses one thread; every change is on disk before it is acknowledged.

On disk: ``server.jsonl`` (projects, sweeps, agents, artifacts), ``runs/ENTITY/PROJECT/ID.jsonl`` with the run's uploaded
files in the folder of the same name, ``sweeps/ID/journal.jsonl`` (the embedded controller's journal).
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isaerft_sweep.controller.trial_factory import new_sweep_id
from isaerft_sweep.errors import FolderError, SpaceError
from isaerft_sweep.journal.append_log import AppendLog, whole_lines
from isaerft_sweep.journal.job_refs import AgentJob
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.serve.agent_registry import AgentRegistry, ServedAgent
from isaerft_sweep.serve.artifacts import Artifacts
from isaerft_sweep.serve.checks import RequestError, checked_name
from isaerft_sweep.serve.disk import prepare_folder
from isaerft_sweep.serve.run_state import RunState, SweepRunState
from isaerft_sweep.serve.runs import HISTORY, RunKey, ServedRun, next_state
from isaerft_sweep.serve.sweep_config import parse_config, read_definition
from isaerft_sweep.serve.sweeps import ServedSweep

log = logging.getLogger("isaerft.serve")
SILENCE_S = 90.0
"""A run has crashed after so long without a sign of life: three times the interval of wandb's heartbeats."""


class Server:
    """All projects, sweeps, agents, runs and artifacts of one data folder.

    Args:
        folder: the data folder.
        entity: the default owner of projects.
        silence_s: seconds without a sign of life after which a run has crashed.
        read_only: load the data without locking the folder or writing to it; a server may be using it.
    """

    def __init__(self, folder: Path, entity: str, silence_s: float = SILENCE_S, read_only: bool = False) -> None:
        self.folder, self.entity, self.silence_s = folder, entity, silence_s
        self.projects: dict[tuple[str, str], float] = {}
        self.runs: dict[RunKey, ServedRun] = {}
        self.sweeps: dict[str, ServedSweep] = {}
        self.agents: dict[str, ServedAgent] = {}
        self.artifacts = Artifacts(folder / "artifacts")
        self.staging = folder / ".aside"
        """Where uploads are written until they are complete."""
        self._read_only = read_only
        self.registry = AgentRegistry(self)
        if not read_only:
            self._lock()
        try:
            self._load(read_only)
        except BaseException:
            if not read_only:
                self._handle.close()
            raise

    # -- data on disk

    def _lock(self) -> None:
        try:
            prepare_folder(self.folder)
            self._handle = (self.folder / ".lock").open("a", encoding="utf-8")
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.staging.mkdir(exist_ok=True)
            for leftover in self.staging.iterdir():  # of a server that was killed
                leftover.unlink()
        except BlockingIOError as error:
            self._handle.close()
            raise FolderError(
                f"{self.folder} is in use by another server. Stop it, or choose another: --data PATH."
            ) from error
        except OSError as error:
            raise FolderError(
                f"the data folder {self.folder} cannot be written ({error.strerror}). Choose another: --data PATH."
            ) from error

    def _load(self, read_only: bool) -> None:
        path = self.folder / "server.jsonl"
        lines, length = whole_lines(path)
        for number, line in enumerate(lines, 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FolderError(f"{path}, line {number} is not an entry ({error}). Restore the file.") from error
        self._load_runs()
        if read_only:
            return
        self._log = AppendLog(path, length)
        for sweep in self.sweeps.values():
            self._reconcile(sweep)

    def _load_runs(self) -> None:
        for path in sorted(p for p in (self.folder / "runs").glob("*/*/*.jsonl") if p.is_file()):
            key = RunKey(path.parent.parent.name, path.parent.name, path.name.removesuffix(".jsonl"))
            run = ServedRun(key, path, last_seen_monotonic=time.monotonic())
            run.load(lambda sweep: self.sweeps[sweep].metric if sweep in self.sweeps else "")
            self.runs[key] = run
            self.projects.setdefault((key.entity, key.project), run.created)

    def _reconcile(self, sweep: ServedSweep) -> None:
        """Bring journal and run logs in line, in case the server was killed between two writes. The run logs decide."""
        if sweep.definition is None:
            return
        for record in list(sweep.records.values()):
            run = self.runs.get(RunKey(sweep.entity, sweep.project, record.run_id))
            if isinstance(record.job, AgentJob) and (run is None or run.attempt < record.attempt):
                self.registry.begin_attempt(sweep, record, record.job.agent)
            elif record.job is not None and run is not None and not run.active:
                self.registry.finalize_later(run)
            if run is not None:
                sweep.restore_curve(run)

    def write(self, **event: Any) -> None:
        event["t"] = round(time.time(), 3)
        self._log.append(event)
        self._apply(event)

    def _apply(self, event: Mapping[str, Any]) -> None:
        getattr(self, f"_on_{event['event']}")(event)

    def _on_project(self, event: Mapping[str, Any]) -> None:
        self.projects.setdefault((event["entity"], event["name"]), event["t"])

    def _on_sweep(self, event: Mapping[str, Any]) -> None:
        folder = SweepFolder(self.folder / "sweeps" / event["id"])
        stored_only = event["imported"] or self._read_only  # another process may be writing the journal
        place = event["entity"], event["project"]
        sweep = ServedSweep(folder, place, event["config"], event["t"], stored_only=stored_only)
        sweep.apply_update(event["t"], None, _sweep_metadata(event))
        self.sweeps[sweep.id] = sweep

    def _on_sweep_update(self, event: Mapping[str, Any]) -> None:
        sweep = self.sweeps[event["id"]]
        if event.get("config"):
            try:
                sweep.update(event["config"])
            except SpaceError as error:  # an older version accepted it; new files are checked before they are written
                log.error("sweep %s keeps its older file, since this version rejects the newer one: %s", sweep.id, error)
        sweep.apply_update(event["t"], event.get("state"), _sweep_metadata(event))

    def _on_agent(self, event: Mapping[str, Any]) -> None:
        created = event["t"]
        agent = ServedAgent(event["id"], event["sweep"], event["host"], event["user"], created, created, time.monotonic())
        self.agents[agent.id] = agent

    def _on_artifact(self, event: Mapping[str, Any]) -> None:
        self.artifacts.apply(event["id"], event["facts"], event["t"])

    def close(self) -> None:
        self._log.close()
        for sweep in self.sweeps.values():
            sweep.close()
        self._handle.close()

    # -- projects and sweeps

    def project(self, entity: str | None, name: str | None) -> tuple[str, str]:
        """The key of an existing project. Raises RequestError when there is no such project."""
        key = (entity or self.entity, name or "uncategorized")
        if key not in self.projects:
            raise RequestError(f"there is no project {key[0]}/{key[1]} on this server.", 404)
        return key

    def ensure_project(self, entity: str | None, name: str | None) -> tuple[str, str]:
        """The key of a project, which is created if needed. Raises RequestError when a name is not valid."""
        key = (checked_name("entity", entity or self.entity), checked_name("project", name or "uncategorized"))
        if key not in self.projects:
            self.write(event="project", entity=key[0], name=key[1])
        return key

    def create_sweep(self, entity: str | None, project: str | None, config: str, metadata: Mapping[str, Any]) -> ServedSweep:
        """Create a sweep. Raises SpaceError when its config is not valid, RequestError when a name is not.

        Args:
            entity: the owner of the project; None: the server's default.
            project: the project; None: ``uncategorized``.
            config: the text of the sweep file.
            metadata: ``description`` and ``displayName``, as far as they are set.
        """
        raw = parse_config(config)
        read_definition(raw)
        key = self.ensure_project(entity, project)
        sweep_id = new_sweep_id()
        self.write(event="sweep", id=sweep_id, entity=key[0], project=key[1], config=config, imported=False, **metadata)
        return self.sweeps[sweep_id]

    def import_sweep(self, entity: str, project: str, sweep_id: str, config: str) -> ServedSweep:
        """Create a sweep that another controller or server runs, and whose runs are uploaded here.

        Args:
            entity: the owner of the project.
            project: the project.
            sweep_id: the id of the sweep, which stays the same.
            config: the text of the sweep file.
        """
        if sweep_id in self.sweeps:
            return self.find_sweep(entity, project, sweep_id)
        parse_config(config)
        checked_name("sweep", sweep_id)
        key = self.ensure_project(entity, project)
        self.write(event="sweep", id=sweep_id, entity=key[0], project=key[1], config=config, imported=True)
        sweep = self.sweeps[sweep_id]
        for run in self.runs_of(sweep):
            run.use_metric(sweep.metric)
        return sweep

    def update_sweep(self, sweep: ServedSweep, config: str | None, state: str | None, metadata: Mapping[str, Any]) -> None:
        """Change a sweep. Raises SpaceError when its config cannot change so, RequestError when the state is not valid.

        Args:
            sweep: the sweep to change.
            config: the text of the new sweep file; None keeps the current one.
            state: the new state; None keeps the current one, or reopens the sweep when its new cap allows more runs.
            metadata: the fields that change, of ``description`` and ``displayName``.
        """
        if state is not None and state not in list(SweepRunState):
            raise RequestError(f"a sweep's state must be one of {', '.join(SweepRunState)} but got '{state}'.")
        if config is not None:
            before = sweep.config
            was_over = sweep.is_over
            sweep.update(config)
            if state is None and sweep.reopens(was_over):
                state = SweepRunState.RUNNING
            sweep.update(before)
        self.write(event="sweep_update", id=sweep.id, config=config, state=state, **metadata)
        if state == SweepRunState.CANCELED:
            for run in self.runs_of(sweep):
                if run.active and not run.stop:
                    run.write(set={"stop": "cancel"})

    def find_sweep(self, entity: str | None, project: str | None, sweep_id: str) -> ServedSweep:
        """Look up a sweep. Raises RequestError when the project has no sweep with that id."""
        sweep = self.sweeps.get(sweep_id)
        if sweep is None or (project and sweep.project != project) or (entity and sweep.entity != entity):
            raise RequestError(f"there is no sweep {entity or self.entity}/{project}/{sweep_id} on this server.", 404)
        return sweep

    def runs_of(self, sweep: ServedSweep) -> Iterator[ServedRun]:
        """The sweep's runs, oldest first."""
        for run in list(self.runs.values()):
            if run.sweep == sweep.id and (run.key.entity, run.key.project) == (sweep.entity, sweep.project):
                yield run

    # -- runs

    def run_of(self, key: RunKey) -> ServedRun:
        """The run with that key; if it does not exist, a new one, which is not on disk yet."""
        run = self.runs.get(key)
        if run is None:
            checked_name("run", key.name)
            path = self.folder / "runs" / key.entity / key.project / f"{key.name}.jsonl"
            run = self.runs[key] = ServedRun(key, path, last_seen_monotonic=time.monotonic())
        return run

    def upsert_run(self, key: RunKey, fields: Mapping[str, Any], from_run: bool = True) -> tuple[ServedRun, bool]:
        """Create or change a run; also returns whether it is new. An ended run resumes when its client queried it before.

        ``fields``: of ``upsertBucket``. ``from_run``: whether the run's own process sent them, not a user who edits the run.
        """
        self.ensure_project(key.entity, key.project)
        inserted = key not in self.runs
        run = self.run_of(key)
        sweep = self.sweeps.get(str(fields.get("sweep") or run.sweep))
        if inserted and sweep is not None:
            run.use_metric(sweep.metric)
        changed = {name: value for name, value in fields.items() if value is not None and run.metadata.get(name) != value}
        event: dict[str, Any] = {"facts": changed} if changed or inserted else {}
        # A process sends its host or program only when it starts. One that resumes has queried the run before.
        restarts = from_run and not run.resume_pending and not inserted and bool({"host", "jobProgram"} & fields.keys())
        starts = (from_run and (run.resume_pending or run.state is RunState.PENDING)) or restarts
        if inserted or (starts and run.state is not RunState.RUNNING):
            event["set"] = {"state": RunState.RUNNING, "exitcode": None}
        run.upserted(starts, from_run)
        if starts and run.state is RunState.CRASHED:
            self.registry.revive(run)
        if event:
            run.write(**event)
        run.seen(time.monotonic())
        return run, inserted

    def find_run(self, entity: str | None, project: str | None, name: str) -> ServedRun:
        """Look up a run. Raises RequestError when the project has no run with that id."""
        run = self.runs.get(RunKey(entity or self.entity, project or "uncategorized", name))
        if run is None:
            raise RequestError(f"there is no run {entity or self.entity}/{project}/{name} on this server.", 404)
        return run

    def stream(self, run: ServedRun, files: Mapping[str, tuple[int, list[str]]], ending: Mapping[str, Any]) -> bool:
        """Store what a run streams; returns whether the run should stop.

        Args:
            run: the run that sent the request.
            files: offset and lines by stream.
            ending: ``preempting``, ``complete`` and ``exitcode``, as far as the client sent them.
        """
        run.seen(time.monotonic())
        if run.overwritten_by(files):
            run.write(set={"anew": True})
        run.streamed(files)
        fresh = {name: (offset, run.new_rows(name, offset, rows)) for name, (offset, rows) in files.items()}
        event: dict[str, Any] = {"files": {name: part for name, part in fresh.items() if part[1]}}
        if ending.get("complete") and event["files"]:
            run.write(**event)  # ``next_state`` reads the summary
            event["files"] = {}
        values = next_state(run, ending, self.registry.may_be_retried(run))
        if values and run.state is RunState.CRASHED:
            self.registry.revive(run)
        if values:
            event["set"] = values
        if event["files"] or values:
            run.write(**event)
        if not run.active:
            self.registry.finalize(run)
            return False
        if HISTORY in files:  # also when the rows are stored already: the disk may have been full then
            self.registry.check_early_stop(run)
        return bool(run.stop)

    def stop_run(self, run: ServedRun) -> None:
        """A user requests that the run stops."""
        if run.active and not run.stop:
            run.write(set={"stop": "user"})

    def files_of(self, run: ServedRun) -> Path:
        """The folder of the run's uploaded files. Its name never equals that of a run's log."""
        folder = run.path.with_suffix("")
        return folder if folder.suffix != ".jsonl" else folder.with_name(f"{folder.name}+files")

    # -- artifacts

    def write_artifact(self, artifact_id: str, **fields: Any) -> dict[str, Any]:
        """Set fields of an artifact, which is created if needed; returns all its fields."""
        self.write(event="artifact", id=artifact_id, facts=fields)
        return self.artifacts[artifact_id]


def _sweep_metadata(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: event[name] for name in ("description", "displayName") if event.get(name)}
