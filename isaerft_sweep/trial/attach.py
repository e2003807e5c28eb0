"""Puts a new adapter on a model."""

from __future__ import annotations

import peft
from torch import nn
from transformers import PreTrainedModel, set_seed

from isaerft_sweep.adapter import IsaerftConfig
from isaerft_sweep.adapter.architecture import decoder_layers, decoder_layers_name
from isaerft_sweep.adapter.config import ON_STREAM
from isaerft_sweep.adapter.frozen_boundary import FrozenBoundary
from isaerft_sweep.errors import ModelError
from isaerft_sweep.models.loading import LoadedModel
from isaerft_sweep.spec_fields import to_dict
from isaerft_sweep.specs import AdapterSpec

LORA_RANK = 8


def attach_adapter(loaded: LoadedModel, spec: AdapterSpec, seed: int, revision: str | None = None) -> peft.PeftModel:
    """The model with a new adapter.

    Args:
        loaded: the model, which is changed in place.
        spec: which adapter.
        seed: equal ones give equal initial weights.
        revision: of the base model on the Hub, for the adapter's config.
    """
    set_seed(seed)
    config = lora_config(loaded.model, spec) if spec.kind == "lora" else isaerft_config(spec)
    config.revision = revision
    model: peft.PeftModel = peft.get_peft_model(loaded.model, config)
    if spec.kind == "lora":
        layers, boundary = decoder_layers(model.get_base_model()), hook_layer(spec)
        layers[boundary] = FrozenBoundary(layers[boundary])
    return model


def hook_layer(spec: AdapterSpec) -> int:
    """The lowest decoder layer whose output the adapter changes, or above which it changes weights."""
    return min(hook_point.layer for hook_point in spec.sites)


def isaerft_config(spec: AdapterSpec) -> IsaerftConfig:
    """PEFT's config of an adapter at hook points. Raises ConfigError when its settings contradict each other."""
    names = {"layer"} if spec.kind in ON_STREAM else {"layer", "sae_release", "sae_id", "sae_path"}
    return IsaerftConfig(
        sites=[{k: v for k, v in to_dict(hook_point).items() if v is not None and k in names} for hook_point in spec.sites],
        kind=spec.kind,
        system_prompt=spec.system_prompt,
        rank=spec.rank,
        hidden_size=spec.hidden_size,
        hidden_layers=spec.hidden_layers,
    )


def lora_config(model: PreTrainedModel, spec: AdapterSpec) -> peft.LoraConfig:
    """LoRA (arXiv 2106.09685) on every linear map of the decoder layers above the hook point, with alpha twice the rank.

    So the layers below are frozen, and their output is stored, as for ISAERFT. Raises ModelError when no layer is above.
    """
    layers, name, lowest = decoder_layers(model), decoder_layers_name(model), hook_layer(spec)
    targets = [
        f"{name}.{index}.{inner}"
        for index in range(lowest + 1, len(layers))
        for inner, module in layers[index].named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not targets:
        raise ModelError(
            f"adapter.kind=lora must have linear maps to train in the layers above the hook point, but the hook point "
            f"is layer {lowest} of {len(layers)} (0 to {len(layers) - 1}). Choose a lower one: adapter.sites."
        )
    rank = spec.rank or LORA_RANK
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=peft.TaskType.CAUSAL_LM)
