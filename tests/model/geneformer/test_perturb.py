"""Genes deleted and overexpressed in silico, recomputed by hand, and their controls."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from cellprior import pl
from cellprior.model import Geneformer
from cellprior.model.geneformer._perturb import Draw, Request, changed_list
from tests.parity.geneformer_golden import Golden


@pytest.fixture(scope="module", params=["v1", "v2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    case = Golden.load(request.param)
    case.write(folder := tmp_path_factory.mktemp("official"))
    adata = case.adata()
    found = Geneformer.from_pretrained(folder, adata[:, ~adata.var["ensembl_id"].duplicated()].copy())
    yield found
    found.release()


def expressed(model: Geneformer, cell: int) -> list[str]:
    """Ids of a cell's genes, in order."""
    counts = torch.from_numpy(np.asarray(model.adata.X[[cell]].todense()))
    index = model.gene_match.index
    over = torch.zeros(1, len(model.genes)).index_add(
        1, torch.from_numpy(index[index >= 0]), counts[:, index >= 0]
    )
    tokens = model.module.tokens(over)[0]
    return (
        model.genes["ensembl_id"]
        .to_numpy()[tokens[tokens >= model.module.first_gene] - model.module.first_gene]
        .tolist()
    )


def embed(model: Geneformer, genes: list[str], left_out: set[str] = frozenset()) -> Tensor:
    """Mean over the genes of a list, without some, one layer before the last; not by `pool`."""
    row = {name: i for i, name in enumerate(model.genes["ensembl_id"])}
    special = model.module.special
    tokens = [row[name] + model.module.first_gene for name in genes]
    tokens = [2, *tokens, 3] if special else tokens
    with torch.inference_mode():
        states = model.module.states(torch.tensor([tokens]), layer=-1)[0]
    return states[[i + special for i, name in enumerate(genes) if name not in left_out]].double()


def shift(before: Tensor, after: Tensor) -> float:
    return 1 - torch.cosine_similarity(before.mean(0), after.mean(0), dim=0).item()


@pytest.mark.parametrize("how", ["delete", "overexpress", "inhibit"])
def test_a_shift_is_that_of_the_mean_over_the_other_genes(model, how):
    genes = expressed(model, 0)
    absent = sorted(set(model.genes["ensembl_id"]) & set(model.adata.var["ensembl_id"]) - set(genes))[:1]
    groups = [genes[3], (genes[10], genes[4])] + ([(*absent, genes[5])] if how == "overexpress" else [])
    found = model.perturb(groups, how, indices=[0], n_controls=0, pooling="mean")
    assert found["of"].eq("cell").all()
    for row, group in zip(found.itertuples(), groups, strict=True):
        names = [group] if isinstance(group, str) else list(group)
        rest = [name for name in genes if name not in names]
        room = model.module.n_positions - 2 * model.module.special
        after = {"delete": rest, "overexpress": [*names, *rest][:room], "inhibit": [*rest, *names]}[how]
        expected = shift(embed(model, genes, set(names)), embed(model, after, set(names)))
        assert row.shift == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert row.genes == "+".join(names)
        assert (row.n_tokens, row.n_tokens_after) == (len(genes), len(after))
        assert row.rank == np.mean([genes.index(name) + 1 for name in names if name in genes])
        assert np.isnan([row.expression_control, row.count_control]).all()


def test_the_token_of_the_cell_and_vectors_of_other_genes_move_too(model):
    genes = expressed(model, 0)
    watched = [genes[1], genes[3]]
    found = model.perturb([genes[3]], indices=[0], shift_of=watched, n_controls=0, pooling="mean").set_index(
        "of"
    )
    assert list(found.index) == ["cell", genes[1]]  # not of the gene that is gone
    after = [name for name in genes if name != genes[3]]
    before, new = embed(model, genes), embed(model, after)
    expected = shift(before[1:2], new[1:2])
    assert found.loc[genes[1], "shift"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    alone = model.perturb([genes[3]], indices=[0], n_controls=0, pooling="mean")
    assert alone["shift"].item() == pytest.approx(found.loc["cell", "shift"], rel=1e-3, abs=1e-6)
    if model.module.special:
        token = model.perturb([genes[3]], indices=[0], n_controls=0)
        both = model.perturb([genes[3]], indices=[0], n_controls=0, shift_of=[genes[1]])
        assert token["shift"].item() == pytest.approx(both["shift"].iloc[0], rel=1e-3, abs=1e-6)
        assert token["shift"].item() != pytest.approx(alone["shift"].item(), rel=1e-2)


def test_cells_that_lack_a_gene_have_no_row_of_its_deletion_and_one_of_its_overexpression(model):
    gene = expressed(model, 0)[20]
    has = [gene in expressed(model, i) for i in range(model.adata.n_obs)]
    assert 0 < sum(has) < len(has)
    deleted = model.perturb([gene], n_controls=1)
    assert deleted["cell"].tolist() == model.adata.obs_names[has].tolist()
    over = model.perturb([gene], "overexpress", n_controls=1)
    with_genes = [i for i in range(len(has)) if len(expressed(model, i))]
    assert set(over["cell"]) >= set(model.adata.obs_names[with_genes])
    assert over.loc[~over["cell"].isin(deleted["cell"]), "rank"].isna().all()
    nothing = model.perturb([gene], indices=np.flatnonzero(~np.array(has))[:2])
    assert nothing.empty
    assert list(nothing.columns) == list(deleted.columns)


def test_random_genes_depend_on_the_seed_and_the_cell_alone_and_are_streamed(model, tmp_path):
    genes = expressed(model, 0)[:3]
    together = model.perturb(genes, n_controls=3)
    again = model.perturb(genes, n_controls=3, batch_size=16, indices=np.arange(model.adata.n_obs)[::-1])
    key = ["cell", "genes"]
    pd.testing.assert_frame_equal(
        together.sort_values(key, ignore_index=True),
        again.sort_values(key, ignore_index=True),
        rtol=1e-3,
        atol=1e-6,
    )
    other = model.perturb(genes, n_controls=3, seed=1)
    np.testing.assert_allclose(other["shift"], together["shift"], rtol=1e-3, atol=1e-6)
    assert not np.allclose(other["expression_control"], together["expression_control"], rtol=1e-3)
    assert model.perturb(genes, n_controls=3, out=tmp_path / "shifts.csv") is None
    stored = pd.read_csv(tmp_path / "shifts.csv")
    pd.testing.assert_frame_equal(stored, together, check_dtype=False)
    assert [path.name for path in tmp_path.iterdir()] == ["shifts.csv"]
    with pytest.raises(FileExistsError, match="already"):
        model.perturb(genes, out=tmp_path / "shifts.csv")
    model.adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    pd.testing.assert_frame_equal(
        model.perturb(genes, adata=backed, n_controls=3), together, rtol=1e-3, atol=1e-6
    )


def test_controls_of_equal_expression_are_near_in_rank_or_in_median_and_never_the_genes_themselves(model):
    options = {"n_controls": 200, "seed": 0, "pooling": None, "layer": -1}
    request = Request.of(model, None, [model.adata.var["ensembl_id"].iloc[5]], (), "overexpress", **options)
    genes = request.measured[::2].copy()
    np.random.default_rng(0).shuffle(genes)
    draw = Draw(genes, request, np.random.default_rng(0))
    present, absent = genes[100], request.measured[151]
    pairs = np.array(draw.like(np.array([present, absent]), np.array([True, False])))
    place = {token: i for i, token in enumerate(genes)}
    ranks = np.array([place[token] for token in pairs[:, 0]])
    assert np.abs(ranks - 100).max() <= 26
    assert present not in pairs[:, 0]
    medians = np.array([request.place[token] for token in pairs[:, 1]])
    assert np.abs(medians - 151).max() <= 52
    assert not set(pairs[:, 1]) & {*genes.tolist(), absent}
    anything = np.array(draw.any(1, 1))
    assert np.isin(anything[:, 0], genes).all()
    assert not np.isin(anything[:, 1], genes).any()
    assert np.ptp([place[token] for token in anything[:, 0]]) > 100
    assert draw.any(len(genes) + 1, 0) == []


def test_lists_after_a_perturbation_by_hand():
    genes, pair = np.array([9, 5, 7, 6]), np.array([8, 7])
    assert changed_list(genes, pair, "delete", 4).tolist() == [9, 5, 6]
    assert changed_list(genes, pair, "overexpress", 4).tolist() == [8, 7, 9, 5]
    assert changed_list(genes, pair, "inhibit", 4).tolist() == [9, 5, 6, 7]


def test_a_gene_that_matters_to_the_network_stands_out_of_its_controls(tmp_path):
    case = Golden.load("v1")
    case.write(tmp_path)
    model = Geneformer.from_pretrained(tmp_path, case.adata())
    gene = expressed(model, 0)[40]
    row = model.genes["ensembl_id"].tolist().index(gene) + model.module.first_gene
    with torch.no_grad():  # to the network, all other genes and all places are alike
        weight = model.module.embedder.tokens.weight
        weight[torch.arange(len(weight)) != row] = weight[0].clone()
        model.module.embedder.positions.weight.zero_()
    found = model.perturb([gene], n_controls=5)
    assert len(found) > 5
    assert (found["shift"] > 100 * found["expression_control"]).all()
    model.release()


def test_what_cannot_be_meant_is_refused(model):
    gene = model.adata.var["ensembl_id"].iloc[5]
    for arguments, message in (
        ({"genes": gene}, "is one name; a list is needed"),
        ({"genes": [gene], "shift_of": gene}, "is one name; a list is needed"),
        ({"genes": []}, "No genes to perturb"),
        ({"genes": [()]}, "No genes to perturb"),
        ({"genes": [(gene, gene)]}, "names one gene twice"),
        ({"genes": [gene], "how": "kill"}, "choose one of 'delete', 'overexpress', 'inhibit'"),
        ({"genes": [gene], "n_controls": -1}, "n_controls=-1"),
        ({"genes": [gene], "layer": 1}, "layer=1"),
        ({"genes": [gene], "pooling": "max"}, "pooling='max'"),
        ({"genes": [gene], "indices": []}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            model.perturb(**arguments)
    with pytest.raises(KeyError, match="NOGENE"):
        model.perturb(["NOGENE"])


def test_the_plot_shows_genes_and_controls(model, tmp_path: Path):
    found = model.perturb(expressed(model, 0)[:4], n_controls=2)
    ax = pl.perturbation(found, n_genes=3)
    assert len(ax.get_yticklabels()) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()][0] == "the genes"
    with pytest.raises(ValueError, match="of='CD3D' has no rows; there are 'cell'"):
        pl.perturbation(found, of="CD3D")
    plt.close("all")
