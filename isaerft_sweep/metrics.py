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
HARM = ("eval/kl_base", "eval/neutral_nll", "eval/neutral_nll_rise")
"""KL(base ‖ adapted) in nats per answer token; NLL of neutral text in nats per token, and its rise over the base model's."""
GENERATION = (
    "eval/generation_tokens",
    "eval/generation_repeated",
    "eval/generation_distinct2",
    "eval/generation_base_nll",
)
"""Of greedy answers: mean length, share of repeated 4-grams, share of distinct bigrams, NLL under the base model."""
METRICS = (
    *(f"eval/{name}" for name in _SHARED),
    *HARM,
    *GENERATION,
    *(f"train/{name}" for name in _SHARED),
    "train/grad_norm",
    "train/learning_rate",
    "train/epoch",
    "train/num_tokens",
)
"""The names that a sweep's ``metric`` may have."""

LESS_IS_BETTER = (
    "loss",
    "nll_loss",
    "kl_base",
    "neutral_nll",
    "neutral_nll_rise",
    "generation_repeated",
    "generation_base_nll",
    "rewards/rejected",
    "logps/rejected",
    "grad_norm",
)

CONTAINS_BETA = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
"""Metrics that contain beta: reward = beta · mean log-probability, loss = NLL + beta · odds-ratio term."""


def depends_on_beta(name: str) -> bool:
    """Whether beta alone changes the metric, so that it cannot rank trials of different beta."""
    return name.partition("/")[2] in CONTAINS_BETA


def effect_of_beta(name: str, goal: str, loss: str = "orpo") -> str:
    """Which beta a ranking by a metric that contains beta favours, whatever the model does; as text.

    ORPO's loss is the NLL plus beta times −log σ(log odds ratio), which is above 0; its rewards, and those of SimPO and CPO,
    are beta times a log-probability, which is below 0. So each of them except the margin changes with beta in one direction.
    The other losses are −log σ(margin), and DPO's rewards are beta times a log-ratio: their direction is that of a sign.
    """
    kind = name.partition("/")[2]
    of_dpo = loss == "dpo" and kind in ("rewards/chosen", "rewards/rejected")
    if kind == "rewards/margins" or of_dpo or (kind == "loss" and loss != "orpo"):
        quantity = "reward" if of_dpo else "margin"
        above, below = ("large", "small") if (kind != "loss") == (goal == "maximize") else ("small", "large")
        return f"{above} beta where the {quantity} is above 0 and {below} beta where it is below"
    grows_with_beta = kind == "loss"
    return "large beta" if grows_with_beta == (goal == "maximize") else "small beta"


def wandb_name(key: str) -> str:
    """A Trainer log key under the name that W&B shows: ``eval_rewards/margins`` becomes ``eval/rewards/margins``."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
