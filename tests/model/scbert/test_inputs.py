from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellprior.model.data._counts import csr_tensor
from cellprior.model.engine._kernels import cell_depth
from cellprior.model.scbert._inputs import counts_to_bins, loses_single_counts, sample_mask


def exact_bins(counts: np.ndarray, n_bins: int = 5) -> np.ndarray:
    """By fractions: bin k starts where the scaled count is 2^k - 1."""
    bins = np.zeros(counts.shape, dtype=int)
    for i, cell in enumerate(counts.astype(int)):
        for j, x in enumerate(cell):
            scaled = Fraction(10_000 * int(x), max(int(cell.sum()), 1))
            bins[i, j] = sum(scaled >= 2**k - 1 for k in range(1, n_bins + 1))
    return bins


def some_counts(n_cells: int = 30, n_genes: int = 70) -> np.ndarray:
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0, 2, (n_cells, n_genes)) * rng.choice([0.1, 3, 300], (n_cells, 1))
    counts = rng.poisson(rate)
    counts[4] = 0
    return counts.astype(np.float32)


@pytest.mark.parametrize("n_bins", [1, 5, 8])
def test_bins_are_those_of_exact_arithmetic_whether_counts_are_dense_or_sparse(n_bins):
    counts = some_counts()
    expected = exact_bins(counts, n_bins)
    assert expected.max() == n_bins
    for x in (torch.from_numpy(counts), csr_tensor(sp.csr_matrix(counts))):
        bins = counts_to_bins(x, n_bins)
        assert bins.dtype == torch.uint8
        np.testing.assert_array_equal(bins, expected)


@pytest.mark.parametrize("depth", [10_000, 30_000, 70_000, 330_000, 2_110_000, 16_170_000])
def test_a_scaled_count_that_is_an_edge_lands_in_the_upper_bin_and_one_count_less_does_not(depth):
    factor = depth // 10_000
    edges = np.array([1, 3, 7, 15, 31])
    for step, expected in ((0, [1, 2, 3, 4, 5]), (-1, [0, 1, 2, 3, 4])):
        counts = np.append(factor * edges + step, 0)
        counts[-1] = depth - counts.sum()
        bins = counts_to_bins(torch.tensor(counts[None], dtype=torch.float32))
        np.testing.assert_array_equal(bins[0, :-1], expected)


def test_a_cell_without_counts_is_all_zero_and_depth_is_its_sum():
    counts = some_counts()
    for x in (torch.from_numpy(counts), csr_tensor(sp.csr_matrix(counts))):
        np.testing.assert_array_equal(cell_depth(x), counts.sum(1))
    assert not counts_to_bins(torch.from_numpy(counts))[4].any()


def test_single_counts_are_lost_in_the_cells_of_which_it_is_said():
    counts = torch.zeros(4, 3)
    counts[:, 0] = 1
    counts[:, 1] = torch.tensor([5.0, 9_999.0, 10_000.0, 60_000.0])
    lost = loses_single_counts(cell_depth(counts))
    np.testing.assert_array_equal(lost, [False, False, True, True])
    np.testing.assert_array_equal(counts_to_bins(counts)[:, 0] == 0, lost)


def some_tokens(n_cells: int = 300, n_genes: int = 400) -> np.ndarray:
    rng = np.random.default_rng(1)
    share = rng.random((n_cells, 1))
    share[0], share[1] = 0, 1
    return rng.integers(1, 6, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < share)


def test_selected_are_15_in_100_expressed_genes_of_every_cell_rounded_up():
    tokens = some_tokens()
    mask = sample_mask(tokens, np.random.default_rng(0))
    expected = torch.from_numpy((tokens > 0).sum(1)).mul(0.15).ceil()  # float32, as the original computes it
    np.testing.assert_array_equal(mask.selected.sum(1), expected)
    assert not mask.selected[tokens == 0].any()
    assert not mask.selected[0].any()
    assert (mask.selected | ~mask.replaced).all()


def test_rounding_is_that_of_float32_which_is_one_more_for_some_numbers_of_genes():
    n_expressed = np.arange(16_908)
    exact = -(-3 * n_expressed // 20)
    rounded = np.ceil(n_expressed.astype(np.float32) * np.float32(0.15))
    assert (rounded != exact).sum() == 336
    assert n_expressed[rounded != exact][0] == 100
    mask = sample_mask(np.ones((1, 100)), np.random.default_rng(0))
    assert mask.selected.sum() == 16


def test_every_expressed_gene_is_as_likely_and_nine_in_ten_are_replaced():
    tokens = np.tile(np.arange(40) % 7, (20_000, 1))  # bins 1 to 5, the mask token 6, and 0
    mask = sample_mask(tokens, np.random.default_rng(0))
    candidates = (tokens[0] > 0) & (tokens[0] < 6)
    share = mask.selected.mean(axis=0)
    assert not share[~candidates].any()
    k, n = 5, int(candidates.sum())  # ceil(0.15 * 29)
    assert n == 29
    assert np.abs(share[candidates] - k / n).max() < 5 * (k / n * (1 - k / n) / 20_000) ** 0.5
    assert mask.replaced.sum() / mask.selected.sum() == pytest.approx(0.9, abs=0.005)


def test_the_rates_can_be_set_and_the_same_seed_gives_the_same_mask():
    tokens = some_tokens()
    masks = [sample_mask(tokens, np.random.default_rng(seed), rate=0.5, replace=1.0) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(masks[0].selected, masks[0].replaced)
    np.testing.assert_array_equal(masks[0].selected.sum(1), np.ceil((tokens > 0).sum(1) / 2))
    np.testing.assert_array_equal(masks[0].selected, masks[1].selected)
    assert (masks[0].selected != masks[2].selected).any()
