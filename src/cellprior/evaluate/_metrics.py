"""How well an embedding tells labels apart: by its neighbours, its clusters, and its distances."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.neighbors import NearestNeighbors

from cellprior._docs import described
from cellprior._obs import text_of
from cellprior.evaluate._graph import Neighbors, exact_neighbors, umap_weights
from cellprior.evaluate._inputs import as_codes, as_embedding, at_least_two, enough_cells

NO_IGRAPH = "Leiden clusters need igraph: pip install 'cellprior[leiden]'"
RESOLUTIONS = tuple(round(0.1 * i, 1) for i in range(1, 21))  # scIB's grid


def knn_predict(train: Any, train_labels: Any, test: Any, *, n_neighbors: int = 15) -> np.ndarray:
    """Label cells by a vote of their nearest neighbours among labelled ones, exact and Euclidean.

    Every neighbour has one vote. Of labels with equally many votes, that of the nearest cell wins.

    Parameters
    ----------
    train
        Embedding of the labelled cells ``(n_train, dimensions)``.
    train_labels
        Theirs ``(n_train,)``.
    test
        Embedding of other cells ``(n_test, dimensions)``.
    n_neighbors
        How many vote.

    Returns
    -------
    Labels ``(n_test,)``.

    Raises
    ------
    ValueError
        If an embedding is not finite or the two differ in dimensions, labels are missing or all the same, or there are
        fewer labelled cells than neighbours.
    """
    train = as_embedding(train, name="train", origin=np.zeros(1))
    test = as_embedding(test, name="test", origin=np.zeros(1))
    if train.shape[1] != test.shape[1]:
        msg = (
            f"train has {train.shape[1]} dimensions and test {test.shape[1]}: embed both with the same model."
        )
        raise ValueError(msg)
    codes, values = as_codes(train_labels, len(train), name="train_labels")
    n_labels = at_least_two(values, name="train_labels")
    enough_cells(len(train), n_neighbors, name="train")
    search = NearestNeighbors(n_neighbors=n_neighbors, algorithm="brute").fit(train - train[0])
    neighbor = codes[
        search.kneighbors(test - train[0], return_distance=False)
    ]  # (n_test, n_neighbors), nearest first
    votes = np.zeros((len(test), n_labels), dtype=np.int64)
    np.add.at(votes, (np.arange(len(test))[:, None], neighbor), 1)
    wins = np.take_along_axis(votes, neighbor, axis=1) == votes.max(axis=1, keepdims=True)
    return np.asarray(values[neighbor[np.arange(len(test)), wins.argmax(axis=1)]])


@described
def accuracy(truth: Any, predicted: Any) -> float:
    """Share of cells whose label is predicted: 0 to 1, higher is better.

    Always predicting the most common label gives that label's share, however little was learned: look at
    :func:`macro_f1` beside it.

    <truth>
    """
    true, guess, _ = _codes_of_both(truth, predicted)
    return float((true == guess).mean())


@described
def balanced_accuracy(truth: Any, predicted: Any) -> float:
    r"""Mean over labels of the share of its cells that are predicted: 0 to 1, higher is better.

    :math:`\frac{1}{K} \sum_k \mathrm{TP}_k / n_k` over the K labels in ``truth``; chance is 1 / K. Some papers report
    it as "accuracy" (torchmetrics averages over labels by default); it is not comparable with :func:`accuracy`.

    <truth>
    """
    hit, there, _ = tally(*_codes_of_both(truth, predicted))
    return float((hit / there).mean())


@described
def macro_f1(truth: Any, predicted: Any) -> float:
    r"""Mean F1 of the labels: 0 to 1, higher is better.

    :math:`\frac{1}{K} \sum_k 2 \mathrm{TP}_k / (n_k + m_k)`, with :math:`n_k` cells of a label and :math:`m_k`
    predicted to be. The mean is over the labels in ``truth``: a label that no cell has is wrong wherever it is
    predicted, but is not averaged in as another 0, as it is by scikit-learn unless ``labels`` says otherwise.

    <truth>
    """
    return float(f1(*tally(*_codes_of_both(truth, predicted))).mean())


def tally(
    truth: np.ndarray, predicted: np.ndarray, n_labels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of each label ``(n_labels,)``: those predicted to be of it, all of it, and all predicted to be.

    Cells with the number -1 are not counted.
    """
    of = (truth[truth == predicted], truth, predicted)
    hit, there, said = (np.bincount(codes[codes >= 0], minlength=n_labels) for codes in of)
    return hit, there, said


def f1(hit: np.ndarray, there: np.ndarray, said: np.ndarray) -> np.ndarray:
    """``2 TP / (n + m)`` of each label, 0 for one that is nowhere; arguments as :func:`tally` gives them."""
    return np.asarray(2 * hit / np.maximum(there + said, 1))


def can_cluster() -> bool:
    """Whether igraph, which is not part of the package for its licence, is installed."""
    return find_spec("igraph") is not None


def clustering(
    embedding: Any,
    labels: Any,
    *,
    resolutions: Sequence[float] = RESOLUTIONS,
    n_neighbors: int = 15,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare Leiden clusters with labels, over a grid of resolutions.

    The graph is always made anew from the embedding: exact neighbours, the weights of UMAP [McInnes et al., 2018], as
    :func:`scanpy.pp.neighbors`; clusters are those of :func:`scanpy.tl.leiden` [Traag et al., 2019], two iterations of
    igraph. Neither sees the labels. Report the value at a resolution fixed beforehand, such as 1.0, or the mean over
    the grid. The best over the grid, which many papers report, was picked with the labels and cannot be had where
    there are none: that row is marked, to be shown as such or not at all.

    Parameters
    ----------
    embedding
        ``(cells, dimensions)``.
    labels
        ``(cells,)``.
    resolutions
        By default 0.1 to 2.0 in steps of 0.1, the grid of scIB [Luecken et al., 2022].
    n_neighbors
        Of the graph, the cell among them.
    seed
        Of Leiden.

    Returns
    -------
    One row per resolution, with ``resolution``, ``n_clusters``, ``ari`` (adjusted Rand index [Hubert and Arabie, 1985]:
    1 is best, 0 the expectation of random clusters, down to -0.5), ``nmi`` (mutual information over the mean of both
    entropies: 0 to 1, higher is better; not corrected for chance, it is above 0 for random clusters) and
    ``picked_by_labels``, true for the highest ``nmi``, of equals the first.

    Raises
    ------
    ImportError
        If igraph is not installed.
    ValueError
        If the embedding is not finite, labels are missing or all the same, there are fewer cells than neighbours, or no
        resolution or one that is not positive is given.
    """
    if not can_cluster():
        raise ImportError(NO_IGRAPH)
    embedding = as_embedding(embedding)
    codes, values = as_codes(labels, len(embedding))
    at_least_two(values)
    enough_cells(len(embedding), n_neighbors, fewest=2)
    if len(resolutions) == 0 or not all(resolution > 0 for resolution in resolutions):
        msg = f"resolutions={tuple(resolutions)}: Leiden needs at least one, and all above 0."
        raise ValueError(msg)
    return clustering_of(exact_neighbors(embedding, n_neighbors - 1), codes, resolutions, seed=seed)


def clustering_of(
    near: Neighbors, codes: np.ndarray, resolutions: Sequence[float], *, seed: int = 0
) -> pd.DataFrame:
    """What :func:`clustering` gives, from the nearest cells and the number of each cell's label ``(cells,)``."""
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(obs=pd.DataFrame(index=np.arange(len(codes)).astype(str)))
    options: dict[str, Any] = {"flavor": "igraph", "directed": False, "n_iterations": 2, "random_state": seed}
    graph = umap_weights(near)
    found = []
    for resolution in resolutions:
        sc.tl.leiden(cells, resolution, adjacency=graph, **options)
        clusters = cells.obs["leiden"].cat.codes.to_numpy()
        found.append(
            {
                "resolution": float(resolution),
                "n_clusters": len(np.unique(clusters)),
                "ari": float(adjusted_rand_score(codes, clusters)),
                "nmi": float(normalized_mutual_info_score(codes, clusters)),
            }
        )
    table = pd.DataFrame(found)
    return table.assign(picked_by_labels=table.index == table["nmi"].idxmax())


def silhouette(embedding: Any, labels: Any) -> float:
    r"""Silhouette width of the labels, scaled: 0 to 1, higher is better, 0.5 for labels without distances of their own.

    :math:`(\bar{s} + 1) / 2` with :math:`s_i = (b_i - a_i) / \max(a_i, b_i)`: :math:`a_i` is the mean Euclidean
    distance of cell i to the others of its label, :math:`b_i` to those of the nearest other label [Rousseeuw, 1987; as
    scaled by Luecken et al., 2022, "ASW"]. It rewards labels in round and distant heaps, wherever these lie, so an
    embedding that knows the labels and nothing else wins: :func:`scgraph` notices. Time is quadratic in cells.

    Parameters
    ----------
    embedding
        ``(cells, dimensions)``.
    labels
        ``(cells,)``. The only cell of a label counts as :math:`s_i = 0`.

    Raises
    ------
    ValueError
        If the embedding is not finite, or labels are missing, all the same or all different.
    """
    embedding = as_embedding(embedding)
    codes, values = as_codes(labels, len(embedding))
    if at_least_two(values) == len(codes):
        msg = f"labels are different for all {len(codes)} cells; a silhouette needs labels that cells share."
        raise ValueError(msg)
    return (float(silhouette_score(embedding, codes)) + 1) / 2


def _codes_of_both(truth: Any, predicted: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Codes of the true and the predicted labels, -1 for one that is true of no cell, and the number of the former."""
    true, values = as_codes(truth, name="truth")
    guess, guessed = as_codes(predicted, len(true), name="predicted")
    known = pd.Index([text_of(value) for value in values])
    return true, known.get_indexer([text_of(value) for value in guessed])[guess], len(values)
