"""A module in a decoder layer's place that has the layer's attributes."""

from __future__ import annotations

from typing import Any

from torch import nn


class WrappedLayer(nn.Module):
    """Holds the decoder layer as ``base_layer``."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        """Attributes of the wrapped decoder layer (``attention_type`` and the like, which some models read)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
