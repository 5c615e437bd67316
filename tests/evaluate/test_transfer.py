import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import cellprior as cp
from cellprior.evaluate._transfer import CENTRED, JOINT, _pair
from tests.contract.models import blood_cells

from .test_protocols import told


@pytest.fixture(scope="module")
def studies(cells) -> list[AnnData]:
    """Three studies; the last has a type that the others lack."""
    adata = cells(n_cells=400, n_types=4)
    adata.obsm["X_told"] = np.hstack([told_4(adata), told_4(adata)])
    of = np.random.default_rng(5).integers(0, 3, 400)
    parts = [adata[of == i].copy() for i in range(3)]
    return [*(part[part.obs["type"] != "type 3"].copy() for part in parts[:2]), parts[2]]


def told_4(adata: AnnData) -> np.ndarray:
    rng = np.random.default_rng(1)
    return pd.get_dummies(adata.obs["type"]).to_numpy(float) + 0.2 * rng.standard_normal((adata.n_obs, 4))


def test_labels_of_one_study_are_read_on_another_beside_centred_genes(studies):
    reference, _, query = studies
    table = cp.evaluate.transfer(reference, query, "X_told", "type", progress=False)
    assert set(table["method"]) >= {"X_told", CENTRED, "PCA", JOINT}
    assert set(table["reader"]) == {"nearest neighbours", "nearest centroid", "linear probe"}
    assert set(table["n_cells"]) == {int((query.obs["type"] != "type 3").sum())}
    f1 = table[table["metric"] == "macro_f1"].set_index(["method", "reader"])["value"]
    assert f1["X_told", "nearest neighbours"] > 0.9
    assert set(table.loc[table["method"] != CENTRED, "versus"]) == {CENTRED}
    seen = table.drop_duplicates("method").set_index("method")["seen"].to_dict()
    assert (seen["X_told"], seen["PCA"], seen[JOINT]) == ("all cells", "training cells", "all cells")


def test_the_mean_of_each_study_is_at_the_origin_and_distances_within_it_stay(studies):
    reference, _, query = studies
    task = _pair(reference, query, "type", "query", layer=None, batch_key=None, scvi_epochs=None)
    n = reference.n_obs
    [space] = task.methods[0].fit()
    log = task.log.toarray()
    for rows in (slice(None, n), slice(n, None)):
        np.testing.assert_allclose(space.values[rows].mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(space.values[rows], log[rows] - log[rows].mean(axis=0), atol=1e-5)


def test_weights_that_were_trained_on_a_study_are_said_to_be_and_of_several_the_worst_counts(tmp_path):
    adata = blood_cells()
    adata = adata[adata.obs["bulk_labels"].isin(["CD14+ Monocyte", "CD19+ B"])].copy()
    reference, query = adata[::2].copy(), adata[1::2].copy()
    model = cp.model.CellPLM(genes=list(adata.var_names), n_hidden=16, n_layers=1, n_heads=2, n_latent=4)
    model.save_pretrained(tmp_path / "mine")
    mine = str(tmp_path / "mine")

    def seen(queries: object, embedding: str = mine) -> dict[str, str]:
        table = cp.evaluate.transfer(reference, queries, embedding, "bulk_labels", progress=False)
        return table[table["kind"] == "embedding"].set_index("study")["seen"].to_dict()

    assert seen(query) == {"query": "not known"}
    for cells, found in ((query, "these cells"), (reference, "these cells"), (query[:0], "no cell")):
        known = cp.weights.fingerprints(cells.X, model_index(model, cells))
        cp.weights.write_trained_on(tmp_path / "mine", known)
        assert seen(query) == {"query": found}
    cp.weights.write_trained_on(
        tmp_path / "mine", cp.weights.fingerprints(query.X[:20], model_index(model, query))
    )
    of_parts = seen({"new": query[20:].copy(), "old": query[:20].copy()})
    assert of_parts == {"all": "these cells", "new": "no cell", "old": "these cells"}
    for cells in (reference, query):
        cp.tl.embed(cells, mine, key_added="X_mine")
    assert seen(query, "X_mine") == {"query": "not known"}


def model_index(model: cp.model.CellPLM, cells: AnnData) -> np.ndarray:
    return cp.genes.match(cells.var, model.genes).index


def test_embeddings_by_different_weights_are_not_transferred(studies):
    reference, _, query = (study.copy() for study in studies)
    for cells, digest in ((reference, "aaaa1111"), (query, "bbbb2222")):
        cells.uns["cellprior"] = {"X_told": {"weights": "mine", "sha256": digest}}
    with pytest.raises(
        ValueError, match=r"by different weights in the two, mine \(aaaa1111\) and mine \(bbbb2222\)"
    ):
        cp.tl.transfer_labels(query, reference, "type", use_rep="X_told")
    with pytest.raises(ValueError, match="embed both with the same"):
        cp.evaluate.transfer(reference, query, "X_told", "type", progress=False)
    query.uns["cellprior"]["X_told"]["sha256"] = "aaaa1111"
    cp.tl.transfer_labels(query, reference, "type", use_rep="X_told")


def test_whole_numbers_are_the_same_labels_as_fractions_and_missing_ones(studies):
    reference, _, query = (study.copy() for study in studies)
    reference.obs["type"] = reference.obs["type"].str[-1].astype(int)
    query.obs["type"] = query.obs["type"].str[-1].astype(float).where(np.arange(query.n_obs) > 4)
    table = cp.evaluate.transfer(reference, query, "X_told", "type", progress=False)
    assert table["n_cells"].iloc[0] == (query.obs["type"] < 3).sum()


def test_several_studies_are_summed_with_the_studies_as_units(studies):
    reference, first, second = studies
    queries = {"first": first, "second": second}
    table = cp.evaluate.transfer(reference, queries, {"told": "X_told"}, "type", progress=False)
    rows = table[(table["method"] == "told") & (table["metric"] == "accuracy")]
    values = rows[rows["reader"] == "nearest centroid"].set_index("study")["value"]
    assert list(values.index) == ["all", "first", "second"]
    assert values["all"] == pytest.approx(values[["first", "second"]].mean())


def test_studies_that_do_not_fit_are_refused_with_what_to_do(studies):
    reference, query, _ = studies
    other = query.copy()
    other.var_names = [f"ENSG{i:011d}" for i in range(other.n_vars)]
    with pytest.raises(ValueError, match="the same kind of name"):
        cp.evaluate.transfer(reference, other, "X_told", "type", progress=False)
    other = query.copy()
    other.obs["type"] = "neuron"
    with pytest.raises(ValueError, match="Name the types alike"):
        cp.evaluate.transfer(reference, other, "X_told", "type", progress=False)
    with pytest.raises(KeyError, match="nope"):
        cp.evaluate.transfer(reference, query, "X_told", "nope", progress=False)


@pytest.mark.parametrize("how", ["nearest neighbours", "nearest centroid", "ridge"])
def test_cells_are_named_after_a_reference_in_any_embedding_and_strangers_are_unknown(studies, how):
    reference, _, query = studies
    many = ad.concat([reference] * 4, index_unique="-")
    many.obsm["X_told"] = many.obsm["X_told"] + 0.05 * np.random.default_rng(0).standard_normal(
        many.obsm["X_told"].shape
    )
    with pytest.warns(UserWarning, match="cells are called 'unknown'"):
        named = cp.tl.transfer_labels(query, many, "type", use_rep="X_told", how=how, reject=0.2, copy=True)
    assert "told_label" not in query.obs
    known = named.obs["type"] != "type 3"
    guess = named.obs["told_label_best_guess"].astype(str)
    assert (guess[known] == named.obs["type"][known]).mean() > 0.9
    unknown = named.obs["told_label"] == "unknown"
    assert unknown[~known].mean() > 0.8 > 0.5 > unknown[known].mean()
    assert named.obs["told_label_certainty"].between(0, 1).all()
    assert named.uns["cellprior"]["told_label"]["use_rep"] == "X_told"


def test_labels_cannot_be_transferred_between_embeddings_that_differ(cells):
    adata = cells(60)
    adata.obsm["X_a"] = told(adata)
    other = adata.copy()
    other.obsm["X_a"] = np.hstack([told(adata)] * 2)
    with pytest.raises(ValueError, match="embed both with the same weights"):
        cp.tl.transfer_labels(adata, other, "type", use_rep="X_a")
    with pytest.raises(KeyError, match="X_b"):
        cp.tl.transfer_labels(adata, other, "type", use_rep="X_b")
    with pytest.raises(ValueError, match="choose among"):
        cp.tl.transfer_labels(adata, adata, "type", use_rep="X_a", how="tarot")
