"""Why a ranking may mislead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from isaerft_sweep.metrics import CONTAINS_BETA, depends_on_beta, effect_of_beta
from isaerft_sweep.search.distributions import Categorical, Constant, Distribution, Numeric, resolved
from isaerft_sweep.search.sampler import Point

EDGE = 0.05
"""A point this close to 0 or 1 on the unit interval is on the edge of the space."""
BETA_FREE = "eval/log_odds_chosen"
OF_THE_LOSS = (*CONTAINS_BETA, "rewards/accuracies")


def dependence(metric: str, swept: Iterable[str], goal: str = "maximize", loss: str = "orpo") -> list[str]:
    """Why ``metric`` cannot be compared between trials of different values of ``swept`` parameters; empty when it can.

    Args:
        metric: its name in W&B.
        swept: keys of the swept parameters.
        goal: ``maximize`` or ``minimize``.
        loss: the trials' ``orpo.loss``.
    """
    swept, reasons = set(swept), []
    if depends_on_beta(metric) and "orpo.beta" in swept:
        reasons.append(
            f"{metric} contains beta itself, and beta was swept: by its formula this ranking ({goal}) favours "
            f"{effect_of_beta(metric, goal, loss)}. "
            f"{BETA_FREE} and eval/rewards/accuracies do not; --metric {BETA_FREE} ranks by it."
        )
    if "orpo.gamma" in swept and loss == "simpo" and metric.partition("/")[2] == "loss":
        # −log σ(beta · difference − gamma), arXiv 2405.14734, equation 6: it rises with gamma
        reasons.append(
            f"{metric} contains gamma itself, and gamma was swept: by its formula this ranking ({goal}) favours "
            f"{'small' if goal == 'minimize' else 'large'} gamma. {BETA_FREE} does not; --metric {BETA_FREE} ranks by it."
        )
    if "orpo.loss" in swept and metric.partition("/")[2] in OF_THE_LOSS:
        reasons.append(f"{metric} means something else for each loss, and the loss was swept. Compare {BETA_FREE}.")
    sections = {key.split(".")[0] for key in swept}
    changed = [key for key in sorted(swept) if key.startswith("data.") or key == "orpo.max_length"]
    if metric.startswith("eval/") and changed:
        reasons.append(f"{', '.join(changed)} was swept, so trials were evaluated on different text.")
    if "model" in sections:
        reasons.append("The model was swept: log-probabilities of different models and tokenizers cannot be compared.")
    return reasons


def edges(space: Mapping[str, Distribution], point: Point) -> list[str]:
    """One sentence for each parameter of ``point`` on the edge of the space: a better value may lie beyond."""
    warnings = []
    at_point = resolved(space, point.params)
    for key, value in point.params.items():
        side = _side(at_point.get(key), value, point.unit.get(key))
        if side:
            warnings.append(
                f"The best trial's {key} = {value:.4g} is {side} of the space: a better one may lie beyond. Widen it."
            )
    return warnings


def _side(distribution: Constant | Categorical | Numeric | None, value: object, u: float | None) -> str | None:
    if distribution is None or isinstance(distribution, Constant) or isinstance(value, (bool, str)):
        return None
    choices = distribution.choices
    if choices is not None:
        numbers = [c for c in choices if isinstance(c, (int, float)) and not isinstance(c, bool)]
        if len(numbers) < max(3, len(choices)):  # one of two values is always at an end
            return None
        return "the smallest value" if value == min(numbers) else "the largest value" if value == max(numbers) else None
    if not isinstance(distribution, Numeric) or not isinstance(value, (int, float)):
        return None
    u = distribution.place(value) if u is None else u  # W&B stores only values
    return "at the lower end" if u <= EDGE else "at the upper end" if u >= 1 - EDGE else None
