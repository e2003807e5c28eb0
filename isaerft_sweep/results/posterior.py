"""What a sweep's results say of its points: a Gaussian model of points, seeds and held-out pairs.

A trial at point x with seed s has on pair i the value

    y = mu + g(x) + common(s) + own(x, s) + pair(i) + deviation(x, i).

``g`` is a Gaussian process over the unit cube, Matérn 5/2 (Rasmussen and Williams 2006, equation 4.17), or independent from
point to point. The quality of a point is mu + g(x), its expected value over seeds and pairs. ``mu`` is unknown (flat
prior). The covariance of the deviations comes from the pairs themselves. Everything else is a sum over a grid of
hypotheses, weighted by their marginal likelihood (the same book, equation 2.30, with mu integrated out as in 2.45):

- the standard deviation of ``g``: a quarter to three times that of the observed values;
- its length scale: independent points, 0.2, 0.5 or 1.2 of the cube's edge;
- the standard deviation over seeds. Before a point has two seeds it is assumed: 0 to 1.5 times the typical difference
  between a point and its neighbour (``SEED_RATIOS``, with weights that fall), and at least ``Trials.least_seed_sd``. With
  two seeds at one point it is measured: 0.02 to 1.5 times the standard deviation of all values, each as likely;
- the part of it that all trials of a seed share: none or half, and nearly all once it is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from isaerft_sweep.search.gaussian_process import matern

SEED_RATIOS = {0.05: 0.2, 0.15: 0.1, 0.3: 0.15, 0.5: 0.15, 0.75: 0.15, 1.0: 0.15, 1.5: 0.1}
"""Standard deviation over seeds, divided by the root mean square difference between neighbours: its prior probability."""
MEASURED_RATIOS = (0.02, 0.03, 0.045, 0.065, 0.1, 0.14, 0.2, 0.27, 0.36, 0.5, 0.7, 1.0, 1.5)
"""The same, divided by the standard deviation of all trials' values, once some point has two seeds."""
SHARED_BY_SEED, SHARED_MEASURED = (0.0, 0.5), (0.0, 0.5, 0.9, 1.0)
"""The part of the variance over seeds that all points of a seed share."""
LENGTH_SCALES = (0.0, 0.2, 0.5, 1.2)
"""0: no point says anything of another."""
SCALES, SMALL_SCALES = (0.25, 0.5, 0.75, 1.0, 1.4, 2.0, 3.0), (0.02, 0.08)
"""Standard deviation of ``g`` divided by that of the observed means; the small ones only once seeds are measured."""
JITTER = 1e-9
"""Of the average variance, added to every variance so that rounding leaves covariances positive."""
DRAWS = 4000
LEAST_WEIGHT = 1e-3
"""Hypotheses with less posterior weight than this part of the largest are left out."""


@dataclass(frozen=True)
class Posterior:
    """What is known of each point's quality: its expected value over seeds and pairs.

    ``mean``, ``low``, ``high`` [points]: posterior mean and 95 % interval. They are corrected for the winner's having been
    chosen, since the model knows of all points. ``probability_best`` [points]: that the point has the best quality.
    ``seed_sd``: posterior mean of the standard deviation over seeds.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    probability_best: np.ndarray
    seed_sd: float


@dataclass(frozen=True)
class Trials:
    """The results of trials, best described as a table of trials and pairs.

    ``values`` [trials, pairs]: the metric on each held-out pair; [trials, 1] where only its mean is known. ``point``
    [trials]: the number of each trial's point. ``seed`` [trials]: the number of its seed. ``places`` [points, parameters]:
    the points on the unit cube; None when they are unknown. ``least_seed_sd``: the smallest standard deviation over seeds
    that is possible while no point has two. ``varies`` [trials]: whether another seed would change the trial; None: each.
    """

    values: np.ndarray
    point: np.ndarray
    seed: np.ndarray
    places: np.ndarray | None = None
    least_seed_sd: float = 0.0
    varies: np.ndarray | None = None

    @property
    def seeds_known(self) -> bool:
        """Whether a point that varies over seeds has two of them."""
        varying = self.point if self.varies is None else self.point[self.varies]
        return len(varying) > len(set(varying.tolist()))

    @property
    def points(self) -> int:
        return int(self.point.max()) + 1


@dataclass(frozen=True)
class _Hypothesis:
    log_weight: float
    mean: np.ndarray
    covariance: np.ndarray
    seed_sd: float


def posterior(trials: Trials, sign: int = 1, seed: int = 0) -> Posterior:
    """The posterior of every point's quality, given all trials.

    Args:
        trials: at least two points.
        sign: +1 when more is better, −1 when less is.
        seed: of the draws.
    """
    means = trials.values.mean(axis=1)
    if np.ptp(means) == 0:
        return _all_equal(trials)
    within, common_sd, freedom = _pair_noise(trials.values)
    hypotheses = list(_hypotheses(trials, means, within))
    weights = np.exp([h.log_weight for h in hypotheses])
    weights /= weights.sum()
    rng = np.random.default_rng([seed, 2])
    counts = rng.multinomial(DRAWS, weights)
    quality = np.concatenate([_draws(h, int(count), rng) for h, count in zip(hypotheses, counts, strict=True) if count])
    best = np.argmax(sign * quality, axis=1)
    share = np.bincount(best, minlength=trials.points) / len(quality)
    # the pairs' common effect moves all points alike; its variance is estimated, so it is Student's t
    spread = np.sqrt(freedom / rng.chisquare(freedom, size=len(quality))) if freedom else np.ones(len(quality))
    quality += (common_sd * spread * rng.standard_normal(len(quality)))[:, None]
    low, high = np.quantile(quality, [0.025, 0.975], axis=0)
    mean = sum(weight * h.mean for weight, h in zip(weights, hypotheses, strict=True))
    seed_sd = float(sum(weight * h.seed_sd for weight, h in zip(weights, hypotheses, strict=True)))
    return Posterior(np.asarray(mean), low, high, share, seed_sd)


def _all_equal(trials: Trials) -> Posterior:
    mean = np.full(trials.points, trials.values.mean())
    _, common_sd, _ = _pair_noise(trials.values)
    return Posterior(mean, mean - 2 * common_sd, mean + 2 * common_sd, np.full(trials.points, 1 / trials.points), 0.0)


def _pair_noise(values: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Covariance of the trials' means through their deviations on pairs [trials, trials]; sd through the common effect.

    The third value is the number of degrees of freedom of both. The covariance is shrunk to a multiple of the identity as
    in Ledoit and Wolf 2004, since there may be fewer pairs than trials.
    """
    count, pairs = values.shape
    if pairs < 2:
        return np.zeros((count, count)), 0.0, 0
    deviations = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    sample = deviations @ deviations.T / (pairs - 1)
    average = np.trace(sample) / count
    distance = float(((sample - average * np.eye(count)) ** 2).sum())
    # the mean square error of the sample covariance, from the fourth moments
    error = float(((deviations**2).sum(axis=0) ** 2).sum() - pairs * (sample**2).sum()) / pairs**2
    shrink = min(1.0, max(0.0, error) / distance) if distance > 0 else 1.0
    within = (1 - shrink) * sample + shrink * average * np.eye(count)
    common = values.mean(axis=0).var(ddof=1)
    if np.isin(values, (0.0, 1.0)).all():  # Agresti and Coull 1998: shares of 0 and 1 are not certain
        share = (values.mean() * pairs + 2) / (pairs + 4)
        common = max(common, share * (1 - share) * pairs / (pairs + 4))
    return within / pairs, float(np.sqrt(common / pairs)), pairs - 1


def _hypotheses(trials: Trials, means: np.ndarray, within: np.ndarray) -> Iterator[_Hypothesis]:
    """Those hypotheses that the data do not rule out."""
    design = np.eye(trials.points)[trials.point]
    same_seed = (trials.seed[:, None] == trials.seed[None, :]).astype(float)
    kept: list[tuple[float, np.ndarray, np.ndarray, float]] = []
    # with one seed in all, what trials share through it cannot be separated from mu
    several = len(set(trials.seed.tolist())) > 1
    known, spread_of_all = trials.seeds_known, float(means.std(ddof=1))
    shared_parts = (SHARED_MEASURED if known else SHARED_BY_SEED) if several else (0.0,)
    ratios = dict.fromkeys(MEASURED_RATIOS, 1 / len(MEASURED_RATIOS)) if known else SEED_RATIOS
    grid = list(itertools.product((*SMALL_SCALES, *SCALES) if known else SCALES, ratios.items(), shared_parts))
    varies = np.ones(len(means)) if trials.varies is None else trials.varies.astype(float)
    for kernel in _kernels(trials):
        neighbours = _neighbour_difference(kernel, trials.places)
        scales = [scale * spread_of_all for scale, _, _ in grid]
        if known:
            seed_sds = [ratio * spread_of_all for _, (ratio, _), _ in grid]
        else:
            seed_sds = [
                max(trials.least_seed_sd, scale * ratio * neighbours)
                for scale, (_, (ratio, _), _) in zip(scales, grid, strict=True)
            ]
        noises = [
            within + sd**2 * ((1 - shared) * np.eye(len(means)) + shared * same_seed) * np.outer(varies, varies)
            for sd, (_, _, shared) in zip(seed_sds, grid, strict=True)
        ]
        spread = design @ kernel @ design.T
        totals = np.stack([scale**2 * spread + noise for scale, noise in zip(scales, noises, strict=True)])
        weights = _log_likelihoods(means, totals) + np.log([probability for _, (_, probability), _ in grid])
        priors = [scale**2 * kernel for scale in scales]
        kept += zip(weights.tolist(), priors, noises, seed_sds, strict=True)
    largest = max(weight for weight, *_ in kept)
    for log_weight, prior, noise, seed_sd in kept:
        if log_weight - largest > np.log(LEAST_WEIGHT):
            yield _Hypothesis(log_weight - largest, *_condition(means, design, prior, noise), seed_sd)


def _kernels(trials: Trials) -> Iterator[np.ndarray]:
    """Correlations of the points [points, points], one matrix for each length scale."""
    for length in LENGTH_SCALES:
        if length == 0:
            yield np.eye(trials.points)
        elif trials.places is not None:
            yield matern(trials.places, trials.places, np.full(trials.places.shape[1], length))


def _neighbour_difference(kernel: np.ndarray, places: np.ndarray | None) -> float:
    """Root mean square difference of g between a point and its nearest neighbour, in units of g's standard deviation."""
    if places is None:
        return float(np.sqrt(2.0))
    distance = ((places[:, None, :] - places[None, :, :]) ** 2).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    return float(np.sqrt(np.mean(2 * (1 - kernel[np.arange(len(kernel)), nearest]))))


def _log_likelihoods(means: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """Log marginal likelihoods [hypotheses] with a flat prior on mu, up to a constant.

    ``covariances`` [hypotheses, trials, trials].
    """
    from scipy.linalg import solve_triangular

    count = len(means)
    jitter = JITTER * np.trace(covariances, axis1=1, axis2=2)[:, None, None] / count * np.eye(count)
    factors = np.linalg.cholesky(covariances + jitter)
    right = np.stack([means, np.ones(count)], axis=1)
    solved = np.stack([solve_triangular(factor, right, lower=True, check_finite=False) for factor in factors])
    ones = (solved[..., 1] ** 2).sum(axis=1)
    across = (solved[..., 0] * solved[..., 1]).sum(axis=1)
    rest = (solved[..., 0] ** 2).sum(axis=1) - across**2 / ones
    logs = np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
    return np.asarray(-logs - 0.5 * np.log(ones) - 0.5 * rest)


def _condition(means: np.ndarray, design: np.ndarray, prior: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean [points] and covariance [points, points] of mu + g."""
    total = design @ prior @ design.T + noise
    total += JITTER * np.trace(total) / len(means) * np.eye(len(means))
    across = design @ prior
    solved = np.linalg.solve(total, np.column_stack([across, means, np.ones(len(means))]))
    by_prior, by_means, by_ones = solved[:, : prior.shape[0]], solved[:, -2], solved[:, -1]
    mu = by_means.sum() / by_ones.sum()
    mean = mu + across.T @ (by_means - mu * by_ones)
    rest = 1 - across.T @ by_ones
    return mean, prior - across.T @ by_prior + np.outer(rest, rest) / by_ones.sum()


def _draws(hypothesis: _Hypothesis, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of every point's quality [count, points]."""
    values, vectors = np.linalg.eigh(hypothesis.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.asarray(hypothesis.mean + rng.standard_normal((count, len(values))) @ root.T)
