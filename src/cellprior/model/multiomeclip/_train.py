"""How MultiomeCLIP is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scvi.train import TrainRunner
from torch import Tensor

from cellprior._arguments import count
from cellprior.model.data._ranks import from_first
from cellprior.model.learning._fitting import run
from cellprior.model.learning._holdout import keep_split, noted
from cellprior.model.learning._processes import trainer_defaults
from cellprior.model.learning._training import warn_above_floor
from cellprior.model.multiomeclip._cells import Cells, CountsOf, codes_of
from cellprior.model.multiomeclip._module import MODALITIES, Modality
from cellprior.model.multiomeclip._pretrain import MAX_FITTED, PRETRAINED, PretrainableModel
from cellprior.model.multiomeclip._training import (
    ROWS,
    ContrastivePlan,
    PairedCells,
    PairedMinibatches,
    split_complete,
)

MIN_UNSEEN = 50  # held-out cells that the means of the modalities are taken from, if there are as many


class ContrastiveModel(PretrainableModel):
    """The part of :class:`~cellprior.model.multiomeclip._model.MultiomeCLIP` that trains."""

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
        *,
        micro_batch_size: int | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train on the cells that have both modalities, from where the weights are.

        ``history`` gets, per epoch, ``train_loss``, ``validation_loss`` and beside them the loss of chance; of held-out
        cells ``validation_foscttm`` (mean of ``_atac_to_rna`` and ``_rna_to_atac``), ``validation_recall_at_1`` and
        ``_10`` among ``validation_n_cells`` (5,000 at most), ``validation_modality_gap``; and the same of a control
        that knows nothing but sequencing depth, ``validation_foscttm_floor_depth_only``,
        ``validation_recall_at_1_depth_only`` and ``_10_``. A warning says if the model is no better than that.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        accelerator, devices
            See :class:`~lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size, shuffle_set_split
            Split of the complete cells; by default 90 % are trained on. It is kept with the weights: of the same
            cells, the next call holds out the same, unless another split is asked for, and a warning says if cells
            that were trained on are held out.
        batch_size
            Cells of a minibatch, each the negative of the others, within one category of ``batch_key``; of each
            process, where several train, and then those of all are negatives.
        early_stopping
            Stop when ``validation_foscttm`` has not fallen for 45 epochs, and go back to the best.
        plan_kwargs
            ``lr``, ``weight_decay``, ``warmup``, see
            :class:`~cellprior.model.multiomeclip._training.ContrastivePlan`.
        micro_batch_size
            Cells whose gradient is computed at a time. Saves memory, and changes neither the loss nor the negatives.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given.

        Raises
        ------
        ValueError
            If the model has no data, too few cells have both modalities, ``micro_batch_size`` is no whole number, or
            early stopping has no cells held out.
        RuntimeError
            If several processes have no seed to begin alike.
        DivergedError
            If a loss is not finite. The model has the last weights with a finite loss.
        """
        if micro_batch_size is not None:
            count(micro_batch_size=micro_batch_size)
        if self.adata is None:
            msg = "The model was loaded without data; load it with the data to train on."
            raise ValueError(msg)
        defaults = trainer_defaults(trainer_kwargs.get("strategy"))
        cells = self._cells(None)
        seed = from_first(int(torch.randint(2**31, ()).item()))  # seeded as all of torch is
        train, held_out = split_complete(
            cells.complete,
            train_size=train_size,
            validation_size=validation_size,
            shuffle=shuffle_set_split,
            rng=np.random.default_rng(seed),
        )
        parts = keep_split(
            self.split_.get("train", {}),
            cells.obs.index,
            {"train": train, "validation": held_out},
            sizes_given=train_size is not None or validation_size is not None,
            rows_given=not shuffle_set_split,
        )
        train, held_out = parts["train"], parts["validation"]
        if early_stopping and not len(held_out):
            msg = "early_stopping=True watches held-out cells, and there are none: lower train_size."
            raise ValueError(msg)
        counts = self._counts(None, cells)
        if not self.is_trained_ or self.training_state_:
            self._fit_inputs(cells, counts, held_out, seed)
        args = self.registry["setup_args"]
        label = codes_of(cells.obs, args["labels_key"], unlabeled=args["unlabeled_category"])
        pairs = PairedCells(counts, self.module, np.concatenate([train, held_out]), label)
        batch = codes_of(cells.obs, args["batch_key"])
        minibatches = PairedMinibatches(pairs, train, held_out, batch=batch, batch_size=batch_size)
        plan = ContrastivePlan(
            self.module,
            n_steps=max_epochs * len(minibatches.train_dataloader()),
            depth=_depth(counts, held_out, cells.n_obs),
            micro_batch_size=micro_batch_size,
            keep_best=early_stopping,
            **(plan_kwargs or {}),
        )
        defaults |= {
            "gradient_clip_val": 2.0,
            "early_stopping": early_stopping,
            "early_stopping_monitor": "validation_foscttm",
        }
        if len(held_out):
            defaults["check_val_every_n_epoch"] = 1
        runner = TrainRunner(
            self,
            training_plan=plan,
            data_splitter=minibatches,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            **{**defaults, **trainer_kwargs},
        )
        self.module.train()  # loaded weights are in eval mode, and Lightning leaves them there
        pretrained = self.training_state_
        self.training_state_ = {}  # before checkpoints are saved
        self.split_ = {**self.split_, "train": noted(cells.obs.index, parts)}
        try:
            after = run(self, runner)
        except BaseException:
            if self.is_trained_:  # the weights have moved, and what is known of the modalities with them
                self._align(counts, train, held_out)
            else:
                self.training_state_ = pretrained
            raise
        self._align(counts, train, held_out)
        warn_above_floor(after)

    def _fit_inputs(
        self, cells: Cells, counts: Mapping[Modality, CountsOf], held_out: np.ndarray, seed: int
    ) -> None:
        """Weights and components, or maxima, from all cells that are not held out, paired or not."""
        rng = np.random.default_rng(seed)
        for name in MODALITIES:
            if self.training_state_.get(PRETRAINED) != name:
                rows = np.setdiff1d(np.flatnonzero(cells.has(name)), held_out)
                self._fit_encoder(counts[name], name, rows, rng, seed)

    def _align(
        self, counts: Mapping[Modality, CountsOf], train: np.ndarray, held_out: np.ndarray | None = None
    ) -> None:
        """Find what the modalities share on training cells, and where they lie on others, if there are enough."""
        unseen = None if held_out is None or len(held_out) < MIN_UNSEEN else self._both(counts, held_out)
        self.module.align(*self._both(counts, train), unseen=unseen)

    def _both(self, counts: Mapping[Modality, CountsOf], rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unit vectors of RNA and ATAC of some cells, or of a part of them."""
        rows = rows[:: -(-len(rows) // MAX_FITTED)]
        rna, atac = (torch.from_numpy(self._embed(counts[name], rows)) for name in MODALITIES)
        return rna, atac


def _depth(counts: Mapping[Modality, CountsOf], rows: np.ndarray, n_obs: int) -> dict[Modality, np.ndarray]:
    """Total counts of some cells by modality, 0 for the others ``(n_obs,)``."""
    found: dict[Modality, np.ndarray] = {name: np.zeros(n_obs) for name in MODALITIES}
    for name, depth in found.items():
        for part in np.array_split(rows, max(-(-len(rows) // ROWS), 1)):
            if len(part):
                depth[part] = np.asarray(counts[name].read(part).sum(axis=1)).ravel()
    return found
