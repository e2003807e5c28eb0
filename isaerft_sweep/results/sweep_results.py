"""What is known of a sweep and its trials, ranked; ``reading.py`` reads it from a folder, ``from_wandb.py`` from W&B."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isaerft_sweep.errors import FolderError
from isaerft_sweep.journal.journal import TrialRecord
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.paths import quoted
from isaerft_sweep.results.caveats import dependence
from isaerft_sweep.results.columns import Column, columns_for
from isaerft_sweep.results.statistics import interval, pair_values
from isaerft_sweep.search.constraints import Constraint
from isaerft_sweep.search.distributions import Distribution
from isaerft_sweep.search.seeded import SEED, without_seed
from isaerft_sweep.search.sweep_file import Metric
from isaerft_sweep.specs import Experiment, OrpoSpec

KIND = "adapter.kind"


@dataclass
class RankedTrial:
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
        return _pair_values(trained, metric, self, orpo) if trained else None


@dataclass
class SweepResults:
    """A sweep's ranked trials. ``own``: the metric that the sweep optimises. ``metric``: the one that ranks the trials.

    ``space``: distributions of the swept parameters, empty when unknown. ``experiment``: the composed config. ``source``:
    the sweep's folder or URL. ``is_running``: whether a controller or an array runs it. ``read_rows``: returns a trial's
    logged rows. ``problems``: what else could not be read, one message each. ``constraints``: those of the sweep file.
    ``confirmation``: the trials of ``isaerft-sweep confirm``. ``seeds_known``: whether a point has two seeds, so that the
    spread over seeds is measured and trials are ranked by ``expected``. ``seed_sd``: that spread, a standard deviation.
    """

    name: str
    source: str
    own: Metric
    metric: Metric
    entries: list[RankedTrial]
    space: Mapping[str, Distribution] = field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    experiment: Experiment | None = None
    folder: SweepFolder | None = None
    sweep_id: str = ""
    fingerprint: str = ""
    is_running: bool = False
    problems: list[str] = field(default_factory=list)
    goals: tuple[Metric, ...] = ()
    """All metrics of a sweep with several goals, while it is ranked by them."""
    prefer: Mapping[str, float] = field(default_factory=dict)
    """Weights of the goals; 1 where there is none."""
    confirmation: list[RankedTrial] = field(default_factory=list)
    seeds_known: bool = False
    seed_sd: float | None = None
    read_rows: Callable[[RankedTrial], list[dict[str, Any]]] = lambda _: []

    @property
    def winner(self) -> RankedTrial | None:
        """The first trial, if it has completed and meets the constraints."""
        return next((entry for entry in self.entries if entry.rank == 1 and not entry.violation), None)

    def best(self) -> RankedTrial:
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
            bounds = ", ".join(map(str, self.constraints))
            words = f"none of {len(completed)} completed trials meets the constraints ({bounds}). "
            measured = {name for entry in completed for name in entry.metrics}
            if missing := [c.metric for c in self.constraints if c.metric not in measured]:
                return f"{words}No run has measured {', '.join(missing)}."
            values = ", ".join(f"{c.metric} {nearest.metrics.get(c.metric, math.nan):.4g}" for c in self.constraints)
            return words + f"The nearest is trial {nearest.record.index + 1}: {values}. Search a milder range, or relax it."
        logged = sorted({name for entry in completed for name in entry.metrics if name.startswith("eval/")})
        return (
            f"{len(completed)} trials have completed but none has {self.metric.name}. Rank by another with --metric: "
            f"{', '.join(logged) or 'none was logged'}."
        )

    def _why_incomplete(self) -> str:
        """Why no trial has completed."""
        ended = Counter(entry.state for entry in self.entries if entry.record.ended)
        counts = f" So far: {', '.join(f'{n} {state}' for state, n in sorted(ended.items()))}." if ended else ""
        if self.is_running:
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

    def points_with_seeds(self) -> list[list[RankedTrial]]:
        """The ranked trials of each point that has several seeds of its own, best point first."""
        points = by_point(entry for entry in self.entries if entry.rank)
        return [entries for entries in points if len({entry.params.get(SEED) for entry in entries}) > 1]

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


def by_point(entries: Iterable[RankedTrial]) -> list[list[RankedTrial]]:
    """The trials of each point, which differ in their seed alone, in the order of their first appearance."""
    points: dict[str, list[RankedTrial]] = {}
    for entry in entries:
        points.setdefault(without_seed(entry.params), []).append(entry)
    return list(points.values())


def kind_of(entry: RankedTrial, sweep: SweepResults) -> str:
    """The trial's ``adapter.kind``; empty when it is not known."""
    configured = sweep.experiment.adapter.kind if sweep.experiment else ""
    return str(entry.params.get(KIND, configured))


def paired_gain(
    entry: RankedTrial, sweep: SweepResults, on: str = ""
) -> tuple[float, tuple[float, float] | None, int] | None:
    """By how much the trial is better than the untrained model on the same pairs: the mean, its 95 % interval over pairs and
    their number; None where that is not known, or where a swept parameter alone changes the metric.

    ``on``: ``test_`` for the test pairs.
    """
    metric = sweep.metric.name
    before = next((e.scores[f"{on}untrained"] for e in sweep.entries if f"{on}untrained" in e.scores), None)
    if before is None or f"{on}trained" not in entry.scores or dependence(metric, sweep.swept):
        return None
    tables = []
    for scores in (entry.scores[f"{on}trained"], before):
        values = _pair_values(scores, metric, entry, sweep.orpo)
        if values is None:
            return None
        tables.append(dict(zip(numbered(values[0]), values[1], strict=True)))
    trained, untrained = tables
    common = [name for name in trained if name in untrained]
    if not common:
        return None
    gains = sweep.metric.sign * np.array([trained[name] - untrained[name] for name in common])
    return float(gains.mean()), interval(gains), len(common)


def numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with the number of times that it came before: a pair may be there several times."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        result.append((name, seen[name]))
        seen[name] += 1
    return result


def _pair_values(
    scores: Mapping[str, Any], metric: str, entry: RankedTrial, orpo: OrpoSpec | None
) -> tuple[list[str], np.ndarray] | None:
    """Names of the pairs and the metric on each [pairs], without pairs on which it is not finite."""
    beta = entry.params.get("orpo.beta", orpo.beta if orpo else None)
    loss = entry.params.get("orpo.loss", orpo.loss if orpo else "orpo")
    values = pair_values(metric, scores, beta, loss) if beta is not None else None
    if values is None:
        return None
    finite = np.isfinite(values)
    return [name for name, is_finite in zip(scores["pairs"], finite, strict=True) if is_finite], values[finite]


def shared_untrained(sweep: SweepResults) -> dict[str, float]:
    """Those metrics of the untrained model that no swept parameter changes, so that all trials share them."""
    first = next((entry.untrained for entry in sweep.entries if entry.untrained), {})
    return {name: value for name, value in first.items() if not dependence(name, sweep.swept)}


def trial_of(entry: RankedTrial) -> TrialFolder:
    """The entry's folder. Raises FolderError when the sweep was read from W&B."""
    if entry.folder is None:
        raise FolderError(f"the trial {entry.record.name} is in W&B, not on this machine. Use the sweep's folder.")
    return entry.folder
