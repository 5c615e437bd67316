"""Cells of types that overlap, and a small network for them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

N_GENES = 100
NETWORK = {"n_hidden": 32, "n_layers": 2, "n_heads": 2, "n_latent": 8, "dropout_rate": 0.1}
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
TYPES = ("B", "NK", "T")


def make_cells(n_cells: int, *, seed: int = 0, depth: float = 60.0, fold: float = 2.0) -> AnnData:
    """Three types, which differ by ``fold`` in a third of their genes each, in two batches."""
    own = np.random.default_rng(1)
    rate = own.gamma(1.0, 1.0, size=N_GENES) * np.where(own.random((3, N_GENES)) < 0.3, fold, 1.0)
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n_cells)
    counts = rng.poisson(depth * rate[kind] / rate[kind].sum(axis=1, keepdims=True)).astype(np.float32)
    obs = pd.DataFrame(
        {"kind": np.array(TYPES)[kind], "batch": rng.choice(["a", "b"], n_cells)},
        index=[f"cell {i} of {seed}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)])
    return AnnData(sp.csr_matrix(counts), obs=obs, var=var)
