"""Who belongs to whom: neighbours across modalities, and pairs of cells."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cellprior._arguments import count

ROWS = 2048  # cells whose similarities to all others are in memory at a time
N_ITERATIONS = 100
REGULARISATION = 0.01  # of the transport, in units of the cosine distance; as MatchCLOT's

Method = Literal["transport", "greedy"]


def nearest(queries: np.ndarray, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Most similar references of each query, the best first, and their cosines ``(queries, k)``.

    Parameters
    ----------
    queries, references
        Unit vectors ``(cells, n_latent)``.
    k
        How many, 1 at least; fewer if there are not as many references.

    Raises
    ------
    ValueError
        If ``k`` is no whole number from 1 on.
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

    Raises
    ------
    ValueError
        If ``method`` is not known.
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
