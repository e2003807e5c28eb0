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
    """A run whose ids a W&B agent has chosen.

    ``parent_sweep``: the folder of its sweep, see ``SweepFolder``. ``agent``: the agent's process id, this one's parent.
    """

    sweep_id: str
    run_id: str
    parent_sweep: SweepFolder
    agent: int | None = None


@dataclass(frozen=True)
class TrialFactory:
    """Creates the trials of one sweep. ``overrides``: the command line's, for the command that reproduces a trial."""

    experiment: Experiment
    definition: SweepDefinition
    folder: SweepFolder
    sweep_id: str
    git_commit: str | None
    overrides: Sequence[str] = ()
    agent_run: AgentRun | None = None

    def make(self, index: int, point: Point) -> TrialSpec:
        """The trial's spec, with unique names; its folder is written."""
        experiment = self.experiment.with_params(point.params)
        check(experiment)
        orpo, now = experiment.orpo, datetime.now()

        def candidate(clashes: int) -> str:
            suffix = naming.NameSuffix(clashes, salt=f"{self.sweep_id}/{index}")
            prefix = experiment.run_prefix
            return naming.run_name(experiment.model.name, orpo.learning_rate, orpo.beta, now, prefix=prefix, suffix=suffix)

        name = naming.reserve(self.folder.names, candidate)
        spec = TrialSpec(
            index=index,
            name=name,
            model_name=naming.model_name(experiment.model.name, name, orpo.loss, experiment.adapter.kind),
            run_id=self.agent_run.run_id if self.agent_run else naming.run_id(self.sweep_id, index),
            sweep_id=self.sweep_id,
            sweep_name=(self.agent_run.parent_sweep if self.agent_run else self.folder).path.name,
            identity=identity(experiment),
            created=now.isoformat(timespec="seconds"),
            params=dict(point.params),
            metric=self.definition.metric.name,
            goal=self.definition.metric.goal,
            tags=naming.tags(
                orpo.learning_rate, orpo.beta, (*experiment.tags, *experiment.tracker.tags), experiment.adapter.kind
            ),
            command=self._command(point),
            git_commit=self.git_commit,
            experiment=experiment,
        )
        self.folder.trial(name).create(spec)
        return spec

    def create(self, index: int, point: Point) -> tuple[str, str]:
        """Create the trial; its name and its run id."""
        spec = self.make(index, point)
        return spec.name, spec.run_id

    def _command(self, point: Point) -> str:
        """The command that runs this trial alone again."""
        kept = [o for o in self.overrides if not o.lstrip("+").startswith(("sweep=", "sweep.", "name=", "launcher"))]
        return shlex.join(["python", "-m", "isaerft_sweep.launch", *kept, "sweep=none", *overrides(point.params)])
