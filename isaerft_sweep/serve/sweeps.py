"""One sweep on the server: the embedded controller's journal, sampler and early stopping, asked by agents' heartbeats."""

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
from isaerft_sweep.serve import runs as states
from isaerft_sweep.serve.runs import ServedRun
from isaerft_sweep.serve.sweep_config import evaluations_of, is_ours, nested, parse_config, read_definition
from isaerft_sweep.spec_fields import canonical_json
from isaerft_sweep.tracking.metric_names import parameter_names, value_at

log = logging.getLogger("isaerft.serve")
RUNNING, PAUSED, FINISHED, CANCELED = "RUNNING", "PAUSED", "FINISHED", "CANCELED"
MAX_RETRIES = 2
"""How often a run that has died without a word is handed out again."""


class ServedSweep:
    """``state`` is W&B's; ``imported`` is a sweep of another place, whose runs are only kept here."""

    def __init__(self, folder: SweepFolder, entity: str, project: str, sweep_id: str, config: str, imported: bool) -> None:
        self.folder, self.entity, self.project, self.id, self.config = folder, entity, project, sweep_id, config
        self.imported = imported
        self.state = FINISHED if imported else RUNNING
        self.facts: dict[str, Any] = {}
        self.created = self.updated = time.time()
        self.raw: dict[str, Any] = {}
        self.definition: SweepDefinition | None = None
        self._read()
        self._started_s: dict[int, float] = {}
        if self.definition is not None:
            self._open(self.definition)

    def _read(self) -> None:
        """Take in the file. A new one has been checked; one that this version does not take must not stop the others."""
        try:
            self.raw = parse_config(self.config)
            self.definition = None if self.imported else read_definition(self.raw)
        except SpaceError as error:
            log.error("sweep %s is only shown, since this version does not take its file: %s", self.id, error)
            self.state = FINISHED

    def _open(self, definition: SweepDefinition) -> None:
        self.journal = Journal(self.folder)
        self.records = self.journal.record.trials
        if not self.journal.record.sweep_id:
            metric = definition.metric
            self.journal.write("sweep", sweep_id=self.id, question="", metric=metric.name, goal=metric.goal)
        self.sampler = Sampler(definition.parameters, definition.method, _seed(self.id), definition.metric.sign)
        reached = None if definition.target is None else definition.reached_by
        limits = SweepLimits(self._cap(definition), MAX_RETRIES, reached=reached)
        self.trials = SweepState(self.journal, self.sampler, limits, self._name_trial)
        self.trials.restore(retry_given_up=False)

    def _name_trial(self, index: int, _point: Point) -> tuple[str, str]:
        name = run_id(self.id, index)
        return name, name

    def close(self) -> None:
        if self.definition is not None:
            self.journal.close()

    @property
    def metric(self) -> str:
        """The metric that the sweep is about; empty when it names none."""
        if self.definition is not None:
            return self.definition.metric.name
        return str(self._asked_metric.get("name", ""))

    @property
    def goal(self) -> str:
        return str(self._asked_metric.get("goal", "minimize"))

    @property
    def _asked_metric(self) -> Mapping[str, Any]:
        asked = self.raw.get("metric")
        return asked if isinstance(asked, Mapping) else {}

    @property
    def swept(self) -> list[str]:
        """The dotted names of the parameters that it varies, in the file's order."""
        blocks = self.raw.get("parameters")
        return parameter_names(blocks, constants=False) if isinstance(blocks, Mapping) else []

    def point_of(self, run: ServedRun) -> dict[str, Any]:
        """What a run of this sweep has been given, by dotted name: what was handed out, else what its config says."""
        record = self.record_of(run.key.name)
        values = record.point.params if record is not None else run.config_values()
        found = {key: value_at(values, key) for key in self.swept}
        return {key: value for key, value in found.items() if value is not None}

    @property
    def cap(self) -> float:
        """How many runs there are to be; infinite when neither the file nor the space says."""
        return self.trials.limits.trials

    def _cap(self, definition: SweepDefinition) -> float:
        return min(math.inf if definition.run_cap is None else definition.run_cap, self.sampler.size)

    def update(self, config: str) -> None:
        """Another file for the same sweep. Raises SpaceError when it asks something else but for ``run_cap``."""
        raw = parse_config(config)
        old, new = ({k: v for k, v in c.items() if k not in ("run_cap", "name", "description")} for c in (self.raw, raw))
        if not self.imported and canonical_json(old) != canonical_json(new):
            raise SpaceError(
                "a sweep that has begun keeps its question: only run_cap, name and description can be changed. Start "
                "another sweep for another space."
            )
        definition = read_definition(raw) if self.definition is not None else None
        self.config, self.raw, self.definition = config, raw, definition
        if definition is not None:
            self.trials.change_cap(self._cap(definition))

    def record_of(self, name: str) -> TrialRecord | None:
        return next((r for r in self.records.values() if r.run_id == name), None) if self.definition else None

    def next(self, agent: str) -> TrialRecord | None:
        """The run that an idle agent is to do, noted as given to it; None when there is none now."""
        record = self.trials.next_trial()
        if record is None:
            return None
        try:
            self.trials.dispatched(record, record.attempt + 1, AgentJob(agent))
        except Exception:  # a disk that is full must not lose it
            self.trials.put_back([record])
            raise
        self._started_s[record.index] = time.monotonic()
        return record

    def _finish(self, record: TrialRecord, outcome: AttemptOutcome) -> None:
        """An attempt has ended; whether the run is handed out again ``SweepState`` says."""
        seconds = time.monotonic() - self._started_s.get(record.index, time.monotonic())
        self.trials.finished(record, replace(outcome, seconds=round(seconds, 3)))
        self._started_s.pop(record.index, None)

    def finalize(self, run: ServedRun) -> None:
        """Take in that a run of this sweep has come to an end in W&B's sense."""
        record = self.record_of(run.key.name)
        if record is None or record.job is None or run.active:
            return
        outcome = self._outcome(run)
        if outcome.state is TrialState.DIVERGED:
            self._note_curve(record, run, diverged=True)
        self._finish(record, outcome)

    def _outcome(self, run: ServedRun) -> AttemptOutcome:
        """What the end of a run means for its trial."""
        if run.state == states.FINISHED:
            value = run.summary_value(self.metric, self.goal)
            message = "" if value is not None else f"it logged no finite {self.metric}"
            return AttemptOutcome(TrialState.COMPLETED, value, message)
        if run.stop == "pruner":
            return AttemptOutcome(TrialState.PRUNED, message="stopped early; its checkpoint is kept")
        if run.stop:
            return AttemptOutcome(TrialState.STOPPED, message=f"stopped by the {run.stop}", can_retry=False)
        if run.state == states.PREEMPTED:
            return AttemptOutcome(TrialState.STOPPED, message="preempted: it will resume")
        if run.state == states.CRASHED:
            message = "neither the run nor its agent has been heard of"
            return AttemptOutcome(TrialState.FAILED, message=message, counted=True)
        message = f"ended with code {run.exitcode}"
        if run.said_state == TrialState.DIVERGED:
            return AttemptOutcome(TrialState.DIVERGED, message=message)
        return AttemptOutcome(TrialState.FAILED, message=message, can_retry=False, counted=True)

    def revive(self, run: ServedRun) -> None:
        """A run that was taken for dead speaks: unless it has been handed out again, its attempt goes on."""
        record = self.record_of(run.key.name)
        if record is None or record.job is not None or record.state != TrialState.FAILED:
            return
        self.trials.resume_attempt(record, AgentJob(run.agent))
        self._started_s[record.index] = time.monotonic()

    def should_stop(self, run: ServedRun) -> bool:
        """Whether the pruner has had enough of the run; each evaluation is judged once."""
        record = self.record_of(run.key.name)
        if record is None or record.job is None or not run.active or run.stop:
            return False
        self._note_curve(record, run)
        early = self.trials.early
        return early is not None and early.stops(record.index, run.curve)

    def judge_again(self, run: ServedRun) -> None:
        """The decision to stop the run could not be kept."""
        record = self.record_of(run.key.name)
        if record is not None and self.trials.early is not None:
            self.trials.early.forget(record.index)

    def _note_curve(self, record: TrialRecord, run: ServedRun, diverged: bool = False) -> None:
        """What the pruner should know of a run; how often a run is evaluated is known from the first one's config."""
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
        """After a restart: what the pruner knew of a run. It is judged again at its next evaluation."""
        record = self.record_of(run.key.name)
        if record is not None and run.curve:
            self._note_curve(record, run, record.state is TrialState.DIVERGED)

    @property
    def over(self) -> bool:
        """Whether every run that there is to be has ended."""
        return self.definition is None or self.trials.is_over

    def opens_again(self, was_over: bool) -> bool:
        """Whether it had finished by itself, not by somebody's stop, and has something to do now."""
        return self.state == FINISHED and was_over and not self.over

    def nothing_left(self) -> bool:
        """Whether there is nothing to hand out, nor will be unless a run dies."""
        return self.trials.nothing_to_start

    def command(self, record: TrialRecord, resume: bool) -> dict[str, Any]:
        """What an agent is told to start: our trials with flat dotted names, as Hydra wants, others with nested ones."""
        params = record.point.params if is_ours(self.raw) else nested(record.point.params, self.raw["parameters"])
        return {
            "type": "resume" if resume else "run",
            "run_id": record.run_id,
            "program": str(self.raw.get("program", "")),
            "args": {key: {"value": value} for key, value in params.items()},
        }


def _seed(sweep_id: str) -> int:
    return int.from_bytes(sweep_id.encode(), "big") % 2**31
