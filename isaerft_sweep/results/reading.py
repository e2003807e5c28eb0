"""Reads a sweep from its folder, during or after the run, without changing anything."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from isaerft_sweep.errors import ConfigError, FolderError, SpaceError
from isaerft_sweep.journal.journal import TrialRecord, is_held, read_record
from isaerft_sweep.journal.layout import SweepFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.results.confirm_folder import confirm_folder, confirmation_fingerprint
from isaerft_sweep.results.cost import device_seconds
from isaerft_sweep.results.pareto import fronts, preference, weights_of
from isaerft_sweep.results.sureness import assess
from isaerft_sweep.results.sweep_results import RankedTrial, SweepResults, by_point
from isaerft_sweep.search.constraints import Constraint, read_constraints, violation
from isaerft_sweep.search.distributions import Distribution
from isaerft_sweep.search.sweep_file import Metric, read_goals, read_metric_name, read_sweep
from isaerft_sweep.specs import Experiment

UNREADABLE, GONE = "unreadable", "deleted"
SILENT_S = 300.0
"""A worker without a controller counts as dead after this time without a heartbeat."""


def read_sweep_folder(
    path: Path, metric: str | None = None, ending: bool = False, prefer: Mapping[str, float] | None = None
) -> SweepResults:
    """The sweep in ``path``, ranked. Raises FolderError when ``path`` has no sweep.

    Args:
        path: the sweep's folder.
        metric: ranks the trials; None: the sweep's own.
        ending: whether the caller is the sweep's controller, which is ending.
        prefer: weights of the goals of a sweep with several. Raises SpaceError for another metric.
    """
    folder = SweepFolder(path.expanduser().absolute())
    parts = folder.agent_run_folders() or [folder]
    if not parts[0].journal.is_file():
        raise FolderError(f"'{path}' must be a sweep's folder with a journal.jsonl, but there is none.")
    entries = []
    for part in parts:
        record = read_record(part)
        entries += [_entry(trial, part) for trial in record.trials.values()]
    if len(parts) > 1:
        _number(entries)
    own, content = Metric(record.metric, record.goal), _sweep_file_content(folder)
    sweep = SweepResults(
        name=folder.path.name,
        source=str(folder.path),
        own=own,
        metric=read_metric_name(metric, own),
        entries=entries,
        space=_space(content),
        constraints=constraints_of(content),
        goals=goals_of(content) if metric is None else (),
        prefer=prefer or {},
        experiment=_experiment(folder),
        folder=folder,
        sweep_id=record.sweep_id,
        fingerprint=record.fingerprint,
        is_running=not ending and (any(is_held(part) for part in parts) or _array_runs(folder, entries)),
        read_rows=lambda entry: entry.folder.read_metrics() if entry.folder else [],
    )
    if not sweep.space and folder.definition.is_file() and folder.definition.read_bytes().strip() not in (b"", b"{}"):
        sweep.problems.append(f"{folder.definition} is no longer a valid sweep file: the edges of the space are unknown.")
    launcher = sweep.experiment.launcher if sweep.experiment else None
    per_device = launcher.trials_per_gpu if launcher and launcher.kind == "local" and not launcher.slots else 1
    shares = device_seconds((entry.record for entry in entries), per_device)
    for entry in entries:
        entry.device_s = shares[entry.record.index]
    sweep.confirmation = _confirmation(sweep)
    rank(sweep)
    return sweep


def _confirmation(sweep: SweepResults) -> list[RankedTrial]:
    """The trials that rerun this sweep's leaders with new seeds."""
    if sweep.folder is None or not confirm_folder(sweep.folder).journal.is_file():
        return []
    again = read_sweep_folder(confirm_folder(sweep.folder).path, sweep.metric.name)
    is_unrelated = again.fingerprint != confirmation_fingerprint(sweep.fingerprint)
    return [] if is_unrelated else again.entries


def _array_runs(folder: SweepFolder, entries: list[RankedTrial]) -> bool:
    """Whether a worker of a static array, which has no controller, sent a recent heartbeat."""
    if not folder.static_array.exists():
        return False
    oldest_alive = time.time() - SILENT_S
    running = [entry.folder for entry in entries if entry.state == TrialState.RUNNING and entry.folder]
    return any(folder.read_status().heartbeat > oldest_alive for folder in running)


def _entry(record: TrialRecord, sweep: SweepFolder) -> RankedTrial:
    """The trial from its folder. An unreadable one gets a ``problem``, so that the others are still shown."""
    folder = sweep.trial(record.name)
    if record.attempt and not folder.path.is_dir():
        problem = f"its folder {folder.path} is missing, so the trial has no rank. Restore it."
        return RankedTrial(record, {}, {}, state=GONE, problem=problem)
    try:
        status, scores = folder.read_status(), folder.read_evaluation()
        in_array = not record.attempt and sweep.static_array.exists()
        record = _as_its_worker_says(record, status) if in_array and status.is_final else record
        state = status.state or record.state if record.state is TrialState.QUEUED or in_array else record.state
        metrics = {name: float(value) for name, value in status.metrics.items()}
        untrained = {name: float(value) for name, value in status.untrained.items()}
        for table in scores.values():
            if not len(table["pairs"]) == len(table["chosen"]) == len(table["rejected"]):
                raise ValueError("evaluation.json must have as many scores as pairs")
        return RankedTrial(record, metrics, untrained, scores, folder, state=state)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        problem = (
            f"status.json or evaluation.json in {folder.path} cannot be read ({type(error).__name__}: {error}). It was "
            "changed by hand or its disk is broken: restore it."
        )
        return RankedTrial(record, {}, {}, folder=folder, state=UNREADABLE, problem=problem)


def _as_its_worker_says(record: TrialRecord, status: TrialStatus) -> TrialRecord:
    """A trial of a static array as ``attach`` will write it into the journal: no controller does so meanwhile."""
    begun, ended = status.started or status.heartbeat, status.ended or status.heartbeat
    record = dataclasses.replace(record, metric=status.metric, message=status.message, seconds=status.duration_s)
    spans = [(f"{status.host} {status.pid}", begun, ended)]
    return dataclasses.replace(record, state=status.state or record.state, spans=spans)


def _number(entries: list[RankedTrial]) -> None:
    """Number the runs of agents, which have no trial number, by the age of their folders."""
    entries.sort(key=lambda entry: entry.folder.spec.stat().st_ctime if entry.folder and entry.folder.spec.exists() else 0)
    for index, entry in enumerate(entries):
        entry.record.index = index


def is_sweep(path: Path) -> bool:
    """Whether ``path`` is a sweep's folder."""
    folder = SweepFolder(path)
    return folder.journal.is_file() or bool(folder.agent_run_folders())


def read_space(folder: SweepFolder) -> Mapping[str, Distribution]:
    """The distributions in ``sweep.yaml``; empty for a single trial, whose file is empty."""
    return _space(_sweep_file_content(folder))


def _sweep_file_content(folder: SweepFolder) -> Any:
    """``sweep.yaml``, parsed; None when it cannot be: it may have been edited, and a report must not fail because of it."""
    try:
        return yaml.safe_load(folder.definition.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None


def _space(content: Any) -> Mapping[str, Distribution]:
    try:
        return read_sweep(content).parameters if content else {}
    except (ConfigError, SpaceError):
        return {}


def constraints_of(content: Any) -> tuple[Constraint, ...]:
    """Those of a parsed sweep file; none when they cannot be read."""
    try:
        return read_constraints(content.get("constraints"), ours=False) if isinstance(content, Mapping) else ()
    except SpaceError:
        return ()


def goals_of(content: Any) -> tuple[Metric, ...]:
    """The metrics of a sweep with several goals; empty for one."""
    try:
        goals = read_goals(content, ours=False) if isinstance(content, Mapping) and "metrics" in content else ()
    except SpaceError:
        return ()
    return goals if len(goals) > 1 else ()


def _experiment(folder: SweepFolder) -> Experiment | None:
    try:
        return folder.read_config()
    except FolderError:
        return None


def rank(sweep: SweepResults) -> None:
    """Sort the entries, completed trials from best to worst, then the others by number; set ranks and uncertainties.

    The order is that of the metric; of its expected value over seeds and pairs once some point has two seeds.
    """
    name, sign = sweep.metric.name, sweep.metric.sign

    def key(entry: RankedTrial) -> tuple[bool, float, float]:
        value = entry.value(name) if entry.record.state == TrialState.COMPLETED else None
        return (value is None, entry.violation, entry.record.index if value is None else -sign * value)

    _judge(sweep)
    sweep.entries.sort(key=key)
    for position, entry in enumerate(sweep.entries, 1):
        ranked = entry.record.state == TrialState.COMPLETED and entry.value(name) is not None
        entry.rank = position if ranked else None
    if sweep.goals:
        _rank_by_goals(sweep)
        return
    if sweep.prefer:
        raise SpaceError(
            f"--prefer must go with a sweep of several goals (metrics: in its file) that is ranked by them, but this one is "
            f"ranked by {name} alone. Leave it out."
        )
    assess(sweep)
    if sweep.seeds_known:
        compared = [entry for entry in sweep.entries if entry.expected is not None]
        places = [sweep.entries.index(entry) for entry in compared]
        for place, entry in zip(places, sorted(compared, key=lambda e: -sign * (e.expected or 0.0)), strict=True):
            sweep.entries[place], entry.rank = entry, place + 1


def _judge(sweep: SweepResults) -> None:
    """Set how far each completed trial breaks the constraints: by its metrics, or by the means over its point's seeds."""
    for entry in sweep.entries:
        entry.violation = 0.0
    for entries in by_point(entry for entry in sweep.entries if entry.record.state == TrialState.COMPLETED):
        names = set.intersection(*(set(entry.metrics) for entry in entries))
        means = {name: float(np.mean([entry.metrics[name] for entry in entries])) for name in names}
        for entry in entries:
            entry.violation = violation(sweep.constraints, means)


def _rank_by_goals(sweep: SweepResults) -> None:
    """Sort the ranked trials by their front, those of one front by ``pareto.preference``."""
    names = [goal.name for goal in sweep.goals]
    for name in sweep.prefer:
        if name not in names:
            raise SpaceError(f"--prefer must name a goal of the sweep ({', '.join(names)}) but got '{name}'.")
    if not any(weights_of(names, sweep.prefer)):
        raise SpaceError(f"--prefer must leave a goal with a weight above 0 but sets all to 0: {', '.join(names)}.")
    ranked = [entry for entry in sweep.entries if entry.rank]
    feasible = [entry for entry in ranked if not entry.violation and all(entry.value(name) is not None for name in names)]
    if not feasible:
        return
    values = np.array([[goal.sign * (entry.value(goal.name) or 0.0) for goal in sweep.goals] for entry in feasible])
    numbers = fronts(values)
    score = np.zeros(len(feasible))
    for number in set(numbers.tolist()):
        score[numbers == number] = preference(values[numbers == number], weights_of(names, sweep.prefer))
    order = np.lexsort((-score, numbers))
    for entry, number in zip(feasible, numbers, strict=True):
        entry.on_front = bool(number == 0)
    rest = [entry for entry in sweep.entries if not any(entry is other for other in feasible)]
    sweep.entries[:] = [*(feasible[i] for i in order), *rest]
    for position, entry in enumerate(sweep.entries, 1):
        entry.rank = position if entry.rank else None


def best_as_json(sweep: SweepResults) -> str:
    """The winner with its params, metrics and path, as JSON."""
    winner = sweep.best()
    summary = {
        "name": winner.record.name,
        "run_id": winner.record.run_id,
        "path": str(winner.folder.path) if winner.folder else None,
        "params": dict(winner.params),
        "metric": {sweep.metric.name: winner.value(sweep.metric.name)},
        "expected": winner.expected,
        "interval_95": winner.interval,
        "probability_best": winner.probability_best,
        "metrics": winner.metrics,
    }
    return json.dumps(summary, indent=1)
