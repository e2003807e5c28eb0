"""One point of a space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from isaerft_sweep.spec_fields import canonical_json


@dataclass(frozen=True)
class Point:
    """Sampled values by dotted config key; ``unit`` holds each one's u in [0, 1]. ``note``: why it was chosen, to print."""

    params: Mapping[str, Any]
    unit: Mapping[str, float] = field(default_factory=dict)
    note: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        """Equal for equal values."""
        return canonical_json(self.params)
