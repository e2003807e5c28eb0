"""The metrics that a trial logs, by their names in W&B."""

from __future__ import annotations

_SHARED = (
    "loss",
    "nll_loss",
    "log_odds_chosen",
    "log_odds_ratio",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
)
METRICS = (
    *(f"eval/{name}" for name in _SHARED),
    *(f"train/{name}" for name in _SHARED),
    "train/grad_norm",
    "train/learning_rate",
    "train/epoch",
    "train/num_tokens",
)
"""The names that a sweep's ``metric`` may have."""

LESS_IS_BETTER = ("loss", "nll_loss", "rewards/rejected", "logps/rejected", "grad_norm")

CONTAINS_BETA = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
"""Metrics that contain beta: reward = beta · mean log-probability, loss = NLL + beta · odds-ratio term."""


def depends_on_beta(name: str) -> bool:
    """Whether beta alone changes the metric, so that it cannot rank trials of different beta."""
    return name.partition("/")[2] in CONTAINS_BETA


def effect_of_beta(name: str, goal: str) -> str:
    """Which beta a ranking by a metric that contains beta favours, whatever the model does; as text.

    A reward is beta times a mean log-probability, which is below 0; the loss is the NLL plus beta times −log σ(log odds
    ratio), which is above 0. So each of them except the margin changes with beta in one direction.
    """
    kind = name.partition("/")[2]
    if kind == "rewards/margins":
        larger = "large beta where the margin is above 0 and small beta where it is below"
        smaller = "small beta where the margin is above 0 and large beta where it is below"
        return larger if goal == "maximize" else smaller
    grows_with_beta = kind == "loss"
    return "large beta" if grows_with_beta == (goal == "maximize") else "small beta"


def wandb_name(key: str) -> str:
    """A Trainer log key under the name that W&B shows: ``eval_rewards/margins`` becomes ``eval/rewards/margins``."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
