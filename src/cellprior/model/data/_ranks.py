"""Which of several training processes this is."""

from __future__ import annotations

import torch.distributed as dist


def rank_and_count() -> tuple[int, int]:
    """Number of this process, and how many train together; 0 and 1 where there is no other."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_first(number: int) -> int:
    """The number that the first process has drawn, in all of them."""
    if rank_and_count()[1] == 1:
        return number
    box = [number]
    dist.broadcast_object_list(box)
    return box[0]
