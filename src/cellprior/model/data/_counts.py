"""Raw counts of some cells: read from any kind of matrix, checked, and brought into the order of a vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cellprior._matrix import (
    damaged,
    is_raw,
    matrix_of,
    refuse_damaged,
    refuse_pointers,
)

# cells whose counts are looked at before anything long begins; the others follow as they are read
N_CHECKED = 256
LARGEST = 2.0**53  # a float64 cannot count beyond
NEARLY = 1e-4  # of an integer: what a conversion leaves, not what a normalisation makes


class NotCountsError(ValueError):
    """The matrix does not hold raw counts."""


def by_cell(x: Any, where: str) -> Any:
    """A matrix whose rows can be read: CSC in memory as CSR, once, as each of its rows costs a pass over it.

    Raises ValueError if it is damaged.
    """
    if not isinstance(x, sp.csc_matrix | sp.csc_array):
        return x
    refuse_damaged(x, where)
    return x.tocsr()


def read_rows(x: Any, rows: np.ndarray, *, where: str = "of counts") -> sp.csr_matrix:
    """Rows of a matrix as float32 CSR, in the order asked for.

    The matrix ``(cells, genes)`` is dense or sparse, in memory, backed by a file, or a dask array; ``where`` is what
    errors call it, if it is in memory. Raises OSError if the file cannot be read, or has gone; ValueError if the
    matrix is sparse, and its indices do not fit its shape.
    """
    contiguous = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    if isinstance(x, np.ndarray) or sp.issparse(x):
        _refuse_rows(x, rows, where)
        return read_rows_of_block(x[int(rows[0]) : int(rows[-1]) + 1] if contiguous else x[rows], where)
    try:
        where = _file_of(x) or where
        if isinstance(x, ad.abc.CSCDataset):  # all is read in any case, and is checked before it is cut
            return read_rows(x.to_memory(), rows, where=where)
        _refuse_rows(x, rows, where)
        if contiguous:
            found = read_rows_of_block(x[int(rows[0]) : int(rows[-1]) + 1], where)
        else:
            # files want increasing rows; anndata gives them back sorted and says nothing
            ordered, position = np.unique(rows, return_inverse=True)
            found = read_rows_of_block(x[ordered], where)[position]
        refuse_vanished(x)
    except OSError as error:
        msg = f"The counts of cells {rows.min()} to {rows.max()} cannot be read from the file: {error}"
        raise OSError(error.errno, msg) from error
    return found


def _refuse_rows(x: Any, rows: np.ndarray, where: str) -> None:
    """Refuse rows of a sparse matrix that begin or end outside of its arrays, before compiled code goes there."""
    if sp.issparse(x) and x.format == "csc":
        refuse_damaged(x, where)
        return
    if sp.issparse(x) and x.format == "csr":
        pointers, n = x.indptr, min(len(x.indices), len(x.data))
    else:  # what anndata has read of a file once
        pointers = getattr(x, "_indptr", None)
        if not isinstance(pointers, np.ndarray):
            return
        n = min(x.group["indices"].shape[0], x.group["data"].shape[0])
    if len(pointers) != x.shape[0] + 1:
        raise damaged(where, f"indptr has {len(pointers)} entries, {x.shape[0] + 1} are needed")
    refuse_pointers(pointers[rows], pointers[rows + 1], n, where)


def _file_of(x: Any) -> str | None:
    """Where a matrix on disk is, for errors."""
    group = getattr(x, "group", None)
    return None if group is None else f"{group.name} of {place_of(group)}"


def read_rows_of_block(block: Any, where: str = "of counts") -> sp.csr_matrix:
    """A slice of any kind of matrix as float32 CSR without duplicates."""
    if hasattr(block, "compute"):
        block = block.compute()
    if isinstance(block, ad.abc.CSRDataset | ad.abc.CSCDataset):
        block = block.to_memory()
    if sp.issparse(block) and block.format in ("csr", "csc"):
        refuse_damaged(block, where)
    with np.errstate(over="ignore"):  # what a float32 does not hold becomes infinite, and is refused
        csr = sp.csr_matrix(block, dtype=np.float32)
        if not csr.has_canonical_format:
            csr.sum_duplicates()
    return csr


def check_counts(
    counts: sp.csr_matrix,
    rows: np.ndarray,
    adata: ad.AnnData,
    layer: str | None,
    *,
    argument: str = "layer",
    feature: str = "gene",
) -> None:
    """Refuse values that are not raw counts and name the first cell and gene, and the argument that names a layer.

    Raises NotCountsError, for NaN, infinity, negative, fractional or huge values.
    """
    bad = _no_counts(counts.data)
    if not bad.any():
        return
    at = int(np.argmax(bad))
    value = counts.data[at]
    cell = adata.obs_names[rows[np.searchsorted(counts.indptr, at, side="right") - 1]]
    from_raw = is_raw(adata, layer)
    name = (adata.raw if from_raw else adata).var_names[counts.indices[at]]
    where = "X" if layer is None else "raw.X" if from_raw else f"layers[{layer!r}]"
    wrong = counts.data[bad]
    with np.errstate(invalid="ignore"):
        nearly = bool((np.abs(wrong - np.rint(wrong)) <= NEARLY * np.maximum(wrong, 1)).all())
    kind = (
        "not finite"
        if not np.isfinite(value)
        else "negative"
        if value < 0
        else "too large for a count"
        if value > LARGEST
        else "not an integer"
    )
    shown = f"{value:.9g}" if nearly else f"{value:g}"
    msg = f"{where} does not hold raw counts: cell {cell!r}, {feature} {name!r} is {shown}, which is {kind}. "
    if kind == "not an integer" and nearly:
        access = f"adata.{where}"
        advice = (
            f"It is within {NEARLY:g} of one, as a conversion leaves counts. If they were counts, round them first: "
            f"{access} = np.rint({access})"
        )
        if from_raw:
            advice = advice.replace(access, "adata.X").replace(
                "first: ", "first: adata = adata.raw.to_adata(); "
            )
        raise NotCountsError(f"{msg}{advice}")
    raise NotCountsError(f"{msg}{_way_out(adata, layer, argument)}")


def _no_counts(values: np.ndarray) -> np.ndarray:
    """Which values are no counts: negative, huge or infinite, fractional or NaN."""
    return (values < 0) | (values > LARGEST) | (values != np.rint(values))


def _way_out(adata: Any, layer: str | None, argument: str) -> str:
    """Where the counts are instead, or where they could come from."""
    layers = [name for name in adata.layers if name is not None and name != layer]
    recover = (
        "Else cellprior.pp.recover_counts makes counts of log-normalised values, where that is possible."
    )
    if isinstance(adata, ad.AnnData):
        for other in [*layers, *(["raw"] if adata.raw is not None and "raw" not in layers else []), None]:
            if other != layer and _seem_counts(adata, other):
                if other is None:
                    return f"X holds raw counts: leave out {argument}={layer!r}. {recover}"
                place = "adata.raw" if is_raw(adata, other) else f"layers[{other!r}]"
                return f"{place} holds raw counts, name it: {argument}={other!r} (now {argument}={layer!r}). {recover}"
    named = f"{argument}={layers[0]!r}" if layers else f"{argument}=..."
    advice = f"name it: {named}" if layers else f"put them in a layer and name it: {named}"
    return (
        f"Raw counts are needed. If another layer has them, {advice} (layers here: {layers or 'none'}). "
        "If only log-normalised values are left, cellprior.pp.recover_counts(adata) gives the counts back where "
        "that is possible exactly; it takes adata.raw too. Estimated counts, such as those of Salmon or RSEM, may "
        "be rounded first."
    )


def _seem_counts(adata: ad.AnnData, layer: str | None) -> bool:
    """Whether the first cells of a matrix are counts, and not all of them empty."""
    try:
        x = matrix_of(adata, layer).x
        found = read_rows(x, np.arange(min(N_CHECKED, adata.n_obs)))
    except (ValueError, TypeError, OSError):  # there is none, or it is of no use
        return False
    return found.nnz > 0 and not _no_counts(found.data).any()


def select_columns(x: sp.csr_matrix, column: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """Move each column of ``x`` to ``column[j]``, drop those at -1, and add up those that meet."""
    if len(column) == n_columns and x.has_canonical_format and np.array_equal(column, np.arange(n_columns)):
        return x
    target = column[x.indices]
    kept = target >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[x.indptr]
    moved = sp.csr_matrix((x.data[kept], target[kept], indptr), shape=(x.shape[0], n_columns))
    moved.sum_duplicates()
    return moved


def csr_tensor(x: sp.csr_matrix) -> Tensor:
    """A CSR tensor that shares memory with a SciPy matrix in canonical format."""
    with warnings.catch_warnings():
        # torch announces at first use that CSR tensors are in beta; the two products used here are tested
        warnings.filterwarnings(
            "ignore", message="Sparse CSR tensor support is in beta", category=UserWarning
        )
        indptr, indices, data = (torch.from_numpy(part) for part in (x.indptr, x.indices, x.data))
        return torch.sparse_csr_tensor(indptr, indices, data, size=x.shape, check_invariants=False)


def row_numbers(indices: Sequence[int] | Sequence[bool] | np.ndarray | None, n_obs: int) -> np.ndarray:
    """Row numbers of the cells that ``indices``, numbers or a mask, mean."""
    if indices is None:
        return np.arange(n_obs)
    rows = np.asarray(indices)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iub"):
        msg = f"indices must be whole numbers or a mask, one per cell; found {rows.dtype} of shape {rows.shape}."
        raise TypeError(msg)
    if rows.dtype == bool:
        if len(rows) != n_obs:
            msg = f"The mask has {len(rows)} entries for {n_obs} cells."
            raise ValueError(msg)
        return np.flatnonzero(rows)
    rows = rows.astype(np.int64) if rows.size else np.empty(0, dtype=np.int64)
    if rows.size and not (-n_obs <= rows.min() and rows.max() < n_obs):
        msg = f"indices go from {rows.min()} to {rows.max()}; there are {n_obs} cells."
        raise IndexError(msg)
    return rows % n_obs


# stores of zarr 3 and of zarr 2 that are folders, and which of their attributes leads there
FOLDERS = {"LocalStore": "root", "DirectoryStore": "path", "NestedDirectoryStore": "path"}


def place_of(stored: Any) -> str:
    """File or folder in which something is stored."""
    if hasattr(stored, "file"):
        return str(stored.file.filename)
    store = getattr(stored, "store", None)
    return str(getattr(store, FOLDERS.get(type(store).__name__, ""), store))


def refuse_by_gene(x: Any) -> None:
    """Refuse a matrix on disk that is stored gene by gene: its cells cannot be read without reading all of it.

    Raises ValueError, with the way out.
    """
    if not isinstance(x, ad.abc.CSCDataset):
        return
    name = str(x.group.name).strip("/")
    parts = name.split("/")
    data, read, write = "adata", "adata = anndata.read_h5ad(path)", "adata.write_h5ad(path)"
    if parts[0] == "mod":
        data, read, write = f"mdata[{parts[1]!r}]", "mdata = mudata.read_h5mu(path)", "mdata.write(path)"
    elif parts[0] == "raw":
        read += ".raw.to_adata()"
    counts = f"{data}.layers[{parts[-1]!r}]" if "layers" in parts[:-1] else f"{data}.X"
    msg = (
        f"The counts, {name} of {place_of(x.group)}, are stored gene by gene (CSC), so that every read of some cells "
        f"would read the whole matrix. Store them cell by cell once: {read}; {counts} = {counts}.tocsr(); {write}."
    )
    raise ValueError(msg)


def refuse_vanished(x: Any) -> None:
    """Refuse a matrix in a zarr folder that is no longer there: zarr would go on reading, zeros.

    Raises OSError, with the folder.
    """
    array = getattr(x, "group", x)
    store = getattr(array, "store", None)
    attribute = FOLDERS.get(type(store).__name__)  # of a bucket, the question would cost as much as a read
    if attribute and not (folder := Path(getattr(store, attribute)) / array.path.lstrip("/")).exists():
        msg = f"{folder} was there when it was opened, and is gone."
        raise FileNotFoundError(msg)
