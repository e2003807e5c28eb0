"""Sequences of a batch in groups of near length, so that little is computed for padding."""

from __future__ import annotations

import math
from collections.abc import Sequence


def length_groups(lengths: Sequence[int], call_cost: int, most: float = math.inf) -> list[list[int]]:
    """Places of ``lengths`` in groups that are padded to their own longest, at the least total cost.

    Args:
        lengths: tokens of each sequence.
        call_cost: what one more forward pass costs, in tokens.
        most: tokens that a group may have with padding, if it is of more than one sequence.

    The cost of a group is its longest length times its size, plus ``call_cost``. Sorted by length the best groups are
    neighbours, so a table over the sorted sequences finds them (dynamic programming, n² steps).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n sequences, and where their last group begins
    for end in range(1, len(order) + 1):
        sizes = ((start, lengths[order[start]] * (end - start)) for start in range(end))
        fits = ((start, size) for start, size in sizes if size <= most or start == end - 1)
        best.append(min((best[start][0] + size + call_cost, start) for start, size in fits))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.insert(0, sorted(order[start:end]))
        end = start
    return groups
