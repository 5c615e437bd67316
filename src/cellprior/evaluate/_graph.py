"""Nearest cells of each cell, found once for all that reads them, and the weights that UMAP gives them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

HALVINGS = 64
TOLERANCE = 1e-5  # of the sum of the weights of a cell
LEAST_WIDTH = 1e-3  # of a kernel, times the mean distance


class Neighbors(NamedTuple):
    """The nearest other cells, nearest first."""

    distances: np.ndarray
    """``(cells, neighbours)``"""
    cells: np.ndarray
    """Their numbers ``(cells, neighbours)``."""

    def first(self, n: int) -> Neighbors:
        """As many of them."""
        return Neighbors(self.distances[:, :n], self.cells[:, :n])


def exact_neighbors(embedding: np.ndarray, n: int) -> Neighbors:
    """Nearest other cells by Euclidean distance; equally near ones in random order, the same each time.

    The embedding ``(cells, dimensions)`` is float64, near the origin, see
    :func:`~cellprior.evaluate._inputs.as_embedding`; the cell itself is not among its ``n`` neighbours.
    """
    # equally near cells come in the order of the rows, which is often that of the labels
    order = np.random.default_rng(0).permutation(len(embedding))
    search = NearestNeighbors(n_neighbors=n, algorithm="brute").fit(embedding[order])
    distances, cells = search.kneighbors()  # without the cell itself
    back = np.argsort(order)
    return Neighbors(distances[back], order[cells][back])


def umap_weights(near: Neighbors) -> sp.csr_matrix:
    """Weights of the graph of neighbours as UMAP has them ``(cells, cells)`` [McInnes et al., 2018].

    The nearest of the others has weight 1, and a farther one falls off exponentially, with a width such that the
    weights of a cell sum to the binary logarithm of their number and 1; both directions are joined as fuzzy sets are.
    """
    distances = near.distances.astype(np.float32).astype(np.float64)
    n_cells, n = distances.shape
    target = np.log2(n + 1)
    first = np.where(distances > 0, distances, np.inf).min(axis=1, keepdims=True)
    first = np.where(np.isfinite(first), first, 0.0)
    beyond = np.maximum(distances - first, 0)
    low, high, width = np.zeros((n_cells, 1)), np.full((n_cells, 1), np.inf), np.ones((n_cells, 1))
    for _ in range(HALVINGS):
        off = np.exp(-beyond / width).sum(axis=1, keepdims=True) - target
        high, low = np.where(off > 0, width, high), np.where(off > 0, low, width)
        new = np.where(np.isinf(high), 2 * width, (low + np.where(np.isinf(high), 0, high)) / 2)
        width = np.where(np.abs(off) < TOLERANCE, width, new)
    mean = distances.sum(axis=1, keepdims=True) / (n + 1)  # the cell itself is one of them
    width = np.maximum(width, LEAST_WIDTH * np.where(first > 0, mean, mean.mean()))
    weight = np.where(beyond > 0, np.exp(-beyond / np.where(width > 0, width, 1)), 1.0).astype(np.float32)
    starts = np.arange(0, weight.size + 1, n)
    one_way = sp.csr_matrix((weight.ravel(), near.cells.ravel(), starts), shape=(n_cells, n_cells))
    one_way.sort_indices()
    other_way = sp.csr_matrix(one_way.T)
    joined = sp.csr_matrix(one_way + other_way - one_way.multiply(other_way))
    joined.eliminate_zeros()
    joined.sort_indices()
    return joined
