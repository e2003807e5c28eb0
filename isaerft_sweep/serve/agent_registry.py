"""The agents of a server: the commands each one gets, and what happens to a run without a sign of life."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.run_state import RunState, SweepRunState
from isaerft_sweep.serve.runs import RunKey, ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep

log = logging.getLogger("isaerft.serve")
START_GRACE_S = 3.0
"""A run that its agent does not list this long after it was assigned never started: the response was lost, or it died."""
AGENT_STOP_DELAY_S = 75.0
"""A run is notified of a stop by the response to its stream. Its agent is notified only if it still runs after this time."""
STOP_REPEAT_S = 120.0
"""An agent kills a run at the second stop command. Until then this package's trials have time to write their checkpoint."""


@dataclass
class ServedAgent:
    """``running``: the names of the runs in the agent's last heartbeat."""

    id: str
    sweep: str
    host: str
    user: str
    created: float
    last_seen_wall: float
    """Time of the last heartbeat for display, in seconds since the epoch."""
    last_seen_monotonic: float
    """The same by this process's monotonic clock, for timeouts."""
    running: set[str] = field(default_factory=set)
    dismissed: bool = False
    """Whether the last response was the command to exit."""
    reported: bool = False
    """Whether it has reported its runs to this process since the last run was assigned to it."""
    _stop_sent: dict[str, float] = field(default_factory=dict)

    def report(self, running: set[str], now: float) -> None:
        """Record a heartbeat. ``running``: names of its runs. ``now``: monotonic, in seconds."""
        self.last_seen_wall, self.last_seen_monotonic, self.dismissed = time.time(), now, False
        self.running, self.reported = running, True

    def assigned(self, name: str) -> None:
        """Record that a run was assigned: only the next heartbeat says whether the agent has started it."""
        self.reported = False
        self._stop_sent.pop(name, None)

    def dismiss(self) -> None:
        self.dismissed = True

    def stop_allowed(self, name: str, now: float) -> bool:
        """Whether a stop command for the run would not kill it."""
        return now - self._stop_sent.get(name, now - STOP_REPEAT_S) >= STOP_REPEAT_S

    def stop_sent(self, name: str, now: float) -> None:
        self._stop_sent[name] = now


class RunStore(Protocol):
    """The part of the server that the registry uses: its sweeps, runs and agents, and its log.

    ``silence_s``: seconds without a sign of life after which a run has crashed.
    """

    silence_s: float
    sweeps: dict[str, ServedSweep]
    runs: dict[RunKey, ServedRun]
    agents: dict[str, ServedAgent]

    def write(self, **event: Any) -> None: ...

    def update_sweep(
        self, sweep: ServedSweep, config: str | None, state: str | None, metadata: Mapping[str, Any]
    ) -> None: ...

    def runs_of(self, sweep: ServedSweep) -> Iterator[ServedRun]: ...

    def run_of(self, key: RunKey) -> ServedRun: ...


class AgentRegistry:
    """The agents of one server. Their identities are in the server's log; everything else is lost when the server stops."""

    def __init__(self, server: RunStore) -> None:
        self.server = server
        self._stop_since: dict[RunKey, float] = {}
        self._unfinalized: set[RunKey] = set()
        """Ended runs that their sweeps do not count as ended yet: ``launch`` on the agent may be retrying them."""

    def create_agent(self, sweep: ServedSweep, host: str, user: str) -> ServedAgent:
        agent_id = secrets.token_hex(8)
        self.server.write(event="agent", id=agent_id, sweep=sweep.id, host=host[:200], user=user)
        return self.server.agents[agent_id]

    def heartbeat(self, agent_id: str, run_states: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The commands for the agent. Raises RequestError (404) when this server has no such agent.

        ``run_states``: the names of the agent's runs, with a true value for those that run.
        """
        agent = self.server.agents.get(agent_id)
        if agent is None:
            raise RequestError(f"there is no agent {agent_id} on this server. Start `wandb agent` again.", 404)
        sweep, now = self.server.sweeps[agent.sweep], time.monotonic()
        agent.report({name for name, running in run_states.items() if running}, now)
        commands = [*self._stop_commands(sweep, agent, now)]
        for name in agent.running:
            run = self.server.runs.get(RunKey(sweep.entity, sweep.project, name))
            if run is not None and run.agent in ("", agent.id):
                run.seen(now)
        self._finalize_all()
        self._crash_unstarted(sweep, agent, now)
        if agent.running:
            return commands
        if sweep.definition is None or sweep.state in (SweepRunState.FINISHED, SweepRunState.CANCELED):
            return self._exit_command(agent)
        if sweep.state is SweepRunState.PAUSED:
            return commands
        return commands + self._next_command(sweep, agent)

    def _stop_commands(self, sweep: ServedSweep, agent: ServedAgent, now: float) -> Iterator[dict[str, Any]]:
        for name in agent.running:
            run = self.server.runs.get(RunKey(sweep.entity, sweep.project, name))
            if run is None or not agent.stop_allowed(name, now):
                continue
            # The agent lost its connection and the run was assigned to another agent meanwhile.
            reassigned = run.agent not in ("", agent.id)
            if not reassigned and not run.stop:
                continue
            if not reassigned and run.active and now - self._stop_since.setdefault(run.key, now) < AGENT_STOP_DELAY_S:
                continue
            agent.stop_sent(name, now)
            yield {"type": "stop", "run_id": name}

    def _crash_unstarted(self, sweep: ServedSweep, agent: ServedAgent, now: float) -> None:
        """Mark runs as crashed that were assigned to this agent, that it does not list and that never started."""
        for run in self.server.runs_of(sweep):
            waited_s = now - run.last_seen_monotonic
            if run.agent == agent.id and run.state is RunState.PENDING and run.key.name not in agent.running:
                record = sweep.record_of(run.key.name)
                if record is not None and record.job is not None and waited_s > START_GRACE_S:
                    self.crash(run, "it ended before it sent anything")

    def _next_command(self, sweep: ServedSweep, agent: ServedAgent) -> list[dict[str, Any]]:
        """The command for an idle agent: a run, exit, or none while it should wait."""
        record = sweep.assign_trial(agent.id)
        if record is not None:
            try:
                run = self.begin_attempt(sweep, record, agent.id)
            except OSError:  # the agent sends its heartbeat again
                sweep.trials.put_back([record])
                raise
            agent.assigned(record.run_id)
            return [sweep.command(record, resume=any(run.line_counts.values()))]
        if sweep.is_over:
            self.server.update_sweep(sweep, None, SweepRunState.FINISHED, {})
        needed = any(self._may_be_reassigned(run, agent) for run in self.server.runs_of(sweep))
        return self._exit_command(agent) if sweep.nothing_left() and not needed else []

    def _may_be_reassigned(self, run: ServedRun, agent: ServedAgent) -> bool:
        """Whether the run may soon have to be assigned again, so that an idle agent should wait."""
        silent = time.monotonic() - run.last_seen_monotonic > self.server.silence_s / 2
        return run.key in self._unfinalized or (run.active and (silent or run.agent == agent.id))

    def _exit_command(self, agent: ServedAgent) -> list[dict[str, Any]]:
        agent.dismiss()
        return [{"type": "exit"}]

    def begin_attempt(self, sweep: ServedSweep, record: TrialRecord, agent: str) -> ServedRun:
        """Write a new attempt into the run's log. ``agent``: id of the agent that it is assigned to."""
        run = self.server.run_of(RunKey(sweep.entity, sweep.project, record.run_id))
        run.use_metric(sweep.metric)
        metadata = {} if run.sweep else {"facts": {"sweep": sweep.id}}
        values = {"state": RunState.PENDING, "agent": agent, "stop": "", "exitcode": None, "attempt": record.attempt}
        run.write(**metadata, set=values)
        run.seen(time.monotonic())
        return run

    def watch(self) -> None:
        """Mark runs without a sign of life as crashed. Called every few seconds."""
        now = time.monotonic()
        self._finalize_all()
        for run in list(self.server.runs.values()):
            if run.active and now - run.last_seen_monotonic > self.server.silence_s:
                self.crash(run, "no sign of life from the run or its agent")
        for sweep in self.server.sweeps.values():
            if sweep.definition is None or sweep.state is not SweepRunState.RUNNING:
                continue
            if sweep.is_over and not self._has_live_agent(sweep, now):
                self.server.update_sweep(sweep, None, SweepRunState.FINISHED, {})

    def _has_live_agent(self, sweep: ServedSweep, now: float) -> bool:
        """Whether an agent may still request a run: it could then revive one that was stopped early."""
        agents = (agent for agent in self.server.agents.values() if agent.sweep == sweep.id)
        return any(not agent.dismissed and self._is_alive(agent, now) for agent in agents)

    def _is_alive(self, agent: ServedAgent, now: float) -> bool:
        return now - agent.last_seen_monotonic < self.server.silence_s

    def crash(self, run: ServedRun, reason: str) -> None:
        """Mark a run as crashed, or as killed when a stop was requested."""
        log.warning("run %s of sweep %s has crashed: %s", run.key.name, run.sweep or "none", reason)
        run.write(set={"state": RunState.KILLED if run.stop else RunState.CRASHED})
        self.finalize(run)

    def revive(self, run: ServedRun) -> None:
        """A crashed run turns out to be alive."""
        sweep = self.server.sweeps.get(run.sweep)
        if sweep is None or sweep.definition is None:
            return
        self._unfinalized.add(run.key)  # in case the writes below fail; an active run is taken out again
        was_over = sweep.is_over
        sweep.revive(run)
        if sweep.reopens(was_over):
            self.server.update_sweep(sweep, None, SweepRunState.RUNNING, {})

    def check_early_stop(self, run: ServedRun) -> None:
        """Let the pruner decide about a run that has logged something."""
        sweep = self.server.sweeps.get(run.sweep)
        if sweep is None or not sweep.should_stop(run):
            return
        log.info("run %s of sweep %s is stopped early", run.key.name, sweep.id)
        try:
            run.write(set={"stop": "pruner"})
        except OSError:
            sweep.repeat_stop_decision(run)
            raise

    def finalize(self, run: ServedRun) -> None:
        """A run has ended: its sweep counts it as ended now, or as soon as its agent can no longer retry it."""
        self._stop_since.pop(run.key, None)
        sweep = self.server.sweeps.get(run.sweep)
        if sweep is None or sweep.definition is None:
            return
        self._unfinalized.add(run.key)
        self._finalize_all()

    def finalize_later(self, run: ServedRun) -> None:
        """After a restart: the run has ended, but its sweep's journal may not say so."""
        self._unfinalized.add(run.key)

    def may_be_retried(self, run: ServedRun) -> bool:
        """Whether the run has ended but its agent may still retry it."""
        return run.key in self._unfinalized

    def _finalize_all(self) -> None:
        for key in list(self._unfinalized):
            run = self.server.runs[key]
            agent = self.server.agents.get(run.agent)
            held = (
                agent is not None
                and self._is_alive(agent, time.monotonic())
                and (key.name in agent.running or not agent.reported)
            )
            if run.active or run.state is RunState.FINISHED or not held:
                self.server.sweeps[run.sweep].finalize(run)
                self._unfinalized.discard(key)
