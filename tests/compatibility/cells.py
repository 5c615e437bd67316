"""Made-up cells that every version makes alike, without random numbers whose stream might change."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from cellprior._compat import without_pulled_columns

N_CELLS, N_GENES, N_PEAKS = 60, 40, 50
NAMES = [f"cell{i}" for i in range(N_CELLS)]
KIND = np.arange(N_CELLS) % 3


def counts(n_features: int) -> sp.csr_matrix:
    """Counts 0 to 6, by whole numbers alone; every third feature is high in each of three kinds of cell."""
    cell, feature = np.ogrid[:N_CELLS, :n_features]
    noise = (cell * 7919 + feature * 104729 + cell * feature * 31) % 101 % 4
    return sp.csr_matrix((noise + 3 * (feature % 3 == cell % 3)).astype(np.float32))


def rna() -> AnnData:
    """RNA, with labels and batches."""
    obs = pd.DataFrame(
        {"kind": [f"kind {k}" for k in KIND], "sample": np.where(np.arange(N_CELLS) % 2, "odd", "even")},
        index=NAMES,
    )
    return AnnData(counts(N_GENES), obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))


def multiome() -> MuData:
    """RNA and ATAC."""
    genes = AnnData(counts(N_GENES), obs=pd.DataFrame(index=NAMES), var=rna().var)
    names = [f"chr1:{10_000 * i}-{10_000 * i + 400}" for i in range(N_PEAKS)]
    peaks = AnnData(counts(N_PEAKS), obs=pd.DataFrame(index=NAMES), var=pd.DataFrame(index=names))
    with without_pulled_columns():
        return MuData({"rna": genes, "atac": peaks})
