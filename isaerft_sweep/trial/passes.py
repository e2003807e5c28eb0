"""A trial's way through the model: log-probabilities of the tokens that its loss reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from isaerft_sweep.trial.grouping import length_groups
from isaerft_sweep.trial.token_logps import model_head, token_logps

CALL_FLOPS = {"cpu": 2e9, "cuda": 2e12}
"""What a device computes in the time that one more forward pass costs whatever its size: some milliseconds."""

Prepare = Callable[[list[int], int], None]


@dataclass(frozen=True)
class Batch:
    """Token sequences, padded at the end: ``ids`` and ``mask`` [sequence, position]; ``read`` [sequence, position − 1] is
    true where the loss reads the log-probability of the next token."""

    ids: torch.Tensor
    mask: torch.Tensor
    read: torch.Tensor


class Passes:
    """How a trainer gets through the model: here by itself. In a pack many trials go together; see ``trial/seats.py``."""

    def forward(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of each read token and the mean of its logits, both float32 [n], row by row; ``model``: the trial's own."""
        return token_numbers(model, batch)

    def backward(self) -> None:
        """Called when the gradient of the last forward pass's log-probabilities is there."""


def token_numbers(model: PreTrainedModel, batch: Batch, prepare: Prepare | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``Passes.forward``. ``prepare`` is told the rows and the width of every call of the decoder before it."""
    hidden = read_states(getattr(model, model.base_model_prefix), batch, prepare)
    return token_logps(hidden, batch.ids[:, 1:][batch.read], model_head(model), model.config.vocab_size)


def read_states(decoder: Any, batch: Batch, prepare: Prepare | None = None) -> torch.Tensor:
    """Hidden states [n, hidden] of the positions that are read, row by row.

    Sequences of near length run together, each group padded to its own longest: TRL pads all to the longest of the batch,
    at the end, and what a sequence computes does not depend on it.
    """
    ids, mask, read = batch.ids, batch.mask, batch.read
    per_token = 2 * sum(parameter.numel() for parameter in decoder.parameters())
    groups = length_groups(mask.sum(1).tolist(), int(CALL_FLOPS.get(ids.device.type, CALL_FLOPS["cuda"]) / per_token))
    states, places = [], []
    numbers = torch.arange(read.numel(), device=ids.device).view_as(read)
    for rows in groups:
        width = int(mask[rows].sum(1).max())
        if prepare is not None:
            prepare(rows, width)
        hidden = decoder(input_ids=ids[rows, :width], attention_mask=mask[rows, :width], use_cache=False).last_hidden_state
        wanted = read[rows, : width - 1]
        states.append(hidden[:, :-1][wanted])
        places.append(numbers[rows, : width - 1][wanted])
    return torch.cat(states)[torch.cat(places).argsort()]
