"""Who belongs to whom: neighbours across modalities, pairs of cells, and what a shared space is good for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from cellprior._arguments import count
from cellprior._obs import read_names, warn_of_unlabeled
from cellprior.model.data._cells import Cells
from cellprior.model.data._counts import csr_tensor
from cellprior.model.data._modalities import features_of
from cellprior.model.learning._holdout import recalled
from cellprior.model.learning._rejection import Calibration, check_reject, explain_unknown, find_limits
from cellprior.model.multiomeclip._inputs import log_share, open_peaks
from cellprior.model.multiomeclip._module import MODALITIES, Modality

ROWS = 2048  # cells whose similarities to all others are in memory at a time
N_ITERATIONS = 100
REGULARISATION = 0.01  # of the transport, in units of the cosine distance; as MatchCLOT's

Method = Literal["transport", "greedy"]


@dataclass(frozen=True, eq=False)
class Voters:
    """Cells that name others.

    Attributes
    ----------
    latent
        Unit vectors ``(cells, n_latent)``.
    labels
        Their names ``(cells,)``.
    n_neighbors
        How many of them vote on a cell.
    """

    latent: np.ndarray
    labels: np.ndarray
    n_neighbors: int

    def name(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Name of each cell, its share of the votes, and how far the voters are: 1 - mean cosine ``(cells,)``."""
        names, code = np.unique(self.labels, return_inverse=True)
        index, cosine = nearest(points, self.latent, self.n_neighbors)
        votes = np.zeros((len(points), len(names)))
        np.add.at(votes, (np.arange(len(points))[:, None], code[index]), 1.0 / max(index.shape[1], 1))
        return names[votes.argmax(axis=1)].astype(object), votes.max(axis=1), 1.0 - cosine.mean(axis=1)


def _without_ties(share: np.ndarray, novelty: np.ndarray) -> np.ndarray:
    """Share of the votes; where it is the same, nearer voters count more."""
    return share - 1e-6 * novelty


def nearest(queries: np.ndarray, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Most similar references of each query, the best first, and their cosines ``(queries, k)``.

    Raises ValueError if ``k`` is no whole number from 1 on.

    Parameters
    ----------
    queries, references
        Unit vectors ``(cells, n_latent)``.
    k
        How many, 1 at least; fewer if there are not as many references.
    """
    count(n_neighbors=k)
    k = min(k, len(references))
    everything = torch.from_numpy(references)
    found = [(part @ everything.T).topk(k, dim=1) for part in torch.from_numpy(queries).split(ROWS)]
    if not found:
        return np.empty((0, k), dtype=np.int64), np.empty((0, k), dtype=np.float32)
    return torch.cat([f.indices for f in found]).numpy(), torch.cat([f.values for f in found]).numpy()


def transport(similarity: Tensor) -> Tensor:
    """Probability of each partner, by entropic optimal transport between uniform masses [Cuturi, 2013].

    Of the cosine distance, by Sinkhorn's iterations on logarithms; a row adds up to 1. What many cells are similar to
    (a hub) is shared among them, which the nearest neighbour does not do.

    Parameters
    ----------
    similarity
        Cosines ``(cells of one modality, cells of the other)``.
    """
    kernel = similarity.float() / REGULARISATION
    row = torch.zeros(len(kernel), 1, device=kernel.device)
    column = torch.zeros(1, kernel.shape[1], device=kernel.device)
    log_ratio = float(np.log(len(kernel) / kernel.shape[1]))  # mass of a column, that of a row being 1
    for _ in range(N_ITERATIONS):
        row = -torch.logsumexp(kernel + column, dim=1, keepdim=True)
        column = log_ratio - torch.logsumexp(kernel + row, dim=0, keepdim=True)
    return torch.softmax(kernel + column, dim=1)


def greedy(similarity: np.ndarray) -> np.ndarray:
    """Partner of each row, the most similar pair first, each column once; -1 where no column is left.

    Parameters
    ----------
    similarity
        Cosines ``(cells of one modality, cells of the other)``.
    """
    n_rows, n_columns = similarity.shape
    partner = np.full(n_rows, -1, dtype=np.int64)
    row_free, column_free = np.ones(n_rows, dtype=bool), np.ones(n_columns, dtype=bool)
    for flat in np.argsort(-similarity, axis=None, kind="stable"):
        row, column = divmod(int(flat), n_columns)
        if row_free[row] and column_free[column]:
            partner[row] = column
            row_free[row] = column_free[column] = False
    return partner


def pairs(similarity: np.ndarray, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Partner of each row, -1 for none, and its score: the probability of the transport, or the cosine.

    Raises ValueError if ``method`` is not known.
    """
    if method not in ("transport", "greedy"):
        msg = f'method={method!r} is not known; choose "transport" or "greedy".'
        raise ValueError(msg)
    if method == "transport":
        probability = transport(torch.from_numpy(similarity)).numpy()
        partner = probability.argmax(axis=1)
        return partner, probability[np.arange(len(partner)), partner]
    partner = greedy(similarity)
    score = np.where(partner >= 0, similarity[np.arange(len(partner)), np.maximum(partner, 0)], 0.0)
    return partner, score


def match(model: Any, atac: Any, rna: Any, method: Method) -> pd.DataFrame:
    """See :meth:`cellprior.model.MultiomeCLIP.match`."""
    first, a, a_rows = latents(model, atac, "atac")
    second, b, b_rows = latents(model, atac if rna is None else rna, "rna")
    partner = np.full(len(a), None, dtype=object)
    score = np.zeros(len(a))
    key = model.registry["setup_args"]["batch_key"]
    for i, j in _batches(first.obs.iloc[a_rows], second.obs.iloc[b_rows], key):
        if len(j):
            found, score[i] = pairs(a[i] @ b[j].T, method)
            names = second.obs.index.to_numpy()[b_rows[j]]
            partner[i] = np.where(found >= 0, names[found], None)
    return pd.DataFrame({"partner": partner, "score": score}, index=first.obs.index[a_rows])


def transfer_labels(
    model: Any,
    reference: Any,
    query: Any,
    *,
    labels_key: str | None,
    source: Modality,
    target: Modality,
    n_neighbors: int,
    reject: float | None,
) -> pd.DataFrame:
    """See :meth:`cellprior.model.MultiomeCLIP.transfer_labels`."""
    count(n_neighbors=n_neighbors)  # before anything is embedded
    args = model.registry["setup_args"]
    key, unknown = labels_key or args["labels_key"], str(args["unlabeled_category"])
    if key is None:
        msg = "labels_key is needed, here or in the setup: the column of the reference's obs with the labels."
        raise ValueError(msg)
    cells, latent, rows = latents(model, reference, source)
    if key not in cells.obs and isinstance(reference, ad.AnnData):
        msg = (
            f"The reference is an AnnData, and its obs has no column {key!r}; its columns are "
            f"{list(cells.obs.columns)}. Pass the whole MuData, whose obs has the labels: source={source!r} says which "
            f"modality is read. Or copy them first: reference.obs[{key!r}] = mdata.obs[{key!r}]."
        )
        raise KeyError(msg)
    labels = read_names(cells.obs, key, frame="mdata.obs")
    warn_of_unlabeled(pd.unique(labels), unknown, where=f"mdata.obs[{key!r}]")
    is_labelled = labels != unknown
    held_out = np.empty(0, dtype=np.int64)
    if reject is not None:
        held_out = _held_out(model, reference, cells, is_labelled)
        advice = "These are held-out cells of the reference with a label and both modalities; give more"
        check_reject(reject, len(held_out), advice)
    votes = is_labelled[rows] & ~np.isin(rows, held_out)
    if not votes.any():
        msg = f"No cell of the reference with {source.upper()} has a label in {key!r}."
        raise ValueError(msg)
    voters = Voters(latent[votes], labels[rows[votes]], n_neighbors)
    asked, points, asked_rows = latents(model, query, target)
    label, share, novelty = voters.name(points)
    named = {"label": label, "score": share}
    if reject is not None:
        own, certain, far = voters.name(model._vectors(cells, target, held_out))
        calibration = Calibration(far, _without_ties(certain, far), own == labels[held_out])
        limits = find_limits(*calibration, reject=reject)
        certainty = _without_ties(share, novelty)
        guess = 'in the column "best_guess"'
        explain_unknown(calibration, limits, novelty, certainty, reject=reject, unknown=unknown, guess=guess)
        named["label"] = np.where(np.logical_or(*limits.unknown(novelty, certainty)), unknown, label)
        named["best_guess"] = label
    return pd.DataFrame(named, index=asked.obs.index[asked_rows])


def _held_out(model: Any, reference: Any, cells: Cells, is_labelled: np.ndarray) -> np.ndarray:
    """Numbers of the cells of a reference to calibrate on, of those with a label and both modalities."""
    rows = np.flatnonzero(cells.complete & is_labelled)
    if (kept := recalled(model.split_.get("train", {}), cells.obs.index)) is not None:
        return np.intersect1d(rows, kept["validation"])
    is_attached = reference is None or reference is model.adata
    if is_attached and not model.split_ and model.validation_indices is not None:  # saved by an older version
        return np.intersect1d(rows, model.validation_indices)
    return np.sort(np.random.default_rng(0).permutation(rows)[: len(rows) // 5])


def predict_modality(
    model: Any, query: Any, reference: Any, *, target: Modality, n_neighbors: int
) -> ad.AnnData:
    """See :meth:`cellprior.model.MultiomeCLIP.predict_modality`."""
    count(n_neighbors=n_neighbors)
    if target not in MODALITIES:
        msg = f'target={target!r} is not known; choose "rna" or "atac".'
        raise ValueError(msg)
    cells, latent, rows = latents(model, reference, target)
    asked, points, asked_rows = latents(model, query, "atac" if target == "rna" else "rna")
    index, _ = nearest(points, latent, n_neighbors)
    used, position = np.unique(index, return_inverse=True)
    k = max(index.shape[1], 1)
    weight = sp.csr_matrix(
        (np.full(index.size, 1 / k, np.float32), position.ravel(), np.arange(len(points) + 1) * k),
        shape=(len(points), len(used)),
    )
    features, names = features_of(cells, target)
    counts = sp.csr_matrix(cells.counts[target].read_all(rows[used])[:, features])
    tensor = csr_tensor(counts)
    values = log_share(tensor) if target == "rna" else open_peaks(tensor)
    scaled = sp.csr_matrix((values.values().numpy(), counts.indices, counts.indptr), shape=counts.shape)
    obs = pd.DataFrame(index=asked.obs.index[asked_rows])
    return ad.AnnData(weight @ scaled, obs=obs, var=pd.DataFrame(index=names))


def latents(model: Any, adata: Any, modality: str) -> tuple[Cells, np.ndarray, np.ndarray]:
    """Cells of some data, unit vectors of those with a modality, and their row numbers.

    Raises ValueError if none has it.
    """
    model._check_if_trained(warn=False)
    cells = model._cells(adata)
    if modality not in MODALITIES:
        msg = f'{modality!r} is no modality; choose "rna" or "atac".'
        raise ValueError(msg)
    rows = np.flatnonzero(cells.has(modality))
    if not len(rows):
        msg = f"No cell of the data has {modality.upper()}; they have {' and '.join(cells.counts)}."
        raise ValueError(msg)
    return cells, model._vectors(cells, modality, rows), rows


def _batches(
    first: pd.DataFrame, second: pd.DataFrame, key: str | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numbers of the cells of both that may belong to each other."""
    if key is None or key not in first or key not in second:
        return [(np.arange(len(first)), np.arange(len(second)))]
    a, b = (read_names(obs, key, frame="obs") for obs in (first, second))
    if alone := sorted(set(a) - set(b)):
        msg = (
            f"{int(np.isin(a, alone).sum())} of {len(a)} cells with ATAC have no partner: no cell with RNA is of "
            f"their batch, obs[{key!r}] {', '.join(map(repr, alone[:5]))}; with RNA there are "
            f"{', '.join(map(repr, sorted(set(b))[:5]))}. If these are the same, call them by the same names."
        )
        if len(alone) == len(set(a)):
            raise ValueError(msg)
        warnings.warn(msg, UserWarning, stacklevel=3)
    return [(np.flatnonzero(a == name), np.flatnonzero(b == name)) for name in np.unique(a.astype(str))]
