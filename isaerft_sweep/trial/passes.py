"""What a trial asks for while it trains: forward and backward passes.

A trial is a generator that yields these requests and receives the answers, so whoever drives it decides how they run: one
trial's at a time, or those of many trials in one pass (``co_batching.py``).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel

from isaerft_sweep.trial.batch_layout import Batch, TokenLogps
from isaerft_sweep.trial.strategy import ForwardStrategy

T = TypeVar("T")


@dataclass(frozen=True)
class ForwardPass:
    """One trial's batch through its model, which carries its adapter. The answer is a detached ``TokenLogps``.

    ``trains``: whether a backward pass follows. ``strategy``: how the batch goes through the model by itself.
    """

    model: PreTrainedModel
    batch: Batch
    strategy: ForwardStrategy
    trains: bool

    def run(self) -> TokenLogps:
        """By itself."""
        return self.strategy.forward(self.model, self.batch)


@dataclass(frozen=True)
class BackwardPass:
    """The backward pass of the last ``ForwardPass``: the gradient is in its answer's tensors now. There is no answer."""


Request = ForwardPass | BackwardPass
Steps = Generator[Request, TokenLogps | None, T]
"""A trial, or a part of one, that yields requests and returns T."""
