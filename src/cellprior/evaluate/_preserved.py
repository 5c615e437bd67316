"""What an embedding keeps of the neighbourhoods of expression, and what its variance is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellprior.evaluate._inputs import as_codes, as_embedding
from cellprior.evaluate._neighbors import nearest

N_NEIGHBORS = 15
MOST_CELLS = 1000  # of a batch; of more, some are drawn
THETA = 100.0  # overdispersion of counts, as in the residuals' paper
N_COMPONENTS = 50


def neighbors_kept(
    embedding: Any, residuals: Any, groups: Sequence[np.ndarray], *, n_neighbors: int = N_NEIGHBORS
) -> float:
    r"""How many neighbours of a cell are its neighbours in expression, too: 1 for all, 0 for chance.

    :math:`R_{NX} = \frac{(N - 1) Q_{NX} - K}{N - 1 - K}`, where :math:`Q_{NX}` is the share of a cell's K nearest
    neighbours in the embedding that are among its K nearest in expression, among the N cells of a group [Lee et al.,
    Neurocomputing 112:92, 2013]. Within a batch, as neighbours across batches differ for technical reasons; within a
    type, it shows an embedding that knows the types and nothing else.

    ``residuals`` are components of Pearson residuals ``(cells, components)``, see :func:`residual_components`,
    ``groups`` the rows that are compared with each other, such as the cells of each batch. The mean is over the cells
    of all groups that have three times as many cells as neighbours; NaN if none has.
    """
    embedding = as_embedding(embedding).astype(np.float32)
    residuals = as_embedding(residuals, name="residuals").astype(np.float32)
    found, n_cells = 0.0, 0
    for rows in groups:
        if len(rows) < 3 * n_neighbors:
            continue
        own = np.arange(len(rows))
        both = [nearest(x[rows] - x[rows].mean(axis=0), x[rows] - x[rows].mean(axis=0), n_neighbors, apart=(own, own))
                for x in (embedding, residuals)]  # fmt: skip
        shared = (both[0][:, :, None] == both[1][:, None]).any(axis=2).mean()
        n = len(rows)
        found += n * ((n - 1) * shared - n_neighbors) / (n - 1 - n_neighbors)
        n_cells += n
    return float(found / n_cells) if n_cells else float("nan")


def residual_components(counts: sp.csr_matrix, rows: np.ndarray, *, n_genes: int = 1000) -> np.ndarray:
    """Components of Pearson residuals of the genes whose residuals vary most, of some cells ``(rows, components)``.

    Residuals of a negative binomial with the same overdispersion in all genes, clipped at the root of the number of
    cells [Lause, Berens and Kobak, Genome Biol. 22:258, 2021].
    """
    x = counts[rows]
    x = x[:, np.flatnonzero(np.asarray(x.sum(axis=0)).ravel() > 0)].toarray().astype(np.float32)
    mean = x.sum(axis=1, keepdims=True) * (x.sum(axis=0) / max(x.sum(), 1))
    limit = np.sqrt(len(rows))
    residuals = np.clip((x - mean) / np.sqrt(mean + mean**2 / THETA + 1e-12), -limit, limit)
    varied = np.argsort(-residuals.var(axis=0), kind="stable")[:n_genes]
    kept = residuals[:, varied] - residuals[:, varied].mean(axis=0)
    left, values, _ = np.linalg.svd(kept, full_matrices=False)
    return np.asarray((left * values)[:, :N_COMPONENTS])


def partial_eta_squared(embedding: Any, labels: Any, batches: Any) -> dict[str, float]:
    r"""Shares of the variance of an embedding that types and batches explain, each beyond the other: 0 to 1.

    :math:`\eta^2_p = SS_\mathrm{effect} / (SS_\mathrm{effect} + SS_\mathrm{error})` of an additive model of both,
    sums of squares over all dimensions, the effect's those that it adds to the other (type II).
    """
    x = as_embedding(embedding)
    x = x - x.mean(axis=0)
    of = {
        name: np.eye(len(values))[codes]
        for name, (codes, values) in {
            "type": as_codes(labels, len(x)),
            "batch": as_codes(batches, len(x), name="batches"),
        }.items()
    }
    error = _left(x, np.hstack(list(of.values())))
    without = {"type": _left(x, of["batch"]), "batch": _left(x, of["type"])}
    return {name: float(1 - error / other) if other > 0 else float("nan") for name, other in without.items()}


def preserved(
    latents: Mapping[str, np.ndarray], counts: sp.csr_matrix, codes: np.ndarray, batches: np.ndarray | None
) -> dict[str, dict[str, float]]:
    """Of each embedding, neighbours kept within batches and within types of a batch, and shares of variance.

    Latents ``(cells, dimensions)`` by name, raw counts ``(cells, genes)``; cells of type -1 are left out.
    """
    batch = np.zeros(len(codes), dtype=int) if batches is None else pd.factorize(batches)[0]
    residuals = np.zeros((len(codes), N_COMPONENTS), dtype=np.float32)
    groups, of_types = [], []
    for each in np.unique(batch):
        rows = np.flatnonzero((batch == each) & (codes >= 0))
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:MOST_CELLS])
        if len(rows) >= 3 * N_NEIGHBORS:
            found = residual_components(counts, rows)
            residuals[rows, : found.shape[1]] = found
            groups.append(rows)
            of_types += [rows[codes[rows] == code] for code in np.unique(codes[rows])]
    asked = np.flatnonzero(codes >= 0)
    table = {}
    for name, latent in latents.items():
        table[name] = {
            "neighbours_kept": neighbors_kept(latent, residuals, groups),
            "neighbours_kept_within_types": neighbors_kept(latent, residuals, of_types),
        }
        if batches is not None:
            shares = partial_eta_squared(latent[asked], codes[asked], batch[asked])
            table[name] |= {f"variance_of_{effect}": share for effect, share in shares.items()}
    return table


def _left(x: np.ndarray, design: np.ndarray) -> float:
    """Sum of squares that a linear model leaves."""
    fitted = design @ np.linalg.lstsq(design, x, rcond=None)[0]
    return float(((x - fitted) ** 2).sum())
