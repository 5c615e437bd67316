"""Controls of a link: peaks that a gene has nothing to do with, and that are like those around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellprior.genes._intervals import Intervals
from cellprior.genes._positions import Places

PROMOTER = 2_000  # base pairs from the start of a gene
MIN_CONTROLS = 50
BINS, WIDEST = 4096, 12.0  # of the controls' scores, in standard deviations


@dataclass(frozen=True, eq=False)
class Candidates:
    """Pairs of a gene and a peak within the window: their numbers, and the base pairs between, one entry each."""

    gene: np.ndarray
    peak: np.ndarray
    distance: np.ndarray


def is_promoter(genes: Places, peaks: Intervals) -> np.ndarray:
    """Which peaks lie within 2,000 base pairs of the start of any gene of the annotation ``(n_peaks,)``."""
    found = np.zeros(len(peaks.names), dtype=bool)
    middle = (peaks.start + peaks.end) // 2
    for name in pd.unique(peaks.chromosome[peaks.known]):
        on = np.flatnonzero(peaks.known & (peaks.chromosome == name))
        here = genes.known & (genes.chromosome == name)
        starts = np.sort(np.concatenate([genes.first[here], genes.last[here]]))
        n = np.searchsorted(starts, middle[on] + PROMOTER, "right") - np.searchsorted(
            starts, middle[on] - PROMOTER, "left"
        )
        found[on] = n > 0
    return found


def groups(is_promoter: np.ndarray, n_cells: np.ndarray, size: int) -> np.ndarray:
    """Number of the group of each peak: those near the start of a gene apart, by the cells that they are open in.

    Parameters
    ----------
    is_promoter
        Which peaks are near the start of a gene ``(n_peaks,)``.
    n_cells
        In how many cells each is open ``(n_peaks,)``.
    size
        Peaks of a group, about.
    """
    kinds = [is_promoter, ~is_promoter]
    if min(int(kind.sum()) for kind in kinds) < 2 * MIN_CONTROLS:  # too few for a group of their own
        kinds = [np.ones(len(n_cells), dtype=bool)]
    group, n_groups = np.zeros(len(n_cells), dtype=np.int64), 0
    for kind in kinds:
        of_kind = np.flatnonzero(kind)
        of_kind = of_kind[np.argsort(n_cells[of_kind], kind="stable")]
        parts = np.array_split(of_kind, max(len(of_kind) // size, 1))
        for part in parts:
            group[part] = n_groups
            n_groups += 1
    return group


class Background:
    """Scores of genes with peaks that they have nothing to do with: of other chromosomes, and alike.

    Parameters
    ----------
    genes, peaks
        Unit vectors ``(n, n_latent)``.
    gene_chromosome, peak_chromosome
        ``(n,)``.
    group
        Number of the group of each peak, whose members are alike, see :func:`groups`.
    """

    def __init__(
        self,
        genes: np.ndarray,
        peaks: np.ndarray,
        gene_chromosome: np.ndarray,
        peak_chromosome: np.ndarray,
        group: np.ndarray,
    ) -> None:
        self.genes, self.group = genes, group
        self.gene_chromosome, self.peak_chromosome = gene_chromosome, peak_chromosome
        self.members = [np.flatnonzero(group == i) for i in range(int(group.max()) + 1)]
        self.vectors = [peaks[members] for members in self.members]

    def of(self, pairs: Candidates, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and standard deviation of a pair's controls, and the share of controls that are as far above theirs.

        The controls of a pair are few, so how far they are above their mean, in their standard deviations, is counted
        over all genes that have a pair with a peak of the group.

        Parameters
        ----------
        pairs
            Genes and peaks.
        score
            Of each pair.
        """
        group = self.group[pairs.peak]
        mean, spread = np.full((2, len(score)), np.nan)
        standard = np.full(len(score), np.nan)
        above = np.zeros((len(self.members), BINS), dtype=np.int64)  # of the controls, by group
        key = pairs.gene * len(self.members) + group
        order = np.argsort(key, kind="stable")
        for of_both in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            gene, i = pairs.gene[of_both[0]], group[of_both[0]]
            others = self.peak_chromosome[self.members[i]] != self.gene_chromosome[gene]
            control = self.vectors[i][others] @ self.genes[gene]
            if len(control) < MIN_CONTROLS or not (sd := float(control.std(dtype=np.float64))) > 0:
                continue
            mean[of_both], spread[of_both] = control.mean(dtype=np.float64), sd
            standard[of_both] = (score[of_both] - mean[of_both[0]]) / sd
            above[i] += np.bincount(_bin((control - mean[of_both[0]]) / sd), minlength=BINS)
        above = above[:, ::-1].cumsum(axis=1)[:, ::-1]  # in this bin, or higher
        known = ~np.isnan(standard)
        p = np.full(len(score), np.nan)
        p[known] = (1 + above[group[known], _bin(standard[known])]) / (1 + above[group[known], 0])
        return mean, spread, p


def _bin(standard: np.ndarray) -> np.ndarray:
    scaled = (standard / WIDEST + 1) * (BINS / 2)
    return np.clip(scaled.astype(np.int64), 0, BINS - 1)
