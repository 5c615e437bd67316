"""Small multiomes, made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from cellprior._compat import without_pulled_columns

N_CELLS, N_GENES, N_PEAKS = 160, 60, 240
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}


def multiome(modalities: dict[str, AnnData], obs: pd.DataFrame | None = None) -> MuData:
    """A MuData, without the announcement of mudata that columns will no longer be copied to the top."""
    with without_pulled_columns():
        mdata = MuData(modalities)
    if obs is not None:
        mdata.obs = obs.loc[mdata.obs_names]
    return mdata


def peak_names(n: int = N_PEAKS) -> list[str]:
    return [f"chr{1 + i % 4}:{10_000 * i + 500}-{10_000 * i + 900}" for i in range(n)]


def cells(n_cells: int = N_CELLS, *, seed: int = 0) -> MuData:
    """Cells of four types in two batches; types show in both modalities."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, n_cells)
    profiles = np.random.default_rng(1)  # the same types, whichever cells are drawn
    counts = {}
    for name, n, depth in (("rna", N_GENES, 150), ("atac", N_PEAKS, 60)):
        profile = profiles.dirichlet(np.full(n, 0.3), 4)
        x = np.stack([rng.multinomial(depth, profile[k]) for k in kind])
        counts[name] = sp.csr_matrix(x.astype(np.float32))
    names = [f"cell{i}" for i in range(n_cells)]
    obs = pd.DataFrame(
        {"type": pd.Categorical([f"type {k}" for k in kind]), "batch": [f"b{i % 2}" for i in range(n_cells)]},
        index=names,
    )
    var = {"rna": [f"GENE{i}" for i in range(N_GENES)], "atac": peak_names()}
    return multiome(
        {
            name: AnnData(x, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=var[name]))
            for name, x in counts.items()
        },
        obs,
    )


def part(mdata: MuData, modality: str, rows: np.ndarray, columns: np.ndarray | None = None) -> AnnData:
    """Cells, and features, of one modality, in the order given."""
    adata = mdata.mod[modality]
    return adata[rows].copy() if columns is None else adata[rows][:, columns].copy()
