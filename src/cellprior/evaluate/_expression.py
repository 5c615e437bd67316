"""Expression as the baselines read it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellprior._matrix import matrix_of
from cellprior.genes._kinds import which_are_genes
from cellprior.model.data._counts import read_rows

COUNTS_PER_CELL = 1e4


def raw_counts(adata: ad.AnnData, layer: str | None) -> sp.csr_matrix:
    """Raw counts of ``X``, a layer or ``raw`` ``(cells, genes)``."""
    matrix = matrix_of(adata, layer)
    return read_rows(matrix.x, np.arange(adata.n_obs), where=matrix.where)


def of_genes(counts: sp.csr_matrix, var: pd.DataFrame) -> sp.csr_matrix:
    """Counts of genes, as the models read them, without antibodies and the like; of all features if none is a gene."""
    genes = which_are_genes(var)
    return counts if genes.all() else sp.csr_matrix(counts[:, np.flatnonzero(genes)])


def log_normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    """``log(1 + 10,000 x / depth)`` of raw counts ``(cells, genes)``, float32; an empty cell stays empty."""
    depth = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1)
    scaled = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    scaled.data *= np.repeat(COUNTS_PER_CELL / depth, np.diff(scaled.indptr)).astype(np.float32)
    return scaled.log1p()
