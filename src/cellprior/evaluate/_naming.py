"""Names for the cells of one embedding after labelled cells of it, without training a network."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from cellprior.evaluate import _probes as probes
from cellprior.evaluate._inputs import as_embedding
from cellprior.evaluate._methods import Space
from cellprior.evaluate._neighbors import Chosen, asked_within, choose, nearest, pools
from cellprior.evaluate._splits import RANDOM, Split, inner_folds

How = Literal["nearest neighbours", "nearest centroid", "ridge"]
N_NOVELTY = 5  # reference cells from which the distance of a cell is measured
NEAR_CENTROIDS = 3  # to spread the certainty over


class Named(NamedTuple):
    """Cells of a query, by number of label."""

    codes: np.ndarray
    """``(cells,)``"""
    certainty: np.ndarray
    """Share of the votes or of the weight that the name has, 0 to 1 ``(cells,)``."""
    novelty: np.ndarray
    """Mean distance to the nearest reference cells ``(cells,)``."""
    words: str
    """What was chosen within the reference."""


def name_cells(
    reference: np.ndarray, codes: np.ndarray, query: np.ndarray, *, how: How, n_labels: int
) -> Named:
    """Name cells; the number of neighbours and their distance, or the penalty, is chosen within the reference.

    Parameters
    ----------
    reference, query
        Embeddings ``(cells, dimensions)``.
    codes
        Labels of the reference ``(cells,)``.
    how
        By what.
    n_labels
        How many there are.

    Raises
    ------
    ValueError
        If the embeddings do not fit each other, or ``how`` is not known.
    """
    if how not in get_args(How):
        msg = f"how={how!r} is not known; choose among {', '.join(map(repr, get_args(How)))}."
        raise ValueError(msg)
    reference = as_embedding(reference, name="the reference", origin=np.zeros(1))
    query = as_embedding(query, name="the query", origin=np.zeros(1))
    if reference.shape[1] != query.shape[1]:
        msg = (
            f"The reference has {reference.shape[1]} dimensions and the query {query.shape[1]}: embed both with the "
            "same weights."
        )
        raise ValueError(msg)
    values = np.concatenate([reference, query]).astype(np.float32)
    values -= values[: len(reference)].mean(axis=0)
    split = Split(RANDOM, 0, "", np.arange(len(reference)), np.arange(len(reference), len(values)))
    train, test = values[split.train], values[split.test]
    few = min(N_NOVELTY, len(train))
    near = train[nearest(test, train, few)]  # (cells, neighbours, dimensions)
    novelty = np.linalg.norm(near - test[:, None], axis=2).mean(axis=1)
    by = {"nearest neighbours": _by_neighbours, "nearest centroid": _by_centroids, "ridge": _by_ridge}[how]
    weight, words = by(Space("", values, values.shape[1:]), split, codes, n_labels)
    return Named(weight.argmax(axis=1), weight.max(axis=1), novelty, words)


def _folds(codes: np.ndarray) -> np.ndarray:
    return inner_folds(codes, copies=np.arange(len(codes)), batches=None, seed=0)


def _by_neighbours(space: Space, split: Split, codes: np.ndarray, n_labels: int) -> tuple[np.ndarray, str]:
    asked = asked_within(codes, np.arange(len(codes)))
    found = pools([space], split, _folds(codes), asked)
    chosen: Chosen = choose(found, codes[None], asked, n_labels)[0]
    distance, number = chosen.words.rsplit(", ", 1)
    pool = next(pool for pool in found if pool.words == distance)
    votes = codes[pool.test[:, : int(number.split()[0])]]
    share = (votes[:, :, None] == np.arange(n_labels)).mean(axis=1)
    share[np.arange(len(share)), chosen.said] += 1e-9  # of equal shares the nearest cell's
    return share, chosen.words


def _by_centroids(space: Space, split: Split, codes: np.ndarray, n_labels: int) -> tuple[np.ndarray, str]:
    train, test = space.values[split.train], space.values[split.test]
    there = np.unique(codes)
    centroids = np.stack([train[codes == label].mean(axis=0) for label in there])
    squared = ((test[:, None] - centroids) ** 2).sum(axis=2)
    nearness = 1 / np.maximum(squared, 1e-12) ** NEAR_CENTROIDS
    weight = np.zeros((len(test), n_labels))
    weight[:, there] = nearness / nearness.sum(axis=1, keepdims=True)
    return weight, "nearest centroid"


def _by_ridge(space: Space, split: Split, codes: np.ndarray, n_labels: int) -> tuple[np.ndarray, str]:
    ridge = probes.Ridge(space.values[split.train], space.values[split.test])
    penalty, _ = probes.best_penalty(ridge, codes, _folds(codes), n_labels)
    weight = np.clip(ridge.scores(codes[None], n_labels, penalty)[0], 1e-9, None)
    return weight / weight.sum(axis=1, keepdims=True), f"ridge, penalty {penalty:g}"
