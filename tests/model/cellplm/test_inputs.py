from __future__ import annotations

import numpy as np
import pytest

from cellprior.model.cellplm._inputs import sample_mask, sentences


def test_a_sentence_is_one_batch_and_every_cell_is_in_one():
    batch = np.array([2, 0, 2, 5, 0, 2])
    found = [cells.tolist() for cells in sentences(np.arange(10, 16), batch)]
    assert found == [[1, 4], [0, 2, 5], [3]]


def test_without_batches_all_cells_are_one_sentence():
    assert [cells.tolist() for cells in sentences(np.array([7, 3, 3]), None)] == [[0, 1, 2]]


@pytest.mark.parametrize("batch", [None, np.array([], dtype=int)])
def test_no_cells_make_no_sentence(batch):
    assert list(sentences(np.array([], dtype=int), batch)) == []


def test_masked_are_three_cells_in_four_and_a_beta_share_of_their_genes():
    mask = sample_mask(4000, 400, rng=np.random.default_rng(0))
    masked = mask.any(axis=1)
    assert masked.sum() == 3000
    assert 0.72 < masked[:1000].mean() < 0.78  # drawn from all over the sentence
    share = mask[masked].mean(axis=1)
    # Beta(5, 13): mean 5 / 18, variance 5 * 13 / (18² * 19), plus that of 400 draws
    assert share.mean() == pytest.approx(5 / 18, abs=0.006)
    assert share.var() == pytest.approx(65 / 6156 + (5 / 18 * 13 / 18 - 65 / 6156) / 400, rel=0.1)
    by_gene = mask[masked].mean(axis=0)  # every gene alike
    assert np.abs(by_gene - 5 / 18).max() < 5 * (share.mean() * (1 - share.mean()) / 3000) ** 0.5


def test_the_rates_can_be_set_and_no_cell_hides_more_than_nine_genes_in_ten():
    mask = sample_mask(200, 5000, rng=np.random.default_rng(0), cell_rate=0.5, gene_rate=0.999)
    share = mask.mean(axis=1)
    assert (share > 0).sum() == 100
    # Beta(5, 1.004) exceeds 0.9 in two cells of five
    assert share.max() < 0.92
    assert 0.25 < (share[share > 0] > 0.88).mean() < 0.6


def test_the_same_seed_gives_the_same_mask():
    first, second, other = (sample_mask(50, 20, rng=np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_a_single_cell_is_masked():
    assert sample_mask(1, 300, rng=np.random.default_rng(0)).any()
