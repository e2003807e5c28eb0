"""Locates the decoder layers of a transformers model."""

from __future__ import annotations

from typing import Any

from torch import nn

from isaerft_sweep.errors import ModelError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of any decoder-only transformers model (``model.layers``, ``gpt_neox.layers``, ``h``).

    Raises ModelError when the model has none.
    """
    return model.get_submodule(decoder_layers_name(model))  # type: ignore[return-value]


def decoder_layers_name(model: nn.Module) -> str:
    """The dotted name of ``decoder_layers``: the module list whose length is the config's number of layers."""
    config: Any = model.config
    count = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return str(name)
    raise ModelError(
        f"the model must be decoder-only with a list of {count} layers, but {type(model).__name__} has none. "
        "ISAERFT needs a residual stream between decoder layers."
    )


def decoder_name(model: nn.Module) -> str:
    """The attribute of a causal language model that holds its decoder, that is, everything but the head."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    # a text model extracted from a vision model may have another attribute than its class declares
    return prefix if prefix and hasattr(model, prefix) else decoder_layers_name(model).partition(".")[0]
