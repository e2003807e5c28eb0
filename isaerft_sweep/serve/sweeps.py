"""One sweep on the server: the embedded controller's journal, sampler and early stopping, driven by agents' heartbeats."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from isaerft_sweep.errors import SpaceError
from isaerft_sweep.journal.job_refs import AgentJob
from isaerft_sweep.journal.journal import Journal, TrialRecord
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.naming import run_id
from isaerft_sweep.scheduling.early_stopping import EarlyStopping
from isaerft_sweep.scheduling.sweep_state import AttemptOutcome, SweepLimits, SweepState
from isaerft_sweep.search.pruning import make_pruner
from isaerft_sweep.search.sampler import Point, Sampler
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.serve.run_state import RunState, SweepRunState
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.serve.sweep_config import evaluations_of, is_ours, nested, parse_config, read_definition
from isaerft_sweep.spec_fields import canonical_json
from isaerft_sweep.tracking.metric_names import parameter_names, value_at

log = logging.getLogger("isaerft.serve")
MAX_RETRIES = 2
"""How often a run that crashed is assigned again."""


class ServedSweep:
    """A sweep with its trials.

    Args:
        folder: holds the sweep's journal; named by W&B's id of the sweep.
        place: the owner of the project, and the project that the sweep belongs to.
        config: the text of the sweep file.
        created: when the sweep was created, in seconds since the epoch.
        stored_only: whether the server only stores and shows the sweep and never assigns runs of it.
    """

    def __init__(
        self,
        folder: SweepFolder,
        place: tuple[str, str],
        config: str,
        created: float,
        *,
        stored_only: bool,
    ) -> None:
        self.folder, self.id, self.config = folder, folder.path.name, config
        self.entity, self.project = place
        self.stored_only = stored_only
        self.state = SweepRunState.FINISHED if stored_only else SweepRunState.RUNNING
        self.metadata: dict[str, Any] = {}
        self.created = self.updated = created
        self.raw: dict[str, Any] = {}
        self.definition: SweepDefinition | None = None
        self._read()
        self._started_s: dict[int, float] = {}
        if self.definition is not None:
            self._open(self.definition)

    def _read(self) -> None:
        """Read the sweep file. New files are validated before; one that this version rejects must not block other sweeps."""
        try:
            self.raw = parse_config(self.config)
            self.definition = None if self.stored_only else read_definition(self.raw)
        except SpaceError as error:
            log.error("sweep %s is only shown, since this version rejects its file: %s", self.id, error)
            self.state = SweepRunState.FINISHED

    def _open(self, definition: SweepDefinition) -> None:
        self.journal = Journal(self.folder)
        self.records = self.journal.record.trials
        if not self.journal.record.sweep_id:
            metric = definition.metric
            self.journal.write("sweep", sweep_id=self.id, question="", metric=metric.name, goal=metric.goal)
        goals = max(1, len(definition.goals))
        sign = definition.metric.sign
        self.sampler = Sampler(definition.parameters, definition.method, _seed(self.id), sign, goals=goals)
        reached = None if definition.target is None else definition.reached_by
        limits = SweepLimits(
            self._cap(definition), MAX_RETRIES, reached=reached, violation=definition.violation, others=definition.others
        )
        self.trials = SweepState(self.journal, self.sampler, limits, self._name_trial)
        self.trials.restore(retry_given_up=False)

    def _name_trial(self, index: int, _point: Point) -> tuple[str, str]:
        name = run_id(self.id, index)
        return name, name

    def close(self) -> None:
        if self.definition is not None:
            self.journal.close()

    # -- settings

    @property
    def metric(self) -> str:
        """The name of the metric to optimize; empty when the sweep file names none."""
        if self.definition is not None:
            return self.definition.metric.name
        return str(self._metric_config.get("name", ""))

    @property
    def goal(self) -> str:
        return str(self._metric_config.get("goal", "minimize"))

    @property
    def _metric_config(self) -> Mapping[str, Any]:
        config = self.raw.get("metric")
        return config if isinstance(config, Mapping) else {}

    @property
    def swept(self) -> list[str]:
        """The dotted names of the parameters that vary, in the file's order."""
        blocks = self.raw.get("parameters")
        return parameter_names(blocks, constants=False) if isinstance(blocks, Mapping) else []

    def point_of(self, run: ServedRun) -> dict[str, Any]:
        """The swept values of a run, by dotted name: from the journal, or from the run's config when it is not in there."""
        record = self.record_of(run.key.name)
        params = record.point.params if record is not None else run.config_values()
        values = {key: value_at(params, key) for key in self.swept}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def cap(self) -> float:
        """The number of runs of the whole sweep; infinite when neither the file nor the search space limits it."""
        return self.trials.limits.trials

    def _cap(self, definition: SweepDefinition) -> float:
        return min(math.inf if definition.run_cap is None else definition.run_cap, self.sampler.size)

    def update(self, config: str) -> None:
        """Replace the sweep file. Raises SpaceError when more than ``run_cap``, name and description differs."""
        raw = parse_config(config)
        old, new = ({k: v for k, v in c.items() if k not in ("run_cap", "name", "description")} for c in (self.raw, raw))
        if not self.stored_only and canonical_json(old) != canonical_json(new):
            raise SpaceError(
                "a sweep that has started keeps its settings: only run_cap, name and description can be changed. Start "
                "another sweep for another search space."
            )
        definition = read_definition(raw) if self.definition is not None else None
        self.config, self.raw, self.definition = config, raw, definition
        if definition is not None:
            self.trials.change_cap(self._cap(definition))

    def apply_update(self, time_s: float, state: str | None, metadata: Mapping[str, Any]) -> None:
        """Apply an update that is on disk.

        Args:
            time_s: when it was written, in seconds since the epoch.
            state: the new state; None keeps the current one.
            metadata: the fields that change.
        """
        self.updated = time_s
        self.state = SweepRunState(state) if state else self.state
        self.metadata.update(metadata)

    # -- trials

    def record_of(self, name: str) -> TrialRecord | None:
        return next((r for r in self.records.values() if r.run_id == name), None) if self.definition else None

    def assign_trial(self, agent: str) -> TrialRecord | None:
        """Assign the next trial to an idle agent, in the journal; None when nothing can be started now."""
        record = self.trials.next_trial()
        if record is None:
            return None
        try:
            self.trials.dispatched(record, record.attempt + 1, AgentJob(agent))
        except Exception:  # such as a full disk: the trial must not be lost
            self.trials.put_back([record])
            raise
        self._started_s[record.index] = time.monotonic()
        return record

    def _finish(self, record: TrialRecord, outcome: AttemptOutcome) -> None:
        """Record the end of an attempt. ``SweepState`` decides whether the trial is retried."""
        seconds = time.monotonic() - self._started_s.get(record.index, time.monotonic())
        self.trials.finished(record, replace(outcome, seconds=round(seconds, 3)))
        self._started_s.pop(record.index, None)

    def finalize(self, run: ServedRun) -> None:
        """Record that a run of this sweep has ended in W&B's sense. Does nothing when that is recorded already."""
        record = self.record_of(run.key.name)
        if record is None or record.job is None or run.active:
            return
        outcome = self._outcome(run)
        if outcome.state is TrialState.DIVERGED:
            self._note_curve(record, run, diverged=True)
        self._finish(record, outcome)

    def _outcome(self, run: ServedRun) -> AttemptOutcome:
        """The outcome of the trial's attempt, from the state of its ended run."""
        if run.state is RunState.FINISHED:
            value = run.summary_value(self.metric, self.goal)
            message = "" if value is not None else f"it logged no finite {self.metric}"
            assert self.definition is not None
            names = {constraint.metric for constraint in self.definition.constraints}
            names |= {goal.name for goal in self.definition.goals}
            metrics = {name: number for name in names if (number := run.summary_value(name)) is not None}
            return self.trials.limits.judged(AttemptOutcome(TrialState.COMPLETED, value, message), metrics)
        if run.stop == "pruner":
            return AttemptOutcome(TrialState.PRUNED, message="stopped early; its checkpoint is kept")
        if run.stop:
            return AttemptOutcome(TrialState.STOPPED, message=f"stopped by the {run.stop}", can_retry=False)
        if run.state is RunState.PREEMPTED:
            return AttemptOutcome(TrialState.STOPPED, message="preempted: it will resume")
        if run.state is RunState.CRASHED:
            message = "no sign of life from the run or its agent"
            return AttemptOutcome(TrialState.FAILED, message=message, counted=True)
        message = f"ended with code {run.exitcode}"
        if run.reported_trial_state == TrialState.DIVERGED:
            return AttemptOutcome(TrialState.DIVERGED, message=message)
        return AttemptOutcome(TrialState.FAILED, message=message, can_retry=False, counted=True)

    def revive(self, run: ServedRun) -> None:
        """A crashed run turns out to be alive: its attempt continues, unless the run has been assigned again."""
        record = self.record_of(run.key.name)
        if record is None or record.job is not None or record.state != TrialState.FAILED:
            return
        self.trials.resume_attempt(record, AgentJob(run.agent))
        self._started_s[record.index] = time.monotonic()

    # -- early stopping

    def should_stop(self, run: ServedRun) -> bool:
        """Whether the pruner stops the run. It decides once per evaluation."""
        record = self.record_of(run.key.name)
        if record is None or record.job is None or not run.active or run.stop:
            return False
        self._note_curve(record, run)
        early = self.trials.early
        return early is not None and early.stops(record.index, run.curve)

    def repeat_stop_decision(self, run: ServedRun) -> None:
        """Let the pruner decide again: its decision to stop the run could not be written."""
        record = self.record_of(run.key.name)
        if record is not None and self.trials.early is not None:
            self.trials.early.forget(record.index)

    def _note_curve(self, record: TrialRecord, run: ServedRun, diverged: bool = False) -> None:
        """Give the pruner the run's curve. The first run's config says how often each run is evaluated."""
        assert self.definition is not None
        if self.definition.early_terminate is None:
            return
        if self.trials.early is None:
            number = evaluations_of(run.config_values())
            pruner = make_pruner(self.definition.early_terminate, number)
            assert pruner is not None
            self.trials.stop_early_with(EarlyStopping(pruner, self.definition.metric.sign, number))
        assert self.trials.early is not None
        self.trials.early.note(record.index, run.curve, diverged)

    def restore_curve(self, run: ServedRun) -> None:
        """Give the pruner the run's curve after a restart. It decides again at the next evaluation."""
        record = self.record_of(run.key.name)
        if record is not None and run.curve:
            self._note_curve(record, run, record.state is TrialState.DIVERGED)

    # -- when the sweep is over

    @property
    def is_over(self) -> bool:
        """Whether all runs have ended and none will start."""
        return self.definition is None or self.trials.is_over

    def reopens(self, was_over: bool) -> bool:
        """Whether a sweep that finished by itself, not because a user stopped it, has trials to run again."""
        return self.state is SweepRunState.FINISHED and was_over and not self.is_over

    def nothing_left(self) -> bool:
        """Whether no trial can be assigned now or later, unless a run crashes."""
        return self.trials.nothing_to_start

    def command(self, record: TrialRecord, resume: bool) -> dict[str, Any]:
        """The command that starts the trial on an agent.

        This package's trials get flat dotted names, as Hydra expects them; other programs get nested mappings.
        """
        params = record.point.params if is_ours(self.raw) else nested(record.point.params, self.raw["parameters"])
        return {
            "type": "resume" if resume else "run",
            "run_id": record.run_id,
            "program": str(self.raw.get("program", "")),
            "args": {key: {"value": value} for key, value in params.items()},
        }


def _seed(sweep_id: str) -> int:
    return int.from_bytes(sweep_id.encode(), "big") % 2**31
