from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellprior.model.data._counts import csr_tensor
from cellprior.model.multiomeclip._inputs import (
    components_of,
    inverse_document_frequency,
    log_share,
    open_peaks,
)


@pytest.fixture
def counts() -> sp.csr_matrix:
    x = np.random.default_rng(0).poisson(0.7, (12, 9)).astype(np.float32)
    x[3] = 0
    return sp.csr_matrix(x)


def dense(x: torch.Tensor) -> np.ndarray:
    return (x.to_dense() if x.layout == torch.sparse_csr else x).numpy()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_shares_are_of_ten_thousand_and_an_empty_cell_stays_empty(counts, layout, weighted):
    x = counts.toarray().astype(np.float64)
    weight = np.linspace(0.5, 3, 9) if weighted else np.ones(9)
    expected = np.log1p(x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4 * weight)
    given = csr_tensor(counts) if layout == "sparse" else torch.from_numpy(counts.toarray())
    found = log_share(given, weight=torch.from_numpy(weight).float() if weighted else None)
    assert found.layout == given.layout
    np.testing.assert_allclose(dense(found), expected, rtol=1e-5)
    assert (dense(found)[3] == 0).all()


def test_open_peaks_are_those_with_counts_even_if_zeros_are_stored(counts):
    counts.data[0] = 0
    for given in (csr_tensor(counts), torch.from_numpy(counts.toarray())):
        np.testing.assert_array_equal(dense(open_peaks(given)), counts.toarray() > 0)


def test_rare_peaks_weigh_more_and_closed_ones_nothing():
    found = inverse_document_frequency(np.array([0, 1, 50, 100]), 100)
    np.testing.assert_allclose(found, [0, np.log(101), np.log(3), np.log(2)])


def low_rank(n_cells: int, depth: np.ndarray) -> sp.csr_matrix:
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 3, n_cells)
    profile = rng.random((3, 40)) ** 4
    return sp.csr_matrix(depth[:, None] * profile[groups] + 0.01 * rng.random((n_cells, 40)))


def test_components_are_those_of_the_svd():
    values = low_rank(60, np.ones(60))
    random_depth = np.random.default_rng(2).integers(100, 1000, 60)
    found, mean, spread = components_of(values, random_depth, 3, seed=0)
    _, _, exact = np.linalg.svd(values.toarray(), full_matrices=False)
    np.testing.assert_allclose(np.abs(exact[:3] @ found), np.eye(3), atol=1e-4)
    scores = values @ found
    np.testing.assert_allclose(mean, scores.mean(axis=0), rtol=1e-4)
    assert spread == pytest.approx(np.sqrt(scores.var(axis=0).mean()), rel=1e-4)


def test_a_first_component_that_is_the_depth_is_left_out():
    depth = np.random.default_rng(3).integers(1, 50, 80)
    values = low_rank(80, depth.astype(float))
    found, _, _ = components_of(values, depth, 3, seed=0)
    _, _, exact = np.linalg.svd(values.toarray(), full_matrices=False)
    assert abs(np.corrcoef((values @ exact[0]), np.log1p(depth))[0, 1]) > 0.5
    np.testing.assert_allclose(np.abs(exact[1:4] @ found), np.eye(3), atol=1e-3)


@pytest.mark.parametrize("n_cells", [1, 2, 5])
def test_few_cells_give_few_components_and_the_others_are_zero(n_cells):
    values = low_rank(n_cells, np.ones(n_cells))
    found, mean, spread = components_of(values, np.ones(n_cells), 10, seed=0)
    assert found.shape == (40, 10) and mean.shape == (10,) and spread > 0
    assert (np.abs(found).sum(axis=0) > 0).sum() <= n_cells
    assert np.isfinite(found).all()
