"""Marks the highest decoder layer below all trained weights, for adapters that wrap no decoder layer, such as LoRA."""

from __future__ import annotations

from typing import Any

from torch import nn


class FrozenBoundary(nn.Module):
    """Wraps a decoder layer and returns its output: everything up to here is frozen, so the output can be stored."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output."""
        return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped decoder layer (``attention_type`` and the like, which some models read)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
