"""Names for the cells of one embedding after labelled cells of it, without training a network."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from cellprior.evaluate import _probes as probes
from cellprior.evaluate._inputs import as_embedding, record_of
from cellprior.evaluate._methods import Space
from cellprior.evaluate._neighbors import asked_within, choose, nearest, pools
from cellprior.evaluate._splits import RANDOM, Split, inner_folds, label_codes, stratified
from cellprior.model.learning._rejection import Calibration, check_reject, explain_unknown, find_limits

How = Literal["nearest neighbours", "nearest centroid", "ridge"]
N_NOVELTY = 5  # reference cells from which the distance of a cell is measured
N_FOLDS = 5  # of the reference, of which one is held out to find the limits
NEAR_CENTROIDS = 3  # to spread the certainty over


class Named(NamedTuple):
    """Cells of a query, by number of label."""

    codes: np.ndarray
    """Of the best guess ``(cells,)``."""
    certainty: np.ndarray
    """Share of the votes or of the weight that the name has, 0 to 1 ``(cells,)``."""
    novelty: np.ndarray
    """Mean distance to the nearest reference cells ``(cells,)``."""
    words: str
    """What was chosen within the reference."""


class Transferred(NamedTuple):
    """Cells of a query, by the names of a reference."""

    names: np.ndarray
    """Those that are rejected are called unknown ``(cells,)``."""
    best_guess: np.ndarray
    """The same without rejection ``(cells,)``."""
    certainty: np.ndarray
    """As of :class:`Named` ``(cells,)``."""
    record: dict[str, Any]
    """What was chosen within the reference, and how many cells are unknown for what."""


def transfer_names(
    reference: np.ndarray,
    names: Any,
    query: np.ndarray,
    *,
    how: How,
    reject: float | None = None,
    unknown: str = "unknown",
    guess: str = "there",
) -> Transferred:
    """Name cells after a reference, or call them unknown at a rate that is promised.

    Embeddings are ``(cells, dimensions)``; cells of the reference without a name, or that are ``unknown``, are not
    learned from. With ``reject``, a fifth of the reference is named by the rest, and no longer learned from, to find
    from where on a cell is unknown. ``guess`` says in a warning where the best guess is found. Raises ValueError if
    the embeddings do not fit each other, there are fewer than two labels, or ``reject`` cannot be promised.
    """
    given = pd.Series(names).astype(object)
    codes, labels = label_codes(given.where(given.astype(str) != unknown), 1)
    rows = np.flatnonzero(codes >= 0)
    codes, known = codes[rows], np.asarray(reference)[rows]
    learned, limits = np.ones(len(rows), dtype=bool), None
    if reject is not None:
        learned = stratified(codes, N_FOLDS, copies=np.arange(len(codes))) > 0
        check_reject(reject, int((~learned).sum()), "Label more cells of the reference")
        held_out = name_cells(known[learned], codes[learned], known[~learned], how=how, n_labels=len(labels))
        calibration = Calibration(held_out.novelty, held_out.certainty, held_out.codes == codes[~learned])
        limits = find_limits(*calibration, reject=reject)
    found = name_cells(known[learned], codes[learned], np.asarray(query), how=how, n_labels=len(labels))
    best = np.asarray(labels, dtype=object)[found.codes]
    record: dict[str, Any] = {"how": found.words, "reject": reject}
    if limits is None:
        return Transferred(best, best, found.certainty, record)
    explain_unknown(
        calibration,
        limits,
        found.novelty,
        found.certainty,
        reject=reject or 0.0,
        unknown=unknown,
        guess=guess,
    )
    far, uncertain = limits.unknown(found.novelty, found.certainty)
    record["unknown"] = {"too_far": int(far.sum()), "too_uncertain": int(uncertain.sum())}
    return Transferred(np.where(far | uncertain, unknown, best), best, found.certainty, record)


def refuse_other_weights(key: str, *studies: Any) -> None:
    """Refuse, with a ValueError, embeddings of one key of ``obsm`` that are noted as of different weights."""
    records = [record_of(study, key) for study in studies]
    by = {str(record["sha256"]): str(record.get("weights")) for record in records if "sha256" in record}
    if len(by) > 1:
        named = " and ".join(f"{weights} ({digest[:8]})" for digest, weights in by.items())
        msg = f"obsm[{key!r}] is by different weights in the two, {named}: embed both with the same."
        raise ValueError(msg)


def name_cells(
    reference: np.ndarray, codes: np.ndarray, query: np.ndarray, *, how: How, n_labels: int
) -> Named:
    """Name cells; the number of neighbours and their distance, or the penalty, is chosen within the reference.

    Embeddings are ``(cells, dimensions)``, ``codes`` the labels of the reference ``(cells,)``. Raises ValueError if
    the embeddings do not fit each other, or ``how`` is not known.
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
    chosen = choose(found, codes[None], asked, n_labels)[0]
    votes = codes[found[chosen.pool].test[:, : chosen.number]]
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
