import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData

from cellprior.evaluate._preserved import (
    neighbors_kept,
    partial_eta_squared,
    preserved,
    residual_components,
)


def test_an_embedding_keeps_all_neighbours_of_itself_and_those_of_chance_of_noise():
    rng = np.random.default_rng(0)
    x, groups = rng.standard_normal((300, 5)), [np.arange(150), np.arange(150, 300)]
    assert neighbors_kept(x, 3 * x, groups) == pytest.approx(1)
    assert neighbors_kept(rng.standard_normal((300, 5)), x, groups) == pytest.approx(0, abs=0.04)
    assert np.isnan(neighbors_kept(x, x, [np.arange(40)]))


def test_labels_and_noise_keep_neighbours_within_batches_but_none_within_types(cells):
    adata = cells(n_cells=600)
    rng = np.random.default_rng(0)
    codes = adata.obs["type"].astype("category").cat.codes.to_numpy()
    labels = 20 * np.eye(3)[codes] + rng.standard_normal((600, 3))
    expression = np.sqrt(adata.X.toarray())
    found = preserved(
        {"labels": labels, "expression": expression}, adata.X, codes, adata.obs["donor"].to_numpy()
    )
    assert found["labels"]["neighbours_kept"] > 0.1
    assert abs(found["labels"]["neighbours_kept_within_types"]) < 0.04
    assert found["expression"]["neighbours_kept_within_types"] > 0.1
    assert found["labels"]["variance_of_type"] > 0.9 > 0.1 > found["labels"]["variance_of_batch"]


def test_residuals_are_those_of_scanpy():
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (60, 40)).astype(np.float32))
    adata = AnnData(counts.toarray())
    sc.experimental.pp.normalize_pearson_residuals(adata)
    x = adata.X - adata.X.mean(axis=0)
    found = residual_components(counts, np.arange(60))
    np.testing.assert_allclose(found @ found.T, x @ x.T, atol=0.02)


def test_shares_of_variance_are_those_that_each_adds_to_the_other():
    rng = np.random.default_rng(0)
    kind, batch = rng.integers(0, 3, 400), rng.integers(0, 2, 400)
    x = np.stack([2.0 * kind, 3.0 * batch], axis=1) + rng.standard_normal((400, 2))
    found = partial_eta_squared(x, kind, batch)
    error = 2 * 400  # two dimensions of variance 1
    assert found["type"] == pytest.approx(4 * kind.var() * 400 / (4 * kind.var() * 400 + error), abs=0.05)
    assert found["batch"] == pytest.approx(9 * batch.var() * 400 / (9 * batch.var() * 400 + error), abs=0.05)
    assert partial_eta_squared(x, kind, kind)["type"] == pytest.approx(0, abs=1e-9)
