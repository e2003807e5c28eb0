"""What GraphQL shows of sweeps and their agents; see ``views``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from isaerft_sweep.serve import run_views, views
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve.caller import Caller, global_id, stamp
from isaerft_sweep.serve.filters import page, select
from isaerft_sweep.serve.fleet import ServedAgent
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep

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
        sweep = self.sweep
        values = [run.summary_value(sweep.metric, sweep.goal) for run in self._runs() if run.state == states.FINISHED]
        found = [value for value in values if value is not None]
        return (max if sweep.goal == "maximize" else min)(found) if found else None

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
    def project(self) -> views.ProjectView:
        return views.ProjectView(self.caller, (self.sweep.entity, self.sweep.project))

    def runs(
        self, filters: str | None = None, after: str | None = None, first: int | None = None, order: str | None = None
    ) -> Any:
        return page(select(self._runs(), filters, order), after, first, lambda run: run_views.RunView(self.caller, run))

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
        return page(select(self._runs(), None, order), after, first, lambda run: run_views.RunView(self.caller, run))
