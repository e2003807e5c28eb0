"""The agents: who is there, what each shall do, and what becomes of a run that nobody hears of."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve import sweeps
from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.runs import RunKey, ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep

log = logging.getLogger("isaerft.serve")
SETTLING_S = 3.0
"""A run that its agent does not list so long after it was handed out never began: the answer was lost, or it died."""
TELL_AGENT_S = 75.0
"""A run hears that it should stop with its next sign of life; its agent is told when that has not helped for so long."""
STOP_AGAIN_S = 120.0
"""An agent kills a run that it is told to stop twice: our trials need the time to write their checkpoint."""


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
    spoken: bool = False
    """Whether it has told this process what it is running."""


class RunStore(Protocol):
    """What the agents need of the server: its sweeps, runs and agents, and its log.

    ``silence_s``: after how long a run that nobody hears of has crashed, in seconds.
    """

    silence_s: float
    sweeps: dict[str, ServedSweep]
    runs: dict[RunKey, ServedRun]
    agents: dict[str, ServedAgent]

    def write(self, **event: Any) -> None: ...

    def update_sweep(self, sweep: ServedSweep, config: str | None, state: str | None, facts: Mapping[str, Any]) -> None: ...

    def runs_of(self, sweep: ServedSweep) -> Iterator[ServedRun]: ...

    def run_of(self, key: RunKey) -> ServedRun: ...


class AgentRegistry:
    """The agents of one server. Who they are is in the server's log; what is here is forgotten when it ends."""

    def __init__(self, server: RunStore) -> None:
        self.server = server
        self._stop_since: dict[RunKey, float] = {}
        self.unsettled: set[RunKey] = set()
        """Runs that have ended and their sweeps do not know: launch, and so the agent, may be trying them again in place."""

    def create_agent(self, sweep: ServedSweep, host: str, user: str) -> ServedAgent:
        agent_id = secrets.token_hex(8)
        self.server.write(event="agent", id=agent_id, sweep=sweep.id, host=host[:200], user=user)
        return self.server.agents[agent_id]

    def heartbeat(self, agent_id: str, run_states: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the agent shall do now. Raises RequestError (404) when the agent is not known here."""
        agent = self.server.agents.get(agent_id)
        if agent is None:
            raise RequestError(f"there is no agent {agent_id} on this server. Start `wandb agent` again.", 404)
        sweep, now = self.server.sweeps[agent.sweep], time.monotonic()
        agent.heard, agent.heard_at, agent.gone = time.time(), now, False
        agent.running, agent.spoken = {name for name, runs in run_states.items() if runs}, True
        commands = [*self._stops(sweep, agent, now)]
        for name in agent.running:
            run = self.server.runs.get(RunKey(sweep.entity, sweep.project, name))
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
            run = self.server.runs.get(RunKey(sweep.entity, sweep.project, name))
            if run is None or now - agent.told.get(name, now - STOP_AGAIN_S) < STOP_AGAIN_S:
                continue
            # it was cut off from here, was taken for dead, and another agent does the run now
            elsewhere = run.agent not in ("", agent.id)
            if not elsewhere and not run.stop:
                continue
            if not elsewhere and run.active and now - self._stop_since.setdefault(run.key, now) < TELL_AGENT_S:
                continue
            agent.told[name] = now
            yield {"type": "stop", "run_id": name}

    def _notice_lost(self, sweep: ServedSweep, agent: ServedAgent, now: float) -> None:
        """A run that was given to this agent, that it does not have and that has never begun."""
        for run in self.server.runs_of(sweep):
            waited = now - run.heard
            if run.agent == agent.id and run.state == states.PENDING and run.key.name not in agent.running:
                record = sweep.record_of(run.key.name)
                if record is not None and record.job is not None and waited > SETTLING_S:
                    self.crash(run, "it ended before it told anything")

    def _handed_out(self, sweep: ServedSweep, agent: ServedAgent) -> list[dict[str, Any]]:
        record = sweep.next(agent.id)
        if record is not None:
            try:
                run = self.begin_attempt(sweep, record, agent.id)
            except OSError:  # the agent asks again
                sweep.trials.put_back([record])
                raise
            agent.spoken = False  # whether it is at it, its next words tell
            agent.told.pop(record.run_id, None)
            agent.total += 1
            return [sweep.command(record, resume=any(run.lines.values()))]
        if sweep.over:
            self.server.update_sweep(sweep, None, sweeps.FINISHED, {})
        needed = any(self._may_come_back(run, agent) for run in self.server.runs_of(sweep))
        return self._dismissed(agent) if sweep.nothing_left() and not needed else []

    def _may_come_back(self, run: ServedRun, agent: ServedAgent) -> bool:
        """Whether the run may have to be handed out again soon, so that an idle agent had better wait."""
        silent = time.monotonic() - run.heard > self.server.silence_s / 2
        return run.key in self.unsettled or (run.active and (silent or run.agent == agent.id))

    def _dismissed(self, agent: ServedAgent) -> list[dict[str, Any]]:
        """Nothing is running on the agent and nothing is left for it."""
        agent.gone = True
        return [{"type": "exit"}]

    def begin_attempt(self, sweep: ServedSweep, record: TrialRecord, agent: str) -> ServedRun:
        run = self.server.run_of(RunKey(sweep.entity, sweep.project, record.run_id))
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
        for run in list(self.server.runs.values()):
            if run.active and now - run.heard > self.server.silence_s:
                self.crash(run, "neither the run nor its agent has been heard of")
        for sweep in self.server.sweeps.values():
            if sweep.definition is not None and sweep.state == sweeps.RUNNING and sweep.over and not self._asks(sweep, now):
                self.server.update_sweep(sweep, None, sweeps.FINISHED, {})

    def _asks(self, sweep: ServedSweep, now: float) -> bool:
        """Whether an agent is left that will ask for more: it may be told to go on with a run that was stopped early."""
        agents = (agent for agent in self.server.agents.values() if agent.sweep == sweep.id)
        return any(not agent.gone and self._lives(agent, now) for agent in agents)

    def _lives(self, agent: ServedAgent, now: float) -> bool:
        return now - agent.heard_at < self.server.silence_s

    def crash(self, run: ServedRun, why: str) -> None:
        """A run has died without a word."""
        log.warning("run %s of sweep %s has crashed: %s", run.key.name, run.sweep or "none", why)
        run.write(set={"state": states.KILLED if run.stop else states.CRASHED})
        self.finalize(run)

    def revive(self, run: ServedRun) -> None:
        """A run that was taken for dead speaks."""
        sweep = self.server.sweeps.get(run.sweep)
        if sweep is None or sweep.definition is None:
            return
        self.unsettled.add(run.key)  # should the disk not take what follows; one that is active is not settled
        was_over = sweep.over
        sweep.revive(run)
        if sweep.opens_again(was_over):
            self.server.update_sweep(sweep, None, sweeps.RUNNING, {})

    def judge(self, run: ServedRun) -> None:
        """A run has logged something: is it stopped early?"""
        sweep = self.server.sweeps.get(run.sweep)
        if sweep is None or not sweep.should_stop(run):
            return
        log.info("run %s of sweep %s is stopped early", run.key.name, sweep.id)
        try:
            run.write(set={"stop": "pruner"})
        except OSError:
            sweep.judge_again(run)
            raise

    def finalize(self, run: ServedRun) -> None:
        """A run has ended: tell its sweep, at once or when its agent has nothing to do with it any more."""
        self._stop_since.pop(run.key, None)
        sweep = self.server.sweeps.get(run.sweep)
        if sweep is None or sweep.definition is None:
            return
        self.unsettled.add(run.key)
        self._settle_all()

    def _settle_all(self) -> None:
        for key in list(self.unsettled):
            run = self.server.runs[key]
            agent = self.server.agents.get(run.agent)
            held = (
                agent is not None
                and self._lives(agent, time.monotonic())
                and (key.name in agent.running or not agent.spoken)
            )
            if run.active or run.state == states.FINISHED or not held:
                self.server.sweeps[run.sweep].finalize(run)
                self.unsettled.discard(key)
