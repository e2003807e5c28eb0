"""Bayesian optimisation for few parameters: an exact Gaussian process on the unit cube, in numpy and scipy.

Matérn 5/2 with one length scale per parameter; hyperparameters by maximum a posteriori with analytic gradients (Rasmussen
and Williams 2006, equations 2.30, 4.17 and 5.9); the next point by the largest expected improvement over the best posterior
mean, in logarithms (Ament et al. 2023, arXiv 2310.20708). Points that still run count as observed at their posterior mean
("kriging believer", Ginsbourger et al. 2010), so that parallel trials spread. Results of earlier sweeps are further tasks
(Bonilla et al. 2008), each with an offset of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isaerft_sweep.search.distributions import Categorical, Conditional, Constant, Distribution, Numeric, is_ordered
from isaerft_sweep.search.point import Point

MOST_PARAMETERS = 6
"""With more of them a tree model needs fewer trials."""
MOST_STEPS = 64
"""A parameter with at most so many values is seen as a list of them."""
CATEGORY = 0.6
"""Distance of a category from the origin on its own axis."""
CANDIDATES, NEAR, LEADERS = 1024, 64, 5
"""Candidates: quasi-random ones, and so many near each of the leaders."""
SPREADS = (0.15, 0.04, 0.01)
"""Standard deviations of the candidates near a leader."""
FLOOR = 2.0
"""Values this many times further below the median than the best is above it are cut: how bad a bad point is says little of
where the best is. A trial that diverged is at the floor."""
LENGTH_PRIOR = (np.log(0.4), 0.7)
NOISE_PRIOR = (np.log(0.05), 1.0)
SCALE_PRIOR = (0.0, 0.7)
"""Mean and standard deviation of the logarithms of length scales, noise and scale, for standardised values."""
BOUNDS = {"length": (-3.5, 2.0), "noise": (-7.0, 0.5), "scale": (-2.0, 2.0)}
JITTER = 1e-8
RELATED = (0.8, 0.0, 0.4, 0.95)
"""Possible correlations between the same point in two sweeps, apart from their offsets; the first until results tell."""
MOST_VIOLATION = 1e6
LEAST_OWN = 5
"""Values of this sweep from which their own spread is the unit."""
OFFSET = 1.0
"""Standard deviation of a sweep's offset, for standardised values."""


@dataclass(frozen=True)
class Tasks:
    """The sweep that each point is of [points], 0 for this one; ``related``: correlation of what two sweeps share."""

    of: np.ndarray
    related: float = RELATED[0]

    @property
    def several(self) -> bool:
        return bool(self.of.any())

    def between(self, other: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
        """Correlations and covariance of offsets [other, points] of points of the sweeps ``other`` and these."""
        same = other[:, None] == self.of[None, :]
        return np.where(same, 1.0, self.related), OFFSET**2 * same if self.several else 0.0


@dataclass(frozen=True)
class Posterior:
    """A fitted process. ``predict`` gives mean and standard deviation of the standardised values, noise left out.

    ``tasks``: the sweeps that the points are of.
    """

    x: np.ndarray
    tasks: Tasks
    lengths: np.ndarray
    scale: float
    noise: float
    factor: np.ndarray
    weights: np.ndarray

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at x [points, coordinates] in this sweep."""
        related, offsets = self.tasks.between(np.zeros(len(x), dtype=int))
        across = self.scale**2 * _matern(x, self.x, self.lengths)[0] * related + offsets
        mean = across @ self.weights
        solved = np.linalg.solve(self.factor, across.T)
        own = self.scale**2 + (OFFSET**2 if self.tasks.several else 0.0)
        variance = own - (solved**2).sum(axis=0)
        return mean, np.sqrt(np.maximum(variance, 1e-12))


def fit(x: np.ndarray, y: np.ndarray, task: np.ndarray | None = None) -> Posterior:
    """The process for the values y [points] at x [points, coordinates], with the most probable hyperparameters.

    ``task`` [points]: the sweep that each point is of; None: all are of this one, number 0.
    """
    from scipy.optimize import minimize

    tasks = Tasks(np.zeros(len(x), dtype=int) if task is None else task)
    dimensions = x.shape[1]
    bounds = [BOUNDS["length"]] * dimensions + [BOUNDS["scale"], BOUNDS["noise"]]
    starts = [
        [length] * dimensions + [0.0, noise] for length, noise in ((LENGTH_PRIOR[0], np.log(0.05)), (-1.8, np.log(0.2)))
    ]
    data = (x, y, tasks)
    results = [minimize(_objective, np.array(s), args=data, jac=True, method="L-BFGS-B", bounds=bounds) for s in starts]
    logs = min(results, key=lambda result: float(result.fun)).x
    if tasks.several:
        others = [replace(tasks, related=related) for related in RELATED]
        tasks = min(others, key=lambda one: _objective(logs, x, y, one)[0])
    return _posterior(x, y, tasks, logs)


def _posterior(x: np.ndarray, y: np.ndarray, tasks: Tasks, logs: np.ndarray) -> Posterior:
    lengths, scale, noise = np.exp(logs[:-2]), float(np.exp(logs[-2])), float(np.exp(logs[-1]))
    related, offsets = tasks.between(tasks.of)
    covariance = scale**2 * _matern(x, x, lengths)[0] * related + offsets + (noise**2 + JITTER) * np.eye(len(x))
    factor = np.linalg.cholesky(covariance)
    weights = np.linalg.solve(factor.T, np.linalg.solve(factor, y))
    return Posterior(x, tasks, lengths, scale, noise, factor, weights)


def _objective(logs: np.ndarray, x: np.ndarray, y: np.ndarray, tasks: Tasks) -> tuple[float, np.ndarray]:
    """Minus the log posterior of the hyperparameters, and its gradient."""
    lengths, scale, noise = np.exp(logs[:-2]), np.exp(logs[-2]), np.exp(logs[-1])
    kernel, distance = _matern(x, x, lengths)
    related, offsets = tasks.between(tasks.of)
    kernel *= related
    covariance = scale**2 * kernel + offsets + (noise**2 + JITTER) * np.eye(len(x))
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return 1e10, np.zeros_like(logs)
    inverse = np.linalg.inv(factor)
    inverse = inverse.T @ inverse
    weights = inverse @ y
    inner = np.outer(weights, weights) - inverse
    gradient = np.empty_like(logs)
    # dK / d log length_d of Matérn 5/2: 5/3 · (1 + √5 r) · exp(−√5 r) · (difference_d / length_d)²
    slope = scale**2 * related * 5 / 3 * (1 + distance) * np.exp(-distance)
    for d, length in enumerate(lengths):
        gradient[d] = 0.5 * (inner * slope * ((x[:, None, d] - x[None, :, d]) / length) ** 2).sum()
    gradient[-2] = (inner * scale**2 * kernel).sum()
    gradient[-1] = np.trace(inner) * noise**2
    priors = [LENGTH_PRIOR] * len(lengths) + [SCALE_PRIOR, NOISE_PRIOR]
    means, sds = np.array(priors).T
    value = -0.5 * y @ weights - np.log(np.diag(factor)).sum() - 0.5 * (((logs - means) / sds) ** 2).sum()
    return -float(value), -(gradient - (logs - means) / sds**2)


def matern(one: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Matérn 5/2 correlations [one, other] of points [points, coordinates] with one length scale per coordinate."""
    return _matern(one, other, lengths)[0]


def _matern(one: np.ndarray, other: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations [one, other] and √5 times the scaled distances."""
    squares = (((one[:, None, :] - other[None, :, :]) / lengths) ** 2).sum(axis=-1)
    distance = np.sqrt(5 * squares)
    return (1 + distance + distance**2 / 3) * np.exp(-distance), distance


def log_expected_improvement(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """log E[max(f − best, 0)] for f normal; finite where the expectation itself is 0 in floating point."""
    from scipy.special import erfcx, log_ndtr

    z = (mean - best) / sd
    log_density = -0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    low = np.minimum(z, -1.0)
    # φ(z) + z Φ(z) = φ(z) · (1 − |z| √(π/2) erfcx(|z| / √2)) for z < 0; for large |z| the bracket is z⁻²
    bracket = 1 - np.abs(low) * np.sqrt(np.pi / 2) * erfcx(np.abs(low) / np.sqrt(2))
    small = (
        -0.5 * low**2
        - 0.5 * np.log(2 * np.pi)
        + np.where(low < -1e3, -2 * np.log(-low), np.log(np.maximum(bracket, 1e-300)))
    )
    high = np.maximum(z, -1.0)
    large = np.log(np.exp(np.where(z > -1, log_density, 0.0)) + high * np.exp(log_ndtr(high)))
    return np.asarray(np.log(sd) + np.where(z > -1, large, small))


class GaussianProcessModel:
    """Suggests points from those observed. The same history gives the same points, in any order."""

    kind = "gp"

    def __init__(self, space: Mapping[str, Distribution], seed: int) -> None:
        self.space, self.seed = dict(space), seed
        self.free = [key for key, d in self.space.items() if not isinstance(d, Constant)]
        self.pending: dict[str, list[Point]] = {}
        self.observed: list[tuple[Point, float | None]] = []
        """Points with their values, larger is better; None for one that diverged."""
        self.earlier: list[list[tuple[Point, float | None]]] = []
        """The same of each earlier sweep."""
        self.violations: dict[str, float] = {}
        """How far an observed point breaks the sweep's constraints, by key."""
        self._ranked: tuple[Any, list[dict[str, float]]] | None = None
        self._gain = 0.0

    @property
    def outcomes(self) -> int:
        return len(self.observed) + sum(map(len, self.earlier))

    def learn(self, earlier: list[list[tuple[Point, float | None]]]) -> None:
        """Take the results of earlier sweeps, larger is better."""
        self.earlier = earlier

    def add_pending(self, point: Point) -> None:
        self.pending.setdefault(point.key, []).append(point)

    def tell(self, point: Point, values: Sequence[float] | None, violation: float = 0.0) -> None:
        waiting = self.pending.get(point.key)
        if waiting:
            point = waiting.pop()
            self.observed.append((point, None if values is None else float(values[0])))
            self.violations[point.key] = min(violation, MOST_VIOLATION)

    def forget(self, point: Point) -> None:
        waiting = self.pending.get(point.key)
        if waiting:
            waiting.pop()

    def expected_gain(self, number: int) -> float:
        """The expected improvement of point ``number`` over the best posterior mean, in units of the metric."""
        self.suggest(number, 0)
        return self._gain

    def suggest(self, number: int, attempt: int) -> dict[str, float]:
        """The candidate number ``attempt``, from the best, as point ``number`` of the sweep; on the unit cube, by key."""
        running = sorted(key for key, points in self.pending.items() for _ in points)
        state = (number, len(self.observed), tuple(running))
        if self._ranked is None or self._ranked[0] != state:
            self._ranked = state, self._rank(number)
        ranked = self._ranked[1]
        return ranked[min(attempt, len(ranked) - 1)]

    def _rank(self, number: int) -> list[dict[str, float]]:
        """Candidates by expected improvement, best first."""
        tasks = [self.observed, *self.earlier]
        tasks = [sorted(one, key=lambda entry: (entry[0].key, entry[1] is None, entry[1] or 0.0)) for one in tasks]
        observed = [entry for one in tasks for entry in one]
        x = np.array([self.coordinates(point.unit) for point, _ in observed])
        task = np.repeat(np.arange(len(tasks)), [len(one) for one in tasks])
        y, sd = _standardised_tasks([[value for _, value in one] for one in tasks])
        model = fit(x, y, task)
        running = [p for key in sorted(self.pending) for p in self.pending[key]]
        if running:
            at = np.array([self.coordinates(point.unit) for point in running])
            believed = model.predict(at)[0]
            logs = np.log([*model.lengths, model.scale, model.noise])
            of = np.concatenate([task, np.zeros(len(running), dtype=int)])
            both = np.concatenate([x, at]), np.concatenate([y, believed])
            model = _posterior(*both, replace(model.tasks, of=of), logs)
        means = model.predict(x)[0]
        own = [point for point, _ in tasks[0]]
        broken = np.array([self.violations[point.key] for point in own] + [0.0] * (len(x) - len(own)))
        # leaders are those that meet the constraints, then those that break them least
        order = np.lexsort((-means, broken))
        candidates = self._candidates(number, [observed[i][0].unit for i in order])
        at = np.array([self.coordinates(unit) for unit in candidates])
        met = (means[task == 0] if own else means)[broken[: len(own) or len(x)] == 0]
        # without a point that meets the constraints, one is looked for
        gain = log_expected_improvement(*model.predict(at), best=float(met.max())) if len(met) else np.zeros(len(at))
        if broken.any():
            gain = gain + self._log_feasibility(x[: len(own)], broken[: len(own)], at)
        self._gain = sd * float(np.exp(gain.max()))
        return [candidates[i] for i in np.argsort(-gain, kind="stable")]

    def _log_feasibility(self, x: np.ndarray, broken: np.ndarray, at: np.ndarray) -> np.ndarray:
        """log of the probability that the constraints are met at ``at`` (Gardner et al. 2014, arXiv 1403.5087).

        A process of how far they are broken. Where they are met it is not known by how much: counted as half the median.
        """
        from scipy.special import log_ndtr

        margin = float(np.median(broken[broken > 0])) / 2
        signed = np.log1p(broken / margin) * (broken > 0) - np.log1p(1.0) * (broken == 0)
        spread = float(signed.std()) or 1.0
        mean, sd = fit(x, (signed - signed.mean()) / spread).predict(at)
        return np.asarray(log_ndtr(-(mean + signed.mean() / spread) / sd))

    def _candidates(self, number: int, best_first: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        from scipy.stats import qmc

        rng = np.random.default_rng([self.seed, number])
        units = [qmc.Sobol(len(self.free), scramble=True, rng=rng).random(CANDIDATES)]
        for leader in best_first[:LEADERS]:
            centre = np.array([leader[key] for key in self.free])
            for spread in SPREADS:
                units.append(np.clip(centre + spread * rng.standard_normal((NEAR, len(self.free))), 0.0, 1.0))
        return [dict(zip(self.free, map(float, row), strict=True)) for row in np.concatenate(units)]

    def coordinates(self, unit: Mapping[str, float]) -> list[float]:
        """Where the process sees a point: a number at its u, a value of a list at its place, a category on its axis."""
        axes: list[float] = []
        for key in self.free:
            distribution, u = self.space[key], unit.get(key, 0.5)
            values = _values(distribution)
            if not values:
                axes.append(u)
                continue
            assert not isinstance(distribution, Conditional)
            place = values.index(distribution.at(u))
            if is_ordered(values):
                axes.append(place / max(1, len(values) - 1))
            else:
                axes += [CATEGORY * (place == other) for other in range(len(values))]
        return axes


def _values(distribution: Distribution) -> tuple[Any, ...]:
    """The values of a parameter with few of them; empty for one that is seen by its u."""
    if isinstance(distribution, Categorical):
        return distribution.values
    is_short = isinstance(distribution, Numeric) and distribution.size <= MOST_STEPS
    return (distribution.choices or ()) if is_short else ()


def _standardised(values: Sequence[float | None]) -> tuple[np.ndarray, float]:
    """Values [points] with mean 0 and standard deviation 1, bad ones at the floor; the divisor."""
    finite = np.array([value for value in values if value is not None])
    if not len(finite):
        return np.zeros(len(values)), 0.0
    middle, best = float(np.median(finite)), float(finite.max())
    floor = max(middle - FLOOR * (best - middle), float(finite.min())) if best > middle else float(finite.min())
    cut = np.array([floor if value is None else max(value, floor) for value in values])
    sd = float(cut.std())
    return ((cut - cut.mean()) / sd if sd > 0 else np.zeros(len(cut))), sd


def _standardised_tasks(tasks: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, float]:
    """The values of all tasks in a row, each task with mean 0; the divisor, by which all are divided.

    This sweep's own, once it has spread; else that of the earlier ones.
    """
    parts = [_standardised(values) for values in tasks]
    own = parts[0][1] if len(tasks[0]) >= LEAST_OWN or len(tasks) == 1 else 0.0
    sd = own or float(np.mean([sd for _, sd in parts[1:] if sd > 0] or [parts[0][1]]))
    scaled = [values * part_sd / sd if sd > 0 else values for values, part_sd in parts]
    return np.concatenate(scaled), sd
