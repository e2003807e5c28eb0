"""Marks the highest decoder layer below all trained weights, for adapters that wrap no decoder layer, such as LoRA."""

from __future__ import annotations

from typing import Any

from isaerft_sweep.adapter.wrapped_layer import WrappedLayer


class FrozenBoundary(WrappedLayer):
    """Returns the decoder layer's output: everything up to here is frozen, so the output can be stored."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output."""
        return self.base_layer(*args, **kwargs)
