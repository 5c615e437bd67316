from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellprior.model.data._counts import csr_tensor
from cellprior.model.engine import _kernels
from cellprior.model.engine._kernels import log_counts, weighted_gene_sum

DENSITIES = [0.0, 0.01, 0.1, 0.5, 1.0]


def some_counts(density: float, n_cells: int = 40, n_genes: int = 90) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 300, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density)
    x[7] = 0
    return x.astype(np.float32)


@pytest.fixture(params=["sparse product", "made dense"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a sparse chunk, whatever its density."""
    limit = 2.0 if request.param == "sparse product" else -1.0
    monkeypatch.setattr(_kernels, "BREAK_EVEN_DENSITY", {torch.float32: limit, torch.bfloat16: limit})


def test_the_gene_sum_of_a_sparse_chunk_is_that_of_a_dense_one_and_of_numpy(route):
    table = np.random.default_rng(1).normal(size=(90, 16)).astype(np.float32)
    for density in DENSITIES:
        counts = some_counts(density)
        truth = np.log1p(counts.astype(np.float64)) @ table.astype(np.float64)
        for x in (torch.from_numpy(counts), csr_tensor(sp.csr_matrix(counts))):
            found = weighted_gene_sum(log_counts(x, None), torch.from_numpy(table))
            np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-4, err_msg=f"{density}")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("indices", ["sorted", "unsorted"])
def test_blocks_of_genes_are_the_columns_of_the_counts_in_order(density, indices):
    x = sp.csr_matrix(some_counts(density))
    if indices == "unsorted":
        for start, end in zip(x.indptr, x.indptr[1:], strict=False):
            x.indices[start:end] = x.indices[start:end][::-1].copy()
            x.data[start:end] = x.data[start:end][::-1].copy()
        x.has_sorted_indices = False
    for size in (1, 7, 30, 90, 1000):
        blocks = list(_kernels._blocks_of_genes(x, size))
        assert [start for start, _ in blocks] == list(range(0, 90, size))
        for start, (pointers, columns, values) in blocks:
            expected = sp.csc_matrix(some_counts(density))[:, start : start + size].tocsr()
            np.testing.assert_array_equal(pointers, expected.indptr)
            np.testing.assert_array_equal(columns, expected.indices)
            np.testing.assert_array_equal(values, expected.data)
    np.testing.assert_array_equal(x.toarray(), some_counts(density))  # the input is left as it was


def test_the_depth_of_cells_is_added_up_from_the_first_gene_on_and_goes_to_each_value():
    counts = 0.1 * some_counts(0.3)
    x = csr_tensor(sp.csr_matrix(counts))
    one_by_one = np.add.accumulate(counts, axis=1, dtype=np.float32)[:, -1]
    np.testing.assert_array_equal(_kernels.cell_depth(x), one_by_one)
    np.testing.assert_allclose(_kernels.cell_depth(torch.from_numpy(counts)), one_by_one, rtol=1e-6)
    row = counts.nonzero()[0]
    np.testing.assert_array_equal(_kernels.for_each(x, torch.from_numpy(one_by_one)), one_by_one[row])
    np.testing.assert_array_equal(_kernels.row_of_each(x), row)


@pytest.mark.parametrize("target_sum", [None, 1e4, 50.0])
def test_logarithms_of_scaled_counts_are_those_of_numpy(target_sum):
    for density in DENSITIES:
        counts = some_counts(density)
        scaled = counts.astype(np.float64)
        if target_sum is not None:
            scaled *= target_sum / np.maximum(scaled.sum(1, keepdims=True), 1)
        sparse = csr_tensor(sp.csr_matrix(counts))
        for x in (torch.from_numpy(counts), sparse):
            found = log_counts(x, target_sum).to_dense()
            np.testing.assert_allclose(found, np.log1p(scaled), rtol=1e-5, err_msg=f"{density}")
        np.testing.assert_array_equal(sparse.to_dense(), counts)  # the input is left as it was


def test_with_a_target_sum_sequencing_depth_does_not_matter():
    counts = torch.from_numpy(some_counts(0.2))
    torch.testing.assert_close(log_counts(7 * counts, 1e4), log_counts(counts, 1e4))


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_under_autocast_the_gene_sum_is_close_and_works_on_either_route(route, density):
    counts = some_counts(density)
    table = torch.randn(90, 16, generator=torch.Generator().manual_seed(0))
    exact = log_counts(torch.from_numpy(counts), None) @ table
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_gene_sum(
            log_counts(csr_tensor(sp.csr_matrix(counts)), None), table.bfloat16()
        ).float()
    some = counts.any(1)
    cosine = torch.cosine_similarity(found[some], exact[some])
    assert cosine.min() > 0.9995
    assert not found[7].any()


def test_the_gene_sum_has_the_gradient_of_a_dense_product(route):
    counts = some_counts(0.2)
    gradients = []
    for x in (torch.from_numpy(counts), csr_tensor(sp.csr_matrix(counts))):
        table = torch.ones(90, 4, requires_grad=True)
        weighted_gene_sum(log_counts(x, None), table).square().sum().backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients)
