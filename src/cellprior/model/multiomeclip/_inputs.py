"""What goes into MultiomeCLIP: weighted counts, and the components that summarise them."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from cellprior.genes._intervals import read_peaks
from cellprior.model.engine._kernels import cell_depth, for_each

TARGET_SUM = 10_000.0
DEPTH_CORRELATION = 0.5  # of a component with the logarithm of the depth, from which on it is the depth


def log_share(counts: Tensor, *, weight: Tensor | None = None, depth: Tensor | None = None) -> Tensor:
    """``ln(1 + 10,000 w x / Σx)``, a cell at a time; a cell without counts stays 0.

    Without ``weight``, scanpy's log-normalisation; with the inverse document frequency, TF-IDF as in Stuart et al.,
    Nature Methods 2021 (Signac).

    Parameters
    ----------
    counts
        ``(cells, features)``, dense or sparse CSR; what is given back is as it.
    weight
        Of the features ``(features,)``.
    depth
        Sum of each cell's counts, if it is known ``(cells,)``.
    """
    least = (cell_depth(counts) if depth is None else depth).clamp(min=1.0)
    if counts.layout != torch.sparse_csr:
        shares = counts / least[:, None] * TARGET_SUM
        return torch.log1p(shares if weight is None else shares * weight)
    shares = (counts.values() / for_each(counts, least)).mul_(TARGET_SUM)
    if weight is not None:
        shares.mul_(weight[counts.col_indices()])
    return with_values(counts, shares.log1p_())


def thinned(counts: sp.csr_matrix, least: float, rng: np.random.Generator) -> sp.csr_matrix:
    """Each cell with a share of its counts, drawn between ``least`` and 1: what it would be, sequenced less deeply.

    Parameters
    ----------
    counts
        Whole numbers ``(cells, features)``.
    least
        Share that is kept, at least.
    rng
        Draws the shares and the counts.
    """
    share = np.repeat(rng.uniform(least, 1.0, counts.shape[0]), np.diff(counts.indptr))
    kept = rng.binomial(counts.data.astype(np.int64), share).astype(counts.dtype)
    found = sp.csr_matrix((kept, counts.indices, counts.indptr), shape=counts.shape, copy=True)
    found.eliminate_zeros()
    return found


def open_peaks(counts: Tensor) -> Tensor:
    """1 where there are counts; dense or sparse CSR as given."""
    if counts.layout != torch.sparse_csr:
        return (counts > 0).to(counts.dtype)
    return with_values(counts, (counts.values() > 0).to(counts.dtype))


def with_values(like: Tensor, values: Tensor) -> Tensor:
    """A CSR tensor with other values in the same places."""
    places = like.crow_indices(), like.col_indices()
    return torch.sparse_csr_tensor(*places, values, size=like.shape, check_invariants=False)


def inverse_document_frequency(open_cells: np.ndarray, n_cells: int) -> np.ndarray:
    """``ln(1 + n / n_open)`` of each feature; 0 for one that is open nowhere.

    Parameters
    ----------
    open_cells
        Number of cells in which each feature is open ``(features,)``.
    n_cells
        Number of cells.
    """
    return np.where(open_cells > 0, np.log1p(n_cells / np.maximum(open_cells, 1)), 0.0)


def components_of(
    values: sp.csr_matrix, depth: np.ndarray, n_components: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Truncated SVD of weighted counts, without the first component if that is the depth.

    Parameters
    ----------
    values
        ``(cells, features)``.
    depth
        Total counts ``(cells,)``.
    n_components
        Wanted; where cells or features do not give as many, the others are 0.
    seed
        Of the randomised SVD.

    Returns
    -------
    Components ``(features, n_components)``; mean of the cells on them ``(n_components,)``; and their root mean square
    distance from it, of a component. The components keep their proportions: standardised each by itself, the last,
    which are noise, would count as much as the first.
    """
    n_found = min(n_components + 1, *values.shape)
    u, s, vt = randomized_svd(values, n_found, n_iter=5, random_state=seed)
    first = u[:, 0]
    if first.std() > 0 and depth.std() > 0:
        correlation = np.corrcoef(first, np.log1p(depth))[0, 1]
        if abs(correlation) > DEPTH_CORRELATION:
            u, s, vt = u[:, 1:], s[1:], vt[1:]
    kept = (s > 1e-6 * s.max(initial=0.0))[:n_components]
    components = np.zeros((values.shape[1], n_components), dtype=np.float32)
    components[:, : len(kept)] = vt[:n_components].T * kept
    scores = u[:, :n_components] * s[:n_components] * kept
    mean = np.zeros(n_components, dtype=np.float32)
    mean[: len(kept)] = scores.mean(axis=0)
    spread = float(np.sqrt(scores.var(axis=0).sum() / max(kept.sum(), 1)))
    return components, mean, spread or 1.0


def genomic_order(names: list[str]) -> np.ndarray:
    """Peaks sorted by chromosome and position, those that are no intervals last ``(n_peaks,)``."""
    peaks = read_peaks(names)
    number = np.array([int(c) if c.isdigit() else 1000 if c else 2000 for c in peaks.chromosome])
    return np.lexsort((peaks.start, peaks.chromosome.astype(str), number))
