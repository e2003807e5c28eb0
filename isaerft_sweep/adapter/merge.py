"""Merges the constant b @ W_dec of a bias adapter into a model's own weights, where that is exact.

A decoder layer ends in ``residual + last_linear(...)`` in the families below, so a constant added to the residual
stream is a constant added to that linear map's bias. With a norm in between (Gemma 2 and 3), or
without a bias and a config switch for one (Qwen), no weight can hold the constant.
"""

from __future__ import annotations

import torch
from torch import nn

from isaerft_sweep.adapter.architecture import decoder_layers
from isaerft_sweep.adapter.config import CONSTANT
from isaerft_sweep.errors import ModelError

LORA = "lora"
"""PEFT's own: it merges into the linear maps that it changes."""
LAST_LINEAR = {"llama": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h", "gpt2": "mlp.c_proj", "phi": "mlp.fc2"}
"""model_type -> the linear map whose output is added to the residual stream last."""


def last_linear(layer: nn.Module) -> nn.Module:
    """The linear map of a decoder layer that can hold a constant. Raises ModelError when there is none."""
    for name in LAST_LINEAR.values():
        try:
            return layer.get_submodule(name)
        except AttributeError:
            continue
    raise ModelError(f"{type(layer).__name__} has no linear map that can hold a constant.")


def check_mergeable(model: nn.Module, kinds: set[str]) -> None:
    """Raise ModelError unless merging adapters of ``kinds`` into ``model`` is exact."""
    if kinds == {LORA}:
        return
    model_type = model.config.model_type  # type: ignore[union-attr]
    if kinds - set(CONSTANT):
        raise ModelError(
            f"only an adapter of a constant change ({', '.join(sorted(CONSTANT))}) can be merged but got {sorted(kinds)}. "
            "Keep the adapter separate: PeftModel.from_pretrained."
        )
    if model_type not in LAST_LINEAR:
        raise ModelError(
            f"merging must be exact, and model type '{model_type}' has no bias that reaches the residual stream "
            f"unchanged. Exact for: {', '.join(LAST_LINEAR)}. Keep the adapter separate: PeftModel.from_pretrained."
        )


def make_room(model: nn.Module, kinds: set[str]) -> None:
    """Prepare ``model`` for merging adapters of ``kinds``; Llama's MLPs get zero biases, and the config says so.

    Raises ModelError when merging would not be exact.
    """
    check_mergeable(model, kinds)
    model_type = model.config.model_type  # type: ignore[union-attr]
    if model_type == "llama" and not model.config.mlp_bias:  # type: ignore[union-attr]
        for layer in decoder_layers(model):
            for linear in (m for m in layer.mlp.modules() if isinstance(m, nn.Linear)):  # type: ignore[union-attr]
                linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]), requires_grad=False)
        model.config.mlp_bias = True  # type: ignore[union-attr]
