"""Self-supervised training, shared by the models: each loss beside its floor."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cellprior.model.data._ranks import from_first
from cellprior.model.learning._fit import fit
from cellprior.model.learning._holdout import hold_out, warn_of_other_cells
from cellprior.model.learning._plan import Plan, restarts
from cellprior.model.learning._processes import refuse_unseeded

MOST_EPOCHS, FEWEST_EPOCHS = 100, 10
MANY_SEEN = 2_000_000  # cells, over all epochs
SMALLEST_BATCH, LARGEST_BATCH = 32, 512


class TrainingPlan(Plan):
    """Self-supervised training of a module.

    Parameters
    ----------
    module
        With ``training_losses(batch, floor=..., measured=..., rng_seed=..., **objective)``, a dict of scalar tensors:
        ``loss``, its parts, and beside a part ``<part>_floor_<predictor>``. ``batch["X"]`` holds raw counts over the
        whole vocabulary, dense ``(cells, n_genes)``, and 0 for genes that the data lack; ``batch["batch"]``, if the
        data have batches, the code of the one that all the cells are of ``(cells, 1)``; not with a datamodule.
        ``rng_seed`` is for what is drawn, such as a mask: another in each step, the same in each validation.
    floor
        Predictors that know no biology, fitted to the training cells. A module, as it moves to where the network is.
    measured
        Which vocabulary genes were measured, once, or by category of ``batch_key`` ``(1 or n_batches, n_genes)``; only
        they are to count in the loss.
    schedule
        ``"cosine"``: the learning rate rises, and then falls to 0 along a cosine, step by step. ``"restarts"``: epoch
        by epoch, see :func:`~cellprior.model.learning._plan.restarts`.
    n_steps, lr, weight_decay, warmup
        See :class:`~cellprior.model.learning._plan.Plan`; ``warmup`` is of ``"cosine"``.
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
        if schedule not in ("cosine", "restarts"):
            msg = f'schedule={schedule!r} is not known; choose "cosine" or "restarts".'
            raise ValueError(msg)
        super().__init__(module, n_steps=n_steps, lr=lr, weight_decay=weight_decay, warmup=warmup)
        self.floor = floor
        self.register_buffer("measured", measured, persistent=False)
        self.schedule, self.objective = schedule, objective

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
        if "loss" not in losses:
            msg = (
                f"training_losses of {type(self.module).__name__} gives {', '.join(losses) or 'nothing'}, and no "
                '"loss": what is minimised.'
            )
            raise KeyError(msg)
        named = {f"{stage}_{name}": value.detach() for name, value in losses.items()}
        self.log_epoch(named, len(batch[REGISTRY_KEYS.X_KEY]), shown=f"{stage}_loss")
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        """AdamW, and the schedule that was asked for."""
        optimizers, schedules = super().configure_optimizers()
        if self.schedule == "restarts":
            for group in optimizers[0].param_groups:
                group["initial_lr"] = group["lr"] = self.lr
            schedules = [{"scheduler": LambdaLR(optimizers[0], restarts), "interval": "epoch"}]
        return optimizers, schedules


def train(
    model: Any,
    *,
    max_epochs: int | None,
    split: dict[str, Any],
    plan_kwargs: dict[str, Any] | None,
    datasplitter_kwargs: dict[str, Any] | None,
    objective: str | None,
    measured: Any,
    datamodule: pl.LightningDataModule | None,
    **trainer_kwargs: Any,
) -> None:
    """See :meth:`cellprior.model._base.PretrainedModel.train`; ``split`` is ``train_size`` to ``batch_size``."""
    if model.adata is None and datamodule is None:
        msg = "The model was loaded without data; load it with the data to train on."
        raise ValueError(msg)
    if split["batch_size"] is None:
        n_here = MANY_SEEN if datamodule is not None else model.adata.n_obs
        split = {**split, "batch_size": default_batch_size(n_here, split["train_size"])}
    strategy = trainer_kwargs.get("strategy")
    options = model._objective(objective) | (plan_kwargs or {})
    refuse_unseeded(strategy)
    if datamodule is None:
        cells, seen = model._attached_cells(measured, **split, **(datasplitter_kwargs or {}))
        held = hold_out(model, "train", model.adata.obs_names, cells, split, datasplitter_kwargs)
    else:
        refuse_with_datamodule(datamodule, measured=measured, strategy=strategy)
        cells, seen = model._streamed_cells(datamodule, **split)
        held = {"cells": "of a datamodule", "n_cells": cells.n_train + cells.n_val}
        if model.split_.get("train"):
            warn_of_other_cells(model.split_["train"], held["n_cells"], stacklevel=3)
        if "covariate" in options:
            options["covariate"] = [None]  # whose batch is not known
    if max_epochs is None:
        max_epochs = default_epochs(cells.n_train + cells.n_val)
    plan = model._training_plan_cls(
        model.module,
        model._fit_floor(cells.floor_minibatches(), torch.from_numpy(seen)),
        measured=torch.from_numpy(seen),
        n_steps=max_epochs * len(cells.train_dataloader()),
        **options,
    )
    fit(model, plan, cells, max_epochs=max_epochs, split={"train": held}, **trainer_kwargs)


def default_epochs(n_cells: int) -> int:
    """Passes over some cells: 100, and of more than 20,000 cells as many as see 2 million cells, but 10 at least."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(MANY_SEEN / max(n_cells, 1))))


def default_batch_size(n_cells: int, train_size: float | None) -> int:
    """Cells of a minibatch: a sixteenth of the training cells, as a power of two from 32 to 512.

    So few cells give some steps in an epoch too; from about 9,000 cells on, it is 512.
    """
    n_train = int(n_cells * (0.9 if train_size is None else train_size))
    return min(max(1 << max(n_train // 16, 1).bit_length() - 1, SMALLEST_BATCH), LARGEST_BATCH)


def refuse_with_datamodule(datamodule: Any, *, measured: Any, strategy: Any) -> None:
    """Refuse what needs to know whose cells are in a minibatch, and processes that would all read the same.

    Raises ValueError, with what.
    """
    if measured is not None:
        msg = "measured= names genes by batch, and the minibatches of a datamodule mix batches: leave it out."
        raise ValueError(msg)
    if "ddp" in str(strategy).lower() and not getattr(datamodule, "by_process", False):
        msg = (
            "With datamodule=, each process would train on the same cells: use one process, attached data, or "
            "scripts/pretrain.py, whose processes share the cells of a collection."
        )
        raise ValueError(msg)
