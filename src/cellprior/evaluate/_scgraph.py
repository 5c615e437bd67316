"""scGraph: are the labels of an embedding as far from each other as they are in expression?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from scipy.stats import trim_mean

from cellprior.evaluate._inputs import as_codes, as_embedding

N_GENES = 1000  # highly variable ones, of each batch
N_COMPONENTS = 10  # principal ones, of each batch
MIN_LABELS = 6  # with 5, an embedding made from the labels alone was not noticed
MIN_BATCHES = 2  # a consensus of one is none


def scgraph(
    embeddings: Mapping[str, Any],
    log_expression: Any,
    labels: Any,
    batches: Any,
    *,
    trim: float = 0.05,
    min_batch: int = 100,
    min_label: int = 10,
) -> pd.DataFrame:
    r"""Compare distances between labels in embeddings with those in expression: -1 to 1, higher is better.

    The "Corr-Weighted" score of Wang, Leskovec and Regev, Limitations of cell embedding metrics assessed using drifting
    islands, Nature Biotechnology 2025. The centre of a label is the mean of its cells trimmed by dimension, and
    distances are those of centres:

    1. In each batch of ``min_batch`` cells or more, by 10 principal components of its 1,000 most variable genes;
       :math:`C` is the mean over batches, after each column of each batch and before each column of the mean is
       divided by its maximum. A pair of labels that no batch has both of is left out.
    2. In the embedding, of all cells: :math:`D`.
    3. The score of label j is the Pearson correlation of :math:`D_{ij}` and :math:`C_{ij}` over the other labels i,
       each weighted by :math:`1 / C_{ij}`; that of the embedding is the mean over labels.

    Two other scores of the paper, which count the distance 0 of a label to itself, are left out: they give random
    embeddings 0.8 to 0.95. As the reference is a principal component analysis, the score favours those and other
    linear embeddings. It says whether an embedding distorts, and is no ranking of those that do not.

    Parameters
    ----------
    embeddings
        By name, each ``(cells, dimensions)``.
    log_expression
        Log-normalised expression of the same cells, ``log1p`` ``(cells, genes)``, dense or sparse.
    labels, batches
        ``(cells,)``.
    trim
        Share of a label's cells cut off at each end of each dimension.
    min_batch
        Smaller batches do not count in step 1.
    min_label
        Labels with fewer cells in all are left out.

    Returns
    -------
    A row per embedding with its ``score`` and, where this is NaN, the ``reason``, which is empty otherwise. The score
    needs 6 labels, as with 5 an embedding made from nothing but the labels was not noticed, and 2 batches.

    Raises
    ------
    ValueError
        If there is no embedding, lengths differ, labels or batches are missing, values are not finite, the expression
        is not log-normalised, or ``trim`` is not between 0 and 0.5.

    Examples
    --------
    >>> cp.evaluate.scgraph(
    ...     {"cellplm": adata.obsm["X_cellplm"]}, adata.X, adata.obs["cell_type"], adata.obs["batch"]
    ... )
    """
    if not embeddings or not 0 <= trim < 0.5:
        msg = f"scgraph needs at least one embedding and trim between 0 and 0.5; got {len(embeddings)}, trim={trim}."
        raise ValueError(msg)
    expression = _log_normalised(log_expression)
    n_cells = expression.shape[0]
    label = _without_small(as_codes(labels, n_cells)[0], min_label)
    batch = _without_small(as_codes(batches, n_cells, name="batches")[0], min_batch)
    points = {
        name: as_embedding(embedding, name=f"embedding {name!r}") for name, embedding in embeddings.items()
    }
    for name, embedding in points.items():
        if len(embedding) != n_cells:
            msg = f"Embedding {name!r} has {len(embedding)} cells, log_expression {n_cells}: give the same cells."
            raise ValueError(msg)
    pcas = [(pca, label[rows]) for rows, pca in batch_pcas(expression, batch)]
    consensus = consensus_distances(pcas, label.max() + 1, trim=trim)
    n_labels = int(((consensus > 0).sum(axis=0) > 1).sum())
    scores = dict.fromkeys(points, np.nan)
    reason = "the embedding has all labels at one distance from each other"
    if len(pcas) < MIN_BATCHES:
        reason = (
            f"{len(pcas)} batches of at least {min_batch} cells and with varying genes; {MIN_BATCHES} needed"
        )
    elif n_labels < MIN_LABELS:
        reason = f"{n_labels} labels of at least {min_label} cells beside two others in a batch; {MIN_LABELS} needed"
    else:
        scores = {name: _mean(label_scores(x, label, consensus, trim=trim)) for name, x in points.items()}
    table = pd.DataFrame({"score": pd.Series(scores, dtype=float)})
    return table.assign(reason=np.where(table["score"].isna(), reason, ""))


def batch_pcas(expression: Any, batch: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of each batch and their principal components ``(cells of the batch, 10)``, fewer if it is tiny.

    A batch in which fewer than two genes vary is left out. Expression is log-normalised ``(cells, genes)``; cells of
    batch -1 are left out.
    """
    import scanpy as sc
    from anndata import AnnData

    for code in range(batch.max() + 1):
        rows = np.flatnonzero(batch == code)
        cells = AnnData(expression[rows])
        if _n_varying(cells.X) < 2:
            continue
        with warnings.catch_warnings():  # of fewer genes than asked for
            warnings.filterwarnings("ignore", "`n_top_genes`", UserWarning)
            sc.pp.highly_variable_genes(cells, n_top_genes=N_GENES)
        n_components = min(N_COMPONENTS, len(rows) - 1, int(cells.var["highly_variable"].sum()) - 1)
        if n_components < 1:
            continue
        sc.pp.pca(cells, n_comps=n_components, mask_var="highly_variable")
        yield rows, cells.obsm["X_pca"]


def label_distances(points: np.ndarray, label: np.ndarray, n_labels: int, *, trim: float) -> np.ndarray:
    """Distances between the trimmed means of labels ``(n_labels, n_labels)``, NaN for a label without cells."""
    centers = np.full((n_labels, points.shape[1]), np.nan)
    for code in np.unique(label[label >= 0]):
        centers[code] = trim_mean(points[label == code], trim, axis=0)
    return np.asarray(cdist(centers, centers))


def consensus_distances(
    pcas: Iterable[tuple[np.ndarray, np.ndarray]], n_labels: int, *, trim: float
) -> np.ndarray:
    """Mean of the distances of all batches ``(n_labels, n_labels)``, NaN for labels that no batch has both of.

    It is not symmetric, as each column is divided by its maximum, before and after the mean. Of each batch come its
    principal components ``(cells of the batch, components)`` and codes of labels; ``trim`` is as of :func:`scgraph`.
    """
    total, n_batches = np.zeros((n_labels, n_labels)), np.zeros((n_labels, n_labels))
    for pca, label in pcas:
        distances = _over_column_maximum(label_distances(pca, label, n_labels, trim=trim))
        total += np.nan_to_num(distances)
        n_batches += np.isfinite(distances)
    return _over_column_maximum(np.where(n_batches > 0, total / np.maximum(n_batches, 1), np.nan))


def label_scores(
    embedding: np.ndarray, label: np.ndarray, consensus: np.ndarray, *, trim: float
) -> np.ndarray:
    """Weighted correlation of each label's distances with the consensus ``(n_labels,)``, NaN where it has none."""
    distances = label_distances(embedding, label, len(consensus), trim=trim)
    near = consensus > 0  # neither the label itself nor a pair that no batch has
    weights = np.where(near, 1 / np.where(near, consensus, 1.0), 0.0)
    weights /= np.maximum(weights.sum(axis=0), np.finfo(float).tiny)
    first, second = (np.where(near, matrix, 0.0) for matrix in (distances, consensus))
    first_mean, second_mean = (weights * first).sum(axis=0), (weights * second).sum(axis=0)
    first, second = first - first_mean, second - second_mean
    first_variance, second_variance = (weights * first**2).sum(axis=0), (weights * second**2).sum(axis=0)
    # Distances that are all the same differ by rounding.
    varies = (first_variance > 1e-24 * first_mean**2) & (second_variance > 1e-24 * second_mean**2)
    deviation = np.sqrt(np.where(varies, first_variance * second_variance, 1.0))
    return np.where(varies, (weights * first * second).sum(axis=0) / deviation, np.nan)


def _over_column_maximum(distances: np.ndarray) -> np.ndarray:
    """Divide each column by its maximum, NaN aside; a column of zeros says nothing and becomes NaN."""
    largest = np.nan_to_num(distances).max(axis=0, initial=0.0)
    return distances / np.where(largest > 0, largest, np.nan)


def _without_small(codes: np.ndarray, minimum: int) -> np.ndarray:
    """Codes counted anew from 0, -1 for those of fewer cells."""
    large = np.bincount(codes) >= minimum
    return np.asarray(np.where(large, np.cumsum(large) - 1, -1)[codes])


def _n_varying(expression: Any) -> int:
    """How many genes do not have the same value in all cells."""
    spread = expression.max(axis=0) - expression.min(axis=0)
    return int((spread != 0).sum())


def _log_normalised(expression: Any) -> Any:
    """Check the expression: a csr or an array of finite, non-negative values that are not all integers."""
    expression = sp.csr_matrix(expression) if sp.issparse(expression) else np.asarray(expression)
    if expression.ndim != 2 or 0 in expression.shape:
        msg = f"log_expression has the shape {expression.shape}; scgraph needs (cells, genes)."
        raise ValueError(msg)
    values = expression.data if sp.issparse(expression) else expression
    if not np.isfinite(values).all():
        msg = "log_expression holds values that are not finite; remove them first."
        raise ValueError(msg)
    found = "negative values: it is scaled" if (values < 0).any() else "integers only: these are counts"
    if (values < 0).any() or (values == np.rint(values)).all():
        msg = f"log_expression holds {found}. Give log-normalised values: sc.pp.normalize_total, then sc.pp.log1p."
        raise ValueError(msg)
    return expression


def _mean(scores: np.ndarray) -> float:
    """Mean of those that are not NaN, NaN if all are."""
    scores = scores[np.isfinite(scores)]
    return float(scores.mean()) if len(scores) else float("nan")
