from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cosine

from cellprior.evaluate._stability import Cells, Perturbed, Spaces, stability
from cellprior.model import CellPLM, ScBERT
from cellprior.model._base import PretrainedModel
from tests.contract.models import blood_cells, tiny_scbert

COMPANY = ["half of the companions", "32 companions"]
QUICK = {"seeds": 1, "max_cells": 120, "progress": False}


def some_blood(n_cells: int = 150):
    return blood_cells()[:n_cells].copy()


def cellplm(adata=None, **setup) -> CellPLM:
    adata = some_blood() if adata is None else adata
    CellPLM.setup_anndata(adata, **setup)
    return CellPLM.from_pretrained("cellplm-starter", adata)


def scbert(**setup) -> ScBERT:
    adata = some_blood()
    ScBERT.setup_anndata(adata, **setup)
    return ScBERT.from_pretrained(tiny_scbert(), adata)


def of(table: pd.DataFrame, what: str, metric: str, method: str = "model") -> pd.Series:
    chosen = (table["perturbation"] == what) & (table["metric"] == metric) & (table["method"] == method)
    (found,) = table[chosen].to_dict("records")
    return pd.Series(found)


@pytest.fixture(scope="module")
def moved() -> pd.DataFrame:
    return stability(cellplm(batch_key="batch"), **{**QUICK, "seeds": 2})


# company


def test_a_cell_of_scbert_does_not_see_its_companions():
    table = stability(scbert(batch_key="batch"), depths=(), gene_dropouts=(), **QUICK)
    assert table["perturbation"].unique().tolist() == [*COMPANY, "all batches together"]
    for what in table["perturbation"].unique():
        assert of(table, what, "q95_shift")["high"] < 1e-5
        assert of(table, what, "neighbours_kept")["value"] > 0.99


def test_a_cell_of_cellplm_does(moved):
    for what in (*COMPANY, "all batches together"):
        assert of(moved, what, "q95_shift")["low"] > 1e-5
    assert of(moved, "32 companions", "neighbours_kept")["high"] < 1


def test_only_data_with_batches_have_batches_to_put_together():
    table = stability(cellplm(), depths=(), gene_dropouts=(), n_companions=10, **QUICK)
    assert table["perturbation"].unique().tolist() == ["half of the companions", "10 companions"]


# what is done to cells


@pytest.fixture(scope="module")
def perturbed() -> tuple[Cells, dict[str, Perturbed]]:
    cells = Cells(cellplm(batch_key="batch"), None, 120)
    return cells, {p.what: p for p in cells.perturbed(0, (0.5,), (0.3,), 32)}


def test_half_of_the_counts_are_whole_counts_of_the_same_cells(perturbed):
    cells, found = perturbed
    thin = found["50% of the counts"].counts
    assert (thin.data == np.rint(thin.data)).all()
    assert ((cells.counts - thin).data >= 0).all()
    assert thin.sum() / cells.counts.sum() == pytest.approx(0.5, abs=0.01)
    kept = np.asarray(thin.sum(axis=1) / cells.counts.sum(axis=1)).ravel()
    assert 0.01 < kept.std() < 0.1  # drawn, and not divided by two
    assert (found["50% of the counts"].parts[0].X != thin).nnz == 0


def test_dropped_genes_are_gone_from_the_data(perturbed):
    cells, found = perturbed
    (data,) = found["30% of the genes dropped"].parts
    n_genes = len(cells.var)
    assert data.n_vars == n_genes - round(0.3 * n_genes)
    assert np.array_equal(data.X.toarray(), cells.counts[:, cells.var.index.isin(data.var_names)].toarray())
    silent = found["30% of the genes dropped"].counts
    assert silent.sum() == data.X.sum()
    assert silent.shape == cells.counts.shape


def test_few_companions_are_of_one_batch_and_every_cell_has_some(perturbed):
    cells, found = perturbed
    few = found["32 companions"]
    assert sorted(few.rows) == list(range(120))
    assert all(part.n_obs <= 32 and part.obs["batch"].nunique() == 1 for part in few.parts)
    names = np.concatenate([part.obs_names for part in few.parts])
    assert names.tolist() == cells.obs.index[few.rows].tolist()


def test_counts_come_from_the_layer():
    adata = some_blood()
    adata.layers["raw"], adata.X = adata.X.copy(), adata.layers["log"]
    x, layer = (
        stability(cellplm(a, **s), **QUICK) for a, s in ((some_blood(), {}), (adata, {"layer": "raw"}))
    )
    pd.testing.assert_frame_equal(x.drop(columns="seconds"), layer.drop(columns="seconds"))


# the numbers


def test_shift_and_neighbours_are_those_of_the_vectors(perturbed):
    cells, found = perturbed
    model, thinned = cellplm(batch_key="batch"), found["50% of the counts"]
    spaces = Spaces(model, cells, 5, {})
    got = spaces.moved(thinned)["model"]
    before, after = (model.get_latent_representation(a).astype(float) for a in (cells.data(), *thinned.parts))
    shift = np.array([cosine(x, y) for x, y in zip(before, after, strict=True)])
    np.testing.assert_allclose(got.shift * spaces.typical["model"], shift, rtol=1e-4, atol=1e-9)
    every_pair = [cosine(before[i], before[j]) for i in range(120) for j in range(i)]
    assert spaces.typical["model"] == pytest.approx(np.median(every_pair), rel=0.05)

    def nearest(z, i):
        distance = [cosine(z[i], z[j]) if i != j else np.inf for j in range(len(z))]
        return set(np.argsort(distance)[:5])

    for i in (0, 17, 60):
        assert got.kept[i] == pytest.approx(len(nearest(before, i) & nearest(after, i)) / 5)


class Fixed(PretrainedModel):
    """Embeds the first data as drawn, and all later ones as told."""

    def __init__(self, later):
        self.z, self.later, self.first = np.random.default_rng(0).normal(size=(200, 6)), later, True

    def get_latent_representation(self, adata):
        self.first, first = False, self.first
        return self.z if first else self.later(self.z)


@pytest.mark.parametrize(
    ("later", "shift", "kept"),
    [
        (lambda z: z, 0.0, 1.0),
        (lambda z: 3 * z, 0.0, 1.0),  # its length says nothing
        (lambda z: np.random.default_rng(1).permutation(z), 1.0, 15 / 199),
    ],
)
def test_at_0_a_cell_is_where_it_was_and_at_1_it_might_be_any_other(later, shift, kept):
    cells = Cells.__new__(Cells)
    cells.layer, cells.batch_key, cells.batch = None, None, np.zeros(200, dtype=int)
    cells.obs, cells.var = pd.DataFrame(index=map(str, range(200))), pd.DataFrame(index=list("abcdefgh"))
    cells.counts = sp.csr_matrix(np.random.default_rng(0).poisson(3.0, (200, 8)).astype(np.float32))
    spaces = Spaces(Fixed(later), cells, 15, {})
    got = spaces.moved(Perturbed("nothing", np.arange(200), [cells.data()]))["model"]
    assert np.median(got.shift) == pytest.approx(shift, abs=0.15 * shift + 1e-9)
    assert got.kept.mean() == pytest.approx(kept, abs=0.03)


def test_the_shallower_the_farther(moved):
    for method in ("model", "PCA"):
        for gentle, harsh in (
            ("50% of the counts", "25% of the counts"),
            ("10% of the genes dropped", "30% of the genes dropped"),
        ):
            assert (
                of(moved, gentle, "median_shift", method)["value"]
                < of(moved, harsh, "median_shift", method)["value"]
            )
            assert (
                of(moved, gentle, "neighbours_kept", method)["value"]
                > of(moved, harsh, "neighbours_kept", method)["value"]
            )


def test_the_table_is_tidy(moved):
    assert not moved.duplicated(["perturbation", "metric", "method"]).any()
    assert set(moved["metric"]) == {"median_shift", "q95_shift", "neighbours_kept"}
    by_company = moved["perturbation"].isin([*COMPANY, "all batches together"])
    assert set(moved.loc[by_company, "method"]) == {"model"}  # a PCA sees no companions
    assert set(moved.loc[~by_company, "method"]) == {"model", "PCA"}
    compared = ~by_company & (moved["method"] == "model")
    assert (moved["versus"] == "PCA").tolist() == compared.tolist()
    found = of(moved, "25% of the counts", "q95_shift")
    other = of(moved, "25% of the counts", "q95_shift", "PCA")
    assert found["difference"] == pytest.approx(found["value"] - other["value"])
    assert moved["value"].between(moved["low"] - 1e-9, moved["high"] + 1e-9).all()
    assert (moved["n_cells"] == 120).all() and (moved["seeds"] == 2).all() and (moved["seconds"] > 0).all()


def test_the_same_call_gives_the_same_numbers_and_leaves_the_data_alone():
    adata, other = some_blood(), some_blood(80)
    model = cellplm(adata)
    before, other_before = adata.copy(), other.copy()
    first, second = (stability(model, other, **QUICK).drop(columns="seconds") for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert (first["n_cells"] == 80).all()
    for data, was in ((adata, before), (other, other_before)):
        assert (data.X != was.X).nnz == 0
        pd.testing.assert_frame_equal(data.obs, was.obs)
        assert data.obsm.keys() == was.obsm.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (0.5, 1.0)}, "1.0 is no share of counts or genes"),
        ({"gene_dropouts": (0,)}, "0 is no share"),
        ({"n_neighbors": 60}, "120 cells, n_neighbors=60.*more cells than twice"),
        ({"seeds": 0}, "seeds=0; at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stability(cellplm(), **{**QUICK, **options})


def test_an_untrained_model_is_refused():
    adata = some_blood()
    CellPLM.setup_anndata(adata)
    with pytest.raises(RuntimeError, match="trained"):
        stability(CellPLM(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4))
