"""ScBERT's face to AnnData."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from torch import Tensor

from cellprior._arguments import whole
from cellprior.model._base import Indices, Precision, PretrainedModel, Size
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.scbert._attention import KeyMax
from cellprior.model.scbert._checkpoint import CHECKPOINT_SUFFIX, GENE_FILE, find_official, read_official
from cellprior.model.scbert._context import attention_between, gene_vectors
from cellprior.model.scbert._encoder import ScBERTEncoder
from cellprior.model.scbert._floors import BinFloors
from cellprior.model.scbert._masked import masked_scores
from cellprior.model.scbert._module import TRAINED_POSITIONS, GeneVectors, Pooling, ScBERTModule
from cellprior.weights import Bundle


class ScBERT(PretrainedModel):
    """ScBERT: binned genes as tokens, linear attention between all genes of a cell [Yang22]_.

    A cell's embedding depends on that cell only: the maximum in its attention is taken over the cell itself, where
    the original takes it over all cells of a batch.

    Parameters
    ----------
    <built>
    n_hidden, n_layers, n_heads, head_dim, n_bins, n_features, dropout_rate, gene_vectors, key_max, n_official_classes
        Of the network, see :class:`~cellprior.model.scbert._module.ScBERTModule`.
    pooling
        How a cell is embedded unless :meth:`get_latent_representation` is told otherwise. With ``"cls"``, contrastive
        objectives train the class token; the bins of hidden genes do not. With one layer it is exact and takes one to
        two milliseconds a cell, whatever the vocabulary.

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
    _encoder_cls = ScBERTEncoder
    obsm_key = "X_scbert"
    default_batch_size = 128  # minutes on a CPU with the original's vocabulary
    _alike = True  # a mean over thousands of genes, most of them silent
    objectives = {
        "masked": {},
        "ordinal": {"bin_loss": "ordinal"},
        "contrastive": {"bin_loss": None, "contrast_weight": 1.0},
        "masked+contrastive": {"contrast_weight": 0.3},
    }

    sizes = {
        "small": {"n_hidden": 64, "n_layers": 3, "n_heads": 4, "head_dim": 16},
        "released": {"n_hidden": 200, "n_layers": 6, "n_heads": 10, "head_dim": 64},
    }

    def __init__(
        self,
        adata: ad.AnnData | None = None,
        registry: dict | None = None,
        *,
        genes: pd.DataFrame | Sequence[str] | None = None,
        min_coverage: float = 0.25,
        size: Size | None = None,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        n_heads: int | None = None,
        head_dim: int | None = None,
        n_bins: int = 5,
        n_features: int | None = None,
        dropout_rate: float = 0.0,
        gene_vectors: GeneVectors = "learned",
        key_max: KeyMax = "cell",
        n_official_classes: int = 0,
        pooling: Pooling = "mean",
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
        pooling: Pooling | None = None,
        precision: Precision = "float32",
        n_zero_genes: int | None = None,
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        <embedded>
        batch_size
            Cells that are read at a time, at least 16; a few of them go through the network together, as many as its
            size allows. Never changes the result, unless the network has ``key_max="batch"``.
        pooling
            Over which positions the mean is taken: ``"mean"`` all genes of the vocabulary, ``"expressed"`` those above
            bin 0; or ``"cls"``, the class token, of networks that have learned it. By default the network's own:
            ``"cls"`` for ``scbert-starter``, ``"mean"`` unless it was built otherwise.
        <precision>
        n_zero_genes
            Approximate, and much faster for a large vocabulary: keep all expressed genes of a cell, and so many of
            the others, which stand for all of them in every sum. ``None`` is exact.

        Returns
        -------
        Float32 array ``(n_cells, n_hidden)``.

        Raises
        ------
        <not_embedded>

        Warns
        -----
        UserWarning
            If cells have more than 10,000 counts over the vocabulary: a gene with a single count is then in bin 0, as
            if it were not expressed.
        """
        return self._embed(adata, indices, batch_size, precision, pooling=pooling, n_zero_genes=n_zero_genes)

    def get_gene_representation(
        self, adata: ad.AnnData | None = None, indices: Indices = None, *, precision: Precision = "float32"
    ) -> pd.DataFrame:
        """Vectors of genes in context: each gene's hidden state, mean over cells.

        Parameters
        ----------
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask; a type of cells gives the genes' vectors in that type.
        precision
            See :meth:`get_latent_representation`.

        Returns
        -------
        Genes of the data that are in the vocabulary, under the data's names, by ``n_hidden``; float32.

        Raises
        ------
        ValueError
            If there are no cells.
        """
        return gene_vectors(self, adata, indices, precision)

    def get_attention(
        self, adata: ad.AnnData | None = None, indices: Indices = None, *, genes: Sequence[str] | None = None
    ) -> pd.DataFrame | pd.Series:
        """Attention between genes, mean over heads, layers and cells.

        Each layer's from that layer's own input; the original takes it from an input to which the layer's output has
        been added already, and rounds to float16.

        Parameters
        ----------
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask. One takes about as long as its embedding.
        genes
            Names of the data, symbols or Ensembl ids. The result holds their number squared: all genes of a large
            vocabulary are a gigabyte.

        Returns
        -------
        With ``genes``, what these (rows) pay to each other (columns), as shares of all that they pay. Without, what
        each gene of the data receives, mean over all positions; together 1 with what goes to the other genes of the
        vocabulary and the class token.

        Raises
        ------
        <genes_in_cells>
        """
        return attention_between(self, adata, indices, genes)

    def fine_tune(
        self, labels_key: str | None = None, *, n_zero_genes: int | None = None, **options: Any
    ) -> None:
        """Learn the labels of the attached data, see :meth:`cellprior.model.CellPLM.fine_tune`.

        Parameters
        ----------
        <labels_key>
        n_zero_genes
            Approximate, and much faster, see :meth:`get_latent_representation`; :meth:`predict` then approximates
            too. ``None`` is exact.
        <options>

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

    def _masked_scores(self, counts: Tensor, fitted: Any, **how: Any) -> MaskedScores:
        return masked_scores(self.module, counts, fitted, **how)
