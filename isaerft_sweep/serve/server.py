"""All that the server knows, and what it does with it. One thread; every change is on the disk before it is answered.

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
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve import sweeps
from isaerft_sweep.serve.agent_registry import AgentRegistry, ServedAgent
from isaerft_sweep.serve.artifacts import Artifacts
from isaerft_sweep.serve.checks import RequestError, checked_name
from isaerft_sweep.serve.disk import made_folder
from isaerft_sweep.serve.runs import RunKey, ServedRun
from isaerft_sweep.serve.sweep_config import parse_config, read_definition
from isaerft_sweep.serve.sweeps import ServedSweep

log = logging.getLogger("isaerft.serve")
SILENCE_S = 90.0
"""A run that nobody has heard of for so long has crashed: three times the interval of wandb's own sign of life."""


class Server:
    """``silence_s``: after how long a run that nobody hears of has crashed."""

    def __init__(self, folder: Path, entity: str, silence_s: float = SILENCE_S, read_only: bool = False) -> None:
        self.folder, self.entity, self.silence_s = folder, entity, silence_s
        self.projects: dict[tuple[str, str], float] = {}
        self.runs: dict[RunKey, ServedRun] = {}
        self.sweeps: dict[str, ServedSweep] = {}
        self.agents: dict[str, ServedAgent] = {}
        self.artifacts = Artifacts(folder / "artifacts")
        self.aside = folder / ".aside"
        """Where files are written until they are whole."""
        self._read_only = read_only
        self.fleet = AgentRegistry(self)
        if not read_only:
            self._lock()
        self._load(read_only)

    # -- what is on the disk

    def _lock(self) -> None:
        try:
            made_folder(self.folder)
            self._handle = (self.folder / ".lock").open("a", encoding="utf-8")
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.aside.mkdir(exist_ok=True)
            for left in self.aside.iterdir():  # by a server that was killed
                left.unlink()
        except BlockingIOError as error:
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
            run = ServedRun(key, path, heard=time.monotonic())
            run.load(lambda sweep: self.sweeps[sweep].metric if sweep in self.sweeps else "")
            self.runs[key] = run
            self.projects.setdefault((key.entity, key.project), run.created)

    def _reconcile(self, sweep: ServedSweep) -> None:
        """After a kill between two writes: the journal is told what the runs' own logs say."""
        if sweep.definition is None:
            return
        for record in list(sweep.records.values()):
            run = self.runs.get(RunKey(sweep.entity, sweep.project, record.run_id))
            if isinstance(record.job, AgentJob) and (run is None or run.attempt < record.attempt):
                self.fleet.begin_attempt(sweep, record, record.job.agent)
            elif record.job is not None and run is not None and not run.active:
                self.fleet.unsettled.add(run.key)
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
        kept = event["imported"] or self._read_only  # the journal is another process's
        sweep = ServedSweep(folder, event["entity"], event["project"], event["id"], event["config"], kept)
        sweep.created = sweep.updated = event["t"]
        sweep.facts = {k: event[k] for k in ("description", "displayName") if event.get(k)}
        self.sweeps[sweep.id] = sweep

    def _on_sweep_update(self, event: Mapping[str, Any]) -> None:
        sweep = self.sweeps[event["id"]]
        sweep.updated = event["t"]
        if event.get("config"):
            try:
                sweep.update(event["config"])
            except SpaceError as error:  # an older version has taken it; a new one is checked before it is written
                log.error("sweep %s keeps its older file, since this version does not take the newer: %s", sweep.id, error)
        sweep.state = event.get("state") or sweep.state
        sweep.facts.update({k: event[k] for k in ("description", "displayName") if event.get(k)})

    def _on_agent(self, event: Mapping[str, Any]) -> None:
        agent = ServedAgent(event["id"], event["sweep"], event["host"], event["user"], event["t"])
        agent.heard = event["t"]
        agent.heard_at = time.monotonic()
        self.agents[agent.id] = agent

    def _on_artifact(self, event: Mapping[str, Any]) -> None:
        self.artifacts.note(event["id"], event["facts"], event["t"])

    def close(self) -> None:
        self._log.close()
        for sweep in self.sweeps.values():
            sweep.close()
        self._handle.close()

    # -- projects and sweeps

    def project(self, entity: str | None, name: str | None) -> tuple[str, str]:
        """The project's key. Raises RequestError when there is none of that name."""
        key = (entity or self.entity, name or "uncategorized")
        if key not in self.projects:
            raise RequestError(f"there is no project {key[0]}/{key[1]} on this server.", 404)
        return key

    def make_project(self, entity: str | None, name: str | None) -> tuple[str, str]:
        """The project's key, made if it is new. Raises RequestError on a name that cannot be one."""
        key = (checked_name("entity", entity or self.entity), checked_name("project", name or "uncategorized"))
        if key not in self.projects:
            self.write(event="project", entity=key[0], name=key[1])
        return key

    def create_sweep(self, entity: str | None, project: str | None, config: str, facts: Mapping[str, Any]) -> ServedSweep:
        """A new sweep. Raises SpaceError when its config is not valid, RequestError on a bad name."""
        raw = parse_config(config)
        read_definition(raw)
        key = self.make_project(entity, project)
        sweep_id = new_sweep_id()
        self.write(event="sweep", id=sweep_id, entity=key[0], project=key[1], config=config, imported=False, **facts)
        return self.sweeps[sweep_id]

    def import_sweep(self, entity: str, project: str, sweep_id: str, config: str) -> ServedSweep:
        """A sweep of another place, whose runs will be uploaded here."""
        if sweep_id in self.sweeps:
            return self.find_sweep(entity, project, sweep_id)
        parse_config(config)
        checked_name("sweep", sweep_id)
        key = self.make_project(entity, project)
        self.write(event="sweep", id=sweep_id, entity=key[0], project=key[1], config=config, imported=True)
        sweep = self.sweeps[sweep_id]
        for run in self.runs_of(sweep):
            run.metric = sweep.metric
        return sweep

    def update_sweep(self, sweep: ServedSweep, config: str | None, state: str | None, facts: Mapping[str, Any]) -> None:
        """Change a sweep's state, cap or words."""
        known = (sweeps.RUNNING, sweeps.PAUSED, sweeps.FINISHED, sweeps.CANCELED)
        if state is not None and state not in known:
            raise RequestError(f"a sweep's state must be one of {', '.join(known)} but got '{state}'.")
        if config is not None:
            before = sweep.config
            was_over = sweep.over
            sweep.update(config)
            if state is None and sweep.opens_again(was_over):
                state = sweeps.RUNNING
            sweep.update(before)
        self.write(event="sweep_update", id=sweep.id, config=config, state=state, **facts)
        if state == sweeps.CANCELED:
            for run in self.runs_of(sweep):
                if run.active and not run.stop:
                    run.write(set={"stop": "cancel"})

    def find_sweep(self, entity: str | None, project: str | None, sweep_id: str) -> ServedSweep:
        """Raises RequestError when there is none of that id in the project."""
        sweep = self.sweeps.get(sweep_id)
        if sweep is None or (project and sweep.project != project) or (entity and sweep.entity != entity):
            raise RequestError(f"there is no sweep {entity or self.entity}/{project}/{sweep_id} on this server.", 404)
        return sweep

    def runs_of(self, sweep: ServedSweep) -> Iterator[ServedRun]:
        """The sweep's runs, by age."""
        for run in list(self.runs.values()):
            if run.sweep == sweep.id and (run.key.entity, run.key.project) == (sweep.entity, sweep.project):
                yield run

    # -- runs

    def run_of(self, key: RunKey) -> ServedRun:
        run = self.runs.get(key)
        if run is None:
            checked_name("run", key.name)
            path = self.folder / "runs" / key.entity / key.project / f"{key.name}.jsonl"
            run = self.runs[key] = ServedRun(key, path, heard=time.monotonic())
        return run

    def upsert_run(self, key: RunKey, facts: Mapping[str, Any], from_run: bool = True) -> tuple[ServedRun, bool]:
        """Make or change a run; whether it is new. A run that had ended begins again when its client asked for it first.

        ``from_run``: whether the run's own process says so, not somebody who edits it.
        """
        self.make_project(key.entity, key.project)
        inserted = key not in self.runs
        run = self.run_of(key)
        sweep = self.sweeps.get(str(facts.get("sweep") or run.sweep))
        if inserted and sweep is not None:
            run.metric = sweep.metric
        given = {name: value for name, value in facts.items() if value is not None and run.facts.get(name) != value}
        event: dict[str, Any] = {"facts": given} if given or inserted else {}
        # a process names its host or program when it begins, and never again; one that goes on has asked for the run first
        anew = from_run and not run.resuming and not inserted and bool({"host", "jobProgram"} & facts.keys())
        begins = (from_run and (run.resuming or run.state == states.PENDING)) or anew
        if inserted or (begins and run.state != states.RUNNING):
            event["set"] = {"state": states.RUNNING, "exitcode": None}
        run.begun_anew = not run.resuming and (begins or run.begun_anew)
        run.resuming = run.resuming and not from_run
        if begins and run.state == states.CRASHED:
            self.fleet.revive(run)
        if event:
            run.write(**event)
        run.heard = time.monotonic()
        return run, inserted

    def find_run(self, entity: str | None, project: str | None, name: str) -> ServedRun:
        """Raises RequestError when there is none of that id."""
        run = self.runs.get(RunKey(entity or self.entity, project or "uncategorized", name))
        if run is None:
            raise RequestError(f"there is no run {entity or self.entity}/{project}/{name} on this server.", 404)
        return run

    def stream(self, run: ServedRun, files: Mapping[str, tuple[int, list[str]]], ending: Mapping[str, Any]) -> bool:
        """Take in what a run streams; whether it should stop.

        ``ending``: of ``preempting``, ``complete`` and ``exitcode`` what the client sent.
        """
        run.heard = time.monotonic()
        if run.overwritten_by(files):
            run.write(set={"anew": True})
        run.begun_anew = run.begun_anew and not any(name in files for name in states.STREAMS)
        fresh = {name: (offset, run.new_rows(name, offset, rows)) for name, (offset, rows) in files.items()}
        event: dict[str, Any] = {"files": {name: part for name, part in fresh.items() if part[1]}}
        if ending.get("complete") and event["files"]:
            run.write(**event)  # the summary says how it ended
            event["files"] = {}
        values = states.next_state(run, ending, run.key in self.fleet.unsettled)
        if values and run.state == states.CRASHED:
            self.fleet.revive(run)
        if values:
            event["set"] = values
        if event["files"] or values:
            run.write(**event)
        if not run.active:
            self.fleet.finalize(run)
            return False
        if states.HISTORY in files:  # be it only again: the disk may have been full
            self.fleet.judge(run)
        return bool(run.stop)

    def stop_run(self, run: ServedRun) -> None:
        """Somebody wants the run to end."""
        if run.active and not run.stop:
            run.write(set={"stop": "user"})

    def files_of(self, run: ServedRun) -> Path:
        """The folder of the run's uploaded files. No run's log may have its name."""
        folder = run.path.with_suffix("")
        return folder if folder.suffix != ".jsonl" else folder.with_name(f"{folder.name}+files")

    # -- artifacts

    def note_artifact(self, artifact_id: str, **facts: Any) -> dict[str, Any]:
        self.write(event="artifact", id=artifact_id, facts=facts)
        return self.artifacts[artifact_id]
