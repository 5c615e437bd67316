"""Cells of many lengths that go through a network together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def of_like_length(
    length: Tensor, room: int, *, filled: float, least: int = 0
) -> Iterator[tuple[Tensor, int]]:
    """Numbers of cells of nearly equal length, the longest first, and the longest's; not those of none.

    As many tokens as have ``room`` go through the network together, if a cell alone has no more. The shortest cell of
    a group has a share ``filled`` of the longest's, and ``least`` tokens are computed of each cell, however few it
    has.
    """
    length, order = length.sort(descending=True, stable=True)
    lengths, start = length.tolist(), 0
    for i, n in enumerate([*lengths, 0]):
        longest = lengths[start] if start < len(lengths) else 0
        if i > start and ((i + 1 - start) * max(longest, least) > room or n < filled * longest):
            yield order[start:i], longest
            start = i
        if n == 0:
            return


def by_length(length: Tensor, room: int) -> Iterator[Tensor]:
    """Numbers of cells in the order of their length, as many at a time as have room when padded to the longest.

    A cell that alone has more than ``room`` tokens comes by itself.
    """
    order = torch.argsort(length, stable=True)
    sizes, start = length[order].tolist(), 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * sizes[end] <= room:
            end += 1
        yield order[start:end]
        start = end
