"""Groups a batch's sequences by length, so that little time goes into padding."""

from __future__ import annotations

import math
from collections.abc import Sequence


def length_groups(lengths: Sequence[int], call_cost: int, most: float = math.inf) -> list[list[int]]:
    """Groups of indices of ``lengths`` with the least total cost; each group is padded to its longest sequence.

    Args:
        lengths: tokens of each sequence.
        call_cost: overhead of one forward pass, in tokens.
        most: maximum tokens of a group with padding, unless it is a single sequence.

    The cost of a group is its longest length times its size, plus ``call_cost``. The best groups are contiguous in the
    sequences sorted by length, so dynamic programming over these finds them (n² steps).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n sequences, and start of their last group
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
