"""Self-supervised training, shared by the models: AdamW, warm-up and cosine decay, each loss beside its floor."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.model.base import BaseModelClass
from scvi.train import TrainRunner
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from cellprior.model._data import VocabularySplitter

MIN_DISPERSION, MAX_DISPERSION = 1e-4, 1e4


class GeneMeans(NamedTuple):
    """The floor: a predictor that knows each gene's share of the counts, and a cell's depth, and nothing else."""

    share: Tensor  # (genes,), sums to 1
    dispersion: Tensor  # (genes,), of the negative binomial

    @classmethod
    def fit(cls, batches: Iterable[Mapping[str, Tensor]]) -> GeneMeans:
        """Shares, and dispersions by moments, ``Σ μ² / Σ ((x - μ)² - μ)``, in one pass over sparse counts."""
        total = square = cross = depth_square = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            x = batch[REGISTRY_KEYS.X_KEY].to_dense().double()
            depth = x.sum(1)
            total, square = total + x.sum(0), square + (x**2).sum(0)
            cross, depth_square = cross + depth @ x, depth_square + depth @ depth
        share = total / total.sum().clamp(min=1.0)
        square_mean = depth_square * share**2  # Σ μ² with μ = depth·share
        excess = square - 2 * share * cross + square_mean - total
        dispersion = torch.where(excess > 0, square_mean / excess.clamp(min=1e-12), MAX_DISPERSION)
        return cls(share.float(), dispersion.clamp(MIN_DISPERSION, MAX_DISPERSION).float())


class TrainingPlan(pl.LightningModule):
    """Self-supervised training of a module.

    Parameters
    ----------
    module
        With ``training_losses(batch, floor=..., measured=..., rng_seed=..., **objective)``, a dict of scalars:
        ``loss``, its parts, among them ``reconstruction``, and ``floor``.
    floor
        Gene means of the training cells.
    measured
        Vocabulary rows of the genes that the data hold; only they count in the loss.
    n_steps
        Steps of the whole run.
    lr
        Peak learning rate of AdamW.
    weight_decay
        Of AdamW; not on biases and norms.
    warmup
        Share of all steps over which the learning rate rises; then it falls to 0 along a cosine.
    **objective
        To ``training_losses``.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        floor: GeneMeans,
        measured: Tensor,
        n_steps: int,
        *,
        lr: float = 1e-3,
        weight_decay: float = 1e-8,
        warmup: float = 0.05,
        **objective: Any,
    ) -> None:
        super().__init__()
        self.module: Any = module
        self.share: Tensor
        self.dispersion: Tensor
        self.register_buffer("share", floor.share, persistent=False)
        self.register_buffer("dispersion", floor.dispersion, persistent=False)
        self.register_buffer("measured", measured, persistent=False)
        self.n_steps, self.lr, self.weight_decay, self.warmup = n_steps, lr, weight_decay, warmup
        self.objective = objective

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One sentence."""
        return self._step(batch, "train", int(torch.randint(2**31, ()).item()))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One sentence, with the same mask in every epoch."""
        self._step(batch, "validation", batch_idx)

    def _step(self, batch: dict[str, Tensor], stage: str, rng_seed: int) -> Tensor:
        floor = GeneMeans(self.share, self.dispersion)
        losses = self.module.training_losses(
            batch, floor=floor, measured=self.measured, rng_seed=rng_seed, **self.objective
        )
        n_cells = len(batch[REGISTRY_KEYS.X_KEY])
        for name, value in losses.items():
            self.log(
                f"{stage}_{name}",
                value.detach(),
                on_step=False,
                on_epoch=True,
                batch_size=n_cells,
                sync_dist=True,
                prog_bar=name == "loss",
            )
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        """See :func:`adamw`."""
        return adamw(
            self.module, self.n_steps, lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup
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


class TrainableModel(BaseModelClass):
    """The self-supervised part of :class:`~cellprior.model._base.PretrainedModel`."""

    is_trained_: bool

    def train(
        self,
        max_epochs: int = 100,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 512,
        early_stopping: bool = False,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train on the attached data with the model's self-supervised objective, from where the weights are.

        ``history`` gets, per epoch, ``train_loss`` and ``validation_loss``, their parts, and the ``floor`` of each:
        what a predictor that knows only each gene's mean reaches on the same cells. A warning says if the model ends
        above it.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        accelerator, devices
            See :class:`~lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size, shuffle_set_split
            Split of the cells, see :class:`~scvi.dataloaders.DataSplitter`; by default 90 % are trained on.
        batch_size
            Cells of a minibatch, within one category of ``batch_key``.
        early_stopping
            Stop when ``validation_loss`` has not fallen for 45 epochs, see :class:`~scvi.train.Trainer`.
        plan_kwargs
            ``lr``, ``weight_decay``, ``warmup``, and arguments of the objective, see
            :class:`~cellprior.model._training.TrainingPlan`.
        datasplitter_kwargs
            To :class:`~scvi.dataloaders.DataSplitter`.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given.

        Raises
        ------
        ValueError
            If the model has no data.
        """
        if self.adata is None:
            msg = "The model was loaded without data; load it with the data to train on."
            raise ValueError(msg)
        index = self._match_of(self.adata_manager).index
        splitter = VocabularySplitter(
            self.adata_manager,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=batch_size,
            column=index,
            n_columns=len(self.genes),
            by_batch=True,
            dense=True,
            **(datasplitter_kwargs or {}),
        )
        splitter.setup()
        loader = splitter.train_dataloader()
        plan = TrainingPlan(
            self.module,
            GeneMeans.fit(loader),
            measured=torch.from_numpy(np.unique(index[index >= 0])),
            n_steps=max_epochs * len(loader),
            **(plan_kwargs or {}),
        )
        defaults: dict[str, Any] = {"gradient_clip_val": 2.0, "early_stopping_monitor": "validation_loss"}
        if splitter.n_val:
            defaults["check_val_every_n_epoch"] = 1
        runner = TrainRunner(
            self,
            training_plan=plan,
            data_splitter=splitter,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            early_stopping=early_stopping,
            **{**defaults, **trainer_kwargs},
        )
        self.module.train()  # loaded weights are in eval mode, and Lightning leaves them there
        was_trained: bool = self.is_trained_
        # of a trained model, scvi-tools appends to the columns that its history has, and keeps no new ones
        self.is_trained_ = "train_loss" in (self.history_ or {})
        try:
            runner()
        finally:
            self.is_trained_ = self.is_trained_ or was_trained
        warn_above_floor(self.history)

    @property
    def training_state_(self) -> dict[str, Any]:
        """What training needs besides the tensors to go on where it stopped; saved with the model."""
        return {}

    @training_state_.setter
    def training_state_(self, state: dict[str, Any]) -> None:
        pass


def warn_above_floor(history: Mapping[str, Any]) -> None:
    """Say so if the model ended no better than gene means on held-out cells, or on its training cells if none were."""
    stage = "validation" if "validation_floor" in history else "train"
    reached, floor = (float(history[f"{stage}_{name}"].iloc[-1, 0]) for name in ("reconstruction", "floor"))
    if reached < floor:
        return
    cells = "held-out" if stage == "validation" else "training"
    msg = (
        f"After training, the reconstruction loss on {cells} cells is {reached:.1f}; knowing each gene's mean "
        f"alone gives {floor:.1f}. The model has not learned anything about cells yet: train longer, change lr, or "
        "look at the data."
    )
    warnings.warn(msg, UserWarning, stacklevel=3)
