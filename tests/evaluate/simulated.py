"""Cells of known types and batches, and embeddings that know more or less of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

N_TYPES = 8


class Cells(NamedTuple):
    """Log-normalised counts of eight types, in pairs of pairs, and three batches."""

    log_expression: sp.csr_matrix
    types: np.ndarray
    batches: np.ndarray
    pca: np.ndarray


def cells(seed: int = 0) -> Cells:
    """450 cells and 300 genes; which types are near each other is known to expression only."""
    rng = np.random.default_rng(seed)
    code, batch = rng.integers(N_TYPES, size=450), np.repeat(np.arange(3), 150)
    log_mean = rng.normal(size=300)
    profile = sum(
        size * rng.normal(size=(2**level, 300))[np.arange(N_TYPES) >> (3 - level)]
        for level, size in [(1, 1.0), (2, 0.6), (3, 0.4)]
    )
    log_mean = log_mean + profile[code] + 0.1 * rng.normal(size=(3, 300))[batch]
    counts = rng.poisson(np.exp(log_mean))
    log_expression = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    names = np.array([f"type {k}" for k in range(N_TYPES)])
    return Cells(
        sp.csr_matrix(log_expression),
        names[code],
        np.array(["x", "y", "z"])[batch],
        PCA(10, svd_solver="full").fit_transform(log_expression.astype(np.float64)),
    )


def corners(labels: np.ndarray, *, distance: float = 100.0, seed: int = 0) -> np.ndarray:
    """An embedding that knows the labels and nothing else: each in a corner far from all others, at random."""
    rng = np.random.default_rng(seed)
    values, code = np.unique(labels, return_inverse=True)
    return distance * rng.normal(size=(len(values), 10))[code] + rng.normal(size=(len(labels), 10))


def noise(n_cells: int, *, seed: int = 0) -> np.ndarray:
    """An embedding that knows nothing."""
    return np.random.default_rng(seed).normal(size=(n_cells, 10))
