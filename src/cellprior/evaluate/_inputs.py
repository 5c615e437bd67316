"""What every metric asks of its arrays, and the form in which it gets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellprior._obs import text_of


def record_of(adata: Any, key: str) -> Mapping[str, Any]:
    """What :func:`cellprior.tl.embed` has noted of a key of ``obsm``, or nothing."""
    found: Mapping[str, Any] | None = adata.uns.get("cellprior", {}).get(key)
    return found or {}


def as_embedding(embedding: Any, *, name: str = "embedding", origin: np.ndarray | None = None) -> np.ndarray:
    """Check an embedding and move it so that ``origin``, by default its first cell, is zero.

    Distances stay the same, but a large part that all cells share no longer costs them digits, and an embedding whose
    cells are all the same becomes zero exactly. Any real numbers ``(cells, dimensions)``, dense or sparse, become
    float64, dense; never the array that was given. Raises ValueError if it is not a matrix, is empty or holds values
    that are not finite.
    """
    values = np.asarray(embedding.toarray() if sp.issparse(embedding) else embedding, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        msg = f"{name} has the shape {values.shape}; a metric needs (cells, dimensions) with at least one of each."
        raise ValueError(msg)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        msg = (
            f"{name} is not finite in {len(bad)} of {len(values)} cells, the first in row {bad[0]}. Leave these "
            "cells out, of the labels too, or find out where the embedding went wrong."
        )
        raise ValueError(msg)
    return np.asarray(values - (values[0] if origin is None else origin))


def as_codes(labels: Any, n_cells: int | None = None, *, name: str = "labels") -> tuple[np.ndarray, pd.Index]:
    """Number labels of any type, in the order in which they come.

    The types of the values may be mixed, and there must be ``n_cells`` of them, if that is given. Gives codes
    ``(n_cells,)`` and the labels they stand for; categories that no cell has are not among them. Raises ValueError if
    there are none, too few or too many, or some are missing.
    """
    if getattr(labels, "ndim", 1) != 1:
        msg = f"{name} has {labels.ndim} dimensions; give one value per cell, such as a single column of obs."
        raise ValueError(msg)
    codes, values = pd.factorize(pd.Series(labels))
    place: dict[str, int] = {}
    same = np.array([place.setdefault(text_of(value), len(place)) for value in values], dtype=np.int64)
    if len(place) < len(values):  # 1 and "1" are one label, called as it comes first
        codes, values = np.where(codes < 0, -1, same[codes]), values[np.unique(same, return_index=True)[1]]
    if len(codes) == 0 or n_cells not in (None, len(codes)):
        msg = f"{name} has {len(codes)} entries" + ("." if n_cells is None else f" for {n_cells} cells.")
        raise ValueError(f"{msg} Give one per cell, in the order of the cells.")
    missing = int((codes < 0).sum())
    if missing:
        msg = f"{name} is missing in {missing} of {len(codes)} cells. Leave these cells out first."
        raise ValueError(msg)
    return codes, values


def at_least_two(values: pd.Index, *, name: str = "labels") -> int:
    """How many different labels there are; one alone is an error, as every embedding tells it perfectly."""
    if len(values) < 2:
        msg = f"{name} has one value only, {values[0]!r}; the metric compares at least two."
        raise ValueError(msg)
    return len(values)


def enough_cells(n_cells: int, n_neighbors: int, *, fewest: int = 1, name: str = "embedding") -> None:
    """Refuse fewer cells than neighbours, and fewer neighbours than ``fewest``."""
    if not fewest <= n_neighbors <= n_cells:
        msg = (
            f"{name} has {n_cells} cells and n_neighbors={n_neighbors}, which must be between {fewest} and the number "
            "of cells. Pass another n_neighbors, and the same for all that you compare."
        )
        raise ValueError(msg)
