"""Uncertainty of results: bootstrap over held-out pairs and over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

RESAMPLES = 2000
MIN_PAIRS = 8
CHUNK = 2_000_000
"""Bootstrap weights in memory at a time."""


def pair_values(metric: str, scores: Mapping[str, Any], beta: float, loss: str = "orpo") -> np.ndarray | None:
    """A metric's value on each pair [pairs], or None when the metric is not a mean over pairs.

    Args:
        metric: its name in W&B.
        scores: ``chosen`` and ``rejected`` [pairs]: mean log-probability per token of the answer, below 0.
        beta: of the loss; ORPO's and SimPO's rewards are beta · mean log-probability.
        loss: ``orpo.loss``. DPO's and CPO's rewards need more than the scores.

    The formulas are those of arXiv 2403.07691, equations 4 and 7.
    """
    chosen, rejected = (np.asarray(scores[side], dtype=float) for side in ("chosen", "rejected"))
    name = metric.removeprefix("eval/")
    if not metric.startswith("eval/") or not len(chosen):
        return None
    if name in ("log_odds_chosen", "log_odds_ratio"):
        odds = _log_odds(chosen) - _log_odds(rejected)
        log_ratio: np.ndarray = odds if name == "log_odds_chosen" else -np.logaddexp(0, -odds)
        return log_ratio
    if name.startswith("rewards/") and loss not in ("orpo", "simpo"):
        return None
    if name == "rewards/accuracies":
        return (beta * chosen > beta * rejected).astype(float)
    values = {"logps/chosen": chosen, "logps/rejected": rejected}
    values |= {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected}
    return values.get(name, beta * (chosen - rejected) if name == "rewards/margins" else None)


def _log_odds(logp: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)) of log p < 0."""
    with np.errstate(divide="ignore", invalid="ignore"):  # infinite for a probability of 1: pair_values of an entry drops it
        return np.asarray(logp - np.log(-np.expm1(logp)))


def interval(values: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Confidence interval of the mean of ``values`` [pairs]; None for fewer than ``MIN_PAIRS``.

    Percentile bootstrap (Efron 1979); for values of 0 and 1 Wilson's score interval (1927), which keeps its width when all
    pairs agree.
    """
    if len(values) < MIN_PAIRS:
        return None
    if np.isin(values, (0.0, 1.0)).all():
        from scipy.stats import binomtest

        wilson = binomtest(int(values.sum()), len(values)).proportion_ci(confidence, method="wilson")
        return float(wilson.low), float(wilson.high)
    means = np.concatenate([weights @ values for weights in _weights(len(values), seed)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def show_probability(share: float) -> str:
    """A probability in whole percent; never 0 or 100 %, since it is an estimate from resamples."""
    return ">99%" if share > 0.99 else "<1%" if share < 0.01 else f"{share:.0%}"


def _weights(pairs: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap weights [resamples, pairs] in chunks: the draws of each pair divided by the number of pairs."""
    rng = np.random.default_rng(seed)
    step = max(1, min(RESAMPLES, CHUNK // pairs))
    for start in range(0, RESAMPLES, step):
        yield rng.multinomial(pairs, np.full(pairs, 1 / pairs), size=min(step, RESAMPLES - start)) / pairs
