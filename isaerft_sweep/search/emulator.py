"""Emulates the training of an adapter that adds a constant vector, from the recorded gradients of trials that have run.

Such an adapter shows the model one vector v = b @ W_dec, and ORPO's loss is NLL + β · OR. With the same batches, step t of
any trial is determined by v: the gradients of both parts at v are interpolated between those that trials recorded at their v
of step t, and clipping, AdamW, schedule and L1 are arithmetic on b. What an evaluation would give at the final v is
interpolated between the evaluations of the same trials. Neither model nor torch is needed.

Vectors are seen by their coordinates z in the span of all recorded ones, which is nearly all of their length. Interpolation
is by Gaussian processes with a constant, a linear and a Matérn 5/2 part (Rasmussen and Williams 2006, section 2.7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from isaerft_sweep.search.gaussian_process import matern

LEAST_ANCHORS = 3
"""Recorded trials below which nothing is emulated."""
SPAN_ERROR = 1e-3
"""Directions of the recorded vectors below this share of the longest are left out; and at most ``MOST_DIRECTIONS`` kept."""
MOST_DIRECTIONS = 16
CONSTANT = 100.0
"""Variance of the constant part, of which the data tell everything."""
JITTER = 1e-4
"""Variance of noise of a metric, in units of its own: with less, points that nearly coincide make it steep."""
GRADIENT_REACH, GRADIENT_NOISE = 2.0, 1e-6
"""Of the interpolation of gradients: the Matérn part's length scale, in units of the anchors' length at that step, and the
variance of noise. There is no linear part: small differences between anchors would be extrapolated."""
BENDS = (0.1, 0.5, 2.0)
"""Standard deviation of the part that is not linear, in units of the linear one's at the anchors' mean length."""
REACHES = (0.5, 1.0, 2.0)
"""Its length scales, in units of that length."""
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as transformers' Trainer has them."""


@dataclass(frozen=True)
class Recipe:
    """What a trial trains with, as far as it can be emulated. ``steps``: of the optimiser."""

    learning_rate: float
    beta: float
    steps: int
    warmup_steps: int
    schedule: str
    l1: float
    max_grad_norm: float

    @property
    def rates(self) -> np.ndarray:
        """The learning rate of each step [steps], as transformers' ``get_scheduler`` gives it."""
        step = np.arange(self.steps)
        warm = np.where(step < self.warmup_steps, step / max(1, self.warmup_steps), 1.0)
        if self.schedule == "constant":
            warm = np.ones(self.steps)
        share = np.clip((step - self.warmup_steps) / max(1, self.steps - self.warmup_steps), 0.0, 1.0)
        if self.schedule == "linear":
            warm = warm * (1 - share)
        elif self.schedule == "cosine":
            warm = warm * 0.5 * (1 + np.cos(math.pi * share))
        return self.learning_rate * warm


@dataclass(frozen=True)
class Anchor:
    """A trial that was trained and has recorded its gradients, of n numbers at d coordinates of the residual stream.

    ``gradients`` [steps, 2, n]: of NLL and OR for b. ``vectors`` [steps + 1, d]: v before each step and after the last.
    ``projected`` [steps + 1, n]: W_dec v. ``evaluations``: metrics by the step after which they were measured.
    """

    recipe: Recipe
    gradients: np.ndarray
    vectors: np.ndarray
    projected: np.ndarray
    evaluations: Mapping[int, Mapping[str, float]]


class AdamW:
    """torch's AdamW without weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), for rows of numbers, float32."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.values = np.zeros(shape, np.float32)
        self._mean, self._square = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._steps = 0

    def step(self, gradient: np.ndarray, rates: np.ndarray | float) -> None:
        """One step with gradients of the values' shape. ``rates``: broadcast against them."""
        self._steps += 1
        first, second = BETAS
        self._mean += np.float32(1 - first) * (gradient - self._mean)
        self._square *= np.float32(second)
        self._square += np.float32(1 - second) * gradient * gradient
        sizes = np.asarray(rates, np.float64) / (1 - first**self._steps)
        root = np.sqrt(self._square)
        root /= np.float32(math.sqrt(1 - second**self._steps))
        root += np.float32(EPSILON)
        self.values -= (sizes.astype(np.float32) * self._mean) / root


class Kernel:
    """A constant, a linear and a Matérn 5/2 part, on coordinates in units of the anchors' mean length."""

    def __init__(self, bend: float, reach: float) -> None:
        self.bend, self.reach = bend, reach

    def __call__(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Covariances [one, other] of points [points, coordinates]."""
        lengths = np.full(one.shape[1], self.reach)
        covariance: np.ndarray = CONSTANT + one @ other.T + self.bend**2 * matern(one, other, lengths)
        return covariance


class Interpolation:
    """Values at points [points, coordinates], interpolated. The kernel is the one with the smallest leave-one-out error."""

    def __init__(self, points: np.ndarray, values: np.ndarray) -> None:
        self.points, self.middle = points, float(values.mean())
        self._scale = float(values.std()) or 1.0
        scaled = (values - self.middle) / self._scale
        fits = [(*self._fit(Kernel(bend, reach), scaled), Kernel(bend, reach)) for bend in BENDS for reach in REACHES]
        _, self._weights, self.kernel = min(fits, key=lambda fit: fit[0])

    def _fit(self, kernel: Kernel, scaled: np.ndarray) -> tuple[float, np.ndarray]:
        """The leave-one-out error and the weights (Rasmussen and Williams 2006, equation 5.12)."""
        inverse = np.linalg.inv(kernel(self.points, self.points) + JITTER * np.eye(len(self.points)))
        weights: np.ndarray = inverse @ scaled
        return float(((weights / np.diag(inverse)) ** 2).mean()), weights

    def at(self, points: np.ndarray) -> np.ndarray:
        """The values [points] at points [points, coordinates]."""
        values: np.ndarray = self.middle + self._scale * (self.kernel(points, self.points) @ self._weights)
        return values


class Emulator:
    """Emulates trials from anchors that took the same batches."""

    def __init__(self, anchors: Sequence[Anchor]) -> None:
        self.anchors = list(anchors)
        vectors = np.concatenate([anchor.vectors for anchor in self.anchors])
        projected = np.concatenate([anchor.projected for anchor in self.anchors])
        left, sizes, _ = np.linalg.svd(vectors, full_matrices=False)
        kept = sizes > SPAN_ERROR * sizes[0]
        kept[MOST_DIRECTIONS:] = False
        # z = U v for the span's basis U = left / sizes @ vectors; of b it is b @ to_coordinates
        unit = math.sqrt(float(np.mean([(anchor.vectors[-1] ** 2).sum() for anchor in self.anchors]))) or 1.0
        mixing = (left[:, kept] / sizes[kept] / unit).astype(np.float32)
        self.to_coordinates = projected.T @ mixing
        self.coordinates = [anchor.vectors @ (vectors.T @ mixing) for anchor in self.anchors]
        """Of each anchor's vectors [steps + 1, directions]."""

    @cached_property
    def steps(self) -> int:
        """The longest training that can be emulated."""
        return max(len(anchor.gradients) for anchor in self.anchors)

    def train(self, recipes: Sequence[Recipe]) -> np.ndarray:
        """The coordinates [recipes, directions] of the vectors that the recipes, of the same number of steps, end with.

        Not a number where they have more steps than any anchor.
        """
        steps = recipes[0].steps
        if steps > self.steps:
            return np.full((len(recipes), self.to_coordinates.shape[1]), np.nan)
        rates = np.stack([recipe.rates for recipe in recipes])
        betas = np.array([recipe.beta for recipe in recipes], np.float32)[:, None]
        limits = np.array([recipe.max_grad_norm or math.inf for recipe in recipes])
        shrink = np.array([recipe.l1 for recipe in recipes])
        optimizer = AdamW((len(recipes), self.to_coordinates.shape[0]))
        for t in range(steps):
            weights = self._weights(optimizer.values @ self.to_coordinates, t)
            nll, odds_ratio = (np.stack([self.anchors[i].gradients[t, part] for i in self._reaching(t)]) for part in (0, 1))
            gradient = weights @ nll + (betas * weights) @ odds_ratio
            norms = np.sqrt((gradient.astype(np.float64) ** 2).sum(axis=1))
            gradient *= np.minimum(1.0, limits / (norms + 1e-6)).astype(np.float32)[:, None]
            optimizer.step(gradient, rates[:, t, None])
            if shrink.any():
                least = (rates[:, t] * shrink).astype(np.float32)[:, None]
                optimizer.values = np.sign(optimizer.values) * np.maximum(np.abs(optimizer.values) - least, 0)
        coordinates: np.ndarray = optimizer.values @ self.to_coordinates
        return coordinates

    def _weights(self, at: np.ndarray, step: int) -> np.ndarray:
        """The shares [points, anchors] of those that reach a step in its gradients at coordinates [points, directions]."""
        known = np.stack([self.coordinates[i][step] for i in self._reaching(step)])
        length = math.sqrt(float((known**2).sum(axis=1).mean())) or 1.0  # the first step's vectors are all zero
        known, at = known / length, at / length
        reach = np.full(known.shape[1], GRADIENT_REACH)
        covariance = CONSTANT + matern(known, known, reach) + GRADIENT_NOISE * np.eye(len(known))
        weights: np.ndarray = np.linalg.solve(covariance, (CONSTANT + matern(at, known, reach)).T).T
        return weights.astype(np.float32)

    def _reaching(self, step: int) -> list[int]:
        """Numbers of the anchors that have taken a step, counted from 0."""
        return [i for i, anchor in enumerate(self.anchors) if len(anchor.gradients) > step]

    def metric(self, name: str) -> Interpolation:
        """The metric as a function of coordinates, by the evaluations of all anchors."""
        points, values = [], []
        for anchor, coordinates in zip(self.anchors, self.coordinates, strict=True):
            for step, metrics in anchor.evaluations.items():
                if name in metrics:
                    points.append(coordinates[step])
                    values.append(metrics[name])
        return Interpolation(np.stack(points), np.array(values))

    def without(self, number: int) -> Emulator:
        """The emulator of all anchors but one."""
        return Emulator([anchor for other, anchor in enumerate(self.anchors) if other != number])
