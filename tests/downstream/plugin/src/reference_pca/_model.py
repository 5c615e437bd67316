"""The face to AnnData."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from anndata import AnnData

from cellprior.model import PretrainedModel
from reference_pca._module import ReferencePCAModule


class ReferencePCA(PretrainedModel):
    """Principal components of reference cells, for other cells.

    Parameters
    ----------
    adata
        AnnData registered with ``setup_anndata``.
    registry
        Registry of a saved model, instead of data.
    genes
        Vocabulary; by default that of the data.
    min_coverage
        Least share of genes that must match.
    n_latent, target_sum
        Of the network.
    """

    _module_cls = ReferencePCAModule
    obsm_key = "X_reference_pca"

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        genes: pd.DataFrame | Sequence[str] | None = None,
        min_coverage: float = 0.25,
        n_latent: int = 16,
        target_sum: float = 10_000,
    ) -> None:
        super().__init__(adata, registry, genes, min_coverage)
        self._finish_init(locals())
        self.module = self._module_cls(len(self.genes), **self._network())
