"""One sweep on the server: the embedded controller's journal, sampler and early stopping, asked by agents' heartbeats."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from isaerft_sweep.controller.early import EarlyStopping
from isaerft_sweep.errors import SpaceError
from isaerft_sweep.journal.journal import Journal, TrialRecord
from isaerft_sweep.journal.layout import COMPLETED, DIVERGED, FAILED, PRUNED, STOPPED, SweepFolder
from isaerft_sweep.naming import run_id
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
RETRIES = 2
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
        self.waiting: list[TrialRecord] = []
        self._asked: Point | None = None
        """A point that the sampler has given and the journal has not taken yet."""
        self.seconds: dict[int, float] = {}
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
        self.early: EarlyStopping | None = None
        for record in sorted(self.records.values(), key=lambda r: r.index):
            self.sampler.restore(record.point)
            if record.ended:
                self._tell(record)
            elif record.job is None and not record.ended:
                self.waiting.append(record)

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
        """How many runs there shall be; infinite when neither the file nor the space says."""
        assert self.definition is not None
        cap = self.definition.run_cap
        return min(math.inf if cap is None else cap, self.sampler.size)

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

    def record_of(self, name: str) -> TrialRecord | None:
        return next((r for r in self.records.values() if r.run_id == name), None) if self.definition else None

    def next(self, agent: str) -> TrialRecord | None:
        """The run that an idle agent shall do, noted as given to it; None when there is none now."""
        if not self.waiting:
            self.waiting += [record for record in [self._revived() or self._new()] if record is not None]
        if not self.waiting:
            return None
        record = self.waiting[0]
        self.journal.write("dispatch", index=record.index, attempt=record.attempt + 1, job={"agent": agent})
        self.waiting.pop(0)  # only now: a disk that is full must not lose it
        self.seconds[record.index] = time.monotonic()
        return record

    def _new(self) -> TrialRecord | None:
        if self._has_all:
            return None
        point = self._asked = self._asked or self.sampler.ask()
        if point is None:
            return None
        index, name = len(self.records), run_id(self.id, len(self.records))
        self.journal.write("trial", index=index, name=name, run_id=name, params=dict(point.params), unit=dict(point.unit))
        self._asked = None
        return self.records[index]

    def _revived(self) -> TrialRecord | None:
        pruned = [i for i, record in self.records.items() if record.state == PRUNED]
        index = self.early.revived(pruned) if self.early else None
        return None if index is None else self.records[index]

    def end(self, record: TrialRecord, state: str, metric: float | None, message: str, given_up: bool = False) -> None:
        """An attempt is over; ``stopped`` and ``failed`` ones that are not given up are handed out again."""
        seconds = time.monotonic() - self.seconds.get(record.index, time.monotonic())
        self.journal.write(
            "end",
            index=record.index,
            state=state,
            metric=metric,
            message=message,
            seconds=round(seconds, 3),
            given_up=given_up,
        )
        self.seconds.pop(record.index, None)
        if self.early and state != PRUNED:
            self.early.forget(record.index)
        if not record.ended:
            self.waiting.append(record)
        else:
            self._tell(record)

    def _tell(self, record: TrialRecord) -> None:
        """The sampler hears of a run that has ended, unless its end says nothing of its point (a lost node, a person)."""
        if record.state in (COMPLETED, DIVERGED):
            self.sampler.tell(record.point, record.metric)
        elif record.state != PRUNED:  # which may come back, and stays pending until then
            self.sampler.forget(record.point)

    def finalize(self, run: ServedRun) -> None:
        """Take in that a run of this sweep has come to an end in W&B's sense."""
        record = self.record_of(run.key.name)
        if record is None or record.job is None or run.active:
            return
        if run.state == states.FINISHED:
            value = run.summary_value(self.metric, self.goal)
            self.end(record, COMPLETED, value, "" if value is not None else f"it logged no finite {self.metric}")
        elif run.stop == "pruner":
            self.end(record, PRUNED, None, "stopped early; its checkpoint is kept")
        elif run.stop:
            self.end(record, STOPPED, None, f"stopped by the {run.stop}", given_up=True)
        elif run.state == states.PREEMPTED:
            self.end(record, STOPPED, None, "preempted: it will go on")
        elif run.state == states.CRASHED:
            again = record.failures < RETRIES
            self.end(record, FAILED, None, "neither the run nor its agent has been heard of", given_up=not again)
        elif run.said_state == DIVERGED:
            self._note_curve(record, run, {"state": DIVERGED})
            self.end(record, DIVERGED, None, f"ended with code {run.exitcode}")
        else:
            self.end(record, FAILED, None, f"ended with code {run.exitcode}", given_up=True)

    def revive(self, run: ServedRun) -> None:
        """A run that was taken for dead speaks: unless it has been handed out again, its attempt goes on."""
        record = self.record_of(run.key.name)
        if record is None or record.job is not None or record.state != FAILED:
            return
        if record.given_up:
            self.sampler.pending_again(record.point)
        self.journal.write("dispatch", index=record.index, attempt=record.attempt, job={"agent": run.agent})
        self.waiting = [other for other in self.waiting if other is not record]
        self.seconds[record.index] = time.monotonic()

    def should_stop(self, run: ServedRun) -> bool:
        """Whether the pruner has had enough of the run; each evaluation is judged once."""
        record = self.record_of(run.key.name)
        if record is None or record.job is None or not run.active or run.stop:
            return False
        return self._note_curve(record, run, {}, judge=True)

    def judge_again(self, run: ServedRun) -> None:
        """The decision to stop the run could not be kept."""
        record = self.record_of(run.key.name)
        if record is not None and self.early is not None:
            self.early.forget(record.index)

    def _note_curve(self, record: TrialRecord, run: ServedRun, status: dict[str, Any], judge: bool = False) -> bool:
        assert self.definition is not None
        if self.definition.early_terminate is None:
            return False
        if self.early is None:
            number = evaluations_of(run.config_values())
            pruner = make_pruner(self.definition.early_terminate, number)
            assert pruner is not None
            self.early = EarlyStopping(pruner, self.definition.metric.sign, number)
        status["evaluations"] = run.curve
        if judge:
            return self.early.stops(record.index, status)
        self.early.note(record.index, status)
        return False

    def restore_curve(self, run: ServedRun) -> None:
        """After a restart: what the pruner knew of a run. It is judged again at its next evaluation."""
        record = self.record_of(run.key.name)
        if record is not None and run.curve:
            self._note_curve(record, run, {"state": record.state} if record.state == DIVERGED else {})

    @property
    def over(self) -> bool:
        """Whether every run that there shall be has ended."""
        if self.definition is None:
            return True
        records = self.records.values()
        return self._has_all and not self.waiting and all(r.ended and r.job is None for r in records)

    @property
    def _has_all(self) -> bool:
        """Whether every run has been made: as many as there shall be, or one has reached the metric's target."""
        assert self.definition is not None
        reached = self.definition.target is not None and any(
            self.definition.reached_by(record.metric) for record in self.records.values()
        )
        return reached or len(self.records) >= self.cap

    def opens_again(self, was_over: bool) -> bool:
        """Whether it had finished by itself, not by somebody's stop, and has something to do now."""
        return self.state == FINISHED and was_over and not self.over

    def nothing_left(self) -> bool:
        """Whether there is nothing to hand out, nor will be unless a run dies."""
        return not self.waiting and self._has_all

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
