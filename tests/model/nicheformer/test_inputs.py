"""Tokens of Nicheformer beside a plain way to make them; numbers of the original are in tests/parity."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from cellprior.model.data._counts import read_rows
from cellprior.model.data._minibatches import csr_tensor
from cellprior.model.nicheformer._context import ContextField, known_name
from cellprior.model.nicheformer._inputs import (
    ASSAYS,
    CONTEXT_TECHNOLOGY,
    CONTEXT_TOKENS,
    FIRST_GENE,
    MASK,
    PAD,
    TECHNOLOGIES,
    context_code,
    mask_tokens,
    nonzero_means,
    rank_tokens,
    scale_of,
    unstable_argsort,
)
from cellprior.model.nicheformer._vocabulary import shipped

GENES = 40


@pytest.fixture
def counts() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).poisson(0.7, (30, GENES)).astype(np.float32))


@pytest.fixture
def means() -> torch.Tensor:
    found = torch.from_numpy(np.random.default_rng(1).gamma(2.0, 3.0, (5, GENES)))
    found[:, ::7] = 0.0  # never seen
    found[1, 3] = -2.0  # as some of MERFISH
    return found


def plainly(
    counts: np.ndarray, means: np.ndarray, context: list[str | None], species: str
) -> list[list[int]]:
    """Tokens one gene at a time."""
    cells = []
    for cell, assay in zip(counts.tolist(), context, strict=True):
        technology = "dissociated" if assay is None else ASSAYS[assay].technology
        scale = means[TECHNOLOGIES.index(technology)].tolist()
        ranked = sorted((g for g in range(GENES) if cell[g]), key=lambda g: -cell[g] / (scale[g] or 1.0))
        token = 1 if assay is None else ASSAYS[assay].token
        front = [{"human": 5, "mouse": 6}[species], token, 3 if technology == "dissociated" else 4]
        cells.append([t for t in front if t != PAD] + [g + FIRST_GENE for g in ranked])
    return cells


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_tokens_are_species_assay_modality_and_genes_by_their_rank_in_the_technology(counts, means, species):
    assays = [*ASSAYS, None] * 3
    assays = assays[: len(counts)]
    code = torch.tensor([context_code(species, assay) for assay in assays])
    expected = plainly(counts.numpy(), means.numpy(), assays, species)
    sparse = csr_tensor(read_rows(counts.numpy(), np.arange(30)))
    index = torch.arange(0, GENES, 2)
    for x, n_positions in ((counts, 100), (sparse, 100), (counts, 12), (sparse, 12)):
        tokens = rank_tokens(x, means, code, n_positions=n_positions)
        assert tokens.shape[1] <= n_positions
        for found, cell in zip(tokens.tolist(), expected, strict=True):
            assert [t for t in found if t != PAD] == cell[:n_positions]
            assert found[len(cell) :] == [PAD] * (len(found) - min(len(cell), len(found)))
    some = rank_tokens(counts[:, ::2], means, code, n_positions=100, gene_index=index)
    silent = counts.clone()
    silent[:, 1::2] = 0
    assert torch.equal(some, rank_tokens(silent, means, code, n_positions=100))


def test_a_cell_of_iss_has_no_token_of_its_assay_and_a_cell_without_counts_has_context_only(means):
    tokens = rank_tokens(
        torch.zeros(2, GENES), means, torch.tensor([context_code("human", "ISS"), 0]), n_positions=9
    )
    assert tokens.tolist() == [[5, 4, PAD], [5, 3, PAD]]


def test_the_authors_table_of_tokens_is_kept():
    """Numbers of the authors' notebooks."""
    tokens = {name: CONTEXT_TOKENS[context_code("mouse", name)].tolist() for name in ASSAYS}
    assert tokens["MERFISH"] == [6, 7, 4]
    assert tokens["CosMx"] == [6, 8, 4]
    assert tokens["Xenium"] == [6, 9, 4]
    assert tokens["10x 3' v3"] == [6, 11, 3]
    assert tokens["Smart-seq v4"] == [6, 18, 3]
    assert [TECHNOLOGIES[CONTEXT_TECHNOLOGY[context_code("human", name)]] for name in list(ASSAYS)[:5]] == [
        "merfish", "cosmx", "xenium", "iss", "dissociated",
    ]  # fmt: skip
    assert CONTEXT_TOKENS[context_code()].tolist() == [5, PAD, 3]


def test_genes_that_a_technology_never_saw_are_divided_by_one_not_by_nothing(means):
    assert (scale_of(means, "clean")[means == 0] == 1).all()
    rounded = scale_of(torch.tensor([[0.2, 0.5, 2.5, 3.4, 0.0]]), "rounded")
    assert rounded.tolist() == [[1.0, 1.0, 3.0, 3.0, 1.0]]  # half up, and what becomes 0 is 1
    vocabulary = shipped()
    xenium = torch.from_numpy(vocabulary.means)
    counts = torch.zeros(1, len(vocabulary.genes))
    counts[0, [5, 100, 7000]] = 1.0
    tokens = rank_tokens(counts, xenium, torch.tensor([context_code("human", "Xenium")]), n_positions=1500)
    assert tokens.shape == (1, 6)  # and not 1,500, of which 1,379 nobody measured


def test_the_unstable_sort_sorts_and_is_no_stable_one():
    rng = np.random.default_rng(0)
    n_other = 0
    for n in (0, 1, 2, 14, 15, 16, 17, 50, 400):
        for values in (
            rng.integers(0, 6, n).astype(float),
            rng.normal(size=n),
            np.zeros(n),
            np.arange(n) * 1.0,
        ):
            order = unstable_argsort(values)
            np.testing.assert_array_equal(np.sort(order), np.arange(n))
            np.testing.assert_array_equal(values[order], np.sort(values))
            n_other += not np.array_equal(order, np.argsort(values, kind="stable"))
    assert n_other > 5


def test_only_genes_are_hidden_and_never_all_as_a_mask():
    tokens = np.tile(np.array([5, 11, 3, *range(30, 200), 1, 1]), (200, 1))
    shown, selected = mask_tokens(tokens, np.random.default_rng(0), n_tokens=300)
    assert not selected[:, :3].any()
    assert not selected[:, -2:].any()
    assert selected[:, 3:-2].mean() == pytest.approx(0.15, abs=0.01)
    np.testing.assert_array_equal(shown[~selected], tokens[~selected])
    of = shown[selected]
    assert (of == MASK).mean() == pytest.approx(0.81, abs=0.02)
    assert (of == tokens[selected]).mean() == pytest.approx(0.09, abs=0.02)
    assert of[of != MASK].min() >= FIRST_GENE
    assert of.max() < 300


def test_means_are_those_of_the_cells_that_have_the_gene_by_technology(counts):
    technology = torch.tensor([0, 3] * 15)
    found = nonzero_means([counts[:11], counts[11:]], [technology[:11], technology[11:]], GENES)
    share = counts.double().numpy() * 1e4 / counts.sum(1, keepdim=True).double().numpy()
    for row in (0, 3):
        of_it = share[technology.numpy() == row]
        expected = [column[column > 0].mean() if (column > 0).any() else 0.0 for column in of_it.T]
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)
    assert not found[[1, 2, 4]].any()


@pytest.mark.parametrize(
    ("kind", "text", "name"),
    [
        ("assay", "10X 3’ v3", "10x 3' v3"),
        ("assay", "xenium", "Xenium"),
        ("assay", " cosmx", "CosMx"),
        ("assay", "12", "10x 3' v2"),
        ("assay", "10x transcription profiling", "10x 3' transcription profiling"),
        ("species", "Mus musculus", "mouse"),
        ("species", "5", "human"),
        ("modality", "Spatial", "spatial"),
    ],
)
def test_names_are_known_by_any_spelling_and_by_the_authors_numbers(kind, text, name):
    assert known_name(kind, text, "it") == name


def cells(**obs: list) -> AnnData:
    return AnnData(np.zeros((3, 2), dtype=np.float32), obs=pd.DataFrame(obs, index=["a", "b", "c"]))


def test_contexts_are_read_by_cell_or_for_all():
    adata = cells(assay=["Xenium", "10x 3' v3", "xenium"], organism=["human", "Mus musculus", "mouse"])
    codes = ContextField({"assay_key": "assay", "species_key": "organism"}).codes(adata)
    expected = [("human", "Xenium"), ("mouse", "10x 3' v3"), ("mouse", "Xenium")]
    assert codes.tolist() == [context_code(*context) for context in expected]
    codes = ContextField({"assay_key": "assay", "species": "mouse"}).codes(adata)
    assert codes.tolist() == [context_code("mouse", assay) for _, assay in expected]
    assert ContextField({}).codes(adata).tolist() == [context_code()] * 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"assay": "Slide-seq"},
            r"assay='Slide-seq' is no assay that Nicheformer knows\. Known are \"MERFISH\"",
        ),
        ({"assay": "Visium"}, "spots are no single cells"),
        ({"assay_key": "tech"}, r"adata\.obs\['tech'\] has 'seqFISH', which is no assay"),
        ({"species": "rat"}, 'Known are "human", "mouse"'),
        (
            {"assay_key": "missing"},
            r"adata\.obs\['missing'\] is missing \(NaN\) in 1 of 3 cells, the first 'b'",
        ),
        ({"assay": "Xenium", "assay_key": "tech"}, "give one of them"),
        (
            {"assay": "Xenium", "modality": "dissociated"},
            "Cell 'a' is dissociated, and its assay Xenium is spatial",
        ),
        ({"modality": "spatial"}, "Cell 'a' is spatial, and of no assay"),
        ({"modality_key": "modality", "assay": "10x 3' v3"}, "Cell 'c' is spatial, and its assay 10x 3' v3"),
    ],
)
def test_what_is_not_known_or_contradicts_itself_is_refused_by_name(args, message):
    adata = cells(
        tech=["Xenium", "seqFISH", "Xenium"], missing=["Xenium", None, "Xenium"],
        modality=["dissociated", "dissociated", "spatial"],
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ContextField(args).codes(adata)
    with pytest.raises(KeyError, match="its columns are"):
        ContextField({"assay_key": "nothing"}).codes(adata)
