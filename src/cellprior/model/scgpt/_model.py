"""ScGPT's face to AnnData."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model._base import Indices, Precision, PretrainedModel, Size
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.scgpt import _context
from cellprior.model.scgpt._checkpoint import (
    ARGS,
    SUFFIX,
    VOCABULARY,
    find_official,
    read_official,
    recognises,
)
from cellprior.model.scgpt._encoder import ScGPTEncoder
from cellprior.model.scgpt._floors import BinFloors
from cellprior.model.scgpt._heads import Mvc
from cellprior.model.scgpt._inputs import N_BINS, PAD, Ties
from cellprior.model.scgpt._masked import masked_scores
from cellprior.model.scgpt._module import BatchNorm, Pooling, ScGPTModule, ValueStyle
from cellprior.weights import Bundle


class ScGPT(PretrainedModel):
    """scGPT: the expressed genes of a cell as tokens, binned by their rank within the cell [Cui24]_.

    A cell's embedding depends on that cell only, and is the same each time: where equal counts lie between several
    bins, the original draws one at random, in each cell anew; here each gene has its draw.

    Parameters
    ----------
    <built>
    n_hidden, n_layers, n_heads, n_ff, dropout_rate, n_bins
    value_style, cls_value, ties, expression, mvc, zero_probability, generative
    batch_norm, batch_norm_eps, n_batches, batch_decoder, adversary
    n_official_classes, n_official_layers, pre_norm
        Of the network, see :class:`~cellprior.model.scgpt._module.ScGPTModule`.

    Examples
    --------
    >>> ScGPT.setup_anndata(adata, layer="counts")
    >>> model = ScGPT.from_pretrained("scgpt-human", adata)
    >>> adata.obsm["X_scgpt"] = model.get_latent_representation()

    References
    ----------
    .. [Cui24] Cui et al., scGPT: toward building a foundation model for single-cell multi-omics using generative AI,
       Nature Methods 21:1470, 2024.
    """

    _module_cls = ScGPTModule
    _encoder_cls = ScGPTEncoder
    obsm_key = "X_scgpt"
    default_batch_size = 256
    objectives = {
        "masked": {"lr": 1e-4},
        "contrastive": {"lr": 1e-4, "contrast_weight": 1.0},
        "integration": {"lr": 1e-4, "ecs_weight": 10.0, "dab_weight": 1.0, "with_zeros": True},
    }

    sizes = {
        "small": {"n_hidden": 128, "n_layers": 3, "n_heads": 4, "n_ff": 128},
        "released": {"n_hidden": 512, "n_layers": 12, "n_heads": 8, "n_ff": 512},
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
        n_ff: int | None = None,
        dropout_rate: float = 0.2,
        n_bins: int = N_BINS,
        value_style: ValueStyle = "continuous",
        cls_value: int = PAD,
        ties: Ties = "fixed",
        expression: Literal["mlp", "linear"] | None = "mlp",
        mvc: Mvc | None = "inner product",
        zero_probability: bool = False,
        generative: bool = False,
        batch_norm: BatchNorm | None = None,
        batch_norm_eps: float = 6.1e-5,
        n_batches: int = 0,
        batch_decoder: bool = False,
        adversary: bool = False,
        n_official_classes: int = 0,
        n_official_layers: int = 3,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(adata, registry, genes, min_coverage)
        self._finish_init(locals())
        self.module = ScGPTModule(len(self.genes), **self._network())

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file or folder holds an official scGPT checkpoint."""
        return recognises(path)

    @classmethod
    def _files_beside(cls, name: str) -> Sequence[str]:
        return [ARGS, VOCABULARY] if name.endswith(SUFFIX) else []

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
        pooling: Pooling = "cls",
        unit_length: bool = True,
        ties: Ties | None = None,
        seed: int = 0,
        max_genes: int | None = None,
        domain: int | None = None,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        <embedded>
        batch_size
            Cells that are read at a time, at least 16; of these, cells of like length go through the network together.
            Never changes the result.
        pooling
            ``"cls"``, the class token, as the original; ``"mean"`` over all tokens; ``"weighted"``, by bin.
        unit_length
            Divide each vector by its length, as the original does.
        ties
            Which bin a count gets where it could be in several: ``"fixed"``, by one draw for each gene;
            ``"middle"``; ``"upper"``; ``"random"``, by a draw for each gene and cell. By default the network's.
        seed
            Of ``"random"``; the draws depend on it, the gene and the cell's own counts.
        max_genes
            Approximate: of a cell with more expressed genes, keep so many, the first ones in a fixed order of all
            genes that has nothing to do with their counts. The original keeps 1,199, others each time.
        domain
            For a network that norms each batch on its own: whose statistics are used, a number from 0 on.
        <precision>

        Returns
        -------
        Float32 array ``(n_cells, n_hidden)``.

        Raises
        ------
        <not_embedded>
        ValueError
            If an argument is not one of those above.
        """
        options: dict[str, Any] = {"ties": ties, "seed": seed, "max_genes": max_genes}
        options |= {"pooling": pooling, "unit_length": unit_length, "domain": domain}
        return self._embed(adata, indices, batch_size, precision, **options)

    def fine_tune(
        self,
        labels_key: str | None = None,
        *,
        trainable: str = "all",
        max_epochs: int = 10,
        lr: float = 1e-4,
        batch_size: int = 32,
        max_genes: int | None = None,
        domain: int | None = None,
        **options: Any,
    ) -> None:
        """Learn the labels of the attached data the original's way, see :meth:`cellprior.model.CellPLM.fine_tune`.

        Parameters
        ----------
        <labels_key>
        trainable
            ``"all"`` as the original, ``"transformer"`` as the original with ``freeze``, or as for other models.
        max_epochs, lr, batch_size
            By default the original's.
        max_genes, domain
            See :meth:`get_latent_representation`; :meth:`predict` then has them too.
        <options>

        Raises
        ------
        ValueError
            If ``max_genes`` is below 1.
        """
        self.module.max_genes, self.module.domain = max_genes, domain
        options |= {"trainable": trainable, "max_epochs": max_epochs, "lr": lr, "batch_size": batch_size}
        super().fine_tune(labels_key, **options)

    def get_gene_representation(
        self, adata: ad.AnnData | None = None, indices: Indices = None, *, in_cells: bool = False
    ) -> pd.DataFrame:
        """Vectors of genes.

        Parameters
        ----------
        adata
            Data, by default the attached; without any, all genes of the vocabulary.
        indices
            Cells, as numbers or a mask, with ``in_cells``.
        in_cells
            Give each gene's hidden state, mean over the cells that express it (NaN if none does). By default the
            vector it has in every cell, from which the authors make gene programs.

        Returns
        -------
        Genes of the data that are in the vocabulary, under the data's names, by ``n_hidden``; float32.

        Raises
        ------
        ValueError
            If there are no cells.
        """
        if in_cells:
            return _context.gene_vectors_in_cells(self, adata, indices)
        return _context.gene_vectors(self, adata)

    def get_attention(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        *,
        genes: Sequence[str] | None = None,
        layer: int | None = None,
    ) -> pd.DataFrame | pd.Series:
        """Attention between genes, mean over heads and cells.

        Parameters
        ----------
        <some_cells>
        genes
            Names of the data, symbols or Ensembl ids.
        layer
            One of the layers, from 0 on, -1 for the last; by default the mean of all.

        Returns
        -------
        With ``genes``, what these (rows) pay to each other (columns), as shares of all that they pay, mean over the
        cells that express both, NaN if none does. Without, what each gene of the data receives, mean over all tokens
        of a cell, 0 where it is not expressed; together 1 with what the class token receives.

        Raises
        ------
        <genes_in_cells>
        """
        if genes is None:
            return _context.attention_received(self, adata, indices, layer)
        return _context.attention_between(self, adata, indices, genes, layer)

    @property
    def training_state_(self) -> dict[str, Any]:
        """How the annotation head reads a cell."""
        return {"max_genes": self.module.max_genes, "domain": self.module.domain}

    @training_state_.setter
    def training_state_(self, state: dict[str, Any]) -> None:
        self.module.max_genes, self.module.domain = state.get("max_genes"), state.get("domain")

    def _objective(self, name: str | None) -> dict[str, Any]:
        options = super()._objective(name)
        if options.get("dab_weight") and self.adata is not None:
            if REGISTRY_KEYS.BATCH_KEY not in self.adata_manager.data_registry:
                msg = f"objective={name!r} hides the batch of a cell: setup_anndata() needs a batch_key."
                raise ValueError(msg)
            state = self.adata_manager.get_state_registry(REGISTRY_KEYS.BATCH_KEY)
            n_batches = len(state.categorical_mapping)
            if self.module.adversary is None or self.module.n_batches < n_batches:
                self.module.add_adversary(n_batches)
                self.init_params_["non_kwargs"].update(adversary=True, n_batches=n_batches)
        return options

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> BinFloors:
        return BinFloors.fit(self.module, batches, measured)

    def _masked_scores(self, counts: Tensor, fitted: Any, **how: Any) -> MaskedScores:
        return masked_scores(self.module, counts, fitted, **how)
