"""UCE's sentences: draws that belong to a cell."""

from __future__ import annotations

import numpy as np
import pytest

from cellprior.model.data._entries import Counts
from cellprior.model.uce._inputs import (
    Genome,
    most_chromosomes,
    of_one_species,
    presence_task,
    sentences,
    weights_of,
)
from tests.parity.uce_golden import LENGTH, case_a


def counts_of(*cells: dict[int, float]) -> Counts:
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])])
    gene = np.array([g for cell in cells for g in sorted(cell)], dtype=np.int64)
    value = np.array([cell[g] for cell in cells for g in sorted(cell)], dtype=np.float32)
    return Counts(indptr, gene, value)


def genome(n: int = 40, n_chromosomes: int = 4, species: int = 1) -> Genome:
    gene = np.arange(n)
    chromosome = gene * n_chromosomes // n
    return Genome(gene + 100, chromosome, gene % 7, gene * species // n, 3 * np.arange(n_chromosomes))


def cell(seed: int) -> dict[int, float]:
    rng = np.random.default_rng(seed)
    return {int(g): float(rng.integers(1, 30)) for g in rng.choice(40, 25, replace=False)}


def genes_of(tokens: np.ndarray) -> np.ndarray:
    return tokens[tokens < 40]


def test_a_sentence_is_chromosomes_in_some_order_and_their_genes_by_start():
    where = genome()
    found = sentences(counts_of(cell(0)), where, length=50).token[0]
    assert found[0] == where.cls
    assert found[-1] == where.close
    opens = np.flatnonzero((found >= 40) & (found < where.close))
    assert len(found) == 1 + 50 + 2 * len(opens)
    for begin, end in zip(opens, [*opens[1:], len(found)], strict=True):
        genes = found[begin + 1 : end - 1]
        assert found[end - 1] == where.close
        assert (where.chromosome[genes] == found[begin] - 40).all()
        order = np.lexsort((where.number[genes], where.start[genes]))
        np.testing.assert_array_equal(order, np.arange(len(genes)))


@pytest.mark.parametrize("sampling", ["keyed", "systematic"])
def test_a_cell_has_its_sentences_in_any_company(sampling):
    how = {"length": 50, "n_draws": 3, "sampling": sampling, "seed": 4}
    together = sentences(counts_of(cell(0), {}, cell(1)), genome(), **how)
    alone = sentences(counts_of(cell(1)), genome(), **how)
    for i in range(3):
        n = alone.length[i]
        assert together.length[6 + i] == n
        np.testing.assert_array_equal(together.token[6 + i, :n], alone.token[i, :n])
    np.testing.assert_array_equal(together.token[3:6, 0], genome().cls)
    np.testing.assert_array_equal(together.length[3:6], 1)


def test_draws_depend_on_the_seed_the_draw_and_every_count():
    base = cell(0)
    more = {**base, 3: base.get(3, 0) + 1}
    found = [
        sentences(counts_of(cell), genome(), length=50, n_draws=2, seed=seed)
        for cell, seed in ((base, 0), (base, 1), (more, 0))
    ]
    texts = {row.tobytes() for each in found for row in np.sort(each.token[:, :56], axis=1)}
    assert len(texts) == 6


def test_draws_do_not_depend_on_which_other_species_a_vocabulary_has():
    """A gene is known by its number in the released files, not by its row."""
    where = genome()
    kept = np.arange(10, 40)
    chromosome = np.unique(where.chromosome[kept])
    part = Genome(
        where.number[kept],
        np.searchsorted(chromosome, where.chromosome[kept]),
        where.start[kept],
        where.species[kept],
        where.code[chromosome],
    )
    full = {g: v for g, v in cell(0).items() if g >= 10}
    one = sentences(counts_of(full), where, length=50).token[0]
    other = sentences(counts_of({g - 10: v for g, v in full.items()}), part, length=50).token[0]
    np.testing.assert_array_equal(genes_of(one), other[other < 30] + 10)


def test_genes_are_drawn_in_proportion_to_the_logarithm_of_their_counts():
    one = cell(0)
    found = sentences(counts_of(one), genome(), length=1000, n_draws=40).token
    share = np.bincount(genes_of(found.ravel()), minlength=40) / 40_000
    expected = np.zeros(40)
    genes = sorted(one)
    expected[genes] = weights_of(np.array([one[g] for g in genes], dtype=np.float32))
    np.testing.assert_allclose(share, expected, atol=5 * (0.05 / 40_000) ** 0.5)
    first = [row[1] for row in found]
    assert len(set(first)) == len(genome().code)  # every chromosome comes first at times


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_systematic_draws_give_each_gene_its_share_to_within_one(species):
    case = case_a()
    counts, where = case.counts(species), case.genome(species)
    found = sentences(counts, where, length=LENGTH, sampling="systematic")
    times = np.stack(
        [np.bincount(row[row < len(where.number)], minlength=len(where.number)) for row in found.token]
    )
    np.testing.assert_array_equal(times, case[f"{species}/times_drawn"])
    several = sentences(counts, where, length=LENGTH, sampling="systematic", n_draws=2).token
    assert (several[0::2] != several[1::2]).any()


def test_of_a_cell_with_genes_of_two_species_only_those_of_most_counts_are_kept():
    where = genome(species=2)  # rows 0 to 19, and 20 to 39
    counts, share = of_one_species(counts_of({1: 9, 2: 9, 30: 2}, {3: 1, 25: 8}, {}), where.species)
    np.testing.assert_array_equal(counts.gene, [1, 2, 25])
    np.testing.assert_array_equal(counts.indptr, [0, 2, 3, 3])
    np.testing.assert_allclose(share, [0.9, 8 / 9, 1])


def test_a_cell_on_more_chromosomes_than_a_sentence_has_room_for_is_refused():
    assert most_chromosomes(1024) == 255
    n = 300
    where = Genome(np.arange(n), np.arange(n), np.zeros(n, int), np.zeros(n, int), np.arange(n))
    fits = sentences(counts_of(dict.fromkeys(range(200), 1.0)), where)
    assert fits.length[0] > 1024
    with pytest.raises(ValueError, match="lie on 2[0-9]+ chromosomes.*has room for 255.*scaffolds"):
        sentences(counts_of(dict.fromkeys(range(n), 1.0)), where)


def test_half_of_what_is_asked_for_is_expressed_and_hidden_genes_are_not_shown():
    where, known = genome(), np.ones(40, dtype=bool)
    known[:3] = False
    full = {g: v for g, v in cell(0).items() if g >= 3}
    counts = counts_of(full, {})
    task = presence_task(counts, where, known, np.random.default_rng(0), hide=0.2, n_queries=8, length=50)
    hidden = task.query[0][:4]
    assert task.target[0].tolist() == [True] * 4 + [False] * 4
    assert set(hidden) <= set(full)
    assert not set(hidden) & set(genes_of(task.sentences.token[0]))
    assert not set(task.query[0][4:]) & set(full)
    assert known[task.query].all()
    assert not task.target[1].any()  # of an empty cell, everything is absent
    # more asked for than was hidden: others that are expressed, with replacement
    task = presence_task(counts, where, known, np.random.default_rng(0), hide=0.2, n_queries=60, length=50)
    assert set(task.query[0][:30]) <= set(full)
    assert task.target[0].sum() == 30
