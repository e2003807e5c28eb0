"""Puts a new adapter on a model."""

from __future__ import annotations

import peft
from transformers import set_seed

from isaerft_sweep.adapter import IsaerftConfig
from isaerft_sweep.models.loading import LoadedModel
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import AdapterSpec


def attach_adapter(loaded: LoadedModel, spec: AdapterSpec, seed: int, revision: str | None = None) -> peft.PeftModel:
    """The model with a new adapter; equal seeds give equal initial weights."""
    set_seed(seed)
    config = adapter_config(spec)
    config.revision = revision
    return peft.get_peft_model(loaded.model, config)


def adapter_config(spec: AdapterSpec) -> IsaerftConfig:
    """PEFT's config of an adapter. Raises ConfigError when its settings contradict each other."""
    return IsaerftConfig(
        sites=[{k: v for k, v in to_dict(hook_point).items() if v is not None} for hook_point in spec.sites],
        kind=spec.kind,
        rank=spec.rank,
        hidden_size=spec.hidden_size,
        hidden_layers=spec.hidden_layers,
    )
