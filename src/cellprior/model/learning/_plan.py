"""What every training plan shares: AdamW, warm-up and cosine decay; and losses that are logged by epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from cellprior.model.data._ranks import rank_and_count


class Plan(pl.LightningModule):
    """Training of a module for ``n_steps``, with AdamW, whose ``weight_decay`` is not on biases and norms.

    ``lr`` is the peak; the learning rate rises over the share ``warmup`` of all steps, then it falls to 0 along a
    cosine.
    """

    def __init__(
        self, module: Any, *, n_steps: int, lr: float, weight_decay: float, warmup: float = 0.05
    ) -> None:
        super().__init__()
        self.module = module
        self.n_steps, self.lr, self.weight_decay, self.warmup = n_steps, lr, weight_decay, warmup

    def configure_optimizers(self) -> Any:
        """See :func:`adamw`; several processes share the steps, and the trainer counts them."""
        n_steps = self.n_steps if rank_and_count()[1] == 1 else int(self.trainer.estimated_stepping_batches)
        return adamw(self.module, n_steps, lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup)

    def log_epoch(self, losses: Mapping[str, Tensor | float], n_cells: int, *, shown: str) -> None:
        """Log means over the cells of an epoch; ``shown`` is the one that is drawn beside the bar."""
        for name, value in losses.items():
            self.log(
                name,
                value,
                on_step=False,
                on_epoch=True,
                batch_size=n_cells,
                sync_dist=True,
                prog_bar=name == shown,
            )


def adamw(
    module: torch.nn.Module, n_steps: int, *, lr: float, weight_decay: float, warmup: float
) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
    """AdamW on what is trained of a module, with warm-up and cosine by step; no weight decay on biases and norms."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    n_steps = max(n_steps, 2)
    n_warmup = min(max(int(warmup * n_steps), 1), n_steps - 1)
    parts: list[LRScheduler] = [
        LinearLR(optimizer, start_factor=1 / (n_warmup + 1), total_iters=n_warmup),
        CosineAnnealingLR(optimizer, T_max=n_steps - n_warmup),
    ]
    with warnings.catch_warnings():
        # SequentialLR itself steps its parts in a way that they warn about
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        schedule = SequentialLR(optimizer, parts, milestones=[n_warmup])
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def restarts(epoch: int) -> float:
    """Learning rate in an epoch, counted from 0, as a share of the peak; the schedule of scBERT's pretraining.

    Cycles of 15, 25, 45 and so on epochs: 5 epochs of linear rise from 1 % of the first peak, then a cosine back to it;
    each peak is 0.9 times the one before.
    """
    n_rising, n_falling, peak, lowest = 5, 10, 1.0, 0.01
    while epoch >= n_rising + n_falling:
        epoch -= n_rising + n_falling
        n_falling, peak = 2 * n_falling, 0.9 * peak
    if epoch < n_rising:
        return lowest + (peak - lowest) * epoch / n_rising
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * (epoch - n_rising) / n_falling)) / 2
