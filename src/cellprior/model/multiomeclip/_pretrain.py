"""How the encoder of ATAC is trained before the model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scvi.train import TrainRunner

from cellprior.model.data._counts import row_numbers
from cellprior.model.data._ranks import from_first
from cellprior.model.learning._fitting import continued, run
from cellprior.model.learning._holdout import keep_split, noted
from cellprior.model.learning._processes import trainer_defaults
from cellprior.model.learning._training import TrainingPlan, warn_above_floor
from cellprior.model.multiomeclip._cells import CountsOf
from cellprior.model.multiomeclip._module import MLPEncoder, Modality
from cellprior.model.multiomeclip._pretraining import (
    MASK_SHARE,
    CellsOfOneModality,
    MaskedPeaks,
    Popularity,
    as_pretraining,
)
from cellprior.model.multiomeclip._reading import Data, ReadingModel
from cellprior.model.multiomeclip._training import ROWS, PairedMinibatches, split_complete

MAX_FITTED = 20_000  # training cells that components are found from
PRETRAINED = "pretrained"  # modality, in the training state of a model that has not been trained yet


class PretrainableModel(ReadingModel):
    """The part of :class:`~cellprior.model.multiomeclip._model.MultiomeCLIP` that learns from ATAC alone."""

    history_: dict[str, Any] | None
    training_state_: dict[str, Any]

    def pretrain_atac(
        self,
        adata: Data | None = None,
        *,
        max_epochs: int = 40,
        mask_share: float = MASK_SHARE,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 256,
        plan_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the encoder of ATAC by itself, on cells that need no RNA; :meth:`train` goes on from there.

        A share of a cell's open peaks is hidden, and told from as many closed ones by what the encoder makes of the
        others, see :class:`~cellprior.model.multiomeclip._pretraining.MaskedPeaks`. It starts from the components that
        :meth:`train` would find, fitted on these cells, and moves them and the layers behind. RNA is not read.

        ``history`` gets ``train_pretrain_loss`` and ``validation_pretrain_loss``, and beside each its
        ``_floor_popularity``, of a predictor that knows how often each peak is open, and ``_floor_chance``. A warning
        says if the model is no better. ``train_indices`` and ``validation_indices`` are rows of these cells until
        :meth:`train` is called.

        Of the attached data, cells that :meth:`train` draws as held out have been seen here, without their RNA. For
        numbers that are clean of that, keep test cells out of the data altogether.

        Parameters
        ----------
        adata
            Data with ATAC, by default the attached: an AnnData of peaks, which are matched to the model's, or a MuData,
            whose cells with ATAC are used, whether they have RNA or not.
        max_epochs
            Passes over the training cells.
        mask_share
            Share of the open peaks that is hidden.
        accelerator, devices
            See :class:`~lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size, shuffle_set_split
            Split of the cells with ATAC; by default 90 % are trained on. The next call holds out the same.
        batch_size
            Cells of a minibatch.
        plan_kwargs
            ``lr`` (0.0003 unless given), ``weight_decay``, ``schedule``, ``warmup``, see
            :class:`~cellprior.model.learning._training.TrainingPlan`.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given.

        Raises
        ------
        ValueError
            If the model has been trained, or reads no components (``encoder="vit"``), ``mask_share`` is no share, or
            too few cells have ATAC.
        DivergedError
            If a loss is not finite. The model has the last weights with a finite loss.
        NotCountsError, PeakMatchError
            If the data are not raw counts, or too few peaks are known.
        """
        was_trained, encoder = self.is_trained_, self._atac_components()
        if was_trained and not self.training_state_:
            msg = "The model has been trained: pretrain_atac comes before train()."
            raise ValueError(msg)
        if not 0 < mask_share < 1:
            msg = f"mask_share={mask_share}; a share of the open peaks between 0 and 1 is needed."
            raise ValueError(msg)
        defaults = trainer_defaults(trainer_kwargs.get("strategy"))
        cells = self._cells(adata)
        seed = from_first(int(torch.randint(2**31, ()).item()))  # seeded as all of torch is
        train, held_out = split_complete(
            cells.has("atac"),
            train_size=train_size,
            validation_size=validation_size,
            shuffle=shuffle_set_split,
            rng=np.random.default_rng(seed),
            having="ATAC",
        )
        parts = keep_split(
            self.split_.get("pretrain_atac", {}),
            cells.obs.index,
            {"train": train, "validation": held_out},
            sizes_given=train_size is not None or validation_size is not None,
            rows_given=not shuffle_set_split,
        )
        train, held_out = parts["train"], parts["validation"]
        counts = self._counts(adata, cells)["atac"]
        if not self.training_state_:
            self._fit_encoder(counts, "atac", train, np.random.default_rng(seed), seed)
        measured = np.isin(np.arange(counts.n_features), counts.column)
        open_cells = _open_cells(counts, train)
        masked = MaskedPeaks(encoder, self.module.n_latent, open_cells, mask_share=mask_share)
        minibatches = PairedMinibatches(
            CellsOfOneModality(counts), train, held_out, batch=None, batch_size=batch_size
        )
        plan = TrainingPlan(
            masked,
            Popularity(open_cells, len(train), measured),
            measured=torch.from_numpy(measured)[None],
            n_steps=max_epochs * len(minibatches.train_dataloader()),
            **{"lr": 3e-4, "weight_decay": 1e-2, **(plan_kwargs or {})},
        )
        defaults |= {"gradient_clip_val": 2.0, "early_stopping_monitor": "validation_loss"}
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
        self.module.train()
        self.split_ = {**self.split_, "pretrain_atac": noted(cells.obs.index, parts)}
        try:
            after = run(self, runner, lambda before, after: continued(before, as_pretraining(after)))
        finally:
            masked.fold()  # the layers have learned to read these components
            if self.is_trained_:
                self.training_state_ = {PRETRAINED: "atac"}
            self.is_trained_ = was_trained
        warn_above_floor(after)

    def get_atac_representation(
        self,
        adata: Data | None = None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Place of cells on the components of ATAC: what its encoder reads, and all that is known without RNA.

        Components of TF-IDF (latent semantic indexing), as :meth:`pretrain_atac` has moved them, if it was called.

        Parameters
        ----------
        adata
            Data with ATAC, by default the attached.
        indices
            Cells, as numbers or a mask; the result is in this order.
        batch_size
            Cells in memory at a time. Never changes the result.

        Returns
        -------
        Float32 array ``(n_cells, n_components)``.

        Raises
        ------
        RuntimeError
            If the model has been neither pretrained, nor trained, nor loaded from weights.
        ValueError
            If a cell lacks ATAC, or the model reads no components (``encoder="vit"``).
        """
        encoder = self._atac_components()
        if not self.training_state_:
            self._check_if_trained(warn=False)
        cells = self._cells(adata)
        rows = row_numbers(indices, cells.n_obs)
        if not (has := cells.has("atac")[rows]).all():
            msg = f"{int((~has).sum())} of {len(rows)} cells lack ATAC, the first {cells.obs.index[rows[~has][0]]!r}."
            raise ValueError(msg)
        counts = self._counts(adata, cells)["atac"]
        return self._in_parts(counts, rows, batch_size, encoder.inputs, encoder.components.shape[1])

    def _check_if_trained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to embed without training, and with an encoder of RNA that has learned nothing."""
        super()._check_if_trained(*args, **kwargs)
        if self.training_state_:
            msg = (
                "ATAC has been pretrained, and the model not trained yet: train() on cells with both modalities comes "
                "first. get_atac_representation gives what is known of ATAC."
            )
            raise RuntimeError(msg)

    def _atac_components(self) -> MLPEncoder:
        """Encoder of ATAC, if it has components.

        Raises
        ------
        ValueError
            If it has not.
        """
        encoder = self.module.encoder_of("atac")
        if not isinstance(encoder, MLPEncoder):
            msg = 'Components of ATAC are needed, which encoder="vit" has not; make the model with encoder="mlp".'
            raise ValueError(msg)
        return encoder

    def _fit_encoder(
        self, counts: CountsOf, modality: Modality, rows: np.ndarray, rng: np.random.Generator, seed: int
    ) -> None:
        """Weights and components, or maxima, from some cells."""
        if len(rows) > MAX_FITTED:
            rows = np.sort(rng.choice(rows, MAX_FITTED, replace=False))
        blocks = [counts.read(part) for part in np.array_split(rows, -(-len(rows) // ROWS))]
        self.module.encoder_of(modality).fit(sp.vstack(blocks, format="csr"), seed=seed % 2**31)


def _open_cells(counts: CountsOf, rows: np.ndarray) -> np.ndarray:
    """Number of some cells in which each peak is open ``(n_peaks,)``."""
    total = np.zeros(counts.n_features, dtype=np.int64)
    for part in np.array_split(rows, -(-len(rows) // ROWS)):
        block = counts.read(part)
        total += np.bincount(block.indices[block.data > 0], minlength=counts.n_features)
    return total
