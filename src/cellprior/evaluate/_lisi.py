"""How mixed labels or batches are around a cell: the local inverse Simpson index."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellprior._docs import described
from cellprior.evaluate._graph import Neighbors, exact_neighbors
from cellprior.evaluate._inputs import as_codes, as_embedding, at_least_two, enough_cells

HALVINGS = 45  # of an interval of 60 in log2 of the kernel's width


@described
def clisi(embedding: Any, labels: Any, *, n_neighbors: int = 90, perplexity: float = 30.0) -> float:
    r"""Purity of labels around a cell, cLISI: 0 to 1, higher is better.

    :math:`(K - \mathrm{median}_i L_i) / (K - 1)` over K labels [Luecken et al., 2022]. The index :math:`L_i =
    1 / \sum_k (\sum_{j: y_j = k} p_{ij})^2` is how many labels there effectively are around cell i [Korsunsky et al.,
    2019], with :math:`p_{ij} \propto \exp(-\beta_i d_{ij})` over its nearest other cells at the Euclidean distances
    :math:`d_{ij}`, and :math:`\beta_i` such that the perplexity of the :math:`p_{ij}` is as given. As in scib-metrics,
    the cell itself is one of the ``n_neighbors`` but has no weight. Most embeddings are near 1.

    Parameters
    ----------
    embedding
        ``(cells, dimensions)``.
    labels
        ``(cells,)``.
    <near>
    """
    return purity(*_checked(embedding, labels, n_neighbors, perplexity, name="labels"), perplexity)


@described
def ilisi(embedding: Any, batches: Any, *, n_neighbors: int = 90, perplexity: float = 30.0) -> float:
    r"""Mixing of batches around a cell, iLISI: 0 to 1, higher is better mixed.

    :math:`(\mathrm{median}_i L_i - 1) / (B - 1)` over B batches [Luecken et al., 2022], with the index of
    :func:`clisi`. 1 is reached only if all batches are equally large. It does not know labels: noise mixes batches
    best of all, and batches of different composition should not mix. Read it beside a score of the labels only.

    Parameters
    ----------
    embedding
        ``(cells, dimensions)``.
    batches
        ``(cells,)``.
    <near>
    """
    return mixing(*_checked(embedding, batches, n_neighbors, perplexity, name="batches"), perplexity)


def purity(near: Neighbors, codes: np.ndarray, perplexity: float) -> float:
    """:func:`clisi`, from the nearest cells and the number of each cell's label ``(cells,)``."""
    n_labels = int(codes.max()) + 1
    return float((n_labels - np.median(_lisi(near, codes, perplexity))) / (n_labels - 1))


def mixing(near: Neighbors, codes: np.ndarray, perplexity: float) -> float:
    """:func:`ilisi`, from the nearest cells and the number of each cell's batch ``(cells,)``."""
    return float((np.median(_lisi(near, codes, perplexity)) - 1) / int(codes.max()))


def _checked(
    embedding: Any, labels: Any, n_neighbors: int, perplexity: float, *, name: str
) -> tuple[Neighbors, np.ndarray]:
    """The nearest cells, and the number of each cell's label."""
    embedding = as_embedding(embedding)
    codes, values = as_codes(labels, len(embedding), name=name)
    at_least_two(values, name=name)
    enough_cells(len(embedding), n_neighbors, fewest=2)
    if not 1 <= perplexity <= n_neighbors - 1:
        msg = (
            f"perplexity={perplexity:g} with n_neighbors={n_neighbors}: it counts effective neighbours and must be "
            "between 1 and n_neighbors - 1; a third of the neighbours is usual."
        )
        raise ValueError(msg)
    return exact_neighbors(embedding, n_neighbors - 1), codes


def _lisi(near: Neighbors, codes: np.ndarray, perplexity: float) -> np.ndarray:
    """Index of each cell ``(cells,)``."""
    weights = neighbor_weights(near.distances, perplexity)
    n_labels = int(codes.max()) + 1
    place = codes[near.cells] + n_labels * np.arange(len(codes))[:, None]
    shares = np.bincount(place.ravel(), weights.ravel(), minlength=n_labels * len(codes))
    return np.asarray(1 / (shares.reshape(len(codes), n_labels) ** 2).sum(axis=1))


def neighbor_weights(distances: np.ndarray, perplexity: float) -> np.ndarray:
    """Weights ``exp(-beta d)`` of neighbours, that sum to 1 and have the given perplexity, by row.

    Where more cells than ``perplexity`` are equally near and nearest, they share the weight. Distances
    ``(cells, neighbours)`` are in any unit; perplexity is the exponential of the entropy.
    """
    # Neither a shift nor the unit changes the weights.
    distances = distances - distances.min(axis=1, keepdims=True)
    mean = distances.mean(axis=1, keepdims=True)
    distances = distances / np.where(mean > 0, mean, 1.0)
    low, high = np.full((len(distances), 1), -30.0), np.full((len(distances), 1), 30.0)  # log2 of beta
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        scaled = np.exp2(middle) * distances
        weights = np.exp(-scaled)
        total = weights.sum(axis=1, keepdims=True)
        entropy = np.log(total) + (scaled * weights).sum(axis=1, keepdims=True) / total
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    return np.asarray(weights / total)
