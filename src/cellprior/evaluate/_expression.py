"""Expression as the baselines read it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import scipy.sparse as sp

from cellprior._matrix import matrix_of
from cellprior.model._data import read_rows


def raw_counts(adata: ad.AnnData, layer: str | None) -> sp.csr_matrix:
    """Raw counts of ``X``, a layer or ``raw`` ``(cells, genes)``."""
    matrix = matrix_of(adata, layer)
    return read_rows(matrix.x, np.arange(adata.n_obs), where=matrix.where)


def log_normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    """log1p of counts per 10,000, ``(cells, genes)``."""
    depth = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return sp.csr_matrix(sp.diags_array(1e4 / depth) @ counts).log1p()
