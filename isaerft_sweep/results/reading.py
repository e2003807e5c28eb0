"""Reads a sweep from its folder alone, while it runs or after; changes nothing."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from isaerft_sweep.errors import ConfigError, FolderError, SpaceError
from isaerft_sweep.journal.journal import SweepRecord, TrialRecord, is_held, replay
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.results.caveats import dependence
from isaerft_sweep.results.columns import Column, columns_for
from isaerft_sweep.results.cost import device_seconds
from isaerft_sweep.results.statistics import interval, pair_values, probability_best
from isaerft_sweep.search.distributions import Distribution
from isaerft_sweep.search.sweep_file import Metric, read_metric_name, read_sweep
from isaerft_sweep.spec_fields import canonical_json, from_mapping
from isaerft_sweep.specs import Experiment

SEED = "orpo.seed"
UNREADABLE, GONE = "unreadable", "deleted"
SILENT_S = 300.0
"""A worker that no controller sees to and that has said nothing for so long is not counted on."""
SCORED = 200
"""Leaders whose probability of being best is computed; the others' is nil or nearly so."""


@dataclass
class Entry:
    """One trial, with its rank by the metric asked for; ``rank`` is None when it did not complete.

    ``state``: the journal's, or while a job is under way the worker's own word. ``problem``: why what the trial has left
    cannot be read, else empty.
    ``device_s``: device time of all its attempts; what was shared with other trials is divided among them.
    ``scores``: every held-out pair's, as ``TrialFolder.read_evaluation`` gives them. ``interval``: 95 % bootstrap interval
    of the metric over held-out pairs. ``probability_best``: how often it is the best when the pairs are drawn again.
    """

    record: TrialRecord
    metrics: dict[str, float]
    untrained: dict[str, float]
    scores: dict[str, Any] = field(default_factory=dict)
    folder: TrialFolder | None = None
    rank: int | None = None
    interval: tuple[float, float] | None = None
    probability_best: float | None = None
    state: str = ""
    problem: str = ""
    device_s: float = 0.0

    @property
    def params(self) -> Mapping[str, Any]:
        return self.record.point.params

    def value(self, metric: str) -> float | None:
        """The metric at the trial's end, when it is there and finite."""
        found = self.metrics.get(metric)
        return found if found is not None and math.isfinite(found) else None

    def pair_values(self, metric: str, beta: float | None) -> tuple[list[str], np.ndarray] | None:
        """The held-out pairs' names and the metric on each. A pair on which it is no finite number is left out."""
        trained = self.scores.get("trained")
        beta = self.params.get("orpo.beta", beta)
        values = pair_values(metric, trained, beta) if trained and beta is not None else None
        if not trained or values is None:
            return None
        finite = np.isfinite(values)
        return [name for name, known in zip(trained["pairs"], finite, strict=True) if known], values[finite]


@dataclass
class ReadSweep:
    """A sweep's trials, ranked. ``own`` is the metric that the sweep itself optimises, ``metric`` the one it is ranked by.

    ``space``: the swept parameters' distributions, empty when they are not known. ``experiment``: the composed config.
    ``source``: the sweep's folder or address. ``is_run``: whether a controller, or an array, is at it. ``read_rows`` gives a
    trial's logged rows. ``problems``: what else could not be read, for people.
    """

    name: str
    source: str
    own: Metric
    metric: Metric
    entries: list[Entry]
    space: Mapping[str, Distribution] = field(default_factory=dict)
    experiment: Experiment | None = None
    folder: SweepFolder | None = None
    sweep_id: str = ""
    fingerprint: str = ""
    is_run: bool = False
    problems: list[str] = field(default_factory=list)
    read_rows: Callable[[Entry], list[dict[str, Any]]] = lambda _: []

    def best(self) -> Entry:
        """The winner. Raises FolderError when no trial has completed yet."""
        found = next((entry for entry in self.entries if entry.rank == 1), None)
        if found is None:
            raise FolderError(f"the sweep {self.source} has no winner: {self.why_unranked()}")
        return found

    def best_command(self) -> str:
        """The command that runs the winner again. Raises FolderError as ``best``."""
        return trial_of(self.best()).read_spec().command

    def why_unranked(self) -> str:
        """Why no trial has a rank."""
        completed = [entry for entry in self.entries if entry.record.state == TrialState.COMPLETED]
        if not completed:
            return self._why_incomplete()
        logged = sorted({name for entry in completed for name in entry.metrics if name.startswith("eval/")})
        return (
            f"{len(completed)} trials have completed but none has {self.metric.name}. Rank by another with --metric: "
            f"{', '.join(logged) or 'none was logged'}."
        )

    def _why_incomplete(self) -> str:
        """Why no trial has completed."""
        ended = Counter(entry.state for entry in self.entries if entry.record.ended)
        said = f" So far: {', '.join(f'{n} {state}' for state, n in sorted(ended.items()))}." if ended else ""
        if self.is_run:
            return f"no trial has completed yet, and the sweep runs.{said} How far it is: isaerft-sweep status {self.source}"
        if self.folder is None:
            return f"no run has finished yet.{said}"
        if not self.entries:
            return "no trial was made: the check before the first one failed, or was interrupted. Run its command again."
        return f"no trial has completed yet.{said} Run its command again to go on."

    @property
    def swept(self) -> list[str]:
        """The parameters that were given more than one value."""
        values: dict[str, set[str]] = {}
        for entry in self.entries:
            for key, value in entry.params.items():
                values.setdefault(key, set()).add(repr(value))
        return [key for key, found in values.items() if len(found) > 1]

    @property
    def columns(self) -> list[Column]:
        """The swept parameters as the columns of a table."""
        return columns_for((entry.params for entry in self.entries), self.space)

    @property
    def beta(self) -> float | None:
        """Beta of the trials that were not given one of their own."""
        return self.experiment.orpo.beta if self.experiment else None


def read_sweep_folder(path: Path, metric: str | None = None, ending: bool = False) -> ReadSweep:
    """The sweep in ``path``, ranked by ``metric`` or by its own. Raises FolderError when there is none.

    ``ending``: the caller is its controller, which has just ended.
    """
    folder = SweepFolder(path.expanduser().absolute())
    parts = folder.agent_run_folders() or [folder]
    if not parts[0].journal.is_file():
        raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, but there is none.")
    record, entries = SweepRecord(), []
    for part in parts:
        record = SweepRecord()
        replay(part.journal, record)
        entries += [_entry(trial, part) for trial in record.trials.values()]
    if len(parts) > 1:
        _number(entries)
    own = Metric(record.metric, record.goal)
    sweep = ReadSweep(
        name=folder.path.name,
        source=str(folder.path),
        own=own,
        metric=read_metric_name(metric, own),
        entries=entries,
        space=read_space(folder),
        experiment=_experiment(folder),
        folder=folder,
        sweep_id=record.sweep_id,
        fingerprint=record.fingerprint,
        is_run=not ending and (any(is_held(part) for part in parts) or _array_runs(folder, entries)),
        read_rows=lambda entry: entry.folder.read_metrics() if entry.folder else [],
    )
    if not sweep.space and folder.definition.is_file() and folder.definition.read_bytes().strip() not in (b"", b"{}"):
        sweep.problems.append(
            f"{folder.definition} is not a valid sweep file any more: the edges of the space are not known."
        )
    launcher = sweep.experiment.launcher if sweep.experiment else None
    per_device = launcher.trials_per_gpu if launcher and launcher.kind == "local" and not launcher.slots else 1
    shares = device_seconds((entry.record for entry in entries), per_device)
    for entry in entries:
        entry.device_s = shares[entry.record.index]
    rank(sweep)
    return sweep


def _array_runs(folder: SweepFolder, entries: list[Entry]) -> bool:
    """Whether workers that no controller sees to have said something lately."""
    if not folder.static_array.exists():
        return False
    lately = time.time() - SILENT_S
    running = [entry.folder for entry in entries if entry.state == TrialState.RUNNING and entry.folder]
    return any(folder.read_status().heartbeat > lately for folder in running)


def _entry(record: TrialRecord, sweep: SweepFolder) -> Entry:
    """The trial as its folder tells. One that cannot be read is shown as such, and does not hide the others."""
    folder = sweep.trial(record.name)
    if record.attempt and not folder.path.is_dir():
        problem = f"its folder {folder.path} is not there any more, so it has no rank. Restore it."
        return Entry(record, {}, {}, state=GONE, problem=problem)
    try:
        status, scores = folder.read_status(), folder.read_evaluation()
        state = status.state or record.state if record.state is TrialState.QUEUED else record.state
        metrics = {name: float(value) for name, value in status.metrics.items()}
        untrained = {name: float(value) for name, value in status.untrained.items()}
        for found in scores.values():
            if not len(found["pairs"]) == len(found["chosen"]) == len(found["rejected"]):
                raise ValueError("evaluation.json must have as many scores as pairs")
        return Entry(record, metrics, untrained, scores, folder, state=state)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        problem = (
            f"status.json or evaluation.json in {folder.path} cannot be read ({type(error).__name__}: {error}). It was "
            "changed by hand or its disk is broken: restore it."
        )
        return Entry(record, {}, {}, folder=folder, state=UNREADABLE, problem=problem)


def _number(entries: list[Entry]) -> None:
    """Runs that agents made have no number of their own: by their folders' age."""
    entries.sort(key=lambda entry: entry.folder.spec.stat().st_ctime if entry.folder and entry.folder.spec.exists() else 0)
    for index, entry in enumerate(entries):
        entry.record.index = index


def is_sweep(path: Path) -> bool:
    """Whether there is a sweep in ``path``."""
    folder = SweepFolder(path)
    return folder.journal.is_file() or bool(folder.agent_run_folders())


def read_space(folder: SweepFolder) -> Mapping[str, Distribution]:
    """The distributions of ``sweep.yaml``; none for a single trial, whose file is empty."""
    try:
        raw = yaml.safe_load(folder.definition.read_text(encoding="utf-8"))
        return read_sweep(raw).parameters if raw else {}
    except (OSError, yaml.YAMLError, ConfigError, SpaceError):
        return {}  # it is written for people: a report must not fail for it


def _experiment(folder: SweepFolder) -> Experiment | None:
    try:
        raw = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        experiment: Experiment = from_mapping(Experiment, raw, "")
        return experiment
    except (OSError, yaml.YAMLError, ConfigError, TypeError):
        return None


def rank(sweep: ReadSweep) -> None:
    """Completed trials from best to worst, then the others by number; with intervals and probabilities of being best."""
    name, sign = sweep.metric.name, sweep.metric.sign

    def key(entry: Entry) -> tuple[bool, float]:
        value = entry.value(name) if entry.record.state == TrialState.COMPLETED else None
        return (value is None, entry.record.index if value is None else -sign * value)

    sweep.entries.sort(key=key)
    for place, entry in enumerate(sweep.entries, 1):
        ranked = entry.record.state == TrialState.COMPLETED and entry.value(name) is not None
        entry.rank = place if ranked else None
        values = entry.pair_values(name, sweep.beta) if ranked and place <= SCORED else None
        entry.interval = interval(values[1]) if values else None
    _compare(sweep)


def _compare(sweep: ReadSweep) -> None:
    """Fill in the probability of being best, over the pairs that all leaders were evaluated on.

    Trials of one point are one candidate: with different seeds they tell how much the seed matters, with the same one they
    are the same trial twice.
    """
    tables: dict[str, dict[Any, dict[str, float]]] = {}
    leaders = [entry for entry in sweep.entries[:SCORED] if entry.interval]
    for entry in leaders:
        scored = entry.pair_values(sweep.metric.name, sweep.beta)
        assert scored is not None
        of_point = tables.setdefault(without_seed(entry.params), {})
        of_point.setdefault(entry.params.get(SEED), dict(zip(*scored, strict=True)))
    if len(tables) < 2:
        return
    everyones = [table for of_point in tables.values() for table in of_point.values()]
    common = [pair for pair in everyones[0] if all(pair in table for table in everyones)]
    if not common:
        return
    runs = [np.array([[table[pair] for pair in common] for table in of_point.values()]) for of_point in tables.values()]
    shares = dict(zip(tables, probability_best(runs, sweep.metric.sign), strict=True))
    for entry in leaders:
        entry.probability_best = float(shares[without_seed(entry.params)])


def without_seed(params: Mapping[str, Any]) -> str:
    """Equal for points that differ only in their seed."""
    return canonical_json({key: value for key, value in params.items() if key != SEED})


def shared_untrained(sweep: ReadSweep) -> dict[str, float]:
    """The untrained model's metrics that are the same for all trials: no swept parameter changes them."""
    first = next((entry.untrained for entry in sweep.entries if entry.untrained), {})
    return {name: value for name, value in first.items() if not dependence(name, sweep.swept)}


def trial_of(entry: Entry) -> TrialFolder:
    """The entry's folder. Raises FolderError when the sweep was read from W&B."""
    if entry.folder is None:
        raise FolderError(f"the trial {entry.record.name} is in W&B, not on this machine. Give the sweep's folder.")
    return entry.folder


def best_as_json(sweep: ReadSweep) -> str:
    """The winner with all that is needed to use it."""
    winner = sweep.best()
    facts = {
        "name": winner.record.name,
        "run_id": winner.record.run_id,
        "path": str(winner.folder.path) if winner.folder else None,
        "params": dict(winner.params),
        "metric": {sweep.metric.name: winner.value(sweep.metric.name)},
        "interval_95": winner.interval,
        "probability_best": winner.probability_best,
        "metrics": winner.metrics,
    }
    return json.dumps(facts, indent=1)
