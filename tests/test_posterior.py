"""Stated probabilities and intervals: against formulas, against draws by another route, and in simulated sweeps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats
from scipy.spatial.distance import cdist

from isaerft_sweep.results import posterior as module
from isaerft_sweep.results.posterior import Trials, matern, posterior

NO_SEEDS = {1e-6: 1.0}


def one_seed(values: np.ndarray, places: np.ndarray | None = None) -> Trials:
    return Trials(values, np.arange(len(values)), np.zeros(len(values), dtype=int), places)


def test_the_kernel_is_materns() -> None:
    """The general formula with Bessel functions, Rasmussen and Williams 4.14, at nu = 5/2."""
    rng = np.random.default_rng(0)
    one, other = rng.random((5, 3)), rng.random((4, 3))
    lengths = np.array([0.2, 0.5, 1.3])
    scaled = np.sqrt(5) * cdist(one / lengths, other / lengths)
    expected = 2**-1.5 / special.gamma(2.5) * scaled**2.5 * special.kv(2.5, scaled)
    assert matern(one, other, lengths) == pytest.approx(expected)


def test_one_hypothesis_is_the_textbooks_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """A normal prior with unknown mean, by another route: Gaussian conditioning with a huge variance for the mean."""
    rng = np.random.default_rng(1)
    values, places = rng.normal(size=(6, 1)).repeat(9, axis=1), rng.random((6, 2))
    for name, only in (("SCALES", (1.0,)), ("LENGTH_SCALES", (0.5,)), ("SEED_RATIOS", {0.5: 1.0})):
        monkeypatch.setattr(module, name, only)
    found = posterior(one_seed(values, places))
    means = values.mean(axis=1)
    distance = np.sqrt(5) * cdist(places, places) / 0.5
    kernel = (1 + distance + distance**2 / 3) * np.exp(-distance)
    nearest = (cdist(places, places) + 9 * np.eye(6)).argmin(axis=1)
    variance = means.var(ddof=1)
    noise = 0.25 * variance * np.mean(2 * (1 - kernel[np.arange(6), nearest]))
    prior = variance * kernel + 1e4
    expected = prior @ np.linalg.solve(prior + noise * np.eye(6), means)
    assert found.mean == pytest.approx(expected, abs=2e-3)
    covariance = prior - prior @ np.linalg.solve(prior + noise * np.eye(6), prior)
    pairs = values.mean(axis=0).var(ddof=1) / 9  # the pairs' common effect: here all pairs are equal
    half = 1.96 * np.sqrt(np.diag(covariance) + pairs)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)
    drawn = rng.multivariate_normal(expected, covariance, size=50_000).argmax(axis=1)
    assert found.probability_best == pytest.approx(np.bincount(drawn, minlength=6) / 50_000, abs=0.03)


def test_what_is_better_on_every_pair_is_best_and_what_is_equal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, 50)
    assert posterior(one_seed(np.stack([values, values]))).probability_best == pytest.approx([0.5, 0.5], abs=0.03)
    monkeypatch.setattr(module, "SEED_RATIOS", NO_SEEDS)
    better = np.stack([values, values + 0.3])  # paired: certain, though the intervals overlap
    assert posterior(one_seed(better)).probability_best[1] > 0.99
    assert posterior(one_seed(better), sign=-1).probability_best[0] > 0.99


def test_without_seeds_and_with_many_pairs_it_is_the_normal_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.1, 1, 400), rng.normal(0, 1, 400)
    monkeypatch.setattr(module, "SEED_RATIOS", NO_SEEDS)
    monkeypatch.setattr(module, "SCALES", (30.0,))  # as good as flat
    flat = stats.norm.cdf((a - b).mean() / ((a - b).std() / 20))
    assert posterior(one_seed(np.stack([a, b]))).probability_best[0] == pytest.approx(flat, abs=0.04)


def test_the_spread_over_seeds_is_found_from_repeats() -> None:
    rng = np.random.default_rng(4)
    quality = rng.normal(0, 1, 12)
    point, seed = np.arange(12).repeat(4), np.tile(np.arange(4), 12)
    values = (quality[point] + 0.3 * rng.normal(size=48))[:, None]
    found = posterior(Trials(values, point, seed))
    assert found.seed_sd == pytest.approx(0.3, rel=0.25)
    assert found.mean == pytest.approx(values.reshape(12, 4).mean(axis=1), abs=0.15)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_luck_with_seeds_alone_is_rarely_called_certain(seeds: int) -> None:
    """Three candidates that are equal but for the noise of seeds."""
    rng = np.random.default_rng(seeds)
    point, seed = np.arange(3).repeat(seeds), np.tile(np.arange(seeds), 3)
    certain = [
        posterior(Trials(rng.normal(0, 1, (3 * seeds, 1)), point, seed)).probability_best.max() >= 0.95 for _ in range(100)
    ]
    assert sum(certain) <= 10


def test_probabilities_sum_to_one_whatever_the_numbers() -> None:
    rng = np.random.default_rng(5)
    tables = np.zeros((3, 9)), np.ones((2, 9)), rng.integers(0, 2, (4, 9)).astype(float), rng.normal(size=(2, 8)) * 1e6
    for values in tables:
        found = posterior(one_seed(values, rng.random((len(values), 1))))
        assert found.probability_best.sum() == pytest.approx(1) and np.isfinite([found.low, found.high, found.mean]).all()
        assert (found.low <= found.mean).all() and (found.mean <= found.high).all()
    assert posterior(one_seed(np.ones((2, 9)))).low[0] < 0.9, "nine of nine do not make a share of 1 certain"


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_statements_are_true_as_often_as_they_say(ratio: float) -> None:
    """120 sweeps of 8 trials on a smooth surface whose seeds vary by ``ratio`` times the difference of neighbours."""
    rng = np.random.default_rng(6)
    stated, true, covered = [], [], []
    for _ in range(120):
        places = rng.random((8, 2))
        quality = np.cos(places @ rng.normal(0, 4, (2, 20)) + rng.uniform(0, 7, 20)).sum(axis=1)
        nearest = (cdist(places, places) + 9 * np.eye(8)).argmin(axis=1)
        noise = ratio * np.sqrt(np.mean((quality - quality[nearest]) ** 2))
        pairs = 5 * rng.normal(size=48) + rng.normal(size=(8, 48))
        found = posterior(one_seed((quality + noise * rng.normal(size=8))[:, None] + pairs, places))
        winner = found.mean.argmax()
        stated.append(found.probability_best[winner])
        true.append(winner == quality.argmax())
        covered.append(found.low[winner] <= quality[winner] <= found.high[winner])
    assert np.mean(stated) == pytest.approx(np.mean(true), abs=0.16), "the spread over seeds is not known, only assumed"
    assert np.mean((np.array(stated) - np.array(true)) ** 2) < 0.26
    assert np.mean(covered) >= 0.9
