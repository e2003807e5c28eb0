"""Requests of a trial while it trains: forward and backward passes.

A trial is a generator that yields these requests and receives the answers. Its driver decides how they run: one trial at a
time, or many trials in one pass (``run_passes.py``).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel

from isaerft_sweep.trial.forward.batch_layout import Batch, TokenLogps
from isaerft_sweep.trial.forward.strategy import ForwardStrategy

T = TypeVar("T")


@dataclass(frozen=True)
class ForwardPass:
    """One trial's batch through its model, which carries its adapter. The answer is a detached ``TokenLogps``.

    ``trains``: whether a backward pass follows. ``strategy``: how the batch runs when the trial is alone.
    """

    model: PreTrainedModel
    batch: Batch
    strategy: ForwardStrategy
    trains: bool

    def run(self) -> TokenLogps:
        """Run the pass for this trial alone."""
        return self.strategy.forward(self.model, self.batch)


@dataclass(frozen=True)
class BackwardPass:
    """The backward pass of the last ``ForwardPass``, whose answer's tensors now hold the gradient. Has no answer.

    ``again``: whether another one of the same ``ForwardPass`` follows.
    """

    again: bool = False


Request = ForwardPass | BackwardPass
Steps = Generator[Request, TokenLogps | None, T]
"""A trial, or part of one: yields requests and returns T."""
