"""Self-supervised training, shared by the models: AdamW, warm-up and cosine decay, each loss beside its floor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.model.base import BaseModelClass
from scvi.train import TrainRunner
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from cellprior.model.data._datamodule import StreamedCells
from cellprior.model.data._minibatches import VocabularySplitter
from cellprior.model.data._panels import measured_genes, refuse_unmeasured
from cellprior.model.data._ranks import from_first, rank_and_count
from cellprior.model.learning._fitting import run
from cellprior.model.learning._holdout import keep_split, noted, warn_of_other_cells
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.learning._processes import trainer_defaults


class TrainingPlan(pl.LightningModule):
    """Self-supervised training of a module.

    Parameters
    ----------
    module
        With ``training_losses(batch, floor=..., measured=..., rng_seed=..., **objective)``, a dict of scalars:
        ``loss``, its parts, and beside a part ``<part>_floor_<predictor>``.
    floor
        Predictors that know no biology, fitted to the training cells.
    measured
        Which vocabulary genes were measured, once, or by category of ``batch_key`` ``(1 or n_batches, n_genes)``; only
        they count in the loss.
    n_steps
        Steps of the whole run.
    lr
        Peak learning rate of AdamW.
    weight_decay
        Of AdamW; not on biases and norms.
    schedule
        ``"cosine"``: the learning rate rises, and then falls to 0 along a cosine, step by step. ``"restarts"``: epoch
        by epoch, see :func:`restarts`.
    warmup
        Of ``"cosine"``: share of all steps over which the learning rate rises.
    **objective
        To ``training_losses``.
    """

    measured: Tensor

    def __init__(
        self,
        module: torch.nn.Module,
        floor: torch.nn.Module,
        measured: Tensor,
        n_steps: int,
        *,
        lr: float = 1e-3,
        weight_decay: float = 1e-8,
        schedule: Literal["cosine", "restarts"] = "cosine",
        warmup: float = 0.05,
        **objective: Any,
    ) -> None:
        super().__init__()
        if schedule not in ("cosine", "restarts"):
            msg = f'schedule={schedule!r} is not known; choose "cosine" or "restarts".'
            raise ValueError(msg)
        self.module: Any = module
        self.floor = floor
        self.register_buffer("measured", measured, persistent=False)
        self.n_steps, self.lr, self.weight_decay = n_steps, lr, weight_decay
        self.schedule, self.warmup, self.objective = schedule, warmup, objective

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One sentence."""
        return self._step(batch, "train", from_first(int(torch.randint(2**31, ()).item())))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One sentence, with the same mask in every epoch."""
        self._step(batch, "validation", batch_idx)

    def _step(self, batch: dict[str, Tensor], stage: str, rng_seed: int) -> Tensor:
        losses = self.module.training_losses(
            batch, floor=self.floor, measured=self.measured, rng_seed=rng_seed, **self.objective
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
        n_steps = steps_of(self, self.n_steps)
        optimizers, schedules = adamw(
            self.module, n_steps, lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup
        )
        if self.schedule == "restarts":
            for group in optimizers[0].param_groups:
                group["initial_lr"] = group["lr"] = self.lr
            schedules = [{"scheduler": LambdaLR(optimizers[0], restarts), "interval": "epoch"}]
        return optimizers, schedules


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


def steps_of(plan: pl.LightningModule, n_steps: int) -> int:
    """Steps of the whole run: what was counted for one process, or what the trainer counts for several."""
    return n_steps if rank_and_count()[1] == 1 else int(plan.trainer.estimated_stepping_batches)


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


class TrainableModel(BaseModelClass):
    """The self-supervised part of :class:`~cellprior.model._base.PretrainedModel`."""

    is_trained_: bool
    history_: dict[str, Any] | None
    split_: dict[str, Any]
    objectives: dict[str, dict[str, Any]] = {}  # by name, options of the training plan

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
        *,
        objective: str | None = None,
        measured: Mapping[str, Sequence[str]] | None = None,
        datamodule: pl.LightningDataModule | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train on the attached data without labels, from where the weights are.

        ``history`` gets, per epoch, ``train_loss`` and ``validation_loss``, their parts, and beside a part its floor,
        ``<part>_floor_<predictor>``: what a predictor that knows no biology reaches on the same cells. A warning says
        if the model ends above one. See :func:`cellprior.pl.training`.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        accelerator, devices
            See :class:`~lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size, shuffle_set_split
            Split of the cells, see :class:`~scvi.dataloaders.DataSplitter`; by default 90 % are trained on. It is
            kept with the weights: of the same cells, the next call holds out the same, unless another split is asked
            for, and a warning says if cells that were trained on are held out.
        batch_size
            Cells of a minibatch, within one category of ``batch_key``; of each process, where several train.
        early_stopping
            Stop when ``validation_loss`` has not fallen for 45 epochs, see :class:`~scvi.train.Trainer`.
        plan_kwargs
            ``lr``, ``weight_decay``, ``schedule``, ``warmup``, and arguments of the objective, see
            :class:`~cellprior.model.learning._training.TrainingPlan`.
        datasplitter_kwargs
            To :class:`~scvi.dataloaders.DataSplitter`.
        objective
            What is learned, one of the model's ``objectives``; by default the first.
        measured
            For panels that differ between batches: the genes measured in each category of ``batch_key``, as names of
            the data, symbols or Ensembl ids. The counts of the others must be 0 there, and do not count in the loss.
            By default all genes of the data were measured everywhere.
        datamodule
            Train on its cells instead of the attached, read from disk as they are needed: an
            :class:`scvi.dataloaders.AnnbatchDataModule`, see :doc:`/user_guide/scale`. Its minibatches do not keep to
            one batch, and its order does not follow ``scvi.settings.seed``.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given. ``enable_checkpointing=True``
            saves the model of the epoch with the lowest ``validation_loss``; to end with it,
            ``callbacks=[scvi.train.SaveCheckpoint(load_best_on_end=True)]``. ``strategy="ddp"`` trains in several
            processes, see :doc:`/user_guide/scale`.

        Raises
        ------
        ValueError
            If the model has no data, ``objective`` is not known, or an unmeasured gene has counts.
        RuntimeError
            If several processes have no seed to begin alike.
        KeyError
            If ``measured`` lacks a batch, or names a gene that neither the data nor the vocabulary have.
        DivergedError
            If a loss is not finite. The model has the last weights with a finite loss.
        """
        if self.adata is None and datamodule is None:
            msg = "The model was loaded without data; load it with the data to train on."
            raise ValueError(msg)
        defaults = trainer_defaults(trainer_kwargs.get("strategy"))
        options = self._objective(objective) | (plan_kwargs or {})
        split: dict[str, Any] = {
            "train_size": train_size,
            "validation_size": validation_size,
            "shuffle_set_split": shuffle_set_split,
            "batch_size": batch_size,
        }
        cells: VocabularySplitter | StreamedCells
        held: dict[str, Any]
        if datamodule is None:
            cells, seen = self._attached_cells(measured, **split, **(datasplitter_kwargs or {}))
            names = self.adata.obs_names
            parts = keep_split(
                self.split_.get("train", {}),
                names,
                cells.parts,
                sizes_given=train_size is not None or validation_size is not None,
                rows_given=not shuffle_set_split or "external_indexing" in (datasplitter_kwargs or {}),
            )
            cells.keep(parts)
            held = noted(names, parts)
        else:
            refuse_with_datamodule(measured=measured, strategy=trainer_kwargs.get("strategy"))
            cells = StreamedCells(datamodule, self.genes, self.min_coverage, **split)
            seen = measured_genes(None, None, self.genes, cells.match)
            held = {"cells": "of a datamodule", "n_cells": cells.n_train + cells.n_val}
            if self.split_.get("train"):
                warn_of_other_cells(self.split_["train"], held["n_cells"], stacklevel=2)
            if "covariate" in options:
                options["covariate"] = [None]  # whose batch is not known
        plan = TrainingPlan(
            self.module,
            self._fit_floor(cells.floor_minibatches(), torch.from_numpy(seen)),
            measured=torch.from_numpy(seen),
            n_steps=max_epochs * len(cells.train_dataloader()),
            **options,
        )
        defaults |= {"gradient_clip_val": 2.0, "early_stopping_monitor": "validation_loss"}
        if cells.n_val:
            defaults["check_val_every_n_epoch"] = 1
        runner = TrainRunner(
            self,
            training_plan=plan,
            data_splitter=cells,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            early_stopping=early_stopping,
            **{**defaults, **trainer_kwargs},
        )
        self.module.train()  # loaded weights are in eval mode, and Lightning leaves them there
        self.split_ = {**self.split_, "train": held}
        run(self, runner)
        warn_above_floor(self.history)

    def _attached_cells(
        self, measured: Mapping[str, Sequence[str]] | None, **options: Any
    ) -> tuple[VocabularySplitter, np.ndarray]:
        """The attached cells, split, and which genes were measured; refuses counts of genes that were not."""
        match = self._match_of(self.adata_manager)
        seen = measured_genes(measured, self.adata_manager, self.genes, match)
        cells = VocabularySplitter(
            self.adata_manager,
            column=match.index,
            n_columns=len(self.genes),
            by_batch=True,
            dense=True,
            **options,
        )
        cells.setup()
        if measured is not None:
            for batch in chain(cells.train_dataloader(), cells.val_dataloader()):
                known = seen[int(batch[REGISTRY_KEYS.BATCH_KEY][0])]
                refuse_unmeasured(batch[REGISTRY_KEYS.X_KEY].numpy(), known, self.genes)
        return cells, seen

    def _objective(self, name: str | None) -> dict[str, Any]:
        """Options of the training plan for one of ``objectives``."""
        if name not in (None, *self.objectives):
            msg = f"objective={name!r} is not known; choose one of {', '.join(map(repr, self.objectives))}."
            raise ValueError(msg)
        return dict(self.objectives[name or next(iter(self.objectives))])

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> torch.nn.Module:
        """Predictors that know no biology, from the minibatches of the training cells; see :class:`TrainingPlan`."""
        raise NotImplementedError

    def _fit_predictors(self, batches: Callable[[], Iterable[Mapping[str, Tensor]]], measured: Tensor) -> Any:
        """What :meth:`_masked_scores` needs to know of training cells, from passes over them; the floor, if no more."""
        return self._fit_floor(batches(), measured).to(self.module.device)

    def _masked_scores(
        self,
        counts: Tensor,
        fitted: Any,
        *,
        share: float,
        rng: np.random.Generator,
        measured: Tensor,
        batch: int,
    ) -> MaskedScores:
        """How well genes that are hidden from the network are predicted, by it and by predictors without biology.

        Parameters
        ----------
        counts
            Raw counts over the vocabulary ``(cells, n_genes)``, of one sentence.
        fitted
            From :meth:`_fit_predictors`.
        share
            Of the genes that is hidden.
        rng
            Draws them.
        measured
            Which genes were measured ``(n_genes,)``.
        batch
            Code of the cells' batch.

        Raises
        ------
        NotImplementedError
            If a model does not have it: ``evaluate.masked_prediction`` is then not for this model.
        """
        msg = f"{type(self).__name__} does not say how it predicts hidden genes: it gives no _masked_scores."
        raise NotImplementedError(msg)

    @property
    def training_state_(self) -> dict[str, Any]:
        """What training needs besides the tensors to go on where it stopped; saved with the model."""
        return {}

    @training_state_.setter
    def training_state_(self, state: dict[str, Any]) -> None:
        pass


def refuse_with_datamodule(*, measured: Any, strategy: Any) -> None:
    """Refuse what needs to know whose cells are in a minibatch.

    Raises
    ------
    ValueError
        With what.
    """
    if measured is not None:
        msg = "measured= names genes by batch, and the minibatches of a datamodule mix batches: leave it out."
        raise ValueError(msg)
    if "ddp" in str(strategy).lower():
        msg = (
            "With datamodule=, each process would train on the same cells: use one process, or attached data."
        )
        raise ValueError(msg)


def losses_with_floors(history: Mapping[str, pd.DataFrame], stage: str) -> dict[str, dict[str, pd.Series]]:
    """Names of the losses of a stage that have floors, and the columns of these by the predictor's name."""
    found: dict[str, dict[str, pd.Series]] = {}
    for column, values in history.items():
        name, is_floor, predictor = column.removeprefix(f"{stage}_").partition("_floor_")
        if is_floor and column.startswith(f"{stage}_"):
            found.setdefault(name, {})[predictor.replace("_", " ")] = values.iloc[:, 0].astype(float)
    return found


def warn_above_floor(history: Mapping[str, pd.DataFrame]) -> None:
    """Say so if a loss ended no better than a floor, on held-out cells, or on the training cells if none were."""
    stage = "validation" if "validation_loss" in history else "train"
    for name, floors in losses_with_floors(history, stage).items():
        reached = float(history[f"{stage}_{name}"].iloc[-1, 0])
        sign = -1 if name.endswith("accuracy") else 1
        ahead = {
            what: floor.iloc[-1] for what, floor in floors.items() if sign * (reached - floor.iloc[-1]) >= 0
        }
        if ahead:
            cells = "held-out" if stage == "validation" else "training"
            msg = (
                f"After training, {name} on {cells} cells is {reached:.4g}, no better than what is known without "
                f"looking at cells: {', '.join(f'{what} {value:.4g}' for what, value in ahead.items())}. Train "
                "longer, change lr, or look at the data."
            )
            warnings.warn(msg, UserWarning, stacklevel=3)
