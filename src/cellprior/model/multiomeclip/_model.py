"""MultiomeCLIP's face to MuData."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import anndata as ad
import numpy as np
import pandas as pd
import torch
from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManagerValidationCheck

from cellprior import genes as matching
from cellprior._arguments import flag
from cellprior._matrix import totals
from cellprior._obs import read_column
from cellprior.genes._kinds import kinds_of
from cellprior.model._base import Data, Indices, Precision, PretrainedModel
from cellprior.model.data._barcodes import differ_by_suffix
from cellprior.model.data._cells import Cells, Counts
from cellprior.model.data._counts import row_numbers
from cellprior.model.data._fields import CountsManager
from cellprior.model.data._modalities import (
    ModalityField,
    cells_of_modalities,
    is_shared,
    modality_keys,
    peak_names,
)
from cellprior.model.engine._embedding import Embedding, in_memory
from cellprior.model.files._strict import load_strictly
from cellprior.model.learning._annotation import refuse_unless_annotates
from cellprior.model.multiomeclip import _peaks as peaks_alone
from cellprior.model.multiomeclip import _training as training
from cellprior.model.multiomeclip._checkpoint import read_scclip
from cellprior.model.multiomeclip._encoder import JointEncoder
from cellprior.model.multiomeclip._features import feature_vectors
from cellprior.model.multiomeclip._inputs import genomic_order as order_along_genome
from cellprior.model.multiomeclip._links import peak_gene_links
from cellprior.model.multiomeclip._matching import Method, match, predict_modality, transfer_labels
from cellprior.model.multiomeclip._module import (
    MODALITIES,
    EncoderKind,
    Loss,
    Modality,
    MultiomeCLIPModule,
    default_width,
)
from cellprior.model.multiomeclip._peaks import MASK_SHARE
from cellprior.weights import Bundle, InertCheckpoint, WeightsError

# fitted here, or the order of the file
NOT_IN_SCCLIP = re.compile(r"(rna|atac)\.(maximum|order)|alignment\..*")


class MultiomeCLIP(PretrainedModel):
    """MultiomeCLIP: RNA and ATAC of a cell in one space, learned from cells that have both.

    With ``encoder="mlp-depth"``, components of the log-normalised RNA and of the TF-IDF of ATAC, and the depth of the
    cell, through wide layers; with ``encoder="mlp"``, without the depth; with ``encoder="vit"``, the transformer of
    scCLIP [Xiong23]_. Everything that is fitted, the weights of the peaks and the components among it, comes from the
    training cells, is saved with the model and applied to queries.

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
    peaks: list[str]
    _encoder_cls = JointEncoder
    _setup_method = "setup_mudata"
    obsm_key = "X_multiomeclip"
    _data_splitter_cls = training.PairedSplitter
    _training_plan_cls = training.ContrastivePlan
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
        encoder: EncoderKind = "mlp-depth",
        n_latent: int = 64,
        n_hidden: int | None = None,
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
        super().__init__(adata, registry, genes, min_coverage)
        if peaks is None:
            peaks = peak_names(self._find_cells(adata).counts["atac"].matrix.var)
        self.peaks = list(peaks)
        n_hidden = default_width(encoder) if n_hidden is None else n_hidden  # written with the weights
        self._finish_init(locals())
        order = order_along_genome(self.peaks) if encoder == "vit" and genomic_order else None
        network = {name: value for name, value in self._network().items() if name != "genomic_order"}
        self.module = MultiomeCLIPModule(len(self.genes), len(self.peaks), peak_order=order, **network)

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
        cells = cells_of_modalities(mdata, setup_method_args["setup_args"])
        if not cells.complete.any():
            rna, atac = (mdata.mod[keys[name]].obs_names[:1].tolist() for name in MODALITIES)
            msg = (
                f"No cell has both modalities: {keys['rna']!r} has barcodes such as {rna}, {keys['atac']!r} such as "
                f"{atac}. Give the two libraries of a cell the same barcode."
            )
            said = differ_by_suffix(*(mdata.mod[keys[name]].obs_names for name in MODALITIES))
            raise ValueError(f"{msg} {said}" if said else msg)
        for key in (batch_key, labels_key):
            if key is not None and "source_registry" not in kwargs:
                read_column(mdata.obs, key, frame="mdata.obs")
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
        precision: Precision = "float32",
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
        precision
            ``"bfloat16"`` computes the large products in half the bits.

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
        wanted = cells.only(_wanted(cells, modality))
        encoder = self._encoder(wanted, center=center)
        latent = in_memory(Embedding(encoder, wanted, rows, batch_size=batch_size, precision=precision))
        lacking = ~wanted.known[rows]
        if lacking.any():
            first = cells.obs.index[rows[lacking][0]]
            msg = (
                f"{int(lacking.sum())} of {len(rows)} cells lack {' and '.join(wanted.counts)}, the first {first!r}: "
                'their rows are NaN. modality="joint" embeds each cell by what it has.'
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
        return latent

    def feature_match(self, adata: Data | None = None) -> dict[str, matching.GeneMatch | matching.PeakMatch]:
        """How much of some data, by default the attached, the model reads: a report by modality.

        Raises
        ------
        GeneMatchError, PeakMatchError
            If it is too little.
        """
        return {name: counts.match for name, counts in self._cells(adata).counts.items()}

    def match(
        self, atac: Data | None = None, rna: Data | None = None, *, method: Method = "transport"
    ) -> pd.DataFrame:
        """Find for each cell with ATAC the cell whose RNA belongs to it.

        Within one category of ``batch_key`` if both have that column. Memory grows with the product of the numbers of
        cells of a batch: 10,000 of each take about 1 GB.

        Parameters
        ----------
        atac
            Data with ATAC, by default the attached.
        rna
            Data with RNA, by default the same as ``atac``.
        method
            ``"transport"``: entropic optimal transport, as of MatchCLOT [Gossi23]_; a cell may be the partner of
            several. ``"greedy"``: pairs of falling similarity, each cell once.

        Returns
        -------
        A row per cell with ATAC: ``partner``, the name of the cell with RNA, or None if none is left; and ``score``,
        the probability of that partner (``"transport"``) or the cosine (``"greedy"``).

        References
        ----------
        .. [Gossi23] Gossi et al., Matching single cells across modalities with contrastive learning and optimal
           transport, Briefings in Bioinformatics 24:bbad130, 2023.

        Raises
        ------
        ValueError
            If no batch is in both data, or a cell has none.

        Warns
        -----
        UserWarning
            If some batches have no cell with RNA, so that their cells have no partner.
        """
        return match(self, atac, rna, method)

    def transfer_labels(
        self,
        reference: Data | None = None,
        query: Data | None = None,
        *,
        labels_key: str | None = None,
        source: Modality = "rna",
        target: Modality = "atac",
        n_neighbors: int = 30,
        reject: float | None = None,
    ) -> pd.DataFrame:
        """Name cells after the most similar cells of a reference, across modalities.

        ``reject`` lets a cell be called ``unlabeled_category``, as in ``predict`` of the other models: for lying far
        from all cells of the reference with probability at most ``reject``; and so that of the cells that get a name,
        at most a share ``reject`` has a wrong one, with 90 % confidence. Both hold on average over types, for cells
        exchangeable with those that it is calibrated on: cells of the reference with a label and both modalities, which
        are named by the others and no longer vote. Of the data that the model was trained on, known by the names of all
        cells, these are the cells that :meth:`train` held out; of other data, a fifth. A part of the training data is
        not recognised: with it, nothing is promised.

        Parameters
        ----------
        reference
            Labelled data, by default the attached.
        query
            Data to name, by default the attached.
        labels_key
            Column of the reference's ``obs``; by default that of the setup. Cells of ``unlabeled_category`` are left
            out.
        source, target
            Modality in which the reference and the query are looked at.
        n_neighbors
            Cells of the reference that vote.
        reject
            Between 0 and 1, see above; ``None`` names every cell.

        Returns
        -------
        A row per cell of the query with the modality: ``label``, and ``score``, its share of the votes. With
        ``reject``, also ``best_guess``, the name that most votes are for, unknown or not; and a warning that explains
        it, if far more cells are unknown than of the calibration cells.

        Raises
        ------
        ValueError
            If there is no ``labels_key``, or no labelled cell; or if ``reject`` is not between 0 and 1, or cannot be
            promised with so few calibration cells.
        KeyError
            If there is no such column.
        """
        options: dict[str, Any] = {"labels_key": labels_key, "source": source, "target": target}
        return transfer_labels(self, reference, query, n_neighbors=n_neighbors, reject=reject, **options)

    def predict_modality(
        self,
        query: Data | None = None,
        reference: Data | None = None,
        *,
        target: Modality = "rna",
        n_neighbors: int = 30,
    ) -> ad.AnnData:
        """Predict RNA from ATAC, or ATAC from RNA: the mean of the most similar cells of a reference.

        A mean of real cells: it tells cell types and states apart and smooths over what differs within them. On
        held-out cells of a shallow data set (SNARE-seq, 2,039 cells, 247 counts of RNA and 82 of ATAC per cell) the
        predicted and observed expression of a gene correlated by 0.1 on average, and over the genes of a cell the
        prediction was no better than the mean of all cells. Do not test for differences between cells with it.

        Parameters
        ----------
        query
            Data with the other modality, by default the attached.
        reference
            Data with the modality that is predicted, by default the attached.
        target
            ``"rna"`` gives log-normalised expression, ``"atac"`` the share of cells in which a peak is open.
        n_neighbors
            Cells of the reference that are averaged.

        Returns
        -------
        AnnData with a row per cell of the query that has the other modality, and the reference's genes or peaks.
        """
        return predict_modality(self, query, reference, target=target, n_neighbors=n_neighbors)

    def get_feature_representation(
        self, modality: Modality, adata: Data | None = None, indices: Indices = None
    ) -> pd.DataFrame:
        r"""Vectors of genes or peaks in the shared space: where the cells are that have them.

        With the places :math:`z_i` of :math:`n` cells, as :meth:`get_latent_representation` gives them by the same
        modality with ``center=True``, and values :math:`v_{ij}`, the vector of feature :math:`j` is
        :math:`\sum_i v_{ij} z_i / \sum_i v_{ij} - \sum_i z_i / n`. The values are ``ln(1 + 10,000 x / Σx)`` of the
        counts, or of 1 for each open peak. Genes and peaks of the same kinds of cells point the same way; a long vector
        means few kinds of cells, or that the feature is rare.

        Parameters
        ----------
        modality
            ``"rna"`` for genes, ``"atac"`` for peaks.
        adata
            Data with cells of the modality, by default the attached.
        indices
            Cells, as numbers or a mask; a type of cells gives the vectors within that type.

        Returns
        -------
        All genes (by symbol) or peaks of the model by ``n_latent``; float32; 0 of those that no cell has.

        Raises
        ------
        ValueError
            If none of the cells has the modality.
        RuntimeError
            If the model has neither been trained nor loaded from weights.
        """
        return feature_vectors(self, modality, adata, indices)

    def peak_gene_links(
        self,
        adata: MuData | None = None,
        indices: Indices = None,
        *,
        gene_positions: pd.DataFrame | None = None,
        genes: Sequence[str] | None = None,
        window: int = 500_000,
        n_controls: int = 500,
        min_cells: int = 10,
    ) -> pd.DataFrame:
        """Peaks around the starts of genes, and how near the model holds each to the gene, beside control peaks.

        The score is the cosine of the two vectors of :meth:`get_feature_representation`. What it is for peaks that
        have nothing to do with the gene, other peaks tell: those of other chromosomes that are open in about as many
        cells, and that are within 2,000 base pairs of the start of some gene if this one is, and are not if it is
        not. ``p`` is the share of such pairs, of all genes, whose score lies as far above the mean of its own controls
        in their standard deviations; it is no probability that a link is there. The sign of a score is that of the
        association; ``p`` asks for more opening with more expression.

        A link is an association over kinds of cells, not an effect: peaks that open in the same cells as a gene is
        expressed, on its chromosome by chance, have one too. Distance is not in the score.

        Parameters
        ----------
        adata
            MuData with cells that have both modalities, by default the attached. Held-out cells give correlations that
            the model does not know.
        indices
            Cells, as numbers or a mask.
        gene_positions
            A row per gene, by symbol or Ensembl id: ``chrom``, ``start``, ``end`` and ``strand``, such as
            :func:`cellprior.genes.read_positions` gives. By default the columns of ``mdata["rna"].var``. Without a
            strand, the distance is that to the interval, as of Cell Ranger's column ``interval``. Of a gene that
            stands twice, the first row counts.
        genes
            Names of the genes to link, by default all. Their ``p`` are the same as among all, ``q`` are of their pairs.
        window
            Base pairs from the start of a gene to the middle of a peak, at most; Signac's default.
        n_controls
            Control peaks of a pair, about; 50 at least.
        min_cells
            Cells in which a gene or a peak is found at least.

        Returns
        -------
        A row per pair, the most certain first: ``gene`` and ``peak`` as the data call them; ``distance`` in base
        pairs, negative upstream; ``score``; ``background_mean`` and ``background_sd`` of the control peaks' scores;
        ``p``, and ``q`` after Benjamini and Hochberg, NaN if there are fewer than 50 control peaks; and the baseline,
        ``correlation``, Pearson's of log-normalised expression and log-normalised accessibility over the cells.

        Raises
        ------
        ValueError
            If no cells have both modalities, positions are missing, genes and peaks are of two genome builds, or no
            peak lies near a gene.
        TypeError
            If ``gene_positions`` is no DataFrame.
        GeneMatchError
            If ``gene_positions`` has hardly any gene of the model.

        Warns
        -----
        UserWarning
            If less than half of the genes have a position, or peaks are no more frequent near the starts of genes.
        """
        return peak_gene_links(
            self,
            adata,
            indices,
            gene_positions=gene_positions,
            genes=genes,
            window=window,
            n_controls=n_controls,
            min_cells=min_cells,
        )

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        early_stopping: bool = False,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        *,
        micro_batch_size: int | None = None,
        thin_to: float | None = None,
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
            Passes over the training cells; 50 unless given.
        accelerator, devices, train_size, validation_size, shuffle_set_split
            As of :meth:`cellprior.model.CellPLM.train`; the split is of the complete cells.
        batch_size
            Cells of a minibatch, 128 unless given, each the negative of the others, within one category of
            ``batch_key``; of each process, where several train, and then those of all are negatives.
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
        thin_to
            Each time a cell is trained on, each of its modalities keeps a share of its counts, drawn between this and
            1: so depth is known, and not trusted. By default 0.5 of ``encoder="mlp-depth"``, and 1, all, of the others.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given.

        Raises
        ------
        ValueError
            If the model has no data, too few cells have both modalities, cells that are given lack one,
            ``micro_batch_size`` is no whole number, ``thin_to`` no share, or early stopping has no cells held out.
        RuntimeError
            If several processes have no seed to begin alike.
        <diverged>
        """
        split: dict[str, Any] = {"train_size": train_size, "validation_size": validation_size}
        # contrast needs other cells in the minibatch: it does not shrink with the data
        split |= {
            "shuffle_set_split": shuffle_set_split,
            "batch_size": 128 if batch_size is None else batch_size,
        }
        training.train(
            self,
            max_epochs=50 if max_epochs is None else max_epochs,
            accelerator=accelerator,
            devices=devices,
            split=split,
            early_stopping=early_stopping,
            plan_kwargs=plan_kwargs,
            datasplitter_kwargs=datasplitter_kwargs,
            micro_batch_size=micro_batch_size,
            thin_to=thin_to,
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
        <trainer>
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
        <diverged>
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
        indices: Indices = None,
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

    # what the base asks for

    @property
    def _input_buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Components, their weights, or maxima, which are found before the layers are trained."""
        encoders = {name: self.module.encoder_of(name) for name in MODALITIES}
        return tuple(
            f"{name}.{key}" for name, encoder in encoders.items() for key, _ in encoder.named_buffers()
        )

    def _find_cells(self, data: Any) -> Cells:
        genes = getattr(self, "genes", None)  # not known yet while the vocabulary is taken from the data
        cells = cells_of_modalities(data, self.registry["setup_args"], genes=genes)
        names = [counts.adata.obs_names for counts in cells.counts.values()]
        if len(names) == 2 and (said := differ_by_suffix(*names)):
            warnings.warn(said, UserWarning, stacklevel=4)
        return cells

    def _match(self, modality: str, cells: Cells) -> Any:
        if modality == "rna":
            return super()._match(modality, cells)
        counts = cells.counts["atac"].matrix
        var = counts.var
        if is_shared(cells):  # of one table with both, genes are not lost peaks
            var = var.assign(feature_types=kinds_of(var))
        return matching.match_peaks(
            var, self.peaks, peak_counts=totals(counts), min_coverage=self.min_coverage
        )

    def _in_order(self, counts: Counts, match: Any) -> Counts:
        n_features = len(self.genes if counts.modality == "rna" else self.peaks)
        return counts.matched(match, match.index, n_features)

    def _encoder(self, cells: Cells, **options: Any) -> JointEncoder:
        return JointEncoder(self.module, None, self.default_batch_size, options)

    def _vectors(self, cells: Cells, modality: str, rows: np.ndarray) -> np.ndarray:
        """Unit vectors of cells that have a modality, as they were trained ``(cells, n_latent)``."""
        some = cells.only([modality])
        return in_memory(Embedding(self._encoder(some, center=False), some, rows))

    @classmethod
    @contextmanager
    def opened(
        cls,
        weights: str | os.PathLike[str],
        adata: Data,
        *,
        layer: str | Mapping[str, str | None] | None = None,
        gene_key: str | None = None,
        batch_key: str | None = None,
        unlabeled_category: str = "unknown",
        modalities: Mapping[str, str] | None = None,
        min_coverage: float = 0.25,
        device: str | int | torch.device = "auto",
        known_hash: str | None = None,
        setup: Mapping[str, Any] | None = None,
    ) -> Iterator[Self]:
        """A model that embeds some data, for a while; see :func:`cellprior.tl.embed`."""
        layers = _layers(layer)
        model = cls.from_pretrained(weights, min_coverage=min_coverage, device=device, known_hash=known_hash)
        model._read_from(layers, modalities=modalities, gene_key=gene_key)
        model.registry["setup_args"]["unlabeled_category"] = unlabeled_category
        model._opened = adata
        model._cells()
        if batch_key is not None:
            read_column(adata.obs, batch_key, frame="mdata.obs")
        yield model

    @staticmethod
    def _layers_on_disk(
        layer: str | Mapping[str, str | None] | None, modalities: Mapping[str, str] | None
    ) -> Mapping[str, str | None]:
        """Layer of each modality, by its name in the file."""
        layers = _layers(layer)
        return {key: layers.get(name) for name, key in modality_keys(modalities).items()}

    @classmethod
    def _blank(
        cls,
        *,
        genes: pd.DataFrame,
        peaks: Sequence[str] | None = None,
        genomic_order: bool = True,
        **network: Any,
    ) -> torch.nn.Module:
        if not isinstance(peaks, list) or not peaks or not all(isinstance(peak, str) for peak in peaks):
            msg = "it needs the names of peaks."
            raise ValueError(msg)
        flag(genomic_order=genomic_order)
        return cls._module_cls(len(genes), len(peaks), **network)

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        msg = (
            f"{path} is not a {cls.__name__} bundle: a folder with config.json and model.safetensors is needed. A "
            "checkpoint of scCLIP is made into one by cellprior.model.convert, or `cellprior convert`."
        )
        raise WeightsError(msg)

    @classmethod
    def from_pickle(
        cls,
        checkpoint: InertCheckpoint,
        content: Any,
        *,
        reference: Data | None,
        layer: str | Mapping[str, str | None] | None,
    ) -> tuple[Self, list[str]] | None:
        """Model of an scCLIP checkpoint; see :func:`cellprior.model.convert`."""
        if (official := read_scclip(checkpoint, content)) is None:
            return None
        if reference is None and official.is_scaled:
            msg = (
                f"{checkpoint.path.name} needs reference=, data with raw counts of RNA: scCLIP divides the expression "
                "of each gene by its largest in the data set at hand, and stores none of these. Best are the data that "
                "it was trained on; else your own, as the original does. From then on they are a part of the weights."
            )
            raise ValueError(msg)
        with torch.random.fork_rng(devices=[]):  # what the network starts from is overwritten
            model = cls(genes=official.genes, peaks=official.peaks, **official.network)
        fitted = {name: x for name, x in model.module.state_dict().items() if NOT_IN_SCCLIP.fullmatch(name)}
        load_strictly(model.module, {**official.tensors, **fitted}, checkpoint.path.name)
        model.is_trained_ = True
        notes = list(official.notes)
        if reference is not None:
            model._read_from(_layers(layer))
            notes += model._fit_to(reference, official.is_scaled)
        return model, notes

    def _fit_to(self, reference: Data, is_scaled: bool) -> list[str]:
        """Find what the original takes from the data set at hand, and what turns the modalities together; in words."""
        cells, notes = self._cells(reference), []
        if is_scaled:
            rows = np.flatnonzero(cells.has("rna"))
            if not len(rows):
                msg = f"reference= needs RNA, of which the largest expression is taken; it has {list(cells.counts)}."
                raise ValueError(msg)
            rows = rows[:: -(-len(rows) // training.MAX_FITTED)]
            self.module.rna.fit(cells.counts["rna"].read(rows), seed=0)
            notes.append(
                f"The largest expression of each gene is that of {len(rows):,} cells given at conversion."
            )
        complete = np.flatnonzero(cells.complete)
        if len(complete) > self.module.n_latent:
            training.align(self, cells, complete)
            notes.append(f"The modalities are turned together by {len(complete):,} cells that have both.")
        return notes

    def _read_from(
        self,
        layers: Mapping[str, str | None],
        *,
        modalities: Mapping[str, str] | None = None,
        gene_key: str | None = None,
    ) -> None:
        """Where a model without data looks for counts and names."""
        self.registry["setup_args"] |= {
            **{f"{name}_layer": layers.get(name) for name in MODALITIES},
            "modalities": modalities,
            "gene_key": gene_key,
        }


def _wanted(cells: Cells, modality: str | None) -> list[str]:
    """Modalities to embed."""
    if modality not in (None, "joint", *MODALITIES):
        msg = f'modality={modality!r} is not known; choose "rna", "atac" or "joint".'
        raise ValueError(msg)
    if modality in (None, "joint"):
        return list(cells.counts)
    if modality not in cells.counts:
        msg = f"modality={modality!r} is asked for, and the data have {' and '.join(cells.counts)} only."
        raise ValueError(msg)
    return [name for name in MODALITIES if name == modality]


def _layers(layer: str | Mapping[str, str | None] | None) -> Mapping[str, str | None]:
    """Layer of each modality."""
    if not isinstance(layer, Mapping):
        return {"rna": layer, "atac": layer}
    if unknown := layer.keys() - set(MODALITIES):
        msg = (
            f'layer has the keys {sorted(unknown)}; needed: "rna" and "atac", with the names of their layers.'
        )
        raise ValueError(msg)
    return layer
