"""Names by nearest neighbours, their number and the distance chosen within the training cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cellprior.evaluate._methods import Space
from cellprior.evaluate._metrics import f1, tally
from cellprior.evaluate._splits import Split, stratified

NUMBERS = (15, 10, 5, 3)  # of neighbours, to choose from
MOST_ASKED = 1000  # training cells by which it is chosen
CHUNK = 300  # cells whose distances to all training cells are in memory
GROUPS = 5  # of training cells, of which the smallest distance is taken first


class Pool(NamedTuple):
    """The nearest training cells in one space by one distance."""

    words: str
    inner: np.ndarray
    """Of the training cells that are asked, those in other inner folds, nearest first ``(asked, neighbours)``."""
    test: np.ndarray
    """Of the test cells ``(test cells, neighbours)``."""


class Chosen(NamedTuple):
    """Names of test cells, and how they were come by."""

    said: np.ndarray
    inner: float
    """Macro-F1 within the training cells."""
    words: str
    pool: int = -1
    """Which of the neighbours' pools it was, if names are by neighbours."""
    number: int = 0
    """Of neighbours."""


def asked_within(codes: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """The training cells by which is chosen, some of each label if there are many."""
    parts = -(-len(codes) // MOST_ASKED)
    return np.flatnonzero(stratified(codes, parts, copies=copies) == 0)


def pools(spaces: Sequence[Space], split: Split, folds: np.ndarray, asked: np.ndarray) -> list[Pool]:
    """Neighbours in every space of a method, of every size, by either distance.

    The training cells of the split are neighbours; those ``asked`` are asked without their inner fold, see
    :func:`asked_within`.
    """
    most = min(NUMBERS[0], len(folds) - int(np.bincount(folds).max()))
    found = []
    for space in spaces:
        for size in space.sizes:
            values = space.values[:, :size].astype(np.float32)
            mean = values[split.train].mean(axis=0, dtype=np.float64).astype(np.float32)
            train, test = values[split.train] - mean, values[split.test] - mean
            for distance in ("Euclidean", "cosine"):
                if distance == "cosine":
                    train, test = _on_sphere(train), _on_sphere(test)
                inner = np.empty((len(asked), most), dtype=np.int32)
                for fold in np.unique(folds[asked]):
                    own, others = folds[asked] == fold, np.flatnonzero(folds != fold)
                    inner[own] = others[nearest(train[asked[own]], train[others], most)]
                of = f"{size} components of {space.words}, " if space.words else ""
                found.append(Pool(f"{of}{distance}", inner, nearest(test, train, most)))
    return found


def choose(found: Sequence[Pool], codes: np.ndarray, asked: np.ndarray, n_labels: int) -> list[Chosen]:
    """Names of the test cells, by the space, the distance and the number that name training cells best.

    The labels of the training cells come in one or more ways ``(labellings, training cells)``; gives names for each.
    """
    plans = [(i, n) for i, pool in enumerate(found) for n in usable(pool.inner.shape[1])]
    scores = np.concatenate([_inner_scores(pool.inner, codes, asked, n_labels) for pool in found])
    best = scores.argmax(axis=0)  # of equals the first
    said = []
    for labels, plan, score in zip(codes, best, scores.max(axis=0), strict=True):
        i, n = plans[plan]
        names = vote(labels[found[i].test[:, :n]], n_labels)
        said.append(Chosen(names, float(score), f"{found[i].words}, {n} neighbours", i, n))
    return said


def _inner_scores(inner: np.ndarray, codes: np.ndarray, asked: np.ndarray, n_labels: int) -> np.ndarray:
    """Macro-F1 of the asked cells, by number of neighbours and labelling ``(numbers, labellings)``."""
    n_ways, n_asked = len(codes), len(asked)
    way = np.arange(n_ways)[:, None]
    cell = n_labels * np.arange(n_ways * n_asked).reshape(n_ways, n_asked, 1)
    truth = codes[:, asked]
    there = _counts(truth + n_labels * way, n_ways, n_labels)
    votes, taken, found = np.zeros(n_ways * n_asked * n_labels), 0, []
    for n in sorted(usable(inner.shape[1])):  # what fewer neighbours have said is kept
        new = codes[:, inner[:, taken:n]] + cell
        weight = np.broadcast_to(_weights(taken, n), new.shape)
        votes += np.bincount(new.ravel(), weight.ravel(), minlength=len(votes))
        taken = n
        said = votes.reshape(n_ways, n_asked, n_labels).argmax(axis=2)
        hit = _counts((truth + n_labels * way)[said == truth], n_ways, n_labels)
        of_labels = f1(hit, there, _counts(said + n_labels * way, n_ways, n_labels))
        found.append(of_labels.sum(axis=1) / (there > 0).sum(axis=1))
    return np.stack(found[::-1])


def _counts(places: np.ndarray, n_ways: int, n_labels: int) -> np.ndarray:
    return np.bincount(places.ravel(), minlength=n_ways * n_labels).reshape(n_ways, n_labels)


def _weights(first: int, last: int) -> np.ndarray:
    """Of the votes of some neighbours: what is added is below one vote in all, and most for the nearest."""
    return 1 + 0.5 ** (2.0 + np.arange(first, last))


def usable(most: int) -> Iterator[int]:
    """Numbers of neighbours that there are."""
    return (n for n in NUMBERS if n <= most) if most >= NUMBERS[-1] else iter((most,))


def vote(neighbor: np.ndarray, n_labels: int) -> np.ndarray:
    """Label that most neighbours ``(cells, n)``, nearest first, have; of equally many, that of the nearest cell."""
    n_cells, n = neighbor.shape
    place = neighbor + n_labels * np.arange(n_cells)[:, None]
    votes = np.bincount(place.ravel(), np.tile(_weights(0, n), n_cells), minlength=n_cells * n_labels)
    return np.asarray(votes.reshape(n_cells, n_labels).argmax(axis=1))


def macro_f1(truth: np.ndarray, said: np.ndarray, n_labels: int) -> float:
    """Mean F1 of the labels that are there."""
    hit, there, given = tally(truth, said, n_labels)
    return float(f1(hit, there, given)[there > 0].mean())


def nearest(
    query: np.ndarray, train: np.ndarray, n: int, *, apart: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Numbers of the nearest training cells, nearest first ``(cells, n)``; if ``apart``, none of its own fold.

    Of the training cells in `GROUPS` groups, the smallest distance of each place is taken first: what is among the n
    smallest is in one of the n places whose smallest is smallest.
    """
    # the squared length of a query changes no order, so one product gives what distances are compared by
    longer = np.concatenate([-2 * train.T, (train**2).sum(axis=1)[None]])
    query = np.concatenate([query, np.ones((len(query), 1), dtype=query.dtype)], axis=1)
    width = -(-len(train) // GROUPS)
    few = width <= 2 * n
    distances = np.full((CHUNK, len(train) if few else width * GROUPS), np.inf, dtype=longer.dtype)
    found = np.empty((len(query), n), dtype=np.int32)
    for start in range(0, len(query), CHUNK):
        rows = slice(start, start + CHUNK)
        distance = distances[: len(query) - start]
        np.matmul(query[rows], longer, out=distance[:, : len(train)])
        if apart is not None:
            distance[:, : len(train)][apart[0][rows, None] == apart[1]] = np.inf
        if few:
            order = _smallest(distance, n)
        else:
            place = _smallest(distance.reshape(len(distance), GROUPS, width).min(axis=1), n)
            inside = width * np.arange(GROUPS)[:, None] + place[:, None]
            inside = inside.reshape(len(distance), -1)
            order = _smallest(np.take_along_axis(distance, inside, axis=1), n)
            order = np.take_along_axis(inside, order, axis=1)
        of_these = np.take_along_axis(distance, order, axis=1).argsort(axis=1, kind="stable")
        found[rows] = np.take_along_axis(order, of_these, axis=1)
    return found


def _smallest(values: np.ndarray, n: int) -> np.ndarray:
    """Places of the smallest in each row, in any order ``(rows, n)``."""
    return np.argpartition(values, n - 1, axis=1)[:, :n]


def _on_sphere(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(length > 0, length, 1))
