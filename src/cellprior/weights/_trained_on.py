"""Whether weights were trained on some cells: a number for each by which it is known again, and nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from cellprior.weights._registry import WeightsError

if TYPE_CHECKING:
    import os

TRAINED_ON = "trained_on.npy"
# of a gene to be read: the genes that are left out of data as too rare have less in nearly all cells
LEAST_COUNT = 2
LEAST_GENES = 10  # of a cell to be known again: with fewer, cells of different people would be the same


def fingerprints(counts: sp.csr_matrix, genes: np.ndarray) -> np.ndarray:
    """Numbers by which cells are known again, of the genes that have at least two counts in a cell.

    The same cell has the same number in any file, whatever the order of its genes, and whatever genes of no or one
    count were left out. Two cells have the same by chance once in four billion pairs.

    Parameters
    ----------
    counts
        Raw counts ``(cells, columns)``.
    genes
        Number of each column's gene in the vocabulary of the weights, -1 if it has none ``(columns,)``, as
        ``model.gene_match.index``. Columns of one gene are summed.

    Returns
    -------
    uint32 ``(cells,)``; 0 for a cell of which fewer than ten genes have two counts.
    """
    known = np.flatnonzero(np.asarray(genes) >= 0)
    vocabulary, column = np.unique(np.asarray(genes)[known], return_inverse=True)
    place = sp.csr_matrix(
        (np.ones(len(known)), (known, column)), shape=(counts.shape[1], max(len(vocabulary), 1))
    )
    x = sp.csr_matrix(counts, dtype=np.float64) @ place
    n = np.rint(x.data).astype(np.uint64)
    read = n >= LEAST_COUNT
    each = _mixed((vocabulary.astype(np.uint64)[x.indices] << np.uint64(32)) + n) * read
    # of what is added, whole numbers wrap
    ends = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(each)])
    found = _mixed(ends[x.indptr[1:]] - ends[x.indptr[:-1]]) >> np.uint64(32)
    n_genes = np.diff(np.concatenate([[0], np.cumsum(read)])[x.indptr])
    return np.where(n_genes >= LEAST_GENES, np.maximum(found, 1), 0).astype(np.uint32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits, well mixed [Steele et al., Fast splittable pseudorandom number generators, 2014]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def write_trained_on(folder: str | os.PathLike[str], cells: np.ndarray) -> Path:
    """Put the numbers of the cells that weights were trained on into their bundle.

    Parameters
    ----------
    folder
        The bundle. Its hash stays as it is.
    cells
        Of :func:`fingerprints`, in any order.
    """
    path = Path(folder) / TRAINED_ON
    np.save(path, np.setdiff1d(np.asarray(cells, dtype=np.uint32), [0]))
    return path


def read_trained_on(folder: str | os.PathLike[str]) -> np.ndarray | None:
    """Numbers of the cells that weights were trained on, uint32; None if they do not say.

    Raises WeightsError if the file is damaged.
    """
    path = Path(folder) / TRAINED_ON
    if not path.is_file():
        return None
    try:
        # as a map: no memory is taken for what the file has not
        cells = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        msg = f"{path} is damaged ({error}). Get the bundle again."
        raise WeightsError(msg) from error
    if cells.ndim != 1 or cells.dtype != np.uint32:
        msg = f"{path} holds {cells.dtype} of shape {cells.shape}; needed: uint32, one for each cell."
        raise WeightsError(msg)
    return np.array(cells[cells > 0])
