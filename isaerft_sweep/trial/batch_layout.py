"""How the sequences of a batch lie in the rows that the decoder runs: one to a row, or a pair's two answers behind the
prompt that they share.

Both answers of a pair follow the same prompt, and a token's state depends only on what is before it. So the prompt's states
are the same for both, and need to be computed once, if the rejected answer looks past the chosen one: it gets the positions
that it would have alone, and a mask that hides the chosen answer from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Batch:
    """Token sequences, padded at the end: ``ids`` and ``mask`` [sequence, position]; ``read`` [sequence, position − 1] is
    true where the loss reads the log-probability of the next token; ``pairs``: the chosen and the rejected one of each."""

    ids: torch.Tensor
    mask: torch.Tensor
    read: torch.Tensor
    pairs: tuple[tuple[int, int], ...]
    trials: tuple[int, ...] = (0,)
    """The first sequence of each trial, in order: with another adapter the same tokens have other states."""


class TokenLogps(NamedTuple):
    """Of each token that a batch reads, in float32: log-probability [n] and mean of its logits [n]; of a model whose router
    has a loss, that loss (scalar)."""

    logps: torch.Tensor
    mean_logits: torch.Tensor
    router_loss: torch.Tensor | None = None

    def detached(self, trains: bool) -> TokenLogps:
        """The same numbers as leaves, which the trial's loss leaves its gradient in when it ``trains``."""
        router = None if self.router_loss is None else self.router_loss.detach().requires_grad_(trains)
        return TokenLogps(self.logps.detach().requires_grad_(trains), self.mean_logits.detach(), router)

    def differentiable(self) -> list[torch.Tensor]:
        return [self.logps] if self.router_loss is None else [self.logps, self.router_loss]


@dataclass(frozen=True)
class Layout:
    """Rows for the decoder. ``row`` and ``column`` [sequence, position] say where a batch's token lies, ``shared`` whether
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
        back = positions[:, :, None] - positions[:, None, :]
        there, here = branch[:, None, :], branch[:, :, None]
        seen = (there >= 0) & (back >= 0) & ((there == 0) | (there == here))
        seen |= torch.eye(width, dtype=torch.bool, device=ids.device)  # padding sees itself: no row of a softmax is empty
        mask: Any = _additive(seen, dtype)
        if getattr(config, "layer_types", None):
            window = getattr(config, "sliding_window", None)
            mask = {"full_attention": mask, "sliding_attention": _additive(seen & (back < (window or width)), dtype)}
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def arranged(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Values [sequence, position, hidden] of the batch's tokens, as they lie in the rows."""
        out = values.new_zeros(*self.ids.shape, values.shape[-1])
        kept = mask.bool()
        out[self.row[kept], self.column[kept]] = values[kept]
        return out


def one_row_per_sequence(batch: Batch) -> Layout:
    """Every sequence has a row of its own."""
    count, width = batch.ids.shape
    device = batch.ids.device
    row = torch.arange(count, device=device)[:, None].expand(count, width)
    column = torch.arange(width, device=device).expand(count, width)
    return Layout(batch.ids, column, batch.mask.long() - 1, row, column, shared=False)


def shared_prefix_rows(batch: Batch) -> Layout:
    """Every pair has a row: what both begin with, the rest of the chosen one, the rest of the rejected one."""
    width, device = batch.ids.shape[1], batch.ids.device
    chosen, rejected = (torch.tensor(side, device=device) for side in zip(*batch.pairs, strict=True))
    mask = batch.mask.bool()
    same = (batch.ids[chosen] == batch.ids[rejected]) & mask[chosen] & mask[rejected]
    prefix = same.long().cumprod(1).sum(1)[:, None]
    at = torch.arange(width, device=device).expand(len(chosen), width)
    row, column = torch.empty_like(batch.ids), torch.empty_like(batch.ids)
    row[chosen] = row[rejected] = torch.arange(len(chosen), device=device)[:, None].expand(-1, width)
    column[chosen] = at
    column[rejected] = torch.where(at < prefix, at, mask[chosen].sum(1)[:, None] + at - prefix)
    longest = int(column[mask].max()) + 1
    ids, positions = (batch.ids.new_zeros(len(chosen), longest) for _ in range(2))
    branch = torch.full_like(ids, -1)
    for side, number in ((rejected, 2), (chosen, 1)):
        kept = mask[side]
        place = row[side][kept], column[side][kept]
        ids[place], positions[place] = batch.ids[side][kept], at[kept]
        branch[place] = torch.where(at < prefix, 0, number)[kept]
    return Layout(ids, positions, branch, row, column, shared=True)


def unique_read_positions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the read tokens [n] to look at, so that none is looked at twice, and for every read token its place in that.

    Chat templates let all sequences begin alike. What a sequence has in common with the first one of its trial, next token
    included, has the same log-probabilities there.
    """
    count, device = len(batch.ids), batch.ids.device
    starts = torch.tensor(batch.trials, device=device)
    first = starts[torch.searchsorted(starts, torch.arange(count, device=device), right=True) - 1]
    mask = batch.mask.bool()
    alike = ((batch.ids == batch.ids[first]) & mask & mask[first]).long().cumprod(1).bool()[:, 1:]
    known = alike & batch.read & batch.read[first]
    known[starts] = False
    number = torch.full(batch.read.shape, -1, device=device)
    number[batch.read & ~known] = torch.arange(int((batch.read & ~known).sum()), device=device)
    number = torch.where(known, number[first], number)
    return (~known)[batch.read].nonzero()[:, 0], number[batch.read]


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask [row, 1, query, key] to add to attention scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
