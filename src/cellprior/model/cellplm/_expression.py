"""Expression from CellPLM's decoder: denoised values, and genes that were not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

from cellprior.genes import GeneMatch
from cellprior.model.cellplm._masked import MAX_CELLS, decoded, fit_covariates
from cellprior.model.data._cells import Cells
from cellprior.model.data._counts import row_numbers
from cellprior.model.data._panels import gene_rows, measured_genes, refuse_unmeasured

Covariates: TypeAlias = Literal["fitted", "mean"]
Groups: TypeAlias = list[tuple[np.ndarray, dict[str, int]]]


def normalized_expression(
    model: Any,
    adata: Any,
    indices: Any,
    gene_list: Sequence[str] | None,
    *,
    library_size: float,
    covariates: Covariates,
    batch_size: int | None,
) -> pd.DataFrame:
    """See :meth:`cellprior.model.CellPLM.get_normalized_expression`."""
    model._check_if_trained(warn=False)
    cells = model._cells(adata)
    latent = model._embed(cells, indices, batch_size, decodable=True)
    match, rows = cells.counts["rna"].match, row_numbers(indices, cells.n_obs)
    names, columns = _named(gene_list, model.genes, match)
    seen = measured_genes(None, model.genes, match)
    groups = _decoder_groups(model, covariates, cells, rows, seen)
    values = np.empty((len(latent), len(names)), dtype=np.float32)
    for some, mean in _decoder_means(model, latent, groups, batch_size):
        values[some] = mean[:, columns] * (library_size / mean.sum(axis=1, keepdims=True))
    return pd.DataFrame(values, index=cells.obs.index[rows], columns=names)


def impute(
    model: Any,
    genes: Sequence[str],
    adata: Any,
    indices: Any,
    *,
    measured: Mapping[str, Sequence[str]] | None,
    covariates: Covariates,
    batch_size: int | None,
) -> pd.DataFrame:
    """See :meth:`cellprior.model.CellPLM.impute`."""
    model._check_if_trained(warn=False)
    cells = model._cells(adata)
    latent = model._embed(cells, indices, batch_size, decodable=True)
    of_genes, rows = cells.counts["rna"], row_numbers(indices, cells.n_obs)
    names, columns = _named(genes, model.genes, of_genes.match)
    seen = measured_genes(measured, model.genes, of_genes.match, cells)
    panel = np.zeros(len(rows), dtype=np.int64)
    if measured is not None and cells.batch is not None:
        panel = cells.batch[rows]
    values = np.empty((len(latent), len(names)), dtype=np.float32)
    groups = _decoder_groups(model, covariates, cells, rows, seen)
    for some, mean in _decoder_means(model, latent, groups, batch_size):
        counts = of_genes.over_vocabulary(rows[some], len(model.genes))  # (cells, n_genes)
        known = seen[panel[some]]
        refuse_unmeasured(counts, known, model.genes)
        depth = counts.sum(axis=1, keepdims=True)
        values[some] = mean[:, columns] * (depth / (mean * known).sum(axis=1, keepdims=True))
    return pd.DataFrame(values, index=cells.obs.index[rows], columns=names)


def _decoder_groups(
    model: Any, covariates: Covariates, cells: Cells, rows: np.ndarray, seen: np.ndarray
) -> Groups:
    """Positions of the cells that are decoded with the same covariates, and these; none where it is their mean."""
    if covariates not in get_args(Covariates):
        msg = f'covariates={covariates!r} is not known; choose "fitted" or "mean".'
        raise ValueError(msg)
    decoder = model.module.decoder
    if covariates == "mean" or (decoder.dataset is None and decoder.batch is None):
        return [(np.arange(len(rows)), {})]
    batch = np.zeros(cells.n_obs, dtype=np.int64) if cells.batch is None else cells.batch
    groups = []
    for code in np.unique(batch[rows]):
        # of all cells, so that the choice does not depend on those asked for
        some = np.flatnonzero(batch == code)
        some = some[np.unique(np.linspace(0, len(some) - 1, MAX_CELLS).astype(np.int64))]
        counts = torch.from_numpy(cells.counts["rna"].over_vocabulary(some, len(model.genes)))
        known = torch.from_numpy(seen[code if len(seen) > 1 else 0]).to(model.module.device)
        fitted = fit_covariates(model.module, [{REGISTRY_KEYS.X_KEY: counts}], known)
        groups.append((np.flatnonzero(batch[rows] == code), fitted.get(0, {})))
    return groups


@torch.inference_mode()
def _decoder_means(
    model: Any, latent: np.ndarray, groups: Groups, batch_size: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decoder means ``(cells, n_genes)`` of a few cells at a time, and their positions."""
    step = batch_size or model.default_batch_size
    for positions, covariates in groups:
        for cells in np.array_split(positions, -(-len(positions) // step)):
            z = torch.from_numpy(latent[cells]).to(model.module.device)
            mean, _ = decoded(model.module, z, covariates)
            yield cells, mean.cpu().numpy()


def _named(
    names: Sequence[str] | None, genes: pd.DataFrame, match: GeneMatch
) -> tuple[list[str], np.ndarray]:
    """Names of genes, by default all of the vocabulary, and their rows in it."""
    if names is not None:
        return list(names), gene_rows(names, genes, match)
    symbols, ids = genes["symbol"], genes["ensembl_id"]
    return symbols.where(symbols != "", ids).tolist(), np.arange(len(ids))
