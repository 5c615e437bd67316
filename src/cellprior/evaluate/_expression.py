"""Expression as the baselines read it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import scipy.sparse as sp

from cellprior.model._data import read_rows


def raw_counts(adata: ad.AnnData, layer: str | None) -> sp.csr_matrix:
    """Raw counts of ``X`` or a layer ``(cells, genes)``."""
    return read_rows(adata.X if layer is None else adata.layers[layer], np.arange(adata.n_obs))


def log_normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    """log1p of counts per 10,000, ``(cells, genes)``."""
    depth = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return sp.csr_matrix(sp.diags_array(1e4 / depth) @ counts).log1p()
