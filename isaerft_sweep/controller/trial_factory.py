"""Turns a sampled point into a trial: its config, names, ids and folder."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from isaerft_sweep import naming
from isaerft_sweep.config.boundary import check
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.search.sampler import Point
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.spec_fields import overrides
from isaerft_sweep.specs import Experiment, TrialSpec, identity


def new_sweep_id() -> str:
    """Eight characters, as W&B's sweep ids."""
    return "".join(secrets.choice(naming.ALPHABET) for _ in range(8))


@dataclass(frozen=True)
class AgentRun:
    """A run that somebody else has named: a W&B agent.

    ``parent_sweep``: the folder of its sweep, see ``SweepFolder``. ``agent``: its process, which has started this one.
    """

    sweep_id: str
    run_id: str
    parent_sweep: SweepFolder
    agent: int | None = None


@dataclass(frozen=True)
class TrialFactory:
    """Makes the trials of one sweep. ``overrides`` are the command line's, for the command that reproduces a trial."""

    experiment: Experiment
    definition: SweepDefinition
    folder: SweepFolder
    sweep_id: str
    git_commit: str | None
    overrides: Sequence[str] = ()
    agent_run: AgentRun | None = None

    def make(self, index: int, point: Point) -> TrialSpec:
        """The trial's spec, with names that nobody else has; its folder is written."""
        experiment = self.experiment.with_params(point.params)
        check(experiment)
        orpo, now = experiment.orpo, datetime.now()

        def candidate(grow: int) -> str:
            return naming.run_name(
                experiment.model.name,
                orpo.learning_rate,
                orpo.beta,
                now,
                prefix=experiment.run_prefix,
                grow=grow,
                salt=f"{self.sweep_id}/{index}",
            )

        name = naming.reserve(self.folder.names, candidate)
        spec = TrialSpec(
            index=index,
            name=name,
            model_name=naming.model_name(experiment.model.name, name),
            run_id=self.agent_run.run_id if self.agent_run else naming.run_id(self.sweep_id, index),
            sweep_id=self.sweep_id,
            sweep_name=(self.agent_run.parent_sweep if self.agent_run else self.folder).path.name,
            identity=identity(experiment),
            created=now.isoformat(timespec="seconds"),
            params=dict(point.params),
            metric=self.definition.metric.name,
            goal=self.definition.metric.goal,
            tags=naming.tags(orpo.learning_rate, orpo.beta, (*experiment.tags, *experiment.tracker.tags)),
            command=self._command(point),
            git_commit=self.git_commit,
            experiment=experiment,
        )
        self.folder.trial(name).create(spec)
        return spec

    def create(self, index: int, point: Point) -> tuple[str, str]:
        """Make the trial; its name and its run id."""
        spec = self.make(index, point)
        return spec.name, spec.run_id

    def _command(self, point: Point) -> str:
        """What runs this one trial again."""
        kept = [o for o in self.overrides if not o.lstrip("+").startswith(("sweep=", "sweep.", "name=", "launcher"))]
        return shlex.join(["python", "-m", "isaerft_sweep.launch", *kept, "sweep=none", *overrides(point.params)])
