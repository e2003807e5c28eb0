"""Chooses points by emulating trials from the recorded gradients of those that have run.

Once three trials have recorded theirs, the next point is the one with the largest expected improvement among many that are
emulated (``search/emulator.py``). How wrong the emulator is follows from emulating each recorded trial from the others.
Emulated values choose points; only trials that were trained are results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zipfile import BadZipFile

import numpy as np

from isaerft_sweep.errors import ConfigError
from isaerft_sweep.journal.journal import read_record
from isaerft_sweep.journal.layout import SweepFolder, TrialFolder
from isaerft_sweep.journal.states import TrialState
from isaerft_sweep.metrics import depends_on_beta
from isaerft_sweep.search.constraints import Constraint
from isaerft_sweep.search.distributions import Constant
from isaerft_sweep.search.emulator import LEAST_ANCHORS, Anchor, Emulator, Recipe
from isaerft_sweep.search.gaussian_process import MOST_PARAMETERS, GaussianProcessModel, log_expected_improvement, matern
from isaerft_sweep.search.point import Point
from isaerft_sweep.search.sampler import Gain, Sampler
from isaerft_sweep.search.sweep_file import SweepDefinition
from isaerft_sweep.specs import Experiment

EMULATED_KINDS = ("bias", "random", "vector")
"""Of adapters: those that are trained and add a constant vector."""
EMULATED_KEYS = (
    "orpo.learning_rate",
    "orpo.beta",
    "orpo.warmup_steps",
    "orpo.schedule",
    "orpo.max_steps",
    "orpo.max_grad_norm",
    "adapter.l1",
)
EMULATED_OPTIMIZERS = ("auto", "adamw_torch", "adamw_torch_fused")
FIRST = (0.95, 0.05, 0.5)
"""The first points: a large learning rate with large and with small values of the rest, then a small one in their middle.
Between anchors the emulator interpolates, beyond them it guesses."""
FIRST_RATES, FIRST_RATES_ALONE = (0.95, 0.95, 0.35), (0.95, 0.1, 0.5)
CANDIDATES = 512
BUDGET = 4e9
"""Numbers that may be updated to emulate all candidates of one choice: about a minute of one core."""
REACH = 0.4
"""Length scale on the unit cube of the emulator's error."""
UNUSABLE = 0.5
"""With a leave-one-out error above this share of the trials' spread the emulator is not used."""
CHOSEN = "emulated from"
"""How the note of a point begins that the emulator has chosen. One such trial must have ended before a sweep has enough."""
MEDIAN_OF_SQUARES = 0.455
"""Of a standard normal variable: the median of chi-squared with one degree of freedom."""
NEGLIGIBLE = 0.01
"""An expected gain below this share of the emulated values' range is not worth a trial."""


@dataclass(frozen=True)
class Forecast:
    """Emulated points: the metric, larger is better, its standard deviation, and the log probability that the constraints
    are met, each [points]. ``error``: the median leave-one-out error of the metric."""

    points: list[Point]
    mean: np.ndarray
    sd: np.ndarray
    log_feasible: np.ndarray
    error: float


class EmulatedSearch:
    """A point source that emulates. While it cannot, ``source`` chooses."""

    def __init__(self, source: Sampler, experiment: Experiment, definition: SweepDefinition, folder: SweepFolder) -> None:
        """``folder``: the sweep's, where trials leave their records. ``check_emulation`` has been called with the others."""
        self.source, self.experiment, self.definition, self.folder = source, experiment, definition, folder
        self.method, self.repeats = source.method, source.repeats
        self._coordinates = GaussianProcessModel(source.space, source.seed).coordinates
        self._first = self._first_points()
        self._tried: dict[str, Point] = {}
        self._running: set[str] = set()
        self._outcomes: dict[str, tuple[float | None, float]] = {}
        """Of points that have one: the metric, None after a divergence, and how far the constraints are broken."""
        self._anchors: dict[str, Anchor] = {}
        self._looked_at: tuple[Any, ...] | None = None
        self._forecast: Forecast | None = None
        self._why_not = ""
        """Why the last look gave no forecast."""

    @property
    def size(self) -> float:
        return self.source.size

    @property
    def foreseeable(self) -> float:
        return max(1, len(self._first) - len(self._outcomes))

    def ask(self) -> Point | None:
        point = next((p for p in self._first if p.key not in self._tried), None) or self._best_emulated()
        if point is not None:
            self.restore(point)
            return point
        point = self.source.ask()
        if point is not None:
            point = replace(point, note=self._why_not)
            self._note(point)
        return point

    def tell(self, point: Point, value: float | None, violation: float = 0.0, others: Sequence[float] = ()) -> None:
        self._outcomes[point.key] = (value, violation)
        self._running.discard(point.key)
        self.source.tell(point, value, violation, others)

    def expected_gain(self) -> Gain | None:
        forecast = self._look()
        best = self._best_real()
        if forecast is None or best is None:
            return None
        possible = forecast.mean[forecast.log_feasible > math.log(0.5)]
        spread = float(np.ptp([*possible, best]))
        gain = float(np.exp(self._log_gain(forecast)).max(initial=0.0))
        is_confirmed = any(self._tried[key].note.startswith(CHOSEN) for key in self._outcomes)
        return Gain(gain, NEGLIGIBLE * spread if is_confirmed else None)

    def forget(self, point: Point) -> None:
        self._running.discard(point.key)
        self.source.forget(point)

    def restore(self, point: Point) -> None:
        self._note(point)
        self.source.restore(point)

    def pending_again(self, point: Point) -> None:
        self._outcomes.pop(point.key, None)
        self._running.add(point.key)
        self.source.pending_again(point)

    def _note(self, point: Point) -> None:
        self._tried[point.key] = point
        self._running.add(point.key)

    # -- which points come first

    def _first_points(self) -> list[Point]:
        rates = FIRST_RATES if len(self.source.free) > 1 else FIRST_RATES_ALONE
        units = [
            {key: rate if key == "orpo.learning_rate" else other for key in self.source.free}
            for rate, other in zip(rates, FIRST, strict=True)
        ]
        points = {point.key: point for point in map(self.source.point_at, units)}
        return list(points.values())

    # -- which point is next

    def _best_emulated(self) -> Point | None:
        forecast = self._look()
        if forecast is None or not forecast.points:
            return None
        gain = self._log_gain(forecast)
        best = int(np.argmax(gain))
        note = (
            f"{CHOSEN} {len(self._anchors)} trials: {self._sign * forecast.mean[best]:.4g} ± {forecast.sd[best]:.2g}, "
            f"leave-one-out error {forecast.error:.2g}"
        )
        if self._best_real() is not None:
            note += f", expected gain {math.exp(gain[best]):.2g}"
        return replace(forecast.points[best], note=note)

    def _log_gain(self, forecast: Forecast) -> np.ndarray:
        """log of the expected improvement times the probability that the constraints are met [points]."""
        best = self._best_real()
        if best is None:  # one that meets the constraints is looked for
            return forecast.log_feasible
        gains: np.ndarray = log_expected_improvement(forecast.mean, forecast.sd, best) + forecast.log_feasible
        return gains

    def _best_real(self) -> float | None:
        """The best metric of a trial that meets the constraints, larger is better."""
        values = [self._sign * value for value, broken in self._outcomes.values() if value is not None and not broken]
        return max(values, default=None)

    @property
    def _sign(self) -> int:
        return self.definition.metric.sign

    def _look(self) -> Forecast | None:
        """The forecast from all that has ended; None while the emulator cannot be used."""
        state = (tuple(sorted(self._outcomes)), tuple(sorted(self._running)))
        if state != self._looked_at:
            self._read_anchors()
            self._looked_at = state
            ended = sum(value is not None for value, _ in self._outcomes.values())
            self._why_not = (
                f"not emulated: of {ended} completed trials {len(self._anchors)} have whole records of their gradients, and "
                f"{LEAST_ANCHORS} are needed"
            )
            self._forecast = self._make_forecast() if len(self._anchors) >= LEAST_ANCHORS else None
        return self._forecast

    def _read_anchors(self) -> None:
        for record in read_record(self.folder).trials.values():
            key = record.point.key
            if record.state is TrialState.COMPLETED and key in self._outcomes and key not in self._anchors:
                anchor = read_anchor(self.folder.trial(record.name))
                if anchor is not None:
                    self._anchors[key] = anchor

    def _make_forecast(self) -> Forecast | None:
        keys = sorted(self._anchors)
        emulator = Emulator([self._anchors[key] for key in keys])
        at = np.array([self._place(self._tried[key]) for key in keys])
        values = {name: [_final(self._anchors[key])[name] for key in keys] for name in self._names}
        left_out: dict[str, list[float]] = {name: [] for name in self._names}
        for number, key in enumerate(keys):
            recipe = self._anchors[key].recipe
            for name, value in self._emulated(emulator.without(number), [recipe]).items():
                left_out[name].append(float(value[0]))
        errors = {name: np.array(left_out[name]) - np.array(values[name]) for name in self._names}
        metric = self.definition.metric.name
        error = float(np.nanmedian(np.abs(errors[metric])))  # one that has more steps than the others cannot be left out
        spread = float(np.std(values[metric]))
        if spread == 0:
            self._why_not = f"not emulated: {metric} is the same in all trials"
            return None
        if not error <= UNUSABLE * spread:
            self._why_not = (
                f"not emulated: the leave-one-out error, {error:.2g}, is too large beside the trials' spread, {spread:.2g}"
            )
            return None
        found = self._candidates(emulator)
        points, recipes = [point for point, _ in found], [recipe for _, recipe in found]
        if not points:
            self._why_not = "not emulated: no point is left that has not been tried"
            return Forecast([], np.zeros(0), np.zeros(0), np.zeros(0), error)
        emulated = self._emulated(emulator, recipes)
        candidates = np.array([self._place(point) for point in points])
        certain = self._certain(at, [self._tried[key] for key in sorted(self._running)])
        sds = {name: _sd_at(candidates, at, certain, errors[name]) for name in self._names}
        log_feasible = np.zeros(len(points))
        for constraint in self.definition.constraints:
            log_feasible += _log_met(constraint, emulated[constraint.metric], sds[constraint.metric])
        for key, (result, _) in self._outcomes.items():
            if result is None:  # a divergence: the nearer, the likelier another one
                near = matern(candidates, np.array([self._place(self._tried[key])]), _reaches(candidates))[:, 0]
                log_feasible += np.log(np.maximum(1 - near, 1e-12))
        return Forecast(points, self._sign * emulated[metric], sds[metric], log_feasible, error)

    def _certain(self, anchors: np.ndarray, pending: Sequence[Point]) -> np.ndarray:
        """Where the emulator's error is, or will be, known [points, coordinates]: at anchors and at trials that run."""
        places = [self._place(point) for point in pending]
        return np.concatenate([anchors, np.array(places)]) if places else anchors

    def _candidates(self, emulator: Emulator) -> list[tuple[Point, Recipe]]:
        """Points that have not been tried and can be emulated, with what they train with."""
        numbers = emulator.to_coordinates.shape[0] * emulator.steps
        most = int(min(CANDIDATES, max(32, BUDGET / max(1, numbers))))
        if self.source.size <= most:
            points = list(self.source.grid_points())
        else:
            points = [self.source.quasi_random(number) for number in range(most)]
        distinct = {point.key: point for point in points if point.key not in self._tried}
        candidates = [(point, self._recipe(point)) for point in distinct.values()]
        return [(point, recipe) for point, recipe in candidates if recipe.steps <= emulator.steps]

    def _recipe(self, point: Point) -> Recipe:
        experiment = self.experiment.with_params(point.params)
        return recipe_of(experiment, self._anchor_steps(experiment))

    def _anchor_steps(self, experiment: Experiment) -> int:
        if experiment.orpo.max_steps > 0:
            return experiment.orpo.max_steps
        return max(len(anchor.gradients) for anchor in self._anchors.values())

    def _place(self, point: Point) -> list[float]:
        return self._coordinates(point.unit)

    @property
    def _names(self) -> list[str]:
        """The metrics that decide."""
        return list(dict.fromkeys([self.definition.metric.name, *(c.metric for c in self.definition.constraints)]))

    def _emulated(self, emulator: Emulator, recipes: Sequence[Recipe]) -> dict[str, np.ndarray]:
        """The metrics that decide, emulated for each recipe."""
        at = np.empty((len(recipes), emulator.to_coordinates.shape[1]))
        for steps in {recipe.steps for recipe in recipes}:
            rows = [row for row, recipe in enumerate(recipes) if recipe.steps == steps]
            at[rows] = emulator.train([recipes[row] for row in rows])
        betas = np.array([recipe.beta for recipe in recipes])
        return {name: _metric_at(emulator, name, at, betas) for name in self._names}


def check_emulation(source: Sampler, experiment: Experiment, definition: SweepDefinition) -> None:
    """Raise ConfigError unless trials of this sweep can be emulated."""
    fixed = {key: d.value for key, d in source.space.items() if isinstance(d, Constant)}
    experiment = experiment.with_params(fixed)
    orpo, adapter = experiment.orpo, experiment.adapter
    goals = [goal.name for goal in definition.goals] or [definition.metric.name]
    measured = [*goals, *(constraint.metric for constraint in definition.constraints)]
    others = [key for key in source.free if key not in EMULATED_KEYS]
    needs: list[tuple[bool, str, Any]] = [
        (definition.method == "bayes", "method bayes", definition.method),
        (len(goals) == 1, "one metric", ", ".join(goals)),
        (0 < len(source.free) <= MOST_PARAMETERS, f"1 to {MOST_PARAMETERS} parameters", len(source.free)),
        (not others, f"parameters among {', '.join(EMULATED_KEYS)}", ", ".join(others)),
        (adapter.kind in EMULATED_KINDS, f"adapter.kind {', '.join(EMULATED_KINDS)}", adapter.kind),
        (adapter.top_k is None, "adapter.top_k=null", adapter.top_k),
        (orpo.loss == "orpo", "orpo.loss=orpo", orpo.loss),
        (orpo.optimizer in EMULATED_OPTIMIZERS, f"orpo.optimizer {', '.join(EMULATED_OPTIMIZERS)}", orpo.optimizer),
        (all(name.startswith("eval/") for name in measured), "metrics of evaluations (eval/…)", ", ".join(measured)),
        (experiment.sweep.seeds == 1, "sweep.seeds=1, since other seeds take other batches", experiment.sweep.seeds),
        (not definition.early_terminate, "trials that run to their end", "early_terminate"),
    ]
    for is_met, need, given in needs:
        if not is_met:
            raise ConfigError(f"sweep.emulate must go with {need}, but got {given}. Leave sweep.emulate out.")


def recipe_of(experiment: Experiment, steps: int) -> Recipe:
    """What a trial of the experiment trains with in ``steps`` steps."""
    orpo = experiment.orpo
    return Recipe(
        learning_rate=orpo.learning_rate,
        beta=orpo.beta,
        steps=steps,
        warmup_steps=orpo.warmup_steps,
        schedule=orpo.schedule,
        l1=experiment.adapter.l1 or 0.0,
        max_grad_norm=orpo.max_grad_norm,
    )


def read_anchor(trial: TrialFolder) -> Anchor | None:
    """What a completed trial has recorded; None when it has not, or not from its first step on."""
    try:
        with np.load(trial.gradients) as saved:
            gradients, vectors, projected = saved["gradients"], saved["vectors"], saved["projected"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    if len(vectors) != len(gradients) + 1:
        return None
    evaluations: dict[int, Mapping[str, float]] = {}
    for row in trial.read_metrics():
        metrics = {name: value for name, value in row.items() if name.startswith("eval/")}
        if metrics:
            evaluations[int(row["step"])] = metrics
    recipe = recipe_of(trial.read_spec().experiment, len(gradients))
    return Anchor(recipe, gradients, vectors, projected, evaluations)


def _final(anchor: Anchor) -> Mapping[str, float]:
    return anchor.evaluations[max(anchor.evaluations)]


def _metric_at(emulator: Emulator, name: str, at: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """The metric [points] at coordinates [points, directions]; one that contains beta is made of those that do not."""

    def value(kind: str) -> np.ndarray:
        return emulator.metric(f"eval/{kind}").at(at)

    if not depends_on_beta(name):
        return emulator.metric(name).at(at)
    kind = name.removeprefix("eval/")
    if kind == "loss":
        made = value("nll_loss") - betas * value("log_odds_ratio")
    elif kind == "rewards/margins":
        made = betas * (value("logps/chosen") - value("logps/rejected"))
    else:
        made = betas * value(kind.replace("rewards", "logps"))
    return np.asarray(made)


def _reaches(points: np.ndarray) -> np.ndarray:
    return np.full(points.shape[1], REACH)


def _sd_at(candidates: np.ndarray, anchors: np.ndarray, certain: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The standard deviation of the emulator's error at the candidates [candidates].

    The error is a process that is 0 at ``certain`` [points, coordinates]. Its variance follows from the leave-one-out
    ``errors`` [anchors] over what the process says of them (Rasmussen and Williams 2006, equation 5.12); from their median,
    since without an outer anchor the emulator extrapolates, which it does not do with all of them.
    """
    jitter = 1e-6
    own = matern(anchors, anchors, _reaches(anchors)) + jitter * np.eye(len(anchors))
    variance = float(np.nanmedian(errors**2 * np.diag(np.linalg.inv(own)))) / MEDIAN_OF_SQUARES
    known = matern(certain, certain, _reaches(certain)) + jitter * np.eye(len(certain))
    across = matern(candidates, certain, _reaches(certain))
    left = 1 - (across * np.linalg.solve(known, across.T).T).sum(axis=1)
    sds: np.ndarray = np.sqrt(np.maximum(variance * left, 1e-16))
    return sds


def _log_met(constraint: Constraint, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """log of the probability that the constraint is met [points]."""
    from scipy.special import log_ndtr

    margin = constraint.bound - mean if constraint.at_most else mean - constraint.bound
    return np.asarray(log_ndtr(margin / sd))
