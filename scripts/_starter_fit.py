"""What the recipes of the starter weights share: steps that are drawn, averaged weights, and a run by the library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from _starter_data import CellSet
from torch.utils.data import DataLoader, Dataset

from cellprior.model import PretrainedModel
from cellprior.model.learning._finite import copies, put_back
from cellprior.model.learning._fit import fit

STEPS = 100  # of an epoch, after which the losses are logged
log = logging.getLogger("starter")


class Draws(Dataset):
    """As many minibatches as an epoch has, each drawn anew."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Any:
        return self.draw()


class DrawnCells(pl.LightningDataModule):
    """Minibatches that a function draws; no cells are held out."""

    n_val = 0

    def __init__(self, draw: Callable[[], Any], n_train: int) -> None:
        super().__init__()
        self.draw, self.n_train = draw, n_train

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            Draws(self.draw), batch_size=None, collate_fn=lambda drawn: drawn, generator=torch.Generator()
        )


class Average(pl.Callback):
    """Ends with the exponential average of the weights over the steps."""

    def __init__(self, share: float) -> None:
        self.share, self.tensors = share, {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tensors = copies(pl_module.module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        share = min(self.share, trainer.global_step / (trainer.global_step + 10))
        for name, mine in self.tensors.items():
            mine.lerp_(pl_module.module.get_parameter(name), 1.0 - share)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        put_back(pl_module.module, self.tensors)


class Log(pl.Callback):
    """Writes the losses of each epoch to the log."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        losses = {name: float(x) for name, x in trainer.callback_metrics.items()}
        log.info("step %d: %s", trainer.global_step, ", ".join(f"{k} {x:.4f}" for k, x in losses.items()))


def train(
    model: PretrainedModel,
    plan: pl.LightningModule,
    draw: Callable[[], Any],
    *,
    n_train: int,
    steps: int,
    clip: float,
    average: float,
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Train a model's module by a recipe of its own, on minibatches that are drawn from ``n_train`` cells."""
    log.info("%.2f million parameters", sum(p.numel() for p in model.module.parameters()) / 1e6)
    fit(
        model,
        plan,
        DrawnCells(draw, n_train),
        max_epochs=steps // STEPS,
        accelerator="cpu",
        devices=1,
        split={},
        gradient_clip_val=clip,
        callbacks=[Average(average), Log(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def cosine(step: int, steps: int) -> float:
    """Learning rate of a step, counted from 1, as a share of the peak."""
    return 0.01 + 0.99 * 0.5 * (1.0 + float(np.cos(np.pi * step / steps)))


def as_anndata(cells: CellSet) -> ad.AnnData:
    """Counts, names and labels of a set, as a user has them."""
    obs = pd.DataFrame({"batch": cells.batch}, index=cells.cells)
    if cells.labels is not None:
        obs["cell_type"] = cells.labels
    return ad.AnnData(cells.counts, obs=obs, var=pd.DataFrame(index=cells.genes))


def trained_on(cells: list[CellSet]) -> ad.AnnData:
    """Cells of several sets in vocabulary order, one AnnData to build a model with."""
    counts = sp.vstack([c.counts for c in cells], format="csr")
    names = np.concatenate([c.name + "/" + c.cells.astype(str) for c in cells])
    return ad.AnnData(counts, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=cells[0].genes))
