"""A batch of pairs as tensors, and back from log-probabilities of its tokens to numbers of its pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from isaerft_sweep.preferences import ANSWERS
from isaerft_sweep.trial.forward.activation_cache import sequence_key
from isaerft_sweep.trial.forward.batch_layout import Batch, padded
from isaerft_sweep.trial.losses import PairLogps


@dataclass(frozen=True)
class PairBatch:
    """The sequences of all chosen answers, then those of all rejected ones.

    ``answer`` [sequence, position − 1]: true where the next token is the answer's. ``keys``: a name for each pair that its
    tokens decide, so that trials can be compared pair by pair. ``prompt_is_read``: whether the chosen sequences' prompts
    are.
    """

    batch: Batch
    answer: torch.Tensor
    keys: list[str]
    prompt_is_read: bool

    @property
    def pairs(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, prompts included."""
        return int(self.batch.mask.sum())

    @property
    def nll_tokens(self) -> int:
        """Tokens that the NLL of prompt and chosen answer is the mean over."""
        return int(self.batch.mask[: self.pairs, 1:].sum())

    @property
    def chosen_reads(self) -> int:
        """How many of the read tokens are in chosen sequences; they come first."""
        return int(self.batch.read[: self.pairs].sum())

    def pair_logps(self, logps: torch.Tensor) -> PairLogps:
        """From log p of every read token [n] to the pairs' numbers; without a reference model's."""
        read, pairs = self.batch.read, self.pairs
        table = torch.zeros(read.shape, device=logps.device).index_put(read.nonzero(as_tuple=True), logps)
        tokens = self.answer.sum(-1)
        means = (table * self.answer).sum(-1) / tokens
        nll = -table[:pairs].sum() / read[:pairs].sum() if self.prompt_is_read else None
        return PairLogps(means[:pairs], means[pairs:], tokens[:pairs], tokens[pairs:], nll)


def pair_batch(rows: Mapping[str, list[Any]], pad: int, device: torch.device, read_prompt: bool) -> PairBatch:
    """The batch of some tokenised rows.

    Args:
        rows: columns of ``data.FEATURES``; ``key`` where the pairs' keys do not follow from these tokens.
        pad: id of the padding, which stands behind each sequence.
        device: where the tensors are to be.
        read_prompt: whether the loss reads the prompts of the chosen sequences too.
    """
    sequences = [ids for side in ANSWERS for ids in rows[f"{side}_ids"]]
    prompts = torch.tensor([length for side in ANSWERS for length in rows[f"{side}_prompt_length"]], device=device)
    ids, mask = padded(sequences, pad, device)
    pairs = len(sequences) // 2
    answer = (mask.bool() & (torch.arange(ids.shape[1], device=device) >= prompts[:, None]))[:, 1:]
    read = answer.clone()
    if read_prompt:
        read[:pairs] = mask[:pairs, 1:].bool()
    chosen, rejected = rows["chosen_ids"], rows["rejected_ids"]
    keys = rows["key"] if "key" in rows else [pair_key(*answers) for answers in zip(chosen, rejected, strict=True)]
    together = tuple((i, i + pairs) for i in range(pairs))
    return PairBatch(Batch(ids, mask, read, together), answer, keys, read_prompt)


def pair_key(chosen: Sequence[int], rejected: Sequence[int]) -> str:
    """The key of a pair by its token ids."""
    return sequence_key([len(chosen), *chosen, *rejected])[:16]
