"""Bins, draws and tokens; compared with the original in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest

from cellprior.model.scgpt._inputs import (
    MASK,
    PAD,
    Counts,
    TokenArrays,
    bin_bounds,
    bins_of,
    draw_of,
    sample_mask,
    sample_tokens,
    tokenize,
    with_silent_genes,
)

KNOWN = [0.5241815285823275, 0.4190557575668348, 0.6166781232231303]  # splitmix64 of 0, 1 and 2


def cells(*of_each: list[int], n_genes: int = 1000, seed: int = 0) -> Counts:
    """Cells with these counts, of random genes in increasing order."""
    rng = np.random.default_rng(seed)
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in of_each])])
    gene = [np.sort(rng.choice(n_genes, len(cell), replace=False)) for cell in of_each]
    value = np.array([x for cell in of_each for x in cell], dtype=np.float32)
    return Counts(indptr, np.concatenate([*gene, np.empty(0, dtype=np.int64)]), value)


def one(counts: Counts, i: int) -> Counts:
    part = slice(counts.indptr[i], counts.indptr[i + 1])
    return Counts(np.array([0, part.stop - part.start]), counts.gene[part], counts.value[part])


def random_cells(n: int = 60) -> Counts:
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, 400, n)
    return cells(*((rng.poisson(rng.gamma(0.5, 4.0, size)) + 1).tolist() for size in sizes))


def test_bins_lie_between_the_quantiles_as_numpy_has_them_whatever_the_values():
    counts = random_cells()
    for value in (counts.value, np.log1p(counts.value / 7).astype(np.float32)):
        counts = counts._replace(value=value)
        left, right = bin_bounds(counts)
        for i in range(len(counts.indptr) - 1):
            part = slice(counts.indptr[i], counts.indptr[i + 1])
            if part.start < part.stop:
                edges = np.quantile(value[part], np.linspace(0, 1, 50))
                np.testing.assert_array_equal(left[part], np.digitize(value[part], edges))
                np.testing.assert_array_equal(right[part], np.digitize(value[part], edges, right=True))


def test_a_single_gene_may_be_in_any_bin_and_an_empty_cell_has_none():
    left, right = bin_bounds(cells([], [7], []))
    assert (left.tolist(), right.tolist()) == ([50], [0])
    found = tokenize(cells([], [7], []), n_genes=1000)
    assert found.length.tolist() == [1, 2, 1]
    assert found.gene[0].tolist() == [1001, 1000]
    assert found.value[0].tolist() == [PAD, PAD]


@pytest.mark.parametrize("ties", ["fixed", "middle", "upper", "random"])
def test_a_cell_has_the_same_bins_alone_and_in_any_company(ties):
    counts = random_cells()
    together = bins_of(counts, ties=ties, seed=3)
    for i in (0, 5, 59):
        alone = bins_of(one(counts, i), ties=ties, seed=3)
        np.testing.assert_array_equal(alone, together[counts.indptr[i] : counts.indptr[i + 1]])
    left, right = bin_bounds(counts)
    assert (together <= left).all()
    assert (together >= np.minimum(right + 1, left)).all()


def test_ties_are_broken_as_asked_for():
    counts = cells([1] * 80 + [2] * 20)
    left, right = bin_bounds(counts)
    assert (right[0], left[0]) == (0, 40)
    assert set(bins_of(counts, ties="upper")[:80]) == {40}
    assert set(bins_of(counts, ties="middle")[:80]) == {20}
    fixed = bins_of(counts, ties="fixed")[:80]
    expected = np.ceil(draw_of(counts.gene[:80]) * (right - left)[:80] + left[:80])
    np.testing.assert_array_equal(fixed, expected)
    assert len(set(fixed)) > 15
    again = cells([1] * 80 + [3] * 20)  # another cell with these genes
    np.testing.assert_array_equal(bins_of(again, ties="fixed")[:80], fixed)


def test_random_draws_depend_on_the_seed_the_gene_and_the_cell():
    counts = cells([1] * 50, [1] * 49 + [2])
    first, other = bins_of(counts, ties="random"), bins_of(counts, ties="random", seed=1)
    assert (first != other).mean() > 0.8
    same_genes = Counts(counts.indptr, np.tile(counts.gene[:50], 2), counts.value)
    found = bins_of(same_genes, ties="random")
    assert (found[:49] != found[50:99]).mean() > 0.8


def test_draws_are_the_same_on_every_machine_and_look_uniform():
    draws = draw_of(np.arange(60_000))
    assert draws[:3].tolist() == KNOWN
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(np.histogram(draws, 10, (0, 1))[0] / 6000 - 1).max() < 0.05
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.02


def test_max_genes_keeps_genes_by_one_order_for_all_cells_and_the_bins_of_the_whole_cell():
    counts = random_cells()
    whole = tokenize(counts, n_genes=1000)
    of_cell = [set(row[1:n]) for row, n in zip(whole.gene, whole.length, strict=True)]
    kept = {}
    for k in (20, 50):
        some = tokenize(counts, n_genes=1000, max_genes=k)
        assert some.gene.shape[1] == k + 1
        kept[k] = [set(row[1:n]) for row, n in zip(some.gene, some.length, strict=True)]
        assert [len(genes) for genes in kept[k]] == [min(len(genes), k) for genes in of_cell]
        for i, n in enumerate(some.length):
            pairs = zip(some.gene[i, :n], some.value[i, :n], strict=True)
            assert set(pairs) <= set(zip(whole.gene[i], whole.value[i], strict=True))
    assert all(few <= more for few, more in zip(kept[20], kept[50], strict=True))
    for i in range(30):  # of two genes that two cells have, they do not keep one each
        for j in range(i):
            both = of_cell[i] & of_cell[j]
            only_i, only_j = both & kept[50][i] - kept[50][j], both & kept[50][j] - kept[50][i]
            assert not (only_i and only_j)


@pytest.mark.parametrize(
    ("how", "message"), [({"max_genes": 0}, "max_genes=0"), ({"ties": "low"}, "ties='low'")]
)
def test_what_cannot_be_meant_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        tokenize(cells([1, 2]), n_genes=1000, **how)


def test_a_share_of_the_genes_of_each_cell_is_masked_and_never_the_class_token():
    tokens = tokenize(random_cells(), n_genes=1000)
    mask = sample_mask(tokens.value, 0.4, np.random.default_rng(0))
    assert not mask[:, 0].any()
    assert not mask[tokens.gene == 1000].any()
    np.testing.assert_array_equal(mask.sum(1), (0.4 * (tokens.length - 1)).astype(int))
    assert MASK not in tokens.value


def test_silent_genes_get_tokens_of_bin_0():
    tokens = tokenize(cells([1, 2, 3], [4], n_genes=10), n_genes=10)
    measured = np.arange(0, 10)
    found = with_silent_genes(tokens, measured, 10)
    assert found.gene.shape == (2, 11)
    assert found.length.tolist() == [11, 11]
    for i in (0, 1):
        bins = dict(zip(found.gene[i], found.value[i], strict=True))
        assert bins.pop(11) == PAD
        expressed = dict(
            zip(tokens.gene[i, 1 : tokens.length[i]], tokens.value[i, 1 : tokens.length[i]], strict=True)
        )
        assert {gene: b for gene, b in bins.items() if b} == expressed


def test_sampled_tokens_are_some_of_the_cell_and_short_cells_are_whole():
    tokens = tokenize(random_cells(), n_genes=1000)
    some = sample_tokens(tokens, 30, np.random.default_rng(0))
    assert isinstance(some, TokenArrays)
    assert some.gene.shape[1] == 31
    assert (some.gene[:, 0] == 1001).all()
    for i, n in enumerate(some.length):
        assert n == min(tokens.length[i], 31)
        pairs = set(zip(some.gene[i, :n], some.value[i, :n], strict=True))
        assert len(pairs) == n
        assert pairs <= set(zip(tokens.gene[i], tokens.value[i], strict=True))
        assert (some.gene[i, n:] == 1000).all()
