"""Parameter importances by Optuna."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isaerft_sweep.results.axes import Axis, axes
from isaerft_sweep.results.sweep_results import SweepResults

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MIN_TRIALS = 6
"""Importances need at least this many completed trials."""


@dataclass(frozen=True)
class Importance:
    """Each parameter's share (sum 1) in what separates the best ``good`` of ``trials`` from the rest."""

    shares: dict[str, float]
    good: int
    trials: int


def importance(sweep: SweepResults) -> Importance | None:
    """PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) of the completed trials; None with too few trials or parameters."""
    swept = axes(sweep)
    ranked = [entry for entry in sweep.entries if entry.rank and all(a.key in entry.params for a in swept)]
    if len(swept) < 2 or len(ranked) < MIN_TRIALS:
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # the good ones are a tenth of the trials, at least five, at most half
    quantile = min(0.5, max(0.1, 5 / len(ranked)))
    spaces = {axis.key: _distribution(axis, [entry.params[axis.key] for entry in ranked]) for axis in swept}
    direction = optuna.study.StudyDirection[sweep.metric.goal.upper()]
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parts are experimental in Optuna; the tests check the numbers
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params={axis.key: _native(axis, entry.params[axis.key]) for axis in swept},
                    distributions=spaces,
                    value=entry.value(sweep.metric.name),
                )
                for entry in ranked
            ]
        )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return Importance(dict(shares), round(quantile * len(ranked)), len(ranked))


def _distribution(axis: Axis, values: list[Any]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    choices = axis.values or axis.ticks
    if choices:  # listed numbers too: a density over three values reports importance where none exists
        return CategoricalDistribution(tuple(range(len(choices))))
    return FloatDistribution(float(min(values)), float(max(values)), log=axis.kind == "log")


def _native(axis: Axis, value: Any) -> Any:
    choices = axis.values or axis.ticks
    return choices.index(value) if choices else float(value)
