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
"""Every name that a sweep's ``metric`` may have."""

LESS_IS_BETTER = ("loss", "nll_loss", "rewards/rejected", "logps/rejected", "grad_norm")

CONTAINS_BETA = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
"""Metrics that contain beta itself: reward = beta · mean log-probability, loss = NLL + beta · odds-ratio term."""


def depends_on_beta(name: str) -> bool:
    """Whether a larger beta alone changes the metric, so that it cannot rank trials of different beta."""
    return name.partition("/")[2] in CONTAINS_BETA


def wandb_name(key: str) -> str:
    """A Trainer log key under the name that W&B shows: ``eval_rewards/margins`` becomes ``eval/rewards/margins``."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
