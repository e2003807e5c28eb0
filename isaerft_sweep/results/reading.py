"""Reads a sweep from its folder, during or after the run, without changing anything."""

from __future__ import annotations

import dataclasses
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
from isaerft_sweep.journal.journal import TrialRecord, is_held, read_record
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.journal.status import TrialStatus
from isaerft_sweep.paths import quoted
from isaerft_sweep.results.caveats import dependence
from isaerft_sweep.results.columns import Column, columns_for
from isaerft_sweep.results.confirm_folder import confirm_folder, confirmation_fingerprint
from isaerft_sweep.results.cost import device_seconds
from isaerft_sweep.results.pareto import fronts, preference, weights_of
from isaerft_sweep.results.statistics import pair_values
from isaerft_sweep.results.sureness import assess
from isaerft_sweep.search.constraints import Constraint, read_constraints, violation
from isaerft_sweep.search.distributions import Distribution
from isaerft_sweep.search.sweep_file import Metric, read_goals, read_metric_name, read_sweep
from isaerft_sweep.specs import Experiment, OrpoSpec

UNREADABLE, GONE = "unreadable", "deleted"
SILENT_S = 300.0
"""A worker without a controller counts as dead after this time without a heartbeat."""


@dataclass
class Entry:
    """One trial, ranked by the requested metric; ``rank`` is None when it did not complete.

    ``state``: from the journal, or from the worker's status while the job runs. ``problem``: why the trial's files cannot
    be read, else empty. ``violation``: how far the trial's metrics break the sweep's constraints.
    ``device_s``: device time of all attempts; time shared with other trials is divided among them.
    ``scores``: those of each held-out pair, from ``TrialFolder.read_evaluation``. ``expected``, ``interval``: posterior mean
    and 95 % interval of the metric's expected value over seeds and pairs; an interval alone, over the pairs, where there is
    one trial. ``probability_best``: that this expected value is the best of all trials.
    """

    record: TrialRecord
    metrics: dict[str, float]
    untrained: dict[str, float]
    scores: dict[str, Any] = field(default_factory=dict)
    folder: TrialFolder | None = None
    rank: int | None = None
    expected: float | None = None
    interval: tuple[float, float] | None = None
    probability_best: float | None = None
    state: str = ""
    violation: float = 0.0
    problem: str = ""
    device_s: float = 0.0
    on_front: bool = False
    """Whether no other trial is at least as good in every goal and better in one; false for sweeps with one goal."""

    @property
    def params(self) -> Mapping[str, Any]:
        return self.record.point.params

    def value(self, metric: str) -> float | None:
        """The final value of the metric; None when it is missing or not finite."""
        value = self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None

    def pair_values(self, metric: str, orpo: OrpoSpec | None) -> tuple[list[str], np.ndarray] | None:
        """Names of the held-out pairs and the metric on each [pairs], without pairs on which it is not finite.

        ``orpo``: the sweep's settings, for what the trial's params do not set.
        """
        trained = self.scores.get("trained")
        beta = self.params.get("orpo.beta", orpo.beta if orpo else None)
        loss = self.params.get("orpo.loss", orpo.loss if orpo else "orpo")
        values = pair_values(metric, trained, beta, loss) if trained and beta is not None else None
        if not trained or values is None:
            return None
        finite = np.isfinite(values)
        return [name for name, is_finite in zip(trained["pairs"], finite, strict=True) if is_finite], values[finite]


@dataclass
class ReadSweep:
    """A sweep's ranked trials. ``own``: the metric that the sweep optimises. ``metric``: the one that ranks the trials.

    ``space``: distributions of the swept parameters, empty when unknown. ``experiment``: the composed config. ``source``:
    the sweep's folder or URL. ``is_run``: whether a controller or an array runs it. ``read_rows``: returns a trial's logged
    rows. ``problems``: what else could not be read, one message each. ``constraints``: those of the sweep file.
    ``confirmation``: the trials of ``isaerft-sweep confirm``. ``seeds_known``: whether a point has two seeds, so that the
    spread over seeds is measured and trials are ranked by ``expected``. ``seed_sd``: that spread, a standard deviation.
    """

    name: str
    source: str
    own: Metric
    metric: Metric
    entries: list[Entry]
    space: Mapping[str, Distribution] = field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    experiment: Experiment | None = None
    folder: SweepFolder | None = None
    sweep_id: str = ""
    fingerprint: str = ""
    is_run: bool = False
    problems: list[str] = field(default_factory=list)
    goals: tuple[Metric, ...] = ()
    """All metrics of a sweep with several goals, while it is ranked by them."""
    prefer: Mapping[str, float] = field(default_factory=dict)
    """Weights of the goals; 1 where there is none."""
    confirmation: list[Entry] = field(default_factory=list)
    seeds_known: bool = False
    seed_sd: float | None = None
    read_rows: Callable[[Entry], list[dict[str, Any]]] = lambda _: []

    @property
    def winner(self) -> Entry | None:
        """The first trial, if it has completed and meets the constraints."""
        return next((entry for entry in self.entries if entry.rank == 1 and not entry.violation), None)

    def best(self) -> Entry:
        """The winner. Raises FolderError when no trial has completed yet, or none meets the constraints."""
        winner = self.winner
        if winner is None:
            raise FolderError(f"the sweep {self.source} has no winner: {self.why_unranked()}")
        return winner

    def best_command(self) -> str:
        """The command that runs the winner again. Raises FolderError as ``best``."""
        return trial_of(self.best()).read_spec().command

    def why_unranked(self) -> str:
        """Why no trial has a rank."""
        completed = [entry for entry in self.entries if entry.record.state == TrialState.COMPLETED]
        if not completed:
            return self._why_incomplete()
        if self.entries[0].rank == 1:
            nearest = self.entries[0]
            values = ", ".join(f"{c.metric} {nearest.metrics.get(c.metric, math.nan):.4g}" for c in self.constraints)
            bounds = ", ".join(map(str, self.constraints))
            return (
                f"none of {len(completed)} completed trials meets the constraints ({bounds}). "
                f"The nearest is trial {nearest.record.index + 1}: {values}. Search a milder range, or relax it."
            )
        logged = sorted({name for entry in completed for name in entry.metrics if name.startswith("eval/")})
        return (
            f"{len(completed)} trials have completed but none has {self.metric.name}. Rank by another with --metric: "
            f"{', '.join(logged) or 'none was logged'}."
        )

    def _why_incomplete(self) -> str:
        """Why no trial has completed."""
        ended = Counter(entry.state for entry in self.entries if entry.record.ended)
        counts = f" So far: {', '.join(f'{n} {state}' for state, n in sorted(ended.items()))}." if ended else ""
        if self.is_run:
            progress = f"isaerft-sweep status {quoted(self.source)}"
            return f"no trial has completed yet, and the sweep runs.{counts} Its progress: {progress}"
        if self.folder is None:
            return f"no run has finished yet.{counts}"
        if self.folder is not None and self.folder.static_array.exists():
            return f"no trial has completed yet.{counts} Submit slurm/trials.sbatch again for those that are left."
        if not self.entries:
            return "no trial was made: the check before the first one failed, or was interrupted. Run its command again."
        return f"no trial has completed yet.{counts} Run its command again to resume it."

    @property
    def swept(self) -> list[str]:
        """The parameters that have more than one value."""
        values: dict[str, set[str]] = {}
        for entry in self.entries:
            for key, value in entry.params.items():
                values.setdefault(key, set()).add(repr(value))
        return [key for key, different in values.items() if len(different) > 1]

    @property
    def columns(self) -> list[Column]:
        """The swept parameters as the columns of a table."""
        return columns_for((entry.params for entry in self.entries), self.space)

    @property
    def orpo(self) -> OrpoSpec | None:
        """Loss and optimiser of the trials whose params do not set them."""
        return self.experiment.orpo if self.experiment else None

    @property
    def dependence(self) -> list[str]:
        """Why the trials cannot be compared by the metric that ranks them; empty when they can."""
        loss = self.orpo.loss if self.orpo else "orpo"
        return dependence(self.metric.name, self.swept, self.metric.goal, loss)


def read_sweep_folder(
    path: Path, metric: str | None = None, ending: bool = False, prefer: Mapping[str, float] | None = None
) -> ReadSweep:
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
    sweep = ReadSweep(
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
        is_run=not ending and (any(is_held(part) for part in parts) or _array_runs(folder, entries)),
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


def _confirmation(sweep: ReadSweep) -> list[Entry]:
    """The trials that rerun this sweep's leaders with new seeds."""
    if sweep.folder is None or not confirm_folder(sweep.folder).journal.is_file():
        return []
    again = read_sweep_folder(confirm_folder(sweep.folder).path, sweep.metric.name)
    is_unrelated = again.fingerprint != confirmation_fingerprint(sweep.fingerprint)
    return [] if is_unrelated else again.entries


def _array_runs(folder: SweepFolder, entries: list[Entry]) -> bool:
    """Whether a worker of a static array, which has no controller, sent a recent heartbeat."""
    if not folder.static_array.exists():
        return False
    oldest_alive = time.time() - SILENT_S
    running = [entry.folder for entry in entries if entry.state == TrialState.RUNNING and entry.folder]
    return any(folder.read_status().heartbeat > oldest_alive for folder in running)


def _entry(record: TrialRecord, sweep: SweepFolder) -> Entry:
    """The trial from its folder. An unreadable one gets a ``problem``, so that the others are still shown."""
    folder = sweep.trial(record.name)
    if record.attempt and not folder.path.is_dir():
        problem = f"its folder {folder.path} is missing, so the trial has no rank. Restore it."
        return Entry(record, {}, {}, state=GONE, problem=problem)
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
        return Entry(record, metrics, untrained, scores, folder, state=state)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        problem = (
            f"status.json or evaluation.json in {folder.path} cannot be read ({type(error).__name__}: {error}). It was "
            "changed by hand or its disk is broken: restore it."
        )
        return Entry(record, {}, {}, folder=folder, state=UNREADABLE, problem=problem)


def _as_its_worker_says(record: TrialRecord, status: TrialStatus) -> TrialRecord:
    """A trial of a static array as ``attach`` will write it into the journal: no controller does so meanwhile."""
    begun, ended = status.started or status.heartbeat, status.ended or status.heartbeat
    record = dataclasses.replace(record, metric=status.metric, message=status.message, seconds=status.duration_s)
    spans = [(f"{status.host} {status.pid}", begun, ended)]
    return dataclasses.replace(record, state=status.state or record.state, spans=spans)


def _number(entries: list[Entry]) -> None:
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


def rank(sweep: ReadSweep) -> None:
    """Sort the entries, completed trials from best to worst, then the others by number; set ranks and uncertainties.

    The order is that of the metric; of its expected value over seeds and pairs once some point has two seeds.
    """
    name, sign = sweep.metric.name, sweep.metric.sign

    def key(entry: Entry) -> tuple[bool, float, float]:
        value = entry.value(name) if entry.record.state == TrialState.COMPLETED else None
        return (value is None, entry.violation, entry.record.index if value is None else -sign * value)

    for entry in sweep.entries:
        completed = entry.record.state == TrialState.COMPLETED
        entry.violation = violation(sweep.constraints, entry.metrics) if completed else 0.0

    sweep.entries.sort(key=key)
    for position, entry in enumerate(sweep.entries, 1):
        ranked = entry.record.state == TrialState.COMPLETED and entry.value(name) is not None
        entry.rank = position if ranked else None
    if sweep.goals:
        _rank_by_goals(sweep)
        return
    assess(sweep)
    if sweep.seeds_known:
        compared = [entry for entry in sweep.entries if entry.expected is not None]
        places = [sweep.entries.index(entry) for entry in compared]
        for place, entry in zip(places, sorted(compared, key=lambda e: -sign * (e.expected or 0.0)), strict=True):
            sweep.entries[place], entry.rank = entry, place + 1


def _rank_by_goals(sweep: ReadSweep) -> None:
    """Sort the ranked trials by their front, those of one front by ``pareto.preference``."""
    names = [goal.name for goal in sweep.goals]
    for name in sweep.prefer:
        if name not in names:
            raise SpaceError(f"--prefer must name a goal of the sweep ({', '.join(names)}) but got '{name}'.")
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


def shared_untrained(sweep: ReadSweep) -> dict[str, float]:
    """Those metrics of the untrained model that no swept parameter changes, so that all trials share them."""
    first = next((entry.untrained for entry in sweep.entries if entry.untrained), {})
    return {name: value for name, value in first.items() if not dependence(name, sweep.swept)}


def trial_of(entry: Entry) -> TrialFolder:
    """The entry's folder. Raises FolderError when the sweep was read from W&B."""
    if entry.folder is None:
        raise FolderError(f"the trial {entry.record.name} is in W&B, not on this machine. Use the sweep's folder.")
    return entry.folder


def best_as_json(sweep: ReadSweep) -> str:
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
