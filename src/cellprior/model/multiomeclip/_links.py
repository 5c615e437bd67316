"""Which peaks go with which genes: nearness in the shared space, beside control peaks and plain correlation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control

from cellprior import genes as matching
from cellprior._arguments import whole
from cellprior.genes._genomes import possible_genomes
from cellprior.genes._intervals import Intervals, read_peaks
from cellprior.genes._positions import Places, places_of
from cellprior.model.data._cells import Cells
from cellprior.model.data._counts import row_numbers
from cellprior.model.multiomeclip._controls import (
    MIN_CONTROLS,
    Background,
    Candidates,
    groups,
    is_promoter,
)
from cellprior.model.multiomeclip._features import log_values, vectors_over
from cellprior.model.multiomeclip._module import MODALITIES

MAX_CELLS = 20_000  # that frequencies and correlations are taken from
NEAR, MIN_NEAR, MIN_RICHER = (
    0.02,
    20,
    1.5,
)  # share of the window, expected peaks there, and how many more are usual
_AXIS = 1 << 33  # place of one chromosome on a common axis; no chromosome is as long
COLUMNS = ["gene", "peak", "distance", "score", "background_mean", "background_sd", "p", "q", "correlation"]


@dataclass(frozen=True, eq=False)
class Features:
    """Genes or peaks that can be linked.

    Attributes
    ----------
    rows
        In the vocabulary ``(n,)``.
    names
        In the data ``(n,)``.
    values
        Log-normalised, of the cells that have both modalities ``(cells, n)``.
    n_cells
        In how many of these each is found ``(n,)``.
    """

    rows: np.ndarray
    names: np.ndarray
    values: sp.csc_matrix
    n_cells: np.ndarray

    def take(self, chosen: np.ndarray) -> Features:
        """Some of them, as numbers or a mask."""
        return Features(self.rows[chosen], self.names[chosen], self.values[:, chosen], self.n_cells[chosen])


def peak_gene_links(
    model: Any,
    adata: Any,
    indices: Any,
    *,
    gene_positions: pd.DataFrame | None,
    genes: Sequence[str] | None,
    window: int,
    n_controls: int,
    min_cells: int,
) -> pd.DataFrame:
    """See :meth:`cellprior.model.MultiomeCLIP.peak_gene_links`."""
    whole(window=window, min_cells=min_cells)
    whole(least=MIN_CONTROLS, n_controls=n_controls)
    model._check_if_trained(warn=False)
    cells = model._cells(adata)
    rows = row_numbers(indices, cells.n_obs)
    rows = rows[cells.complete[rows]]
    if len(rows) < 2:
        msg = (
            f"{len(rows)} of the cells have both modalities, which frequencies and correlations are taken from; the "
            f"data have {' and '.join(cells.counts)}. Pass a MuData with RNA and ATAC of the same cells."
        )
        raise ValueError(msg)
    rows = rows[:: -(-len(rows) // MAX_CELLS)]
    rna, atac = (frequent(cells, name, rows, min_cells) for name in MODALITIES)
    intervals = read_peaks(np.asarray(model.peaks, dtype=object)[atac.rows])
    table = cells.counts["rna"].matrix.var if gene_positions is None else gene_positions
    rna, places, every = placed(model, rna, table, given=gene_positions is not None)
    refuse_two_genomes(every, intervals)
    wanted = np.isin(rna.names, rna.names if genes is None else refuse_unknown(genes, rna.names))
    pairs = within(places, intervals, window)
    warn_if_not_near(pairs, window)
    vectors = {
        name: unit(vectors_over(model, name, cells, rows)[features.rows])
        for name, features in zip(MODALITIES, (rna, atac), strict=True)
    }
    score = np.einsum("pd,pd->p", vectors["rna"][pairs.gene], vectors["atac"][pairs.peak])
    alike = groups(is_promoter(every, intervals), atac.n_cells, n_controls)
    chromosomes = places.chromosome, intervals.chromosome
    background = Background(vectors["rna"], vectors["atac"], *chromosomes, alike)
    mean, spread, p = background.of(pairs, score)  # of all genes, whichever are asked for
    asked = wanted[pairs.gene]
    pairs = Candidates(pairs.gene[asked], pairs.peak[asked], pairs.distance[asked])
    links = pd.DataFrame(
        {
            "gene": rna.names[pairs.gene],
            "peak": atac.names[pairs.peak],
            "distance": pairs.distance,
            "score": score[asked],
            "background_mean": mean[asked],
            "background_sd": spread[asked],
            "p": p[asked],
            "q": _adjusted(p[asked]),
            "correlation": correlations(rna.values, atac.values, pairs),
        },
        columns=COLUMNS,
    )
    order = np.lexsort((links["distance"].abs(), -links["score"], links["p"]))
    return links.iloc[order].reset_index(drop=True)


def frequent(cells: Cells, modality: str, rows: np.ndarray, min_cells: int) -> Features:
    """Genes or peaks of the vocabulary that are found in enough of some cells.

    Raises
    ------
    ValueError
        If there are none.
    """
    counts = cells.counts[modality]
    matrix = log_values(counts, rows).tocsc()
    matrix.eliminate_zeros()
    n_cells = np.diff(matrix.indptr)
    name_of = pd.Series(counts.matrix.var.index.astype(str), index=counts.match.index)
    name_of = name_of[~name_of.index.duplicated()]
    known = np.flatnonzero((n_cells >= min_cells) & np.isin(np.arange(matrix.shape[1]), name_of.index))
    if not len(known):
        what = "gene" if modality == "rna" else "peak"
        msg = f"No {what} is found in {min_cells} of {len(rows)} cells; min_cells= asks for fewer."
        raise ValueError(msg)
    return Features(known, name_of[known].to_numpy(dtype=object), matrix[:, known], n_cells[known])


def placed(model: Any, rna: Features, table: pd.DataFrame, *, given: bool) -> tuple[Features, Places, Places]:
    """Genes that have a place, their places, and those of all genes of the table.

    Raises
    ------
    TypeError
        If it is no table.
    ValueError
        If it has no places, or none of the genes.

    Warns
    -----
    UserWarning
        If less than half of the genes have one.
    """
    if not isinstance(table, pd.DataFrame):
        msg = f"gene_positions is a {type(table).__name__}; a DataFrame is needed, with the names of genes as index."
        raise TypeError(msg)
    every = places_of(table)
    if not every.known.any():
        where = "gene_positions has" if given else "var of RNA has"
        msg = (
            f"{where} no positions of genes; its columns are {list(table.columns)}. Needed are chrom, start, end and "
            "strand, or interval as Cell Ranger has it. From the annotation that the reads were counted with: "
            'gene_positions=cellprior.genes.read_positions("genes.gtf.gz").'
        )
        raise ValueError(msg)
    names = table.loc[every.known, [c for c in table.columns if _names_genes(c)]]
    match = matching.match(names, model.genes, min_coverage=0.0)
    row_of = pd.Series(np.flatnonzero(every.known), index=match.index)
    row_of = row_of[~row_of.index.duplicated()].reindex(rna.rows)
    found = row_of.notna().to_numpy()
    if found.mean() < 0.5:
        lacking = ", ".join(map(str, rna.names[~found][:3]))
        msg = f"{int(found.sum()):,} of {len(found):,} genes have a position; {lacking}, ... have none and no links."
        if not found.any():
            raise ValueError(msg)
        warnings.warn(msg, UserWarning, stacklevel=4)
    return rna.take(found), every.take(row_of[found].to_numpy(dtype=np.int64)), every


def _names_genes(column: object) -> bool:
    """Whether a column of a table of positions can hold names of genes."""
    return str(column).lower() in ("gene_id", "gene_ids", "gene_name", "symbol", "ensembl_id", "gene")


def refuse_two_genomes(genes: Places, peaks: Intervals) -> None:
    """Refuse genes and peaks that are not of one genome, as far as their chromosomes tell.

    Raises
    ------
    ValueError
        With both.
    """
    if not peaks.known.any():
        msg = f"The peaks have no positions; their names are such as {', '.join(map(str, peaks.names[:3]))}."
        raise ValueError(msg)
    chromosomes = [pd.unique(x.chromosome[x.known]) for x in (genes, peaks)]
    if not set(chromosomes[0]) & set(chromosomes[1]):
        named = [", ".join(map(str, names[:3])) for names in chromosomes]
        msg = f"Genes and peaks have no chromosome in common: genes lie on {named[0]}, peaks on {named[1]}."
        raise ValueError(msg)
    known = genes.known
    largest = pd.Series(genes.last[known]).groupby(genes.chromosome[known]).max()
    of_genes = possible_genomes({str(name): int(place) for name, place in largest.items()})
    of_peaks = possible_genomes(peaks.largest_starts())
    if of_genes and of_peaks and not set(of_genes) & set(of_peaks):
        msg = (
            f"The positions of the genes fit {' or '.join(of_genes)}, those of the peaks {' or '.join(of_peaks)}: both "
            "are needed in one genome build. Take the annotation that belongs to the peaks: "
            'gene_positions=cellprior.genes.read_positions("genes.gtf.gz").'
        )
        raise ValueError(msg)


def refuse_unknown(genes: Sequence[str], names: np.ndarray) -> list[str]:
    """Names of the genes to link.

    Raises
    ------
    ValueError
        If one is not among those that can be.
    """
    wanted = [genes] if isinstance(genes, str) else list(genes)
    if not wanted or (unknown := [name for name in wanted if name not in set(names)]):
        said = f"{unknown[0]!r} is none" if wanted else "none is given"
        msg = (
            f"genes: {said} of the {len(names):,} genes that the model reads, that are found in min_cells cells, and "
            f"whose position is known, such as {', '.join(map(str, names[:3]))}."
        )
        raise ValueError(msg)
    return wanted


def within(places: Places, peaks: Intervals, window: int) -> Candidates:
    """Pairs of a gene and a peak whose middle is at most ``window`` base pairs from the gene's start.

    Raises
    ------
    ValueError
        If there is none.
    """
    names = pd.Index(pd.unique(peaks.chromosome[peaks.known]))
    on = np.flatnonzero(peaks.known)
    middle = (peaks.start + peaks.end) // 2
    place = names.get_indexer(peaks.chromosome[on]) * _AXIS + middle[on]
    order = np.argsort(place, kind="stable")
    on, place = on[order], place[order]
    code = names.get_indexer(places.chromosome)
    genes = np.flatnonzero(code >= 0)
    base = code[genes] * _AXIS
    first = np.searchsorted(place, base + np.maximum(places.first[genes] - window, 0), side="left")
    n = np.searchsorted(place, base + places.last[genes] + window, side="right") - first
    gene = np.repeat(genes, n)
    if not len(gene):
        msg = f"No peak lies within {window:,} base pairs of the start of a gene; window= asks for more."
        raise ValueError(msg)
    peak = on[np.arange(len(gene)) - np.repeat(np.cumsum(n) - n, n) + np.repeat(first, n)]
    after, before = middle[peak] - places.last[gene], middle[peak] - places.first[gene]
    distance = np.where(after > 0, after, np.where(before < 0, before, 0))
    return Candidates(gene, peak, distance * np.where(places.sense[gene] < 0, -1, 1))


def warn_if_not_near(pairs: Candidates, window: int) -> None:
    """Say so where peaks are no more frequent near the starts of genes, as in all chromatin, than far from them.

    Warns
    -----
    UserWarning
        As positions of two genome builds look so.
    """
    near, expected = int((np.abs(pairs.distance) <= NEAR * window).sum()), NEAR * len(pairs.distance)
    if expected >= MIN_NEAR and near < MIN_RICHER * expected:
        msg = (
            f"{near:,} peaks lie within {NEAR * window:,.0f} base pairs of the start of a gene, {expected:,.0f} are to "
            "be expected by chance, and usually there are many more: are genes and peaks of one genome build?"
        )
        warnings.warn(msg, UserWarning, stacklevel=4)


def correlations(rna: sp.csc_matrix, atac: sp.csc_matrix, pairs: Candidates) -> np.ndarray:
    """Pearson's correlation of the two features of each pair over the cells; NaN where one does not vary.

    Parameters
    ----------
    rna, atac
        Values ``(cells, n)``.
    pairs
        Columns of each.
    """
    means, spreads = zip(*map(_moments, (rna, atac)), strict=True)
    product = np.empty(len(pairs.gene))
    order = np.argsort(pairs.gene, kind="stable")
    for of_gene in np.split(order, np.flatnonzero(np.diff(pairs.gene[order])) + 1):
        x = rna[:, [pairs.gene[of_gene[0]]]].toarray()[:, 0]
        product[of_gene] = atac[:, pairs.peak[of_gene]].T @ x
    covariance = product / rna.shape[0] - means[0][pairs.gene] * means[1][pairs.peak]
    spread = spreads[0][pairs.gene] * spreads[1][pairs.peak]
    return np.divide(covariance, spread, out=np.full(len(spread), np.nan), where=spread > 0)


def _moments(x: sp.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, float64."""
    values = x.astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    square = np.asarray(values.multiply(values).mean(axis=0)).ravel()
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, those of length 0 as they are."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's q values; NaN stays."""
    q, known = np.full(len(p), np.nan), ~np.isnan(p)
    if known.any():
        q[known] = false_discovery_control(p[known])
    return q
