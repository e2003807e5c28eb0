"""Runs the frozen layers up to the hook point for many token sequences.

Two sequences with a common prefix, such as the answers to one prompt, share a row (see ``batch_layout.py``), so the prefix
is computed once.
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

from isaerft_sweep.trial.forward.batch_layout import Batch, one_row_per_sequence, padded, shared_prefix_rows

CALL_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens per call that run fastest on a device: on a CPU, the activations between two layers then fit its cache."""


class Reached(Exception):
    """Ends a forward pass at the hook point: the layers above need not run."""


@torch.no_grad()
def stream_at(base: nn.Module, layer: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The residual stream [row, position, hidden] after ``layer`` of ``base``; the layers above do not run.

    ``inputs``: keyword arguments of the forward pass.
    """
    captured: list[torch.Tensor] = []

    def capture(_module: nn.Module, _inputs: Any, output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)
        raise Reached

    handle = layer.register_forward_hook(capture)
    try:
        with suppress(Reached):
            base(**inputs, use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def stream_of(base: nn.Module, layer: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As ``stream_at``, for ids and mask, both [sequence, position]."""
    return stream_at(base, layer, {"input_ids": ids, "attention_mask": mask})


def streams_of(
    base: PreTrainedModel, layer: nn.Module, sequences: Sequence[Sequence[int]], share: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the index of each sequence and its stream [its tokens, hidden], in any order.

    Args:
        base: the model.
        layer: the layer after which the stream is read.
        sequences: distinct token sequences.
        share: whether two sequences may share a row, after their common prefix.
    """
    device, dtype = next(base.parameters()).device, next(base.parameters()).dtype
    rows = in_pairs(sequences) if share else [(number, number) for number in range(len(sequences))]
    for group in _groups(rows, sequences, CALL_TOKENS.get(device.type, CALL_TOKENS["cuda"])):
        members = sorted({number for row in group for number in row})
        index = {number: i for i, number in enumerate(members)}
        ids, mask = padded([sequences[number] for number in members], 0, device)
        batch = Batch(ids, mask, mask[:, 1:].bool(), tuple((index[a], index[b]) for a, b in group))
        layout = shared_prefix_rows(batch) if share else one_row_per_sequence(batch)
        all_rows, row_width = list(range(len(layout.ids))), layout.ids.shape[1]
        stream = stream_at(base, layer, layout.inputs(all_rows, row_width, base.config.get_text_config(), dtype))
        for number in members:
            tokens = index[number], slice(0, len(sequences[number]))
            yield number, stream[layout.row[tokens], layout.column[tokens]]


def in_pairs(sequences: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs of indices of sequences with long common prefixes; a sequence without a partner is paired with itself."""
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    # sorted, so a sequence has its longest common prefix with a neighbour
    common = [_common_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)]
    pairs, start = [], 0
    while start < len(order):
        with_next = common[start] if start < len(common) else 0
        after_next = common[start + 1] if start + 1 < len(common) else 0
        together = with_next > 0 and with_next >= after_next
        pairs.append((order[start], order[start + 1 if together else start]))
        start += 2 if together else 1
    return pairs


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _groups(rows: list[tuple[int, int]], sequences: Sequence[Sequence[int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Groups of rows of similar length, each of at most ``most`` tokens with padding unless it is one row."""

    def length(row: tuple[int, int]) -> int:
        a, b = (sequences[number] for number in row)
        return len(a) + len(b) - _common_prefix(a, b)

    group: list[tuple[int, int]] = []
    for size, row in sorted(((length(row), row) for row in rows), key=itemgetter(0)):
        if group and (len(group) + 1) * size > most:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
