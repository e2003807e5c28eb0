"""All that the server knows, and what it does with it. One thread; every change is on the disk before it is answered.

On disk: ``server.jsonl`` (projects, sweeps, agents, artifacts), ``runs/ENTITY/PROJECT/ID.jsonl`` with the run's uploaded
files in the folder of the same name, ``sweeps/ID/journal.jsonl`` (the embedded controller's journal).
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isaerft_sweep.controller.trials import new_sweep_id
from isaerft_sweep.errors import FolderError, IsaerftError
from isaerft_sweep.journal.folders import PRUNED, SweepFolder
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.log import AppendLog, whole_lines
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve import sweeps
from isaerft_sweep.serve.runs import RunKey, ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep

log = logging.getLogger("isaerft.serve")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
SILENCE_S = 90.0
"""A run that nobody has heard of for so long has crashed: three times the interval of wandb's own sign of life."""
SETTLING_S = 3.0
"""A run that its agent does not list so long after it was handed out never began: the answer was lost, or it died."""
TELL_AGENT_S = 75.0
"""A run hears that it should stop with its next sign of life; its agent is told when that has not helped for so long."""
STOP_AGAIN_S = 120.0
"""An agent kills a run that it is told to stop twice: our trials need the time to write their checkpoint."""


class RequestError(IsaerftError):
    """A request that cannot be answered; its text goes to the client. ``status``: HTTP's, where GraphQL has no say."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class ServedAgent:
    """``running``: the runs that it said it was running, last time."""

    id: str
    sweep: str
    host: str
    user: str
    created: float
    heard: float = 0.0
    heard_at: float = 0.0
    running: set[str] = field(default_factory=set)
    told: dict[str, float] = field(default_factory=dict)
    total: int = 0
    gone: bool = False


class Server:
    """``silence_s``: after how long a run that nobody hears of has crashed."""

    def __init__(self, folder: Path, entity: str, silence_s: float = SILENCE_S, read_only: bool = False) -> None:
        self.folder, self.entity, self.silence_s = folder, entity, silence_s
        self.projects: dict[tuple[str, str], float] = {}
        self.runs: dict[RunKey, ServedRun] = {}
        self.sweeps: dict[str, ServedSweep] = {}
        self.agents: dict[str, ServedAgent] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self._stop_since: dict[RunKey, float] = {}
        self._read_only = read_only
        self.unsettled: set[RunKey] = set()
        """Runs that have ended but for finishing, whose agents may still be at them: our trials are tried again in place."""
        if not read_only:
            self._lock()
        self._load(read_only)

    # -- what is on the disk

    def _lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._handle = (self.folder / ".lock").open("a", encoding="utf-8")
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        for path in sorted((self.folder / "runs").glob("*/*/*.jsonl")):
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
            if record.job is not None and (run is None or run.attempt < record.attempt):
                self._begin_attempt(sweep, record, str(record.job["agent"]))
            elif record.job is not None and run is not None and not run.active:
                self.unsettled.add(run.key)
            if run is not None:
                sweep.restore_curve(run)

    def _write(self, **event: Any) -> None:
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
            sweep.update(event["config"])
        sweep.state = event.get("state") or sweep.state
        sweep.facts.update({k: event[k] for k in ("description", "displayName") if event.get(k)})

    def _on_agent(self, event: Mapping[str, Any]) -> None:
        agent = ServedAgent(event["id"], event["sweep"], event["host"], event["user"], event["t"])
        agent.heard = event["t"]
        agent.heard_at = time.monotonic()
        self.agents[agent.id] = agent

    def _on_artifact(self, event: Mapping[str, Any]) -> None:
        self.artifacts.setdefault(event["id"], {"created": event["t"]}).update(event["facts"])

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
            self._write(event="project", entity=key[0], name=key[1])
        return key

    def create_sweep(self, entity: str | None, project: str | None, config: str, facts: Mapping[str, Any]) -> ServedSweep:
        """A new sweep. Raises SpaceError when its config is not valid, RequestError on a bad name."""
        raw = sweeps.parse_config(config)
        sweeps.read_definition(raw)
        key = self.make_project(entity, project)
        sweep_id = new_sweep_id()
        self._write(event="sweep", id=sweep_id, entity=key[0], project=key[1], config=config, imported=False, **facts)
        return self.sweeps[sweep_id]

    def import_sweep(self, entity: str, project: str, sweep_id: str, config: str) -> ServedSweep:
        """A sweep of another place, whose runs will be uploaded here."""
        if sweep_id in self.sweeps:
            return self.find_sweep(entity, project, sweep_id)
        sweeps.parse_config(config)
        checked_name("sweep", sweep_id)
        key = self.make_project(entity, project)
        self._write(event="sweep", id=sweep_id, entity=key[0], project=key[1], config=config, imported=True)
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
            sweep.update(config)
            sweep.update(before)
        self._write(event="sweep_update", id=sweep.id, config=config, state=state, **facts)
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

    # -- agents

    def create_agent(self, sweep: ServedSweep, host: str, user: str) -> ServedAgent:
        agent_id = secrets.token_hex(8)
        self._write(event="agent", id=agent_id, sweep=sweep.id, host=host[:200], user=user)
        return self.agents[agent_id]

    def heartbeat(self, agent_id: str, run_states: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the agent shall do now. Raises RequestError (404) when the agent is not known here."""
        agent = self.agents.get(agent_id)
        if agent is None:
            raise RequestError(f"there is no agent {agent_id} on this server. Start `wandb agent` again.", 404)
        sweep, now = self.sweeps[agent.sweep], time.monotonic()
        agent.heard, agent.heard_at, agent.gone = time.time(), now, False
        agent.running = {name for name, runs in run_states.items() if runs}
        commands = [*self._stops(sweep, agent, now)]
        for name in agent.running:
            run = self.runs.get(RunKey(sweep.entity, sweep.project, name))
            if run is not None and run.agent in ("", agent.id):
                run.heard = now
        self._settle_all()
        self._notice_lost(sweep, agent, now)
        if agent.running:
            return commands
        if sweep.definition is None or sweep.state in (sweeps.FINISHED, sweeps.CANCELED):
            return self._dismissed(agent)
        if sweep.state == sweeps.PAUSED:
            return commands
        return commands + self._handed_out(sweep, agent)

    def _stops(self, sweep: ServedSweep, agent: ServedAgent, now: float) -> Iterator[dict[str, Any]]:
        for name in agent.running:
            run = self.runs.get(RunKey(sweep.entity, sweep.project, name))
            if run is None or not run.stop or now - agent.told.get(name, now - STOP_AGAIN_S) < STOP_AGAIN_S:
                continue
            if run.active and now - self._stop_since.setdefault(run.key, now) < TELL_AGENT_S:
                continue
            agent.told[name] = now
            yield {"type": "stop", "run_id": name}

    def _notice_lost(self, sweep: ServedSweep, agent: ServedAgent, now: float) -> None:
        """A run that was given to this agent, that it does not have and that has never begun."""
        for run in self.runs_of(sweep):
            waited = now - run.heard
            if run.agent == agent.id and run.state == states.PENDING and run.key.name not in agent.running:
                record = sweep.record_of(run.key.name)
                if record is not None and record.job is not None and waited > SETTLING_S:
                    self.crash(run, "it ended before it told anything")

    def _handed_out(self, sweep: ServedSweep, agent: ServedAgent) -> list[dict[str, Any]]:
        record = sweep.next(agent.id)
        if record is not None:
            run = self._begin_attempt(sweep, record, agent.id)
            agent.told.pop(record.run_id, None)
            agent.total += 1
            return [sweep.command(record, resume=any(run.lines.values()))]
        if sweep.over:
            self.update_sweep(sweep, None, sweeps.FINISHED, {})
        needed = any(self._may_come_back(run, agent) for run in self.runs_of(sweep))
        return self._dismissed(agent) if sweep.nothing_left() and not needed else []

    def _may_come_back(self, run: ServedRun, agent: ServedAgent) -> bool:
        """Whether the run may have to be handed out again soon, so that an idle agent had better wait."""
        silent = time.monotonic() - run.heard > self.silence_s / 2
        return run.key in self.unsettled or (run.active and (silent or run.agent == agent.id))

    def _dismissed(self, agent: ServedAgent) -> list[dict[str, Any]]:
        """Nothing is running on the agent and nothing is left for it."""
        agent.gone = True
        return [{"type": "exit"}]

    def _begin_attempt(self, sweep: ServedSweep, record: TrialRecord, agent: str) -> ServedRun:
        run = self._run(RunKey(sweep.entity, sweep.project, record.run_id))
        run.metric = sweep.metric
        facts = {} if run.sweep else {"facts": {"sweep": sweep.id}}
        values = {"state": states.PENDING, "agent": agent, "stop": "", "exitcode": None, "attempt": record.attempt}
        run.write(**facts, set=values)
        run.heard = time.monotonic()
        return run

    def watch(self) -> None:
        """Find the runs that nobody hears of any more. Called every few seconds."""
        now = time.monotonic()
        self._settle_all()
        for run in list(self.runs.values()):
            if run.active and now - run.heard > self.silence_s:
                self.crash(run, "neither the run nor its agent has been heard of")

    def crash(self, run: ServedRun, why: str) -> None:
        """A run has died without a word."""
        log.warning("run %s of sweep %s has crashed: %s", run.key.name, run.sweep or "none", why)
        run.write(set={"state": states.KILLED if run.stop else states.CRASHED})
        self._settle(run)

    def _settle(self, run: ServedRun) -> None:
        """A run has ended: tell its sweep, at once or when its agent has nothing to do with it any more."""
        self._stop_since.pop(run.key, None)
        sweep = self.sweeps.get(run.sweep)
        if sweep is None or sweep.definition is None:
            return
        if run.state == states.FINISHED:
            sweep.settle(run)
        else:
            self.unsettled.add(run.key)
            self._settle_all()

    def _settle_all(self) -> None:
        for key in list(self.unsettled):
            run = self.runs[key]
            agent = self.agents.get(run.agent)
            held = agent is not None and time.monotonic() - agent.heard_at < self.silence_s
            if run.active or not (held and agent is not None and key.name in agent.running):
                self.unsettled.discard(key)
                self.sweeps[run.sweep].settle(run)

    # -- runs

    def _run(self, key: RunKey) -> ServedRun:
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
        run = self._run(key)
        sweep = self.sweeps.get(str(facts.get("sweep") or run.sweep))
        if inserted and sweep is not None:
            run.metric = sweep.metric
        given = {name: value for name, value in facts.items() if value is not None and run.facts.get(name) != value}
        event: dict[str, Any] = {"facts": given} if given or inserted else {}
        begins = from_run and (run.resuming or run.state == states.PENDING)
        if inserted or (begins and run.state != states.RUNNING):
            event["set"] = {"state": states.RUNNING, "exitcode": None}
            if not run.resuming and any(run.lines.values()):
                event["set"]["anew"] = True
        run.resuming = run.resuming and not from_run
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
        fresh = {name: (offset, run.new_rows(name, offset, rows)) for name, (offset, rows) in files.items()}
        event: dict[str, Any] = {"files": {name: part for name, part in fresh.items() if part[1]}}
        if ending.get("complete") and event["files"]:
            run.write(**event)  # the summary says how it ended
            event["files"] = {}
        values = _next_state(run, ending)
        if values:
            event["set"] = values
        if event["files"] or values:
            run.write(**event)
        if not run.active:
            self._settle(run)
            return False
        sweep = self.sweeps.get(run.sweep)
        if (
            sweep is not None
            and sweep.definition is not None
            and states.HISTORY in event["files"]
            and sweep.should_stop(run)
        ):
            log.info("run %s of sweep %s is stopped early", run.key.name, sweep.id)
            run.write(set={"stop": "pruner"})
        return bool(run.stop)

    def stop_run(self, run: ServedRun) -> None:
        """Somebody wants the run to end."""
        if run.active and not run.stop:
            run.write(set={"stop": "user"})

    def files_of(self, run: ServedRun) -> Path:
        """The folder of the run's uploaded files."""
        return run.path.with_suffix("")

    # -- artifacts

    def note_artifact(self, artifact_id: str, **facts: Any) -> dict[str, Any]:
        self._write(event="artifact", id=artifact_id, facts=facts)
        return self.artifacts[artifact_id]


def _next_state(run: ServedRun, ending: Mapping[str, Any]) -> dict[str, Any]:
    """What a stream's request says of the run's state, as far as it changes."""
    preempting = bool(ending.get("preempting")) or run.state == states.PREEMPTING
    if not ending.get("complete"):
        wanted = states.PREEMPTING if preempting else states.RUNNING
        # one that was thought dead and speaks is alive; one that has ended stays so
        alive = run.active or run.state == states.CRASHED
        return {"state": wanted} if alive and run.state != wanted else {}
    code = ending.get("exitcode")
    code = code if isinstance(code, int) and not isinstance(code, bool) else 1
    # one that had come to its end before it heard of the stop has finished; ours end in order when they are stopped
    if run.stop and (code or json.loads(run.summary).get("state") == PRUNED):
        state = states.KILLED
    elif preempting and code:
        state = states.PREEMPTED
    else:
        state = states.FAILED if code else states.FINISHED
    return {} if (run.state, run.exitcode) == (state, code) else {"state": state, "exitcode": code}


def checked_name(what: str, name: str) -> str:
    """``name``, if it can name an entity, a project, a run or a sweep. Raises RequestError."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"a name of {what} must be of letters, digits, '_', '.' and '-', at most 128, and begin with a letter or digit, "
            f"but got {name[:140]!r}."
        )
    return name
