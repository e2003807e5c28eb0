"""What GraphQL shows of users and projects: one class per type, one attribute or method per field, in snake case.

Runs and sweeps are in ``run_views`` and ``sweep_views``. The types refer to each other, so these modules import one
another whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isaerft_sweep.serve import artifact_views, run_views, sweep_views
from isaerft_sweep.serve.caller import Caller, global_id, stamp
from isaerft_sweep.serve.checks import RequestError
from isaerft_sweep.serve.filters import page, read_filter, select
from isaerft_sweep.serve.runs import RunKey, ServedRun
from isaerft_sweep.serve.sweeps import ServedSweep


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
        return page(select(self._runs(), filters, order), after, first, lambda run: run_views.RunView(self.caller, run))

    buckets = runs

    def run(self, name: str) -> run_views.RunView | None:
        run = self.caller.server.runs.get(RunKey(*self.key, name))
        return run_views.RunView(self.caller, run) if run is not None else None

    def bucket(self, name: str, missing_ok: bool = False) -> run_views.RunView | None:
        """What a client asks before it goes on with a run."""
        found = self.run(name)
        if found is not None:
            found.run.resuming, found.run.begun_anew = True, False
        elif not missing_ok:
            raise RequestError(f"there is no run {'/'.join(self.key)}/{name} on this server.", 404)
        return found if found is not None and found.run.created else None

    def artifact(self, name: str, enable_tracking: bool = False) -> artifact_views.ArtifactView | None:
        known = artifact_views.named(self.caller, self.key, name)
        return artifact_views.ArtifactView(self.caller, known) if known else None

    def artifact_collection_membership(self, name: str) -> artifact_views.MembershipView | None:
        known = artifact_views.named(self.caller, self.key, name)
        return artifact_views.MembershipView(self.caller, known) if known else None

    def artifact_collection(self, name: str) -> artifact_views.CollectionView | None:
        return next((view for view in artifact_views.collections(self.caller, self.key) if view.name == name), None)

    def artifact_collections(
        self, after: str | None = None, first: int | None = None, filters: str | None = None, order: str | None = None
    ) -> Any:
        artifact_views.refuse_filters(filters)
        return page(artifact_views.collections(self.caller, self.key), after, first, lambda view: view)

    def artifact_type(self, name: str) -> artifact_views.TypeView | None:
        return next((view for view in artifact_views.types(self.caller, self.key) if view.name == name), None)

    def artifact_types(self, after: str | None = None, first: int | None = None) -> Any:
        return page(artifact_views.types(self.caller, self.key), after, first, lambda view: view)

    def _sweeps(self) -> list[ServedSweep]:
        return [s for s in self.caller.server.sweeps.values() if (s.entity, s.project) == self.key]

    @property
    def total_sweeps(self) -> int:
        return len(self._sweeps())

    def sweeps(self, after: str | None = None, first: int | None = None, filters: str | None = None) -> Any:
        if read_filter(filters):
            raise RequestError("sweeps cannot be filtered by this server: leave filters out.")
        return page(self._sweeps(), after, first, lambda sweep: sweep_views.SweepView(self.caller, sweep))

    def sweep(self, sweep_name: str) -> sweep_views.SweepView | None:
        found = next((s for s in self._sweeps() if s.id == sweep_name), None)
        return sweep_views.SweepView(self.caller, found) if found else None


def entity_view(name: str) -> Any:
    """An entity; this server has no organizations."""
    return {"id": global_id("Entity", name), "name": name, "isTeam": False, "entityType": "user", "readOnly": False}
