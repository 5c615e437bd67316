"""Counts above 0, cell by cell, for models that make tokens of them; and draws that depend on nothing else."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Counts(NamedTuple):
    """Counts above 0, cell by cell, in increasing order of the genes."""

    indptr: np.ndarray  # where each cell begins, and the end      (cells + 1,)
    gene: np.ndarray  # vocabulary row, int64                      (entries,)
    value: np.ndarray  # float32                                   (entries,)

    @property
    def cell(self) -> np.ndarray:
        """Cell of each entry."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))


def entries_of(counts: Tensor, gene_index: Tensor | None) -> Counts:
    """Counts above 0 of a matrix ``(cells, genes)``, dense or CSR, by vocabulary row."""
    if counts.layout is torch.strided:
        counts = counts.cpu()
        row, column = counts.nonzero(as_tuple=True)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (counts != 0).sum(1).cumsum(0)])
        gene, value = column.numpy(), counts[row, column].numpy()
    else:
        indptr = counts.crow_indices().cpu().long()
        gene, value = counts.col_indices().cpu().long().numpy(), counts.values().cpu().numpy()
        if not value.all():  # zeros that were stored
            stored = value != 0
            indptr = torch.from_numpy(np.concatenate([[0], np.cumsum(stored)]))[indptr]
            gene, value = gene[stored], value[stored]
    if gene_index is not None:
        gene = gene_index.cpu().long().numpy()[gene]
    return Counts(indptr.numpy(), gene, value)


def entries(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cell, column and value of counts that are not 0, by cell and then by column."""
    if counts.layout is torch.strided:
        row, gene = counts.nonzero(as_tuple=True)
        return row, gene, counts[row, gene]
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts.crow_indices().diff())
    gene, value = counts.col_indices().long(), counts.values()
    return row[value != 0], gene[value != 0], value[value != 0]


def scramble(number: np.ndarray) -> np.ndarray:
    """Well mixed bits of whole numbers, uint64: splitmix64 [Steele, Lea & Flood, OOPSLA 2014]."""
    with np.errstate(over="ignore"):
        z = (number.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def unit_interval(bits: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) of well mixed bits, float64."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keys_of_cells(counts: Counts, seed: int, gene: np.ndarray | None = None) -> np.ndarray:
    """A number for each cell that depends on a seed and on all counts of the cell, uint64 ``(cells,)``.

    ``gene`` is what each gene is known by, by vocabulary row; by default the row. The counts are above 0.
    """
    bits = counts.value.astype(np.float32).view(np.uint32).astype(np.uint64)
    mixed = scramble(scramble(counts.gene if gene is None else gene[counts.gene]) ^ bits)
    total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])  # wraps around
    of_cell = total[counts.indptr[1:]] - total[counts.indptr[:-1]]
    return scramble(of_cell ^ scramble(np.asarray(seed)))
