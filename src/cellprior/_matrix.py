"""Where counts stand in an AnnData, whether a sparse matrix is sound, and sums that no type can spoil."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

RAW = "raw"  # as a layer: adata.raw, unless a layer has this name
BLOCK = 4096  # cells that are added up at a time


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of an AnnData, and the features that its columns are.

    Attributes
    ----------
    x
        Values ``(cells, features)``.
    var
        A row per feature; of ``raw`` its own, which may be more.
    where
        What errors call it.
    """

    x: Any
    var: pd.DataFrame
    where: str


def is_raw(adata: Any, layer: str | None) -> bool:
    """Whether a layer means ``adata.raw``: it is called "raw", and no layer has that name."""
    return layer == RAW and RAW not in adata.layers and getattr(adata, "raw", None) is not None


def matrix_of(adata: Any, layer: str | None, *, argument: str = "layer", name: str | None = None) -> Matrix:
    """``X``, a layer, or ``raw.X``.

    ``layer`` is ``None`` for ``X``, ``"raw"`` for ``adata.raw`` unless a layer has this name; errors call it by
    ``argument``, and the AnnData by ``name``. Raises ValueError if there is no such matrix.
    """
    if is_raw(adata, layer):
        return Matrix(adata.raw.X, adata.raw.var, "raw.X")
    layers = [other for other in adata.layers if other is not None]
    who = "the AnnData" if name is None else repr(name)
    has_raw = getattr(adata, "raw", None) is not None
    if layer is None:
        if (x := x_of(adata)) is None:
            raw = f' It has raw: {argument}="raw".' if has_raw else ""
            msg = (
                f"{who[0].upper()}{who[1:]} has no X; its layers are {layers or 'none'}.{raw} Name the one with raw "
                f"counts: {argument}=..., or put them into X."
            )
            raise ValueError(msg)
        return Matrix(x, adata.var, "X")
    if layer not in layers:
        raw = f' It has raw, which is named as {argument}="raw".' if has_raw else ""
        msg = (
            f"There is no layer {layer!r} in {who}; its layers are {layers or 'none'}.{raw} {argument}={layer!r} was "
            "given here or in the setup of the model, and a query has its counts in the same place as the reference."
        )
        raise ValueError(msg)
    return Matrix(adata.layers[layer], adata.var, f"layers[{layer!r}]")


def places(adata: Any) -> list[str | None]:
    """All matrices of an AnnData, as ``layer=`` names them."""
    found: list[str | None] = [] if x_of(adata) is None else [None]
    found += [name for name in adata.layers if name is not None]
    if getattr(adata, "raw", None) is not None and RAW not in found:
        found.append(RAW)
    return found


def x_of(adata: Any) -> Any:
    """``X``, None if there is none; of an open file without it, anndata raises a KeyError, or finds an empty one."""
    try:
        x = adata.X
    except KeyError:
        return None
    return None if getattr(x, "shape", ()) is None else x


def to_memory(adata: Any) -> Any:
    """A copy in memory of an AnnData in a file.

    Raises ValueError if the file has no ``X``: anndata then reads it whole, and no part of it.
    """
    if x_of(adata) is None:
        msg = (
            f"{adata.filename} has no X, and anndata makes no copy of such a file, or of a part of it, while it is "
            f"open. Read it whole: adata = anndata.read_h5ad({str(adata.filename)!r})."
        )
        raise ValueError(msg)
    return adata.to_memory()


def totals(matrix: Matrix) -> np.ndarray | None:
    """Sum of each feature in float64 ``(features,)``; None of what is not in memory, as that would be read whole.

    Raises ValueError if the matrix is sparse and damaged.
    """
    x = matrix.x
    if isinstance(x, np.ndarray):
        return np.asarray(x.sum(axis=0, dtype=np.float64)).ravel()
    if not sp.issparse(x):
        return None
    if x.format not in ("csr", "csc"):
        x = x.tocsr()
    refuse_damaged(x, matrix.where)
    n = x.shape[1]
    if x.format == "csc":
        filled = np.diff(x.indptr) > 0
        found = np.zeros(n)
        if filled.any():  # a value too many where the arrays are longer than they say
            data = x.data[: x.indptr[-1]]
            found[filled] = np.add.reduceat(data, x.indptr[:-1][filled], dtype=np.float64)
        return found
    found = np.zeros(n)
    for start in range(0, x.shape[0], BLOCK):  # a float32 adds up the counts of so few cells exactly
        pointers = x.indptr[start : start + BLOCK + 1]
        part = slice(pointers[0], pointers[-1])
        cells = (x.data[part], x.indices[part], pointers - pointers[0])
        found += np.asarray(sp.csr_matrix(cells, shape=(len(pointers) - 1, n)).sum(axis=0)).ravel()
    return found


def refuse_damaged(x: Any, where: str) -> None:
    """Refuse a sparse matrix in memory whose indices do not fit its shape: compiled code would read beyond its arrays.

    Raises ValueError, with what does not fit.
    """
    n_major, n_minor = x.shape if x.format == "csr" else x.shape[::-1]
    n = min(len(x.indices), len(x.data))
    if len(x.indptr) != n_major + 1:
        raise damaged(where, f"indptr has {len(x.indptr)} entries, {n_major + 1} are needed")
    refuse_pointers(x.indptr[:-1], x.indptr[1:], n, where)
    refuse_indices(x.indices, n_minor, where)


def refuse_indices(indices: np.ndarray, n_minor: int, where: str) -> None:
    """Refuse indices of a sparse matrix that are negative or too large."""
    if not len(indices):
        return
    # one pass: read as unsigned, a negative index is a large one
    if int(indices.view(f"u{indices.itemsize}").max()) >= n_minor:
        low, high = int(indices.min()), int(indices.max())
        found = f"there is the index {low if low < 0 else high}, and indices go from 0 to {n_minor - 1}"
        raise damaged(where, found)


def refuse_pointers(start: np.ndarray, stop: np.ndarray, n: int, where: str) -> None:
    """Refuse rows, or columns, that begin or end where no values are, or end before they begin."""
    wrong = (start < 0) | (stop < start) | (stop > n)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise damaged(where, f"indptr lets values go from {start[at]} to {stop[at]}, and there are {n}")


def damaged(where: str, found: str) -> ValueError:
    """What to raise."""
    msg = (
        f"The sparse matrix {where} is damaged: {found}. No cell of it can be trusted. Fetch or make the file anew, "
        "and compare its checksum with that of its source."
    )
    return ValueError(msg)
