"""What data are known again by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from cellprior.model.data._counts import read_rows

N_SAMPLED = 64  # cells of which every count goes into a fingerprint


def digest(*parts: np.ndarray | Iterable[object]) -> str:
    """Short sha256 of arrays of numbers and of names."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray) and part.dtype.kind in "iufb":
            found.update(np.ascontiguousarray(part).tobytes())
        else:
            found.update("".join(f"{name}\0" for name in part).encode(errors="surrogatepass"))
        found.update(b"\1")
    return found.hexdigest()[:16]


def digest_of_counts(x: Any) -> str:
    """Fingerprint of a matrix ``(cells, genes)`` that does not read all of it.

    Its shape; how many values each cell has, where it is sparse and on disk or in memory cell by cell; and all values
    of 64 cells, evenly spaced. A change in other cells that leaves the number of values of each as it was goes
    unnoticed.
    """
    parts = [np.asarray(x.shape, dtype=np.int64)]
    if isinstance(x, ad.abc.CSRDataset):
        parts.append(np.asarray(x.group["indptr"][:], dtype=np.int64))
    elif sp.issparse(x) and x.format == "csr":
        parts.append(x.indptr.astype(np.int64))
    rows = np.unique(np.linspace(0, x.shape[0] - 1, N_SAMPLED).astype(np.int64))
    cells = read_rows(x, rows)
    cells.eliminate_zeros()
    return digest(*parts, *(part.astype(np.int64) for part in (cells.indptr, cells.indices)), cells.data)
