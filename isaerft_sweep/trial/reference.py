"""Reference log-probabilities for DPO: those of the model without the adapter, computed once for all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import peft
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from isaerft_sweep.trial.forward.strategy import ForwardStrategy
from isaerft_sweep.trial.pair_batch import PairBatch, pair_batch


@dataclass(frozen=True)
class Reference:
    """(chosen, rejected) sums of log-probabilities over the answer's tokens, by pair (``PairBatch.keys``)."""

    sums: dict[str, tuple[float, float]]

    def of(self, batch: PairBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """The reference fields of ``PairLogps``, float32 [pair]."""
        chosen, rejected = zip(*(self.sums[key] for key in batch.keys), strict=True)
        return {
            "reference_chosen": torch.tensor(chosen, device=device),
            "reference_rejected": torch.tensor(rejected, device=device),
        }


@torch.no_grad()
def compute_reference(
    model: peft.PeftModel, datasets: list[Dataset], strategy: ForwardStrategy, pad: int, batch_size: int
) -> Reference:
    """Run all pairs of ``datasets`` through the model with its adapter off.

    Args:
        model: with its adapter.
        datasets: tokenised pairs.
        strategy: how batches run through the model.
        pad: id of the padding token.
        batch_size: pairs per batch.
    """
    sums: dict[str, tuple[float, float]] = {}
    with without_adapter(model) as base:
        for rows in datasets:
            for start in range(0, len(rows), batch_size):
                batch = pair_batch(rows[start : start + batch_size], pad, base.device, read_prompt=False)
                logps = batch.pair_logps(strategy.forward(base, batch.batch).logps)
                pair_sums = zip(logps.chosen_sum.tolist(), logps.rejected_sum.tolist(), strict=True)
                sums.update(zip(batch.keys, pair_sums, strict=True))
    return Reference(sums)


@contextmanager
def without_adapter(model: peft.PeftModel) -> Iterator[PreTrainedModel]:
    """Inside the block, the base model in evaluation mode, with its adapter off."""
    was_training = model.training
    model.eval()
    with model.disable_adapter():
        yield model.get_base_model()
    model.train(was_training)
