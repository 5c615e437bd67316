"""What goes into CellPLM: sentences of cells, and the masks of its pretraining."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def sentences(rows: np.ndarray, batch: np.ndarray | None) -> Iterator[np.ndarray]:
    """Split cells into sentences, one per batch, or a single one without; gives increasing positions in ``rows``."""
    if batch is None:
        batch = np.zeros(len(rows), dtype=np.int64)
    for code in np.unique(batch):
        yield np.flatnonzero(batch == code)


def sample_mask(
    n_cells: int,
    n_genes: int,
    *,
    rng: np.random.Generator,
    cell_rate: float = 0.75,
    gene_rate: float = 0.25,
) -> np.ndarray:
    """Draw what pretraining hides ``(n_cells, n_genes)``, True = hidden.

    A share ``cell_rate`` of the cells, at least one, is masked. Each of them hides a gene, expressed or not, with
    a probability of its own from Beta(5, 4 / gene_rate - 3), whose mode is ``gene_rate``, at most 0.9.
    """
    mask = np.zeros((n_cells, n_genes), dtype=bool)
    cells = rng.permutation(n_cells)[: max(int(cell_rate * n_cells), 1)]
    rate = np.minimum(rng.beta(5.0, 4.0 / gene_rate + 2.0 - 5.0, size=len(cells)), 0.9)
    mask[cells] = rng.random((len(cells), n_genes), dtype=np.float32) < rate[:, None]
    return mask
