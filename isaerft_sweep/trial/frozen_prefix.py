"""The frozen layers up to the site, run for many token sequences.

Sequences that begin alike, as the two answers to a prompt do, go behind what they share in one row (see ``layout.py``), so
that it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from isaerft_sweep.trial.batch_layout import Batch, one_row_per_sequence, shared_prefix_rows

CALL_TOKENS = {"cpu": 1024, "cuda": 8192}
"""How many tokens a device takes best in one call: on a processor what is between two layers then stays in its cache."""


class Reached(Exception):
    """The forward pass has reached the site; the rest is not wanted."""


@torch.no_grad()
def stream_at(base: nn.Module, layer: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The residual stream [row, position, hidden] that ``layer`` of ``base`` gives out; what is above is not run."""
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise Reached

    handle = layer.register_forward_hook(catch)
    try:
        with suppress(Reached):
            base(**inputs, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def stream_of(base: nn.Module, layer: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As ``stream_at``, for ids and mask [sequence, position]."""
    return stream_at(base, layer, {"input_ids": ids, "attention_mask": mask})


def streams_of(
    base: PreTrainedModel, layer: nn.Module, sequences: Sequence[Sequence[int]], share: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """The number of each of the different ``sequences`` and its stream [its tokens, hidden], in any order.

    ``share``: whether the model takes sequences behind what they share.
    """
    device, dtype = next(base.parameters()).device, next(base.parameters()).dtype
    rows = in_pairs(sequences) if share else [(number, number) for number in range(len(sequences))]
    for group in _groups(rows, sequences, CALL_TOKENS.get(device.type, CALL_TOKENS["cuda"])):
        members = sorted({number for row in group for number in row})
        place = {number: i for i, number in enumerate(members)}
        width = max(len(sequences[number]) for number in members)
        ids = torch.tensor([[*sequences[n], *[0] * (width - len(sequences[n]))] for n in members], device=device)
        mask = torch.tensor([[1] * len(sequences[n]) + [0] * (width - len(sequences[n])) for n in members], device=device)
        batch = Batch(ids, mask, mask[:, 1:].bool(), tuple((place[a], place[b]) for a, b in group))
        layout = shared_prefix_rows(batch) if share else one_row_per_sequence(batch)
        every, longest = list(range(len(layout.ids))), layout.ids.shape[1]
        stream = stream_at(base, layer, layout.inputs(every, longest, base.config.get_text_config(), dtype))
        for number in members:
            at = place[number], slice(0, len(sequences[number]))
            yield number, stream[layout.row[at], layout.column[at]]


def in_pairs(sequences: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Numbers of sequences two by two, so that those with much in common come together; with itself where none is left."""
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    # in this order a sequence has most in common with a neighbour
    common = [_alike(sequences[a], sequences[b]) for a, b in pairwise(order)]
    pairs, at = [], 0
    while at < len(order):
        with_next = common[at] if at < len(common) else 0
        after_next = common[at + 1] if at + 1 < len(common) else 0
        together = with_next > 0 and with_next >= after_next
        pairs.append((order[at], order[at + 1 if together else at]))
        at += 2 if together else 1
    return pairs


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _groups(rows: list[tuple[int, int]], sequences: Sequence[Sequence[int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Rows of near length together, at most ``most`` tokens with padding."""

    def length(row: tuple[int, int]) -> int:
        a, b = (sequences[number] for number in row)
        return len(a) + len(b) - _alike(a, b)

    group: list[tuple[int, int]] = []
    for size, row in sorted(((length(row), row) for row in rows), key=itemgetter(0)):
        if group and (len(group) + 1) * size > most:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
