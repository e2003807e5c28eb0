"""The part of a card that the Hub reads: base model, data set, license, tags and the evaluation as ``model-index``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from isaerft_sweep.specs import TrialSpec

EVALUATED = {
    "eval/log_odds_chosen": "Log odds ratio of chosen over rejected",
    "eval/rewards/accuracies": "Accuracy of preferring the chosen answer",
    "eval/nll_loss": "NLL of prompt and chosen answer",
    "eval/kl_base": "KL from the base model, nats per answer token",
    "eval/neutral_nll_rise": "Rise of the NLL on neutral text, nats per token",
}
"""Metrics in ``model-index``: those that can be compared between runs of different beta."""


def front_matter(spec: TrialSpec, metrics: Mapping[str, float]) -> str:
    """The YAML of the published run's card, plus ``license``, ``datasets``, ``pipeline_tag`` and ``model-index``.

    Local folders are left out: the Hub refuses a card whose model or data set is not on the Hub.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    model, data = spec.experiment.model, spec.experiment.data
    content: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "model_name": spec.model_name,
        "tags": list(spec.tags),
        "licence": "license",
    }
    if is_repository(model.name):
        content = {"base_model": model.name, **content}
    if model.license:
        content["license"] = model.license
    on_hub = data.source == "hub" and is_repository(data.name)
    if on_hub:
        content["datasets"] = [data.name]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.name if on_hub else "preference-pairs",
            dataset_name=data.name if data.source != "files" else Path(data.path or data.name).name,
            dataset_split=data.eval_split if on_hub else None,
            metric_type="accuracy" if name == "eval/rewards/accuracies" else name,
            metric_name=label,
            metric_value=round(metrics[name], 6),
        )
        for name, label in EVALUATED.items()
        if name in metrics
    ]
    if results:
        content["model-index"] = eval_results_to_model_index(spec.model_name, results)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def is_repository(name: str) -> bool:
    """Whether ``name`` can be a repository on the Hub and is not a local folder."""
    return is_name(name) and not Path(name).exists()


def is_name(name: str) -> bool:
    """Whether ``name`` is a valid repository name on the Hub: ``NAME`` or ``ORG/NAME``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
