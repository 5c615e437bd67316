"""What goes into ScGPT: counts as bins of their rank within the cell, and the expressed genes as tokens.

A cell's non-zero counts are cut at 50 of their quantiles, so that only their order matters. Most counts of sparse data
are equal to many others of the cell and lie between several edges at once; which of these bins one gets is the
original's luck. Here it is a number that belongs to the gene.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from cellprior.model.data._entries import Counts, keys_of_cells, scramble, unit_interval

N_BINS = 51  # bin 0, and 50 of counts above 0
MASK, PAD = -1, -2  # what stands for a hidden bin, and for none

Ties = Literal["fixed", "middle", "random", "upper"]
TIES = ("fixed", "middle", "random", "upper")


class TokenArrays(NamedTuple):
    """Cells as sets of tokens, the class token first, padded to the longest."""

    gene: np.ndarray  # vocabulary row; then come the padding and the class token, int64   (cells, width)
    value: np.ndarray  # bin, ``MASK`` or ``PAD``, int64                                   (cells, width)
    length: np.ndarray  # tokens of each cell, int64                                       (cells,)


class Tokens(NamedTuple):
    """Cells as sets of tokens, see :class:`TokenArrays`."""

    gene: Tensor  # (cells, width)
    value: Tensor  # (cells, width)
    length: Tensor  # (cells,), on the CPU


def bin_bounds(counts: Counts, n_bins: int = N_BINS) -> tuple[np.ndarray, np.ndarray]:
    """How many edges are at or below each count, and how many are below: it may be in any bin in between.

    The edges are ``numpy.quantile(v, numpy.linspace(0, 1, n_bins - 1))`` of a cell's non-zero counts v, computed as
    numpy does it, so that equality with a count is the same. The results are those of ``numpy.digitize``. Counts are
    above 0, ``n_bins`` with bin 0. Gives left and right, int64 ``(entries,)``; the bin is ``left``, or one of
    ``right + 1`` to ``left`` where these differ.
    """
    # of positive float32, the bits are in the order of the numbers
    key = (counts.cell.astype(np.int64) << 32) | counts.value.astype(np.float32).view(np.int32)
    order = np.argsort(key)
    key = key[order]
    begins = np.flatnonzero(np.diff(key, prepend=-1))  # of equal counts of a cell
    n_values = np.diff(counts.indptr)
    full = np.flatnonzero(n_values)
    edges = np.full((len(n_values), n_bins - 1), np.nan)
    if len(full):
        edges[full] = _quantiles(counts.value[order], counts.indptr[full], n_values[full], n_bins - 1)
    value = counts.value[order][begins].astype(np.float64)[:, None]
    own = edges[counts.cell[order][begins]]  # (distinct counts, n_bins - 1)
    size = np.diff(begins, append=len(key))
    left, right = np.empty(len(key), dtype=np.int64), np.empty(len(key), dtype=np.int64)
    left[order] = np.repeat((own <= value).sum(1), size)
    right[order] = np.repeat((own < value).sum(1), size)
    return left, right


def _quantiles(ordered: np.ndarray, start: np.ndarray, n_values: np.ndarray, n_edges: int) -> np.ndarray:
    """Quantiles of sorted cells ``(cells, n_edges)``, by the interpolation of ``numpy.quantile``."""
    place = (n_values - 1)[:, None] * np.linspace(0, 1, n_edges)
    below = np.minimum(np.floor(place), (n_values - 1)[:, None]).astype(np.int64)
    above = np.minimum(below + 1, (n_values - 1)[:, None])
    share = place - below
    a, b = ordered[start[:, None] + below], ordered[start[:, None] + above]
    step = b - a  # in float32, as there
    return np.where(share < 0.5, a + step * share, b - step * (1 - share))


def choose_bins(left: np.ndarray, right: np.ndarray, draw: np.ndarray | float) -> np.ndarray:
    """``ceil(draw * (right - left) + left)``, int64; ``draw`` in [0, 1), see :func:`bin_bounds`."""
    return np.ceil(draw * (right - left) + left).astype(np.int64)


def bins_of(counts: Counts, *, n_bins: int = N_BINS, ties: Ties = "fixed", seed: int = 0) -> np.ndarray:
    """Bins 1 to ``n_bins - 1`` of counts above 0, int64 ``(entries,)``.

    Parameters
    ----------
    counts
        All genes of the vocabulary that a cell expresses, as a bin says where among them a gene is.
    n_bins
        With bin 0.
    ties
        Where a count could be in several bins: ``"fixed"``, one draw for each gene, the same in every cell and on
        every machine; ``"middle"``, the middle bin; ``"upper"``, the highest, as in scFormer; ``"random"``, one
        draw for each gene and cell, as in the original.
    seed
        Of ``"random"``. A draw depends on it, the gene, and the counts of the cell: on no other cell.
    """
    left, right = bin_bounds(counts, n_bins)
    if ties == "fixed":
        return choose_bins(left, right, draw_of(counts.gene))
    if ties == "random":
        return choose_bins(left, right, draw_of(counts.gene, of_cells(counts, seed)))
    return choose_bins(left, right, {"middle": 0.5, "upper": 0.0}[ties])


def draw_of(gene: np.ndarray, salt: np.ndarray | int = 0) -> np.ndarray:
    """A number in [0, 1) for each gene, by its row in the vocabulary and a salt; float64."""
    mixed = scramble(scramble(gene) ^ np.asarray(salt, dtype=np.uint64))
    return unit_interval(mixed)


def of_cells(counts: Counts, seed: int) -> np.ndarray:
    """A number for each entry that depends on a seed and on all counts of its cell, uint64."""
    return keys_of_cells(counts, seed)[counts.cell]


def keep_genes(counts: Counts, max_genes: int) -> np.ndarray:
    """Which entries ``(entries,)`` are left where a cell may have ``max_genes`` at most.

    Those that come first in an order of all genes that has nothing to do with their counts, and is always the same.
    """
    rank_key = (counts.cell.astype(np.uint64) << np.uint64(32)) | (scramble(~counts.gene) >> np.uint64(32))
    order = np.argsort(rank_key, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(counts.indptr[:-1], np.diff(counts.indptr))
    return rank < max_genes


def as_tokens(
    indptr: np.ndarray, gene: np.ndarray, value: np.ndarray, *, n_genes: int, cls_value: int
) -> TokenArrays:
    """Entries of cells as padded tokens behind a class token.

    Each cell begins at an ``indptr``, the last of which is the end; ``gene`` and ``value`` are vocabulary rows and
    bins ``(entries,)``. Row ``n_genes`` is the padding, ``n_genes + 1`` the class token, whose bin ``cls_value`` is
    ``PAD`` in pretraining, 0 in the original's fine-tuning.
    """
    n_entries = np.diff(indptr)
    shape = (len(n_entries), int(n_entries.max(initial=0)) + 1)
    genes, values = np.full(shape, n_genes), np.full(shape, PAD)
    genes[:, 0], values[:, 0] = n_genes + 1, cls_value
    row = np.repeat(np.arange(len(n_entries)), n_entries)
    place = np.arange(len(gene)) - np.repeat(indptr[:-1], n_entries) + 1
    genes[row, place], values[row, place] = gene, value
    return TokenArrays(genes, values, n_entries + 1)


def tokenize(
    counts: Counts,
    *,
    n_genes: int,
    n_bins: int = N_BINS,
    ties: Ties = "fixed",
    seed: int = 0,
    max_genes: int | None = None,
    cls_value: int = PAD,
) -> TokenArrays:
    """Tokens of the genes that cells express, see :func:`bins_of`, :func:`keep_genes` and :func:`as_tokens`.

    Bins are those among all expressed genes, whatever ``max_genes`` is.

    Raises ValueError if ``ties`` is not known, or ``max_genes`` below 1.
    """
    if ties not in TIES:
        msg = f"ties={ties!r} is not known; choose one of {', '.join(map(repr, TIES))}."
        raise ValueError(msg)
    if max_genes is not None and max_genes < 1:
        msg = f"max_genes={max_genes}; at least 1 is needed, or None for all that a cell expresses."
        raise ValueError(msg)
    bins = bins_of(counts, n_bins=n_bins, ties=ties, seed=seed)
    indptr, gene = counts.indptr, counts.gene
    if max_genes is not None and np.diff(indptr).max(initial=0) > max_genes:
        kept = keep_genes(counts, max_genes)
        indptr = np.concatenate([[0], np.cumsum(kept)])[indptr]
        gene, bins = gene[kept], bins[kept]
    return as_tokens(indptr, gene, bins, n_genes=n_genes, cls_value=cls_value)


def sample_mask(value: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Which tokens are to be predicted: ``int(rate * k)`` of a cell's k genes, never the class token.

    (The original's fine-tuning draws the class token too.) The class token is the first of the bins
    ``(cells, width)``, ``PAD`` behind the last.
    """
    is_gene = value != PAD
    is_gene[:, 0] = False
    noise = np.where(is_gene, rng.random(value.shape), 2.0)
    rank = np.empty(value.shape, dtype=np.int64)
    np.put_along_axis(rank, noise.argsort(axis=1), np.arange(value.shape[1])[None], axis=1)
    return is_gene & (rank < (rate * is_gene.sum(1)).astype(np.int64)[:, None])


def with_silent_genes(tokens: TokenArrays, genes: np.ndarray, n_genes: int) -> TokenArrays:
    """The same cells with a token, of bin 0, for each of some genes ``(k,)`` that they do not express."""
    n_cells = len(tokens.gene)
    bins = np.zeros((n_cells, n_genes + 2), dtype=np.int64)
    np.put_along_axis(bins, tokens.gene, tokens.value, axis=1)
    of_cls = np.full((n_cells, 1), n_genes + 1)
    gene = np.concatenate([of_cls, np.broadcast_to(genes, (n_cells, len(genes)))], axis=1)
    return TokenArrays(gene, np.take_along_axis(bins, gene, axis=1), np.full(n_cells, len(genes) + 1))


def sample_tokens(tokens: TokenArrays, max_genes: int, rng: np.random.Generator) -> TokenArrays:
    """At most ``max_genes`` genes of each cell, drawn at random as the original does, in random order.

    Cells are cut to a common width, and come back as they are if no cell has more.
    """
    if tokens.gene.shape[1] <= max_genes + 1:
        return tokens
    noise = np.where(tokens.value != PAD, rng.random(tokens.gene.shape), 2.0)
    noise[:, 0] = -1.0  # the class token stays
    kept = noise.argsort(axis=1)[:, : max_genes + 1]
    gene, value = (np.take_along_axis(x, kept, axis=1) for x in (tokens.gene, tokens.value))
    return TokenArrays(gene, value, np.minimum(tokens.length, max_genes + 1))
