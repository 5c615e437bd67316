"""Genes and peaks in the shared space: where the cells are that have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellprior._arguments import one_of
from cellprior.model.data._cells import Cells, Counts
from cellprior.model.data._counts import csr_tensor, row_numbers
from cellprior.model.engine._embedding import Embedding, in_memory
from cellprior.model.multiomeclip._inputs import log_share, open_peaks
from cellprior.model.multiomeclip._module import MODALITIES, Modality
from cellprior.model.multiomeclip._training import in_parts


def feature_vectors(model: Any, modality: Modality, adata: Any, indices: Any) -> pd.DataFrame:
    """See :meth:`cellprior.model.MultiomeCLIP.get_feature_representation`."""
    one_of(MODALITIES, modality=modality)
    model._check_if_trained(warn=False)
    cells = model._cells(adata)
    rows = row_numbers(indices, cells.n_obs)
    rows = rows[cells.has(modality)[rows]]
    if not len(rows):
        msg = f"None of the cells has {modality.upper()}; the data have {' and '.join(cells.counts)}."
        raise ValueError(msg)
    names = gene_names(model) if modality == "rna" else pd.Index(model.peaks)
    return pd.DataFrame(vectors_over(model, modality, cells, rows), index=names)


def gene_names(model: Any) -> pd.Index:
    """Symbols of the vocabulary, or Ensembl ids of genes that have none."""
    symbol = model.genes["symbol"]
    if "ensembl_id" in model.genes:
        symbol = symbol.where(symbol != "", model.genes["ensembl_id"])
    return pd.Index(symbol.to_numpy(dtype=object))


def vectors_over(model: Any, modality: Modality, cells: Cells, rows: np.ndarray) -> np.ndarray:
    """Mean place of some cells, weighted by each feature, from the plain mean ``(n_features, n_latent)``, float32."""
    some = cells.only([modality])
    latent = in_memory(Embedding(model._encoder(some, center=True), some, rows)).astype(np.float64)
    latent -= latent.mean(axis=0)
    n_features = cells.counts[modality].n_columns
    total, weight = np.zeros((n_features, latent.shape[1])), np.zeros(n_features)
    for part in in_parts(np.arange(len(rows))):
        values = log_values(cells.counts[modality], rows[part]).astype(np.float64)
        total += values.T @ latent[part]
        weight += np.asarray(values.sum(axis=0)).ravel()
    return (total / np.where(weight > 0, weight, 1.0)[:, None]).astype(np.float32)


def log_values(counts: Counts, rows: np.ndarray) -> sp.csr_matrix:
    """Log-normalised expression, or accessibility with peaks open or closed ``(cells, n_features)``, float32."""
    tensor = csr_tensor(counts.read(rows))
    values = log_share(open_peaks(tensor) if counts.modality == "atac" else tensor)
    parts = values.values().numpy(), values.col_indices().numpy(), values.crow_indices().numpy()
    return sp.csr_matrix(parts, shape=tuple(values.shape))
