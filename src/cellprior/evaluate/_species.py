"""Labels of one species read on another, beside methods that know proteins or symbols and are trained on nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_chunked

from cellprior._matrix import matrix_of
from cellprior._obs import read_names
from cellprior.evaluate._expression import log_normalised, raw_counts
from cellprior.evaluate._intervals import Resampling, compared
from cellprior.evaluate._metrics import knn_predict
from cellprior.evaluate._splits import HELD_OUT, Split
from cellprior.genes._kinds import which_are_genes

MACROGENES, SYMBOLS = "macrogenes", "PCA of one-to-one symbols"
CENTRED, STANDARDISED = ", each species centred", ", each species standardised"
MAJORITY = "largest label"
N_COMPONENTS, N_NEIGHBORS = 50, 15
NEAREST = 50  # macrogenes of a gene; of those behind, each would have less than a thousandth of the first one's share
WIDTH = 128  # principal components of the vectors of genes, in which they are clustered
LEAST_GENES = 20
MOST_DEVIATIONS = 10.0
SCORES = ("macro_f1", "balanced_accuracy")


def macrogenes(
    cells: Sequence[ad.AnnData],
    vectors: Sequence[pd.DataFrame],
    *,
    layer: str | None = None,
    n_macrogenes: int = 2000,
    seed: int = 0,
) -> list[np.ndarray]:
    r"""Cells of several species by groups of like proteins, without any training on cells.

    The idea is SATURN's [Rosen et al., Nature Methods 21:1492, 2024], without its network: genes of all species are
    clustered by the vectors of their proteins (k-means), and gene g counts for macrogene m with
    :math:`2 \ln^2(1 + 1 / r_{gm})`, where :math:`r_{gm}` is the place of m among all, the nearest first (here the first
    50 of them). A cell's score of m is the sum over its genes of that times the log-normalised count.

    Parameters
    ----------
    cells
        Raw counts of each species ``(cells, genes)``.
    vectors
        Of each species' genes, by names of its data, such as ``UCE.get_gene_representation`` gives them, or ESM-2's
        ``(genes, width)``. Genes without one are left out.
    layer
        Layer with raw counts; ``None`` for ``X``.
    n_macrogenes
        Groups; at most a third of the genes.
    seed
        Of k-means.

    Returns
    -------
    Float32 ``(cells, n_macrogenes)`` of each species.

    Raises
    ------
    ValueError
        If species and vectors are not as many, of different widths or not finite, or fewer than 20 genes of a species
        have one.
    """
    if len(cells) != len(vectors) or not cells:
        msg = f"{len(cells)} species and vectors of {len(vectors)}; give both of each."
        raise ValueError(msg)
    if len({frame.shape[1] for frame in vectors}) > 1:
        widths = ", ".join(str(frame.shape[1]) for frame in vectors)
        msg = f"The vectors have {widths} numbers; needed: of one model, as many in each."
        raise ValueError(msg)
    found = [_with_vectors(adata, frame, layer) for adata, frame in zip(cells, vectors, strict=True)]
    proteins = np.concatenate([of_genes for _, of_genes in found])
    if not np.isfinite(proteins).all():
        msg = "Some vectors of genes are not finite (NaN or infinite). Leave these genes out."
        raise ValueError(msg)
    weight = macrogene_weights(proteins, min(n_macrogenes, len(proteins) // 3), seed=seed)
    scores, start = [], 0
    for log, of_genes in found:
        scores.append(np.asarray((log @ weight[start : start + len(of_genes)]).todense(), dtype=np.float32))
        start += len(of_genes)
    return scores


def macrogene_weights(proteins: np.ndarray, n_macrogenes: int, *, seed: int) -> sp.csr_matrix:
    """What each gene counts for each macrogene ``(genes, n_macrogenes)``, see :func:`macrogenes`."""
    width = min(WIDTH, min(proteins.shape) - 1)
    if width < proteins.shape[1]:
        proteins = PCA(width, svd_solver="randomized", random_state=seed).fit_transform(proteins)
    kmeans = MiniBatchKMeans(n_macrogenes, random_state=seed, n_init=1, batch_size=4096).fit(proteins)
    nearest, rank = min(NEAREST, n_macrogenes), np.arange(1, min(NEAREST, n_macrogenes) + 1)

    def first(distances: np.ndarray, start: int) -> np.ndarray:
        return np.argsort(distances, axis=1, kind="stable")[:, :nearest]

    chunks = pairwise_distances_chunked(proteins, kmeans.cluster_centers_, reduce_func=first)
    column = np.concatenate(list(chunks))
    row = np.repeat(np.arange(len(proteins)), nearest)
    value = np.tile(2 * np.log1p(1 / rank) ** 2, len(proteins)).astype(np.float32)
    return sp.csr_matrix((value, (row, column.ravel())), shape=(len(proteins), n_macrogenes))


def across_species(
    reference: ad.AnnData,
    query: ad.AnnData,
    embeddings: str | Sequence[str] | Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels_key: str,
    *,
    vectors: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    layer: str | None = None,
    n_macrogenes: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well labels that were learned from one species name the cells of another.

    A cell gets the label of most of its 15 nearest cells of the other species. Beside the embeddings stand:

    ``macrogenes``
        50 principal components of :func:`macrogenes`, which know the proteins, as UCE does, and have learned nothing;
        as they are, and with the mean and the scale of each macrogene taken off within each species. With ``vectors``.
    ``PCA of one-to-one symbols``
        Of the genes whose symbol both species have once each, capitals aside; as it is, and with the mean of each
        species at the origin. These are most orthologues, and some that are none: a baseline, and no way to map genes.
    ``largest label``
        The one that most cells of the reference have.

    Parameters
    ----------
    reference
        Labelled cells with raw counts.
    query
        Cells of another species, with labels to compare with.
    embeddings
        Keys of ``obsm`` that both have, or arrays of both by name. They must be of one space.
    labels_key
        Column of ``obs`` in both. Only cells whose label both have are looked at.
    vectors
        Of the genes of both, see :func:`macrogenes`: ``(model.get_gene_representation(reference),
        model.get_gene_representation(query))``.
    layer
        Layer with raw counts; ``None`` for ``X``.
    n_macrogenes, seed
        See :func:`macrogenes`.

    Returns
    -------
    A row per method and metric: ``method``, ``kind`` (``"embedding"`` or ``"baseline"``), ``metric``, ``value`` and its
    95 % interval ``low`` to ``high`` over cells of the query, ``versus``, the best baseline, and the paired
    ``difference`` to it with ``difference_low`` and ``difference_high``. As the best is chosen on the same cells, it is
    favoured slightly.

    Raises
    ------
    KeyError
        If a column or an embedding is missing.
    ValueError
        If fewer than two labels are in both, or arrays do not fit.
    NotCountsError
        If the data are not raw counts.
    """
    codes = _shared_labels(reference, query, labels_key)
    spaces: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for name, pair in _embeddings_of(reference, query, embeddings).items():
        spaces[name, "embedding"] = pair
    first, second = _one_to_one(reference, query, layer, seed)
    spaces[SYMBOLS, "baseline"] = first, second
    spaces[SYMBOLS + CENTRED, "baseline"] = first - first.mean(0), second - second.mean(0)
    if vectors is not None:
        scores = macrogenes([reference, query], vectors, layer=layer, n_macrogenes=n_macrogenes, seed=seed)
        spaces[MACROGENES, "baseline"] = _components(scores[0], scores[1], seed)
        scaled = [_standardised(each) for each in scores]
        spaces[MACROGENES + STANDARDISED, "baseline"] = _components(scaled[0], scaled[1], seed)
    known, asked = codes[0] >= 0, codes[1] >= 0
    said = {
        key: knn_predict(
            first[known], codes[0][known], second[asked], n_neighbors=min(N_NEIGHBORS, known.sum())
        )
        for key, (first, second) in spaces.items()
    }
    said[MAJORITY, "baseline"] = np.full(asked.sum(), np.bincount(codes[0][known]).argmax())
    return _table(said, codes[1][asked], int(known.sum()), seed)


def _with_vectors(
    adata: ad.AnnData, vectors: pd.DataFrame, layer: str | None
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Log-normalised counts of the genes that have a vector, and these."""
    names = matrix_of(adata, layer).var.index
    row = vectors.index.get_indexer_for(names) if vectors.index.is_unique else _first_of(vectors.index, names)
    known = np.flatnonzero(row >= 0)
    if len(known) < LEAST_GENES:
        msg = (
            f"{len(known)} of {len(names):,} genes ({', '.join(map(str, names[:3]))}, ...) have a vector; the "
            f"vectors are of {', '.join(map(str, vectors.index[:3]))}, .... Give them under the names of the data."
        )
        raise ValueError(msg)
    log = log_normalised(raw_counts(adata, layer))[:, known]
    return sp.csr_matrix(log), vectors.to_numpy(dtype=np.float32)[row[known]]


def _first_of(index: pd.Index, names: pd.Index) -> np.ndarray:
    place = {name: i for i, name in reversed(list(enumerate(index)))}
    return np.array([place.get(name, -1) for name in names])


def _one_to_one(
    reference: ad.AnnData, query: ad.AnnData, layer: str | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Components of the genes whose symbol, in capitals, both have once."""
    once = []
    for adata in (reference, query):
        var = matrix_of(adata, layer).var
        names = pd.Series(var.index.astype(str).str.upper())[which_are_genes(var)]
        once.append(names[~names.duplicated(keep=False)])
    shared = np.intersect1d(once[0], once[1])
    if len(shared) < LEAST_GENES:
        msg = f"The species have {len(shared)} symbols in common; put symbols into var_names of both."
        raise ValueError(msg)
    logs = []
    for adata, names in zip((reference, query), once, strict=True):
        column = pd.Series(names.index, index=names.to_numpy())[shared].to_numpy()
        logs.append(log_normalised(sp.csr_matrix(raw_counts(adata, layer)[:, column])))
    return _components(logs[0], logs[1], seed)


def _components(first: Any, second: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the first; both in them."""
    n = min(N_COMPONENTS, first.shape[0] - 1, first.shape[1] - 1)
    fitted = PCA(n, svd_solver="arpack", random_state=seed).fit(first)
    return np.asarray(fitted.transform(first)), np.asarray(fitted.transform(second))


def _standardised(scores: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and standard deviation 1, of at most 10 of these."""
    scaled = (scores - scores.mean(0)) / np.maximum(scores.std(0), 1e-6)
    return np.asarray(scaled.clip(-MOST_DEVIATIONS, MOST_DEVIATIONS))


def _shared_labels(reference: ad.AnnData, query: ad.AnnData, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the labels that both have, of the cells of both, -1 for the others."""
    names = []
    for adata in (reference, query):
        if key not in adata.obs:
            msg = f"{key!r} not found in adata.obs; its columns are {list(adata.obs.columns)}."
            raise KeyError(msg)
        names.append(np.asarray(read_names(adata.obs, key)))
    shared = np.intersect1d(names[0], names[1])
    if len(shared) < 2:
        some = [", ".join(np.unique(each)[:5]) for each in names]
        msg = (
            f"{len(shared)} labels are in both, two are needed. One has {some[0]}, the other {some[1]}: call them "
            "alike."
        )
        raise ValueError(msg)
    first, second = (pd.Index(shared).get_indexer(each) for each in names)
    return first, second


def _embeddings_of(
    reference: ad.AnnData, query: ad.AnnData, embeddings: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if isinstance(embeddings, str):
        embeddings = [embeddings]
    if not isinstance(embeddings, Mapping):
        for key in embeddings:
            if key not in reference.obsm or key not in query.obsm:
                msg = f"{key!r} is not in obsm of both; they have {list(reference.obsm)} and {list(query.obsm)}."
                raise KeyError(msg)
        embeddings = {key: (reference.obsm[key], query.obsm[key]) for key in embeddings}
    found = {name: (np.asarray(pair[0]), np.asarray(pair[1])) for name, pair in embeddings.items()}
    for name, (first, second) in found.items():
        shapes = first.shape, second.shape
        if (len(first), len(second)) != (reference.n_obs, query.n_obs) or first.shape[1:] != second.shape[1:]:
            msg = f"{name} has the shapes {shapes[0]} and {shapes[1]}; a row per cell and as many columns are needed."
            raise ValueError(msg)
    return found


def _table(
    said: Mapping[tuple[str, str], np.ndarray], truth: np.ndarray, n_learned: int, seed: int
) -> pd.DataFrame:
    """Scores with intervals over cells, all paired."""
    one = Split(HELD_OUT, 0, "", np.arange(n_learned), np.arange(len(truth)))
    again = Resampling(len(truth), [one], seed=seed)
    drawn = {key: again.classification(truth, [predicted]) for key, predicted in said.items()}
    tables = []
    for metric in SCORES:
        draws = {name: of[metric] for (name, _), of in drawn.items()}
        best = max((name for name, kind in said if kind == "baseline"), key=lambda name: draws[name][0])
        table = compared(draws, versus=best, of=again.interval, within=(0.0, 1.0))
        table["versus"] = best
        itself = table["method"] == best
        table.loc[itself, ["difference", "difference_low", "difference_high"]] = 0.0
        table.insert(1, "kind", [kind for _, kind in said])
        table.insert(2, "metric", metric)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
