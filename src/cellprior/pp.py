"""Preparing data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from cellprior._matrix import Matrix, matrix_of, refuse_damaged
from cellprior._obs import read_presence

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData, Raw
    from mudata import MuData

__all__ = ["pad_modalities", "recover_counts"]


def __dir__() -> list[str]:
    return list(__all__)


MAX_DECIMALS = 5  # values rounded to more are treated as unrounded


def recover_counts(
    adata: AnnData | Raw, *, layer: str | None = None, base: float | None = None
) -> sp.csr_matrix:
    r"""Turn log-normalised values back into the counts they came from, exactly or not at all.

    Normalising multiplies the counts :math:`k` of a cell by one factor :math:`u`, so that the values are
    :math:`\log(1 + k u)` and the smallest of them, as a rule, that of a single count. The function takes this
    factor from the smallest value, refines it on all values of the cell, rounds, and checks that every value is
    reproduced to the precision with which it was stored and that no other integer would do as well. A cell whose
    counts are all multiples of one number comes back divided by it, which the values cannot tell.

    Every column is turned back, with the one factor of its cell, so that the result fits the data. Antibodies or peaks
    that were normalised otherwise than the genes are refused: pass the genes alone then.

    Parameters
    ----------
    adata
        AnnData, or ``adata.raw``.
    layer
        Layer with the values; ``None`` for ``X``; ``"raw"`` for ``adata.raw``.
    base
        Base of the logarithm; by default that noted by :func:`scanpy.pp.log1p`, else e.

    Returns
    -------
    Counts ``(cells, genes)``, float32.

    Raises
    ------
    ValueError
        If the values are negative (scaled), not finite, counts already, or not integers times a factor per cell.

    Examples
    --------
    >>> adata.layers["counts"] = cp.pp.recover_counts(adata)
    >>> adata = adata.raw.to_adata()  # where X is scaled and raw is log-normalised
    >>> adata.layers["counts"] = cp.pp.recover_counts(adata)
    """
    matrix = matrix_of(adata, layer) if hasattr(adata, "layers") else Matrix(adata.X, adata.var, "raw.X")
    values: Any = matrix.x
    var_names, where = matrix.var.index, matrix.where
    if hasattr(values, "compute"):
        values = values.compute()
    elif hasattr(values, "to_memory"):
        values = values.to_memory()
    if sp.issparse(values) and values.format in ("csr", "csc"):
        refuse_damaged(values, where)
    log = sp.csr_matrix(values[:] if not sp.issparse(values) else values, dtype=np.float64, copy=True)
    log.sum_duplicates()
    log.eliminate_zeros()
    _check_logarithms(log, where, _genes_alone(adata.var))
    if log.nnz == 0:
        return log.astype(np.float32)
    precision = _stored_precision(log.data, np.dtype(values.dtype))
    if base is None:
        base = getattr(adata, "uns", {}).get("log1p", {}).get("base")
    scale = 1.0 if base is None else np.log(base)
    counts, bad = _integers(log.data * scale, log.indptr, precision * scale)
    if bad.any():
        at = int(np.argmax(bad))
        cell = adata.obs_names[np.searchsorted(log.indptr, at, side="right") - 1]
        gene = var_names[log.indices[at]]
        n_cells = len(np.unique(np.searchsorted(log.indptr, np.flatnonzero(bad), side="right")))
        msg = (
            f"{where} is not log(1 + counts x factor) with one factor per cell: {n_cells} of {log.shape[0]} cells do "
            f"not come out as integers, the first at cell {cell!r}, gene {gene!r} ({log.data[at]:g}). If the logarithm "
            "is not the natural one, pass base=. Values that were corrected, imputed or normalised per gene cannot be "
            "turned back; go to the file with the raw counts." + _genes_alone(adata.var)
        )
        raise ValueError(msg)
    log.data = counts
    return log.astype(np.float32)


def pad_modalities(mdata: MuData) -> MuData:
    """Give every modality a row for every cell, of zeros where it has none, and note which rows are padding.

    For tools that refuse a MuData with cells missing from a modality. :class:`cellprior.model.MultiomeCLIP` takes such
    data as they are, and does not mistake the padding of padded ones for cells.

    Parameters
    ----------
    mdata
        Modalities of which some lack some cells.

    Returns
    -------
    A copy, all modalities with the cells of ``mdata`` in its order. ``obs["has_<modality>"]`` is False where a row is
    padding, in ``mdata`` and in the modality itself, whose other columns are empty there. ``obsm``, ``obsp`` and
    ``raw`` of the modalities are left out, as there are no values to pad them with.

    Raises
    ------
    ValueError
        If a barcode stands for several cells.

    Examples
    --------
    >>> mdata = cp.pp.pad_modalities(mdata)
    >>> mdata[mdata.obs["has_atac"]].n_obs  # cells with ATAC
    """
    import mudata as md
    from anndata import AnnData

    from cellprior._compat import without_pulled_columns

    padded, obs = {}, mdata.obs.copy()
    for key, adata in mdata.mod.items():
        for names in (adata.obs_names, mdata.obs_names):
            if not names.is_unique:
                msg = f"The barcode {names[names.duplicated()][0]!r} stands for several cells: make them unique first."
                raise ValueError(msg)
        row = adata.obs_names.get_indexer(mdata.obs_names)
        column = presence_column(key)
        obs[column] = (row >= 0) & read_presence(obs, column) if column in obs else row >= 0
        padded[key] = AnnData(
            _with_empty_rows(adata.X, row),
            obs=adata.obs.reindex(mdata.obs_names).assign(**{column: obs[column].to_numpy(dtype=bool)}),
            var=adata.var.copy(),
            layers={
                name: _with_empty_rows(layer, row) for name, layer in adata.layers.items() if name is not None
            },
            uns=dict(adata.uns),
        )
    with without_pulled_columns():  # columns of the modalities stay where they are
        result = md.MuData(padded)
    result.obs = obs.loc[result.obs_names]
    result.uns.update(mdata.uns)
    return result


def presence_column(key: str) -> str:
    """Column of ``obs`` that says which cells have a modality."""
    return f"has_{key}"


def _with_empty_rows(values: Any, row: np.ndarray) -> Any:
    """Rows of a matrix, one of zeros for -1."""
    if values is None:
        return None
    if hasattr(values, "compute"):
        values = values.compute()
    elif hasattr(values, "to_memory"):
        values = values.to_memory()
    if sp.issparse(values):
        empty = sp.csr_matrix((1, values.shape[1]), dtype=values.dtype)
        return sp.vstack([sp.csr_matrix(values), empty], format="csr")[row]
    values = np.asarray(values)
    return np.vstack([values, np.zeros((1, values.shape[1]), dtype=values.dtype)])[row]


def _genes_alone(var: pd.DataFrame) -> str:
    """How to turn back the genes alone, where other features stand beside them; else empty."""
    from cellprior.genes._kinds import GENE, counted, kinds_by_type, kinds_of

    kinds, by = kinds_of(var), kinds_by_type(var)[1]
    if (kinds == GENE).all() or not (kinds == GENE).any():
        return ""
    others = ", ".join(counted(kinds, kind) for kind in dict.fromkeys(kinds[kinds != GENE].tolist()))
    genes = (
        f"adata[:, adata.var[{by!r}] == {str(var.loc[kinds == GENE, by].iloc[0])!r}]"
        if by
        else "the genes alone"
    )
    return f" The data hold {others}, which are often normalised otherwise than genes: try {genes}."


def _check_logarithms(log: sp.csr_matrix, where: str, genes_alone: str = "") -> None:
    """Refuse what cannot be the logarithm of normalised counts."""
    if not np.isfinite(log.data).all():
        msg = f"{where} holds values that are not finite; remove them first."
        raise ValueError(msg)
    if (log.data < 0).any():
        msg = (
            f"{where} holds negative values: it is scaled, which cannot be undone. If adata.raw holds the "
            "log-normalised values, use recover_counts(adata.raw)." + genes_alone
        )
        raise ValueError(msg)
    if log.nnz and (log.data == np.rint(log.data)).all():
        advice = (
            ' Name them, layer="raw", or go on with adata = adata.raw.to_adata().' if where == "raw.X" else ""
        )
        msg = f"{where} holds integers: these are counts already.{advice}"
        raise ValueError(msg)


def _stored_precision(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Largest error of each stored logarithm: half a unit of its last decimal if rounded, else some float rounding."""
    for decimals in range(1, MAX_DECIMALS + 1):
        shifted = values * 10.0**decimals
        # a float32 is off by up to 2**-24 of itself
        if (np.abs(shifted - np.rint(shifted)) <= shifted * 1.2e-7 + 1e-9).all():
            return np.full_like(values, 0.51 * 10.0**-decimals)
    eps = max(np.finfo(dtype).eps if dtype.kind == "f" else 0.0, np.finfo(np.float32).eps)
    return 4 * eps * (1 + values)


def _integers(log: np.ndarray, indptr: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts behind natural logarithms by row, and which of them are not established."""
    n = np.diff(indptr)
    starts, row = indptr[:-1][n > 0], np.repeat(np.arange((n > 0).sum()), n[n > 0])
    normalised = np.expm1(log)
    unit = np.minimum.reduceat(normalised, starts)
    for _ in range(3):
        counts = np.maximum(np.rint(normalised / unit[row]), 1.0)
        # least squares of log = log(1 + counts * unit) around the present unit
        slope = counts / (1 + counts * unit[row])
        residual = log - np.log1p(counts * unit[row])
        unit = unit + np.add.reduceat(slope * residual, starts) / np.add.reduceat(slope**2, starts)
    error = np.abs(np.log1p(counts * unit[row]) - log)
    spacing = np.log1p((counts + 1) * unit[row]) - np.log1p(counts * unit[row])
    return counts, (error > 2 * precision) | (spacing < 4 * precision)
