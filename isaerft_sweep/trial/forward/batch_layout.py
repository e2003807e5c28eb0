"""Layout of a batch in the decoder's rows: one sequence per row, or both answers of a pair after their shared prompt.

A token's state depends only on earlier tokens, so the prompt's states are the same for both answers of a pair and are
computed once. The rejected answer gets the position ids that it would have alone, and a mask that hides the chosen answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Batch:
    """Token sequences, padded at the end: ``ids`` and ``mask`` [sequence, position]; ``read`` [sequence, position − 1] is
    true where the loss reads the log-probability of the next token; ``pairs``: indices of (chosen, rejected) sequences."""

    ids: torch.Tensor
    mask: torch.Tensor
    read: torch.Tensor
    pairs: tuple[tuple[int, int], ...]
    trials: tuple[int, ...] = (0,)
    """Index of each trial's first sequence, ascending: states depend on the trial's adapter."""


def padded(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, with ``pad`` at the end, and mask of token sequences, both [sequence, position]."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[pad] * (width - len(sequence))] for sequence in sequences], device=device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return ids, (torch.arange(width, device=device) < lengths[:, None]).long()


class TokenLogps(NamedTuple):
    """For each token that a batch reads, float32: log-probability [n] and mean of its logits [n]; the router's loss (scalar)
    if the model has one."""

    logps: torch.Tensor
    mean_logits: torch.Tensor
    router_loss: torch.Tensor | None = None

    def detached(self, trains: bool) -> TokenLogps:
        """The same values as leaf tensors, which receive the loss's gradient when the trial ``trains``."""
        router = None if self.router_loss is None else self.router_loss.detach().requires_grad_(trains)
        return TokenLogps(self.logps.detach().requires_grad_(trains), self.mean_logits.detach(), router)

    def differentiable(self) -> list[torch.Tensor]:
        return [self.logps] if self.router_loss is None else [self.logps, self.router_loss]


@dataclass(frozen=True)
class Layout:
    """Rows for the decoder. ``row`` and ``column`` [sequence, position] locate each token of the batch; ``shared``: whether
    rows hold pairs. ``branch`` [row, column]: 0 for the prompt, 1 and 2 for the answers, −1 for padding."""

    ids: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    shared: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [int(n) for n in (self.branch >= 0).sum(1)]

    def inputs(self, rows: list[int], width: int, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The decoder's arguments for some of the rows."""
        ids, branch = self.ids[rows, :width], self.branch[rows, :width]
        if not self.shared:
            return {"input_ids": ids, "attention_mask": (branch >= 0).long()}
        positions = self.positions[rows, :width]
        distance = positions[:, :, None] - positions[:, None, :]
        key_branch, query_branch = branch[:, None, :], branch[:, :, None]
        visible = (key_branch >= 0) & (distance >= 0) & ((key_branch == 0) | (key_branch == query_branch))
        visible |= torch.eye(width, dtype=torch.bool, device=ids.device)  # padding sees itself: a softmax needs one entry
        mask: Any = _additive_mask(visible, dtype)
        if getattr(config, "layer_types", None):
            window = getattr(config, "sliding_window", None)
            mask = {
                "full_attention": mask,
                "sliding_attention": _additive_mask(visible & (distance < (window or width)), dtype),
            }
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def arranged(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Values [sequence, position, hidden] of the batch's tokens, rearranged to [row, column, hidden]."""
        out = values.new_zeros(*self.ids.shape, values.shape[-1])
        kept = mask.bool()
        out[self.row[kept], self.column[kept]] = values[kept]
        return out


def one_row_per_sequence(batch: Batch) -> Layout:
    """One row per sequence."""
    count, width = batch.ids.shape
    device = batch.ids.device
    row = torch.arange(count, device=device)[:, None].expand(count, width)
    column = torch.arange(width, device=device).expand(count, width)
    return Layout(batch.ids, column, batch.mask.long() - 1, row, column, shared=False)


def shared_prefix_rows(batch: Batch) -> Layout:
    """One row per pair: the common prefix, the rest of the chosen sequence, the rest of the rejected one."""
    width, device = batch.ids.shape[1], batch.ids.device
    chosen, rejected = (torch.tensor(side, device=device) for side in zip(*batch.pairs, strict=True))
    mask = batch.mask.bool()
    same = (batch.ids[chosen] == batch.ids[rejected]) & mask[chosen] & mask[rejected]
    prefix = same.long().cumprod(1).sum(1)[:, None]
    position = torch.arange(width, device=device).expand(len(chosen), width)
    row, column = torch.empty_like(batch.ids), torch.empty_like(batch.ids)
    row[chosen] = row[rejected] = torch.arange(len(chosen), device=device)[:, None].expand(-1, width)
    column[chosen] = position
    column[rejected] = torch.where(position < prefix, position, mask[chosen].sum(1)[:, None] + position - prefix)
    longest = int(column[mask].max()) + 1
    ids, positions = (batch.ids.new_zeros(len(chosen), longest) for _ in range(2))
    branch = torch.full_like(ids, -1)
    for side, number in ((rejected, 2), (chosen, 1)):
        kept = mask[side]
        place = row[side][kept], column[side][kept]
        ids[place], positions[place] = batch.ids[side][kept], position[kept]
        branch[place] = torch.where(position < prefix, 0, number)[kept]
    return Layout(ids, positions, branch, row, column, shared=True)


def unique_read_positions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [m] of the distinct read tokens, and for every read token [n] its index among those.

    With a chat template all sequences share a beginning. Where a sequence equals the first one of its trial, next token
    included, its log-probabilities are the same and are computed once.
    """
    count, device = len(batch.ids), batch.ids.device
    starts = torch.tensor(batch.trials, device=device)
    first = starts[torch.searchsorted(starts, torch.arange(count, device=device), right=True) - 1]
    mask = batch.mask.bool()
    common = ((batch.ids == batch.ids[first]) & mask & mask[first]).long().cumprod(1).bool()[:, 1:]
    duplicate = common & batch.read & batch.read[first]
    duplicate[starts] = False
    index = torch.full(batch.read.shape, -1, device=device)
    index[batch.read & ~duplicate] = torch.arange(int((batch.read & ~duplicate).sum()), device=device)
    index = torch.where(duplicate, index[first], index)
    return (~duplicate)[batch.read].nonzero()[:, 0], index[batch.read]


def _additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask [row, 1, query, key] to add to attention scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)[
        :, None
    ]
