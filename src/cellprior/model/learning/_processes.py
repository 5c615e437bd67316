"""Training in several processes: which cells are whose, and losses that couple the cells of all of them."""

from __future__ import annotations

from typing import Any

import scvi
import torch
import torch.distributed as dist
from torch import Tensor

from cellprior.model.data._ranks import from_first, rank_and_count


def shared_generator() -> torch.Generator | None:
    """What draws the same in all processes, where there are several."""
    if rank_and_count()[1] == 1:
        return None
    return torch.Generator().manual_seed(from_first(int(torch.randint(2**31, ()).item())))


def gather_objects(own: Any) -> list[Any]:
    """What each process has, in order."""
    _, n_ranks = rank_and_count()
    if n_ranks == 1:
        return [own]
    found: list[Any] = [None] * n_ranks
    dist.all_gather_object(found, own)
    return found


def sum_over_processes(own: Tensor) -> Tensor:
    """The sum of a number over all processes, in each of them."""
    if rank_and_count()[1] > 1:
        dist.all_reduce(own)
    return own


def gather_cells(own: Tensor) -> Tensor:
    """Rows of all processes, in order, with their gradient.

    A loss of all rows, computed in each process, then has in each process the gradient of that loss times the number
    of processes, from its own rows; which is what distributed training divides by when it averages.
    """
    if rank_and_count()[1] == 1:
        return own
    return _Gather.apply(own)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        rank, n_ranks = rank_and_count()
        sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(n_ranks)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
        n_rows = [int(size) for size in sizes]
        # processes exchange tensors of one shape
        padded = own.new_zeros(max(n_rows), *own.shape[1:])
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(n_ranks)]
        dist.all_gather(found, padded)
        ctx.own = slice(sum(n_rows[:rank]), sum(n_rows[: rank + 1]))
        return torch.cat([part[:n] for part, n in zip(found, n_rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own]


def refuse_unseeded(strategy: Any) -> None:
    """Refuse processes that each begin anew and have no seed to begin alike.

    Raises RuntimeError, with the way to set one.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__.lower()
    begin_anew = "ddp" in name and not any(how in name for how in ("spawn", "fork", "notebook"))
    if begin_anew and scvi.settings.seed is None:
        msg = (
            f"strategy={strategy!r} runs the whole script in each process, and without a seed each would hold out "
            "other cells: set scvi.settings.seed = 0, or another number, before the model is built."
        )
        raise RuntimeError(msg)
