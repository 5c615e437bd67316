"""ScBERT's face to AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from torch import Tensor

from cellprior._arguments import whole
from cellprior.model._base import Precision
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.scbert._attention import KeyMax
from cellprior.model.scbert._checkpoint import CHECKPOINT_SUFFIX, GENE_FILE, find_official, read_official
from cellprior.model.scbert._context import ContextMixin, Indices
from cellprior.model.scbert._floors import BinFloors
from cellprior.model.scbert._inputs import cell_depth, loses_single_counts
from cellprior.model.scbert._masked import masked_scores
from cellprior.model.scbert._module import TRAINED_POSITIONS, GeneVectors, Pooling, ScBERTModule
from cellprior.weights import Bundle


class ScBERT(ContextMixin):
    """ScBERT: binned genes as tokens, linear attention between all genes of a cell [Yang22]_.

    A cell's embedding depends on that cell only: the maximum in its attention is taken over the cell itself, where
    the original takes it over all cells of a batch.

    Parameters
    ----------
    adata
        AnnData registered with :meth:`setup_anndata`.
    registry
        Registry of a saved model, instead of data.
    genes
        Vocabulary: names, or a frame with ``ensembl_id``, ``symbol``, ``previous_symbols``; by default that of the
        data.
    min_coverage
        Least share of genes that must match, see :func:`cellprior.genes.match`.
    n_hidden, n_layers, n_heads, head_dim, n_bins, n_features, dropout_rate, gene_vectors, key_max, n_official_classes
        Of the network, see :class:`~cellprior.model.scbert._module.ScBERTModule`.

    Examples
    --------
    >>> ScBERT.setup_anndata(adata, layer="counts")
    >>> model = ScBERT.from_pretrained("scbert-starter", adata)
    >>> adata.obsm["X_scbert"] = model.get_latent_representation()

    References
    ----------
    .. [Yang22] Yang et al., scBERT as a large-scale pretrained deep language model for cell type annotation of
       single-cell RNA-seq data, Nature Machine Intelligence 4:852, 2022.
    """

    _module_cls = ScBERTModule
    obsm_key = "X_scbert"
    default_batch_size = 128  # minutes on a CPU with the original's vocabulary
    _alike = True  # a mean over thousands of genes, most of them silent
    objectives = {
        "masked": {},
        "ordinal": {"bin_loss": "ordinal"},
        "contrastive": {"bin_loss": None, "contrast_weight": 1.0},
        "masked+contrastive": {"contrast_weight": 0.3},
    }

    def __init__(
        self,
        adata: ad.AnnData | None = None,
        registry: dict | None = None,
        *,
        genes: pd.DataFrame | Sequence[str] | None = None,
        min_coverage: float = 0.25,
        n_hidden: int = 200,
        n_layers: int = 6,
        n_heads: int = 10,
        head_dim: int = 64,
        n_bins: int = 5,
        n_features: int | None = None,
        dropout_rate: float = 0.0,
        gene_vectors: GeneVectors = "learned",
        key_max: KeyMax = "cell",
        n_official_classes: int = 0,
    ) -> None:
        super().__init__(adata, registry, genes, min_coverage)
        self._finish_init(locals())
        self.module = ScBERTModule(len(self.genes), **self._network())

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file or folder holds an official scBERT checkpoint."""
        return any(path.glob("*" + CHECKPOINT_SUFFIX)) if path.is_dir() else path.suffix == CHECKPOINT_SUFFIX

    @classmethod
    def _files_beside(cls, name: str) -> Sequence[str]:
        return [GENE_FILE] if name.endswith(CHECKPOINT_SUFFIX) else []

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        checkpoint = find_official(path)
        return read_official(checkpoint), checkpoint

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        batch_size: int | None = None,
        *,
        pooling: Pooling = "mean",
        precision: Precision = "float32",
        n_zero_genes: int | None = None,
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Data to embed, by default the attached. Its genes are matched by name; it is not kept.
        indices
            Cells to embed, as numbers or a mask; the result is in this order.
        batch_size
            Cells that are read at a time, at least 16; a few of them go through the network together, as many as its
            size allows. Never changes the result, unless the network has ``key_max="batch"``.
        pooling
            Over which positions the mean is taken: ``"mean"`` all genes of the vocabulary, ``"expressed"`` those above
            bin 0; or ``"cls"``, the class token, which no pretraining objective trains.
        precision
            ``"bfloat16"`` computes the large products in half the bits, several times faster on recent hardware.
        n_zero_genes
            Approximate, and much faster for a large vocabulary: keep all expressed genes of a cell, and so many of
            the others, which stand for all of them in every sum. ``None`` is exact.

        Returns
        -------
        Float32 array ``(n_cells, n_hidden)``.

        Raises
        ------
        RuntimeError
            If the model has neither been trained nor loaded from weights.
        NotCountsError, GeneMatchError
            If the data are not raw counts, or too few of their genes are known.

        Warns
        -----
        UserWarning
            If cells have more than 10,000 counts over the vocabulary: a gene with a single count is then in bin 0, as
            if it were not expressed.
        """
        return self._embed(adata, indices, batch_size, precision, pooling=pooling, n_zero_genes=n_zero_genes)

    def fine_tune(
        self, labels_key: str | None = None, *, n_zero_genes: int | None = None, **options: Any
    ) -> None:
        """Learn the labels of the attached data, see :meth:`cellprior.model.CellPLM.fine_tune`.

        Parameters
        ----------
        labels_key
            Column of ``obs``; by default the one given to ``setup_anndata``.
        n_zero_genes
            Approximate, and much faster, see :meth:`get_latent_representation`; :meth:`predict` then approximates
            too. ``None`` is exact.
        **options
            All other arguments of that method.

        Raises
        ------
        ValueError
            If ``n_zero_genes`` is below 1.
        """
        self.module.n_zero_genes = n_zero_genes
        super().fine_tune(labels_key, **options)

    @property
    def training_state_(self) -> dict[str, Any]:
        """Training steps since the random features were drawn, and how the annotation head reads a cell."""
        return {
            "steps_since_redraw": self.module.steps_since_redraw,
            "n_zero_genes": self.module.n_zero_genes,
        }

    @training_state_.setter
    def training_state_(self, state: dict[str, Any]) -> None:
        steps, n_zero_genes = state.get("steps_since_redraw", 0), state.get("n_zero_genes")
        whole(least=0, most=2**62, steps_since_redraw=steps)
        if n_zero_genes is not None:
            whole(n_zero_genes=n_zero_genes)
        self.module.steps_since_redraw, self.module.n_zero_genes = steps, n_zero_genes

    def _objective(self, name: str | None) -> dict[str, Any]:
        micro_batch_size = max(TRAINED_POSITIONS // len(self.genes), 1)
        return {"micro_batch_size": micro_batch_size, **super()._objective(name)}

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> BinFloors:
        return BinFloors.fit(batches, measured, self.module.n_bins)

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
        return masked_scores(self.module, counts, fitted, share=share, rng=rng, batch=batch)

    def _encode(
        self, chunks: Iterable[Tensor], gene_index: Tensor | None, **options: Any
    ) -> Iterator[Tensor]:
        for counts in chunks:
            yield self.module.pool(self.module.tokens(counts, gene_index=gene_index), **options)

    def _counts(self, loader: Iterable[dict[str, Tensor]]) -> Iterator[Tensor]:
        n_deep = 0
        for counts in super()._counts(loader):
            n_deep += int(loses_single_counts(cell_depth(counts)).sum())
            yield counts
        if n_deep:
            msg = (
                f"{n_deep} cells have more than 10,000 counts over the genes of the vocabulary: there, a gene with a "
                "single count is in bin 0, as if it were not expressed. To compare them with shallower cells, thin "
                "them first: scanpy.pp.downsample_counts(adata, counts_per_cell=10_000)."
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
