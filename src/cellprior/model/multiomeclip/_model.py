"""MultiomeCLIP's face to MuData."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import rich.pretty  # noqa: F401  scvi-tools 1.4.2 uses it without importing it
from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManagerValidationCheck
from scvi.train import TrainRunner

from cellprior.genes._kinds import which_are_genes
from cellprior.genes._table import read_vocabulary
from cellprior.model.data._counts import refuse_by_gene, row_numbers
from cellprior.model.data._fields import CountsManager
from cellprior.model.data._fingerprint import digest, digest_of_counts
from cellprior.model.data._panels import distinct
from cellprior.model.learning._annotation import refuse_unless_annotates
from cellprior.model.multiomeclip import _peaks as peaks_alone
from cellprior.model.multiomeclip import _training as training
from cellprior.model.multiomeclip._barcodes import differ_by_suffix
from cellprior.model.multiomeclip._cells import (
    Cells,
    ModalityField,
    cells_of,
    codes_of,
    genomic_order,
    modality_keys,
    peak_names,
)
from cellprior.model.multiomeclip._embedding import JointEmbedding
from cellprior.model.multiomeclip._module import (
    MODALITIES,
    EncoderKind,
    Loss,
    Modality,
    MultiomeCLIPModule,
)
from cellprior.model.multiomeclip._opening import OpenedModel
from cellprior.model.multiomeclip._peaks import MASK_SHARE
from cellprior.model.multiomeclip._reading import Data
from cellprior.model.multiomeclip._retrieval import RetrievalModel


class MultiomeCLIP(RetrievalModel, OpenedModel):
    """MultiomeCLIP: RNA and ATAC of a cell in one space, learned from cells that have both.

    With ``encoder="mlp"``, components of the log-normalised RNA and of the TF-IDF of ATAC through wide layers; with
    ``encoder="vit"``, the transformer of scCLIP [Xiong23]_. Everything that is fitted, the weights of the peaks and
    the components among it, comes from the training cells, is saved with the model and applied to queries.

    Parameters
    ----------
    adata
        MuData registered with :meth:`setup_mudata`.
    registry
        Registry of a saved model, instead of data.
    genes, peaks
        Vocabularies; by default those of the data.
    min_coverage
        Least share of genes and of peaks that must match, see :func:`cellprior.genes.match` and
        :func:`cellprior.genes.match_peaks`.
    genomic_order
        For ``"vit"``: cut the peaks into patches along the genome, and not in the order of the file.
    encoder, n_latent, n_hidden, n_layers, dropout_rate, n_components, n_heads, n_mlp, n_patches, mask_padding, loss
        Of the network, see :class:`~cellprior.model.multiomeclip._module.MultiomeCLIPModule`.

    Examples
    --------
    >>> MultiomeCLIP.setup_mudata(mdata, rna_layer="counts", atac_layer="counts")
    >>> model = MultiomeCLIP(mdata)
    >>> model.train()
    >>> mdata.obsm["X_multiomeclip"] = model.get_latent_representation()

    References
    ----------
    .. [Xiong23] Xiong, Chen, Kellis, scCLIP: Multi-modal Single-cell Contrastive Learning Integration Pre-training,
       NeurIPS 2023 AI for Science Workshop.
    """

    _module_cls = MultiomeCLIPModule
    _setup_method = "setup_mudata"
    obsm_key = "X_multiomeclip"
    _sentences = False
    _data_splitter_cls = training.PairedSplitter
    _training_plan_cls = training.ContrastivePlan
    _train_runner_cls = TrainRunner
    annotation_: dict[str, Any] = {}
    training_state_: dict[str, Any] = {}

    def __init__(
        self,
        adata: MuData | None = None,
        registry: dict | None = None,
        *,
        genes: pd.DataFrame | Sequence[str] | None = None,
        peaks: Sequence[str] | None = None,
        min_coverage: float = 0.25,
        genomic_order: bool = True,
        encoder: EncoderKind = "mlp",
        n_latent: int = 64,
        n_hidden: int = 256,
        n_layers: int | None = None,
        dropout_rate: float | None = None,
        n_components: Sequence[int] = (64, 256),
        n_heads: int = 8,
        n_mlp: int = 512,
        n_patches: Sequence[int] = (128, 128),
        mask_padding: bool = True,
        loss: Loss = "infonce",
    ) -> None:
        if adata is None and (genes is None or peaks is None):
            msg = "A model without data needs its vocabularies: pass genes= and peaks=."
            raise ValueError(msg)
        if adata is not None and self._get_most_recent_anndata_manager(adata) is None:
            msg = f"The {type(adata).__name__} is not set up: call MultiomeCLIP.setup_mudata(mdata) first."
            raise ValueError(msg)
        super().__init__(adata, registry or (_registry_of(genes) if adata is None else None))
        if adata is not None:
            cells = cells_of(adata, self.registry["setup_args"])
            if genes is None:
                rna = cells.data["rna"]
                genes = distinct(read_vocabulary(list(rna.var_names[which_are_genes(rna.var)])))
            peaks = peak_names(cells.data["atac"].var) if peaks is None else peaks
        self.genes, self.peaks = read_vocabulary(genes), list(peaks or ())
        self.min_coverage = min_coverage
        self._attached_match = {}
        self.init_params_ = self._get_init_params({**locals(), "genes": self.genes, "peaks": self.peaks})
        network = self._network()
        del network["genomic_order"]
        self._model_summary_string = (
            f"MultiomeCLIP: {len(self.genes):,} genes, {len(self.peaks):,} peaks, "
            + ", ".join(f"{name}={value!r}" for name, value in network.items())
        )
        order = _genomic_order(self.peaks) if encoder == "vit" and genomic_order else None
        self.module = MultiomeCLIPModule(len(self.genes), len(self.peaks), peak_order=order, **network)
        if adata is not None:
            self._attached_match = self.feature_match()

    def _network(self) -> dict[str, Any]:
        """Arguments besides the vocabularies and ``min_coverage``."""
        params = self.init_params_["non_kwargs"]
        others = ("genes", "peaks", "min_coverage")
        return {name: value for name, value in params.items() if name not in others}

    @classmethod
    def setup_anndata(cls, adata: ad.AnnData, *args: Any, **kwargs: Any) -> None:
        """Refused: the model learns from cells with both modalities, which a MuData holds."""
        msg = (
            "MultiomeCLIP learns from RNA and ATAC of the same cells: use setup_mudata with a MuData of both. A "
            "trained model embeds an AnnData with one of them without a setup: model.get_latent_representation(adata)."
        )
        raise NotImplementedError(msg)

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        rna_layer: str | None = None,
        atac_layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str = "unknown",
        modalities: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a MuData.

        Cells are the same by barcode, in whatever order a modality has them. Those that lack a modality are not
        trained on, apart from the components of the one they have. Rows that
        :func:`cellprior.pp.pad_modalities` has added are known as such.

        Parameters
        ----------
        mdata
            RNA and ATAC; not a view.
        rna_layer, atac_layer
            Layers with raw counts; ``None`` for ``X``. Counts of ATAC are read as open or closed.
        batch_key
            Column of ``mdata.obs``: each minibatch is of one category, so that telling batches apart is of no use.
        labels_key
            Column of ``mdata.obs`` with cell types: cells of the same type are no negatives of each other.
        unlabeled_category
            Label that stands for "not labelled".
        modalities
            Names of the modalities in the MuData, by default ``{"rna": "rna", "atac": "atac"}``.

        Raises
        ------
        NotCountsError
            If the first cells do not hold raw counts.
        ValueError
            If a modality is missing, they are swapped, they have no barcode in common, or ``mdata`` is a view.
        KeyError
            If a column of ``obs`` is missing.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        keys = modality_keys(modalities)
        if not isinstance(mdata, MuData):
            msg = (
                f"A MuData with RNA and ATAC is needed, found a {type(mdata).__name__}. Of two AnnDatas whose cells "
                'have the same barcodes: mudata.MuData({"rna": rna, "atac": atac}).'
            )
            raise TypeError(msg)
        if mdata.is_view:
            msg = "The MuData is a view of another: make it one of its own first, mdata = mdata.copy()."
            raise ValueError(msg)
        if missing := [key for key in keys.values() if key not in mdata.mod]:
            msg = (
                f"The MuData has no modality {' and no '.join(map(repr, missing))}; it has {list(mdata.mod)}. Name "
                'them: setup_mudata(mdata, modalities={"rna": ..., "atac": ...}).'
            )
            raise ValueError(msg)
        cells = cells_of(mdata, setup_method_args["setup_args"])
        if not cells.complete.any():
            rna, atac = (mdata.mod[keys[name]].obs_names[:1].tolist() for name in MODALITIES)
            msg = (
                f"No cell has both modalities: {keys['rna']!r} has barcodes such as {rna}, {keys['atac']!r} such as "
                f"{atac}. Give the two libraries of a cell the same barcode."
            )
            said = differ_by_suffix(*(mdata.mod[keys[name]].obs_names for name in MODALITIES))
            raise ValueError(f"{msg} {said}" if said else msg)
        for key in (batch_key, labels_key):
            if "source_registry" not in kwargs:
                codes_of(mdata.obs, key)
        fields = [
            ModalityField(REGISTRY_KEYS.X_KEY, rna_layer, keys["rna"], "rna"),
            ModalityField(REGISTRY_KEYS.ATAC_X_KEY, atac_layer, keys["atac"], "atac"),
        ]
        manager = CountsManager(
            fields=fields,
            setup_method_args=setup_method_args,
            validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=False),
        )
        manager.register_fields(mdata, **kwargs)
        cls.register_manager(manager)

    def get_latent_representation(
        self,
        adata: MuData | ad.AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        batch_size: int | None = None,
        *,
        modality: str | None = None,
        center: bool = True,
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Data to embed, by default the attached: a MuData with one or both modalities, or an AnnData with genes or
            with peaks. Genes and peaks are matched by name and place, see :meth:`feature_match`; nothing is kept.
        indices
            Cells to embed, as numbers or a mask; the result is in this order.
        batch_size
            Cells in memory at a time, by default what fits; never changes the result.
        modality
            ``"rna"``, ``"atac"``, or ``"joint"``: the mean of both, or what a cell has. By default ``"joint"`` if the
            data have both.
        center
            Take off the mean of each modality over the training cells, and turn both to the directions that they share,
            for plots and neighbours: as they are, the modalities lie apart on the sphere, and a cell's neighbours are
            all of its own modality. Without it, the vectors are those that were trained and that partners are found by.

        Returns
        -------
        Float32 array ``(n_cells, n_latent)``; a cell without the modality has a row of NaN.

        Raises
        ------
        RuntimeError
            If the model has neither been trained nor loaded from weights.
        NotCountsError, GeneMatchError, PeakMatchError
            If the data are not raw counts, or too few genes or peaks are known.
        ValueError
            If the data lack the modality.

        Warns
        -----
        UserWarning
            If some of the cells lack it.
        """
        self._check_if_trained(warn=False)
        cells = self._cells(adata)
        rows = row_numbers(indices, cells.n_obs)
        wanted = self._wanted(cells, modality)
        counts = self._counts(adata, cells)
        latent = self._joint([counts[name] for name in wanted], rows, batch_size, center=center)
        lacking = ~np.any([cells.has(name)[rows] for name in wanted], axis=0)
        if lacking.any():
            first = cells.obs.index[rows[lacking][0]]
            msg = (
                f"{int(lacking.sum())} of {len(rows)} cells lack {' and '.join(wanted)}, the first {first!r}: their "
                'rows are NaN. modality="joint" embeds each cell by what it has.'
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
        return latent

    def _embedding(self, **options: Any) -> JointEmbedding:
        """All attached cells, to be embedded."""
        self._check_if_trained(warn=False)
        return JointEmbedding(self, **options)

    def _fingerprint(self) -> dict[str, str]:
        """What the attached data are known again by; refuses what cannot be read cell by cell."""
        cells = self._cells(None)
        found = {"cells": digest(cells.obs.index)}
        for name, counts in self._counts(None, cells).items():
            refuse_by_gene(counts.x)
            found[f"{name} counts"] = digest_of_counts(counts.x)
            found[f"{name} features"] = digest(counts.column, cells.rows[name])
        return found

    def _matrices(self) -> list[Any]:
        """Counts of the attached data, where they are."""
        return [counts.x for counts in self._counts(None, self._cells(None)).values()]

    @staticmethod
    def _wanted(cells: Cells, modality: str | None) -> list[Modality]:
        """Modalities to embed."""
        if modality not in (None, "joint", *MODALITIES):
            msg = f'modality={modality!r} is not known; choose "rna", "atac" or "joint".'
            raise ValueError(msg)
        if modality in (None, "joint"):
            return list(cells.data)
        if modality not in cells.data:
            msg = f"modality={modality!r} is asked for, and the data have {' and '.join(cells.data)} only."
            raise ValueError(msg)
        return [name for name in MODALITIES if name == modality]

    # learning

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
        max_epochs, accelerator, devices, train_size, validation_size, shuffle_set_split
            As of :meth:`cellprior.model.CellPLM.train`; the split is of the complete cells.
        batch_size
            Cells of a minibatch, each the negative of the others, within one category of ``batch_key``; of each
            process, where several train, and then those of all are negatives.
        early_stopping
            Stop when ``validation_foscttm`` has not fallen for 45 epochs, and go back to the best.
        plan_kwargs
            ``lr``, ``weight_decay``, ``warmup``, see
            :class:`~cellprior.model.multiomeclip._training.ContrastivePlan`.
        datasplitter_kwargs
            ``external_indexing``: numbers of the cells to train on, to hold out and to test, three arrays. See
            :class:`~cellprior.model.multiomeclip._training.PairedSplitter`.
        micro_batch_size
            Cells whose gradient is computed at a time. Saves memory, and changes neither the loss nor the negatives.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given.

        Raises
        ------
        ValueError
            If the model has no data, too few cells have both modalities, cells that are given lack one,
            ``micro_batch_size`` is no whole number, or early stopping has no cells held out.
        RuntimeError
            If several processes have no seed to begin alike.
        DivergedError
            If a loss is not finite. The model has the last weights with a finite loss.
        """
        split: dict[str, Any] = {"train_size": train_size, "validation_size": validation_size}
        split |= {"shuffle_set_split": shuffle_set_split, "batch_size": batch_size}
        training.train(
            self,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            split=split,
            early_stopping=early_stopping,
            plan_kwargs=plan_kwargs,
            datasplitter_kwargs=datasplitter_kwargs,
            micro_batch_size=micro_batch_size,
            **trainer_kwargs,
        )

    def fine_tune(self, *args: Any, **kwargs: Any) -> None:
        """Refused: labels are transferred, see :meth:`transfer_labels`."""
        refuse_unless_annotates(self)

    def predict(self, *args: Any, **kwargs: Any) -> None:
        """Refused: labels are transferred, see :meth:`transfer_labels`."""
        refuse_unless_annotates(self)

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
        others, see :class:`~cellprior.model.multiomeclip._peaks.MaskedPeaks`. It starts from the components that
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
        split: dict[str, Any] = {"train_size": train_size, "validation_size": validation_size}
        split |= {"shuffle_set_split": shuffle_set_split, "batch_size": batch_size}
        peaks_alone.pretrain(
            self,
            adata,
            max_epochs=max_epochs,
            mask_share=mask_share,
            accelerator=accelerator,
            devices=devices,
            split=split,
            plan_kwargs=plan_kwargs,
            **trainer_kwargs,
        )

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
        return peaks_alone.atac_representation(self, adata, indices, batch_size)

    def _check_if_trained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to embed without training, and with an encoder of RNA that has learned nothing."""
        super()._check_if_trained(*args, **kwargs)
        if self.training_state_:
            msg = (
                "ATAC has been pretrained, and the model not trained yet: train() on cells with both modalities comes "
                "first. get_atac_representation gives what is known of ATAC."
            )
            raise RuntimeError(msg)


_genomic_order = genomic_order  # the name is an argument of the model


def _registry_of(genes: pd.DataFrame | Sequence[str] | None) -> dict[str, Any]:
    """Registry of a model without data: setup with default arguments."""
    names = read_vocabulary(genes)["symbol"].to_numpy()
    args = {f"{name}_layer": None for name in MODALITIES}
    return {
        "model_name": "MultiomeCLIP",
        "setup_method_name": "setup_mudata",
        "setup_args": {
            **args,
            "batch_key": None,
            "labels_key": None,
            "unlabeled_category": "unknown",
            "modalities": None,
        },
        "field_registries": {
            REGISTRY_KEYS.X_KEY: {
                "data_registry": {},
                "state_registry": {"column_names": names},
                "summary_stats": {},
            }
        },
    }
