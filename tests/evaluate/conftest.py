from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData


@pytest.fixture(scope="session")
def cells() -> Callable[..., AnnData]:
    """Counts of cells of some types, in batches of other depths; types show in the counts."""

    def make(n_cells: int = 240, *, n_types: int = 3, n_genes: int = 120, signal: float = 1.0) -> AnnData:
        rng = np.random.default_rng(0)
        kind, batch = rng.integers(0, n_types, n_cells), rng.integers(0, 3, n_cells)
        profiles = np.exp(signal * rng.standard_normal((n_types, n_genes)))
        shift = np.exp(0.3 * rng.standard_normal((3, n_genes)))
        rate = profiles[kind] * shift[batch]
        counts = rng.poisson(200 * rate / rate.sum(axis=1, keepdims=True)).astype(np.float32)
        obs = pd.DataFrame(
            {"type": [f"type {k}" for k in kind], "donor": [f"donor {b}" for b in batch]},
            index=[f"cell {i}" for i in range(n_cells)],
        )
        return AnnData(
            sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
        )

    return make
