"""What goes into UCE: a cell as a sentence of genes, drawn in proportion to ln(1 + count), chromosome by chromosome.

1,024 genes are drawn with replacement; those of a chromosome stand together, by where they start, between a token of
the chromosome and one that closes it; the chromosomes come in random order. The original draws all that from one
stream, so that a cell's sentence depends on the seed and on every cell before it. Here the draws of a cell depend on
the seed and on its own genes and counts, and on nothing else.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from cellprior.model.data._entries import Counts, keys_of_cells, scramble, unit_interval

SENTENCE_LENGTH = 1024
PAD_LENGTH = 1536  # of the original: tokens of a sentence at most

Sampling = Literal["keyed", "systematic"]
SAMPLINGS = ("keyed", "systematic")


class Genome(NamedTuple):
    """Where genes lie. Numbers are those of the released files, whichever species of them there are here."""

    number: np.ndarray  # what a gene is known by                                    (n_genes,)
    chromosome: np.ndarray  # row among the chromosomes                              (n_genes,)
    start: np.ndarray  # on it                                                       (n_genes,)
    species: np.ndarray  # code                                                      (n_genes,)
    code: np.ndarray  # what a chromosome is known by, in increasing order           (n_chromosomes,)

    @property
    def close(self) -> int:
        """Row, in the table of tokens, of what ends a chromosome; the genes and the chromosomes come before it."""
        return len(self.number) + len(self.code)

    @property
    def cls(self) -> int:
        """Row of the class token."""
        return self.close + 1

    @property
    def pad(self) -> int:
        """Row of the padding."""
        return self.close + 2


class Sentences(NamedTuple):
    """Sentences, the class token first, padded to the longest."""

    token: np.ndarray  # row in the table of tokens, int64   (sentences, width)
    length: np.ndarray  # tokens of each, int64               (sentences,)


def of_one_species(counts: Counts, species: np.ndarray) -> tuple[Counts, np.ndarray]:
    """The entries of the species that has most of a cell's counts, and the share of the counts that these are."""
    code, n_cells = species[counts.gene], len(counts.indptr) - 1
    n_species = int(species.max(initial=0)) + 1
    share = np.ones(n_cells)
    if n_species == 1 or len(code) == 0:
        return counts, share
    total = np.bincount(
        counts.cell * n_species + code, weights=counts.value, minlength=n_cells * n_species
    ).reshape(n_cells, n_species)
    most = total.argmax(axis=1)
    if total.sum() == total.max(axis=1).sum():
        return counts, share
    found = total.sum(axis=1) > 0
    share[found] = total.max(axis=1)[found] / total.sum(axis=1)[found]
    kept = code == most[counts.cell]
    indptr = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
    return Counts(indptr, counts.gene[kept], counts.value[kept]), share


def weights_of(count: np.ndarray) -> np.ndarray:
    """Probability of being drawn, of each gene that a cell expresses: ``ln(1 + count)`` over their sum; float32.

    Divided twice by a sum, as the original does, which rounds a little differently.
    """
    weight = np.log1p(count.astype(np.float32))
    weight /= weight.sum(dtype=np.float32)
    total: np.ndarray = np.cumsum(weight, dtype=np.float32)[-1]  # one after the other, as Python's own sum
    return weight / total


def drawn_genes(weight: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Place among ``weight`` of each draw, as ``numpy.random.choice`` with replacement makes them of uniform numbers.

    The weights are of the genes of a cell ``(k,)``, the numbers in [0, 1) ``(sentence_length,)``.
    """
    cdf = np.cumsum(weight, dtype=np.float64)
    return np.searchsorted(cdf / cdf[-1], uniform, side="right")


def sentence(genes: np.ndarray, chromosomes: np.ndarray, genome: Genome) -> np.ndarray:
    """Tokens of the drawn genes, chromosome by chromosome.

    Genes of equal chromosome and start are in the order of their numbers; the original's sorting is not stable.
    ``genes`` are vocabulary rows, drawn ``(sentence_length,)``; ``chromosomes`` those that they lie on, in the order
    in which they come.
    """
    rank = np.empty(len(genome.code), dtype=np.int64)
    rank[chromosomes] = np.arange(len(chromosomes))
    of_gene = rank[genome.chromosome[genes]]
    genes = genes[np.lexsort((genome.number[genes], genome.start[genes], of_gene))]
    n_genes = np.bincount(of_gene, minlength=len(chromosomes))
    tokens = np.full(1 + len(genes) + 2 * len(chromosomes), genome.close)
    tokens[0] = genome.cls
    begin = 1 + np.cumsum(n_genes + 2) - (n_genes + 2)
    tokens[begin] = len(genome.number) + chromosomes
    place = np.arange(len(genes)) + 2 * np.repeat(np.arange(len(chromosomes)), n_genes) + 2
    tokens[place] = genes
    return tokens


def sentences(
    counts: Counts,
    genome: Genome,
    *,
    length: int = SENTENCE_LENGTH,
    n_draws: int = 1,
    sampling: Sampling = "keyed",
    seed: int = 0,
) -> Sentences:
    """Sentences of cells, ``n_draws`` of each cell one after the other.

    Raises ValueError if an argument is none of these, or a cell's genes lie on more chromosomes than a sentence has
    room for.

    Parameters
    ----------
    counts
        Of one species each, see :func:`of_one_species`.
    genome
        Where genes lie.
    length
        Genes that are drawn.
    n_draws
        Sentences of each cell.
    sampling
        ``"keyed"``, draws as the original's, from a generator of the seed and the cell's own genes and counts;
        ``"systematic"``, genes by chromosome and start, at equal steps of their cumulative weight, so that each has its
        share of the sentence to within one draw. Of several, the first step and the order of chromosomes are keyed;
        of one, there is no random number in it.
    seed
        Of the draws.
    """
    if sampling not in SAMPLINGS:
        msg = f'sampling={sampling!r} is not known; choose "keyed" or "systematic".'
        raise ValueError(msg)
    systematic = sampling == "systematic"
    by_place = (genome.number, genome.start, genome.chromosome) if systematic else (genome.number,)
    place = np.empty(len(genome.number), dtype=np.int64)
    place[np.lexsort(by_place)] = np.arange(len(place))
    of_place, of_code = scramble(np.arange(length)), scramble(length + genome.code)  # two kinds of draws
    found = []
    for i, key in enumerate(keys_of_cells(counts, seed, genome.number)):
        part = slice(counts.indptr[i], counts.indptr[i + 1])
        gene, value = counts.gene[part], counts.value[part]
        if not len(gene):
            found += [np.array([genome.cls])] * n_draws
            continue
        order = np.argsort(place[gene])
        gene, weight = gene[order], weights_of(value[order])
        for draw in range(n_draws):
            of_draw = scramble(key ^ scramble(np.asarray(draw)))
            if not systematic:
                uniform = unit_interval(scramble(of_place ^ of_draw))
            else:
                offset = 0.5 if n_draws == 1 else unit_interval(scramble(of_place[:1] ^ of_draw))
                uniform = (np.arange(length) + offset) / length
            genes = gene[drawn_genes(weight, uniform)]
            chromosomes = np.unique(genome.chromosome[genes])
            _refuse_too_many(len(chromosomes), length)
            if not (systematic and n_draws == 1):
                chromosomes = chromosomes[np.argsort(scramble(of_code[chromosomes] ^ of_draw))]
            found.append(sentence(genes, chromosomes, genome))
    return padded(found, genome.pad)


def released_sentences(
    counts: Counts, genome: Genome, order: np.ndarray, stream: np.random.RandomState, *, length: int
) -> Sentences:
    """Sentences as the original's script draws them, from one stream and cell after cell.

    Counts are of one species each. ``order`` is, by vocabulary row, the place of each gene in the columns of the
    data, in whose order the original sums up; ``stream`` is what ``numpy.random.seed`` begins, and is moved on.
    """
    found = []
    for begin, end in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        gene, value = counts.gene[begin:end], counts.value[begin:end]
        if not len(gene):
            found.append(np.array([genome.cls]))
            continue
        by_column = np.argsort(order[gene])
        uniform = stream.random_sample(length)
        genes = gene[by_column][drawn_genes(weights_of(value[by_column]), uniform)]
        chromosomes = np.unique(genome.chromosome[genes])
        _refuse_too_many(len(chromosomes), length)
        stream.shuffle(chromosomes)
        found.append(sentence(genes, chromosomes, genome))
    return padded(found, genome.pad)


def padded(found: list[np.ndarray], pad: int) -> Sentences:
    """Sentences of any length as one array."""
    length = np.array([len(tokens) for tokens in found], dtype=np.int64)
    token = np.full((len(found), int(length.max(initial=1))), pad)
    for row, tokens in zip(token, found, strict=True):
        row[: len(tokens)] = tokens
    return Sentences(token, length)


def most_chromosomes(length: int) -> int:
    """Chromosomes that a sentence has room for, as in the original."""
    return (max(PAD_LENGTH, length + length // 2) - length - 1) // 2


def _refuse_too_many(n: int, length: int) -> None:
    if n > (most := most_chromosomes(length)):
        msg = (
            f"The genes of a cell lie on {n} chromosomes; a sentence of {length:,} genes has room for {most}, and the "
            "network has seen no longer one. If these are scaffolds of an unfinished genome, give those that are not "
            "placed one name in the table of positions, and make the weights of the species anew."
        )
        raise ValueError(msg)


class Task(NamedTuple):
    """Cells as the network sees them in training, and what it is asked."""

    sentences: Sentences
    query: np.ndarray  # vocabulary rows           (cells, queries)
    target: np.ndarray  # whether they are expressed (cells, queries)


def presence_task(
    counts: Counts,
    genome: Genome,
    known: np.ndarray,
    rng: np.random.Generator,
    *,
    hide: float,
    n_queries: int,
    length: int,
) -> Task:
    """Hide some of the genes that cells express, and ask for these and for others that are not there.

    Counts are of one species each, the sentence of the genes that are not hidden, a share of those that are
    expressed. Half of the queries are for genes that are, hidden ones first, and then any; half for others of the
    species that were measured. Of a cell without one kind, all are for the other.
    """
    found, query, target = [], [], []
    n_positive = n_queries // 2
    for begin, end in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        gene, value = counts.gene[begin:end], counts.value[begin:end]
        order = rng.permutation(len(gene))
        n_hidden = round(hide * len(gene)) if len(gene) > 1 else 0
        hidden, shown = gene[order[:n_hidden]], order[n_hidden:]
        found.append(_drawn_sentence(gene[shown], value[shown], genome, rng, length))
        species = genome.species[gene[0]] if len(gene) else genome.species[np.argmax(known)]
        absent = known & (genome.species == species)
        absent[gene] = False
        others = np.flatnonzero(absent)
        n = n_queries if not len(others) else n_positive if len(gene) else 0
        asked = hidden[:n]
        if n > len(asked):
            asked = np.concatenate([asked, rng.choice(gene, n - len(asked))])
        n_others = n_queries - n
        more = rng.choice(others, n_others, replace=n_others > len(others)) if n_others else others[:0]
        query.append(np.concatenate([asked, more]))
        target.append(np.arange(n_queries) < n)
    return Task(padded(found, genome.pad), np.array(query, dtype=np.int64), np.array(target))


def _drawn_sentence(
    gene: np.ndarray, value: np.ndarray, genome: Genome, rng: np.random.Generator, length: int
) -> np.ndarray:
    if not len(gene):
        return np.array([genome.cls])
    genes = gene[drawn_genes(weights_of(value), rng.random(length))]
    chromosomes = np.unique(genome.chromosome[genes])
    _refuse_too_many(len(chromosomes), length)
    return sentence(genes, rng.permutation(chromosomes), genome)
