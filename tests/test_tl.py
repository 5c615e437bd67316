from __future__ import annotations

import gc
import weakref
from importlib.metadata import version

import anndata as ad
import numpy as np
import pytest
from anndata import AnnData
from anndata._warnings import ImplicitModificationWarning

import cellprior as cp
from cellprior.model import CellPLM
from tests.contract.models import blood_cells
from tests.parity.cellplm_golden import Golden

STARTER = "cellplm-starter"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture
def adata() -> AnnData:
    return blood_cells()[:200].copy()


def by_hand(adata: AnnData, **setup: str) -> np.ndarray:
    adata = adata.copy()
    CellPLM.setup_anndata(adata, **setup)
    return CellPLM.from_pretrained(STARTER, adata).get_latent_representation()


def test_the_embedding_is_that_of_the_model_class_and_its_origin_is_noted(adata):
    model = CellPLM.from_pretrained(STARTER, adata.copy())
    match = model.gene_match
    assert cp.tl.embed(adata, STARTER) is None
    np.testing.assert_array_equal(adata.obsm["X_cellplm"], model.get_latent_representation())
    assert adata.uns["cellprior"]["X_cellplm"] == {
        "model": "CellPLM",
        "weights": STARTER,
        "sha256": cp.weights._fetch.sha256(cp.weights.fetch(STARTER)),
        "coverage": match.coverage,
        "vocabulary_share": match.vocabulary_share,
        "counts_share": match.counts_share,
        "cellprior_version": version("cellprior"),
        "params": {"min_coverage": 0.25},
    }


def test_a_setup_of_the_user_is_as_it_was_after_an_embedding_with_another(adata):
    CellPLM.setup_anndata(adata, batch_key="batch")
    before = {name: value for name, value in adata.uns.items() if name.startswith("_scvi")}
    codes = adata.obs["_scvi_batch"].copy()
    cp.tl.embed(adata, STARTER)
    assert {name: value for name, value in adata.uns.items() if name.startswith("_scvi")} == before
    assert (adata.obs["_scvi_batch"] == codes).all()
    CellPLM.from_pretrained(STARTER, adata)  # and still of use


def test_every_argument_reaches_the_model_and_the_record_survives_a_file(adata, tmp_path):
    adata.layers["counts"], adata.X = adata.X, adata.layers["log"]
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"row{i}" for i in range(adata.n_vars)]
    setup = {"layer": "counts", "gene_key": "symbol", "batch_key": "batch"}
    cp.tl.embed(adata, STARTER, **setup, key_added="X_mine", batch_size=33, min_coverage=0.4, device="cpu")
    np.testing.assert_allclose(adata.obsm["X_mine"], by_hand(adata, **setup), rtol=1e-5, atol=1e-5)
    assert "X_cellplm" not in adata.obsm
    adata.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    assert again.uns["cellprior"] == adata.uns["cellprior"]
    assert again.uns["cellprior"]["X_mine"]["params"] == {**setup, "min_coverage": 0.4}
    np.testing.assert_array_equal(again.obsm["X_mine"], adata.obsm["X_mine"])
    cp.tl.embed(again, STARTER, **setup)  # a file that has been through scvi's setup can go through it again
    np.testing.assert_allclose(again.obsm["X_cellplm"], adata.obsm["X_mine"], rtol=1e-5, atol=1e-5)


def test_a_setup_that_was_there_before_holds_afterwards(adata):
    adata.layers["counts"], adata.X = adata.X, adata.layers["log"]
    CellPLM.setup_anndata(adata, layer="counts", batch_key="batch")
    model = CellPLM.from_pretrained(STARTER, adata)
    cp.tl.embed(adata, STARTER, layer="counts", key_added="X_together")
    again = CellPLM.from_pretrained(STARTER, adata)
    assert again.registry["setup_args"] == model.registry["setup_args"]
    latent = again.get_latent_representation()
    np.testing.assert_array_equal(latent, model.get_latent_representation())
    assert not np.allclose(latent, adata.obsm["X_together"])


def test_a_copy_has_the_embedding_and_the_original_is_as_it_was(adata):
    before = set(adata.uns), set(adata.obs), set(adata.obsm)
    copy = cp.tl.embed(adata, STARTER, batch_key="batch", copy=True)
    assert (set(adata.uns), set(adata.obs), set(adata.obsm)) == before
    np.testing.assert_array_equal(copy.obsm["X_cellplm"], by_hand(adata, batch_key="batch"))


def test_a_view_becomes_an_anndata_of_its_own_as_everywhere_in_scanpy(adata):
    half = adata[::2]
    with pytest.warns(ImplicitModificationWarning):
        cp.tl.embed(half, STARTER)
    assert not half.is_view
    assert not adata.obsm
    np.testing.assert_array_equal(half.obsm["X_cellplm"], by_hand(adata[::2]))


def test_the_copy_of_a_view_leaves_it_a_view(adata):
    half = adata[::2]
    copy = cp.tl.embed(half, STARTER, copy=True)
    assert half.is_view
    assert copy.obsm["X_cellplm"].shape[0] == half.n_obs


def test_a_backed_file_can_be_embedded_and_copied_and_so_can_a_part_of_it(adata, tmp_path):
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    cp.tl.embed(backed, STARTER)
    np.testing.assert_array_equal(backed.obsm["X_cellplm"], by_hand(adata))
    copy = cp.tl.embed(backed, STARTER, key_added="X_copy", copy=True)
    np.testing.assert_array_equal(copy.obsm["X_copy"], backed.obsm["X_cellplm"])
    part = cp.tl.embed(backed[::2], STARTER, copy=True)
    np.testing.assert_array_equal(part.obsm["X_cellplm"], by_hand(adata[::2]))
    assert "X_copy" not in backed.obsm


def test_embeddings_side_by_side_keep_their_records_and_the_latest_comes_last(adata):
    for key in ("X_one", "X_two", "X_one"):
        cp.tl.embed(adata, STARTER, key_added=key)
    assert list(adata.uns["cellprior"]) == ["X_two", "X_one"]


def test_an_official_checkpoint_is_recognised_by_its_name(tmp_path):
    case = Golden.load("vae")
    path = case.write(tmp_path)
    for weights in (path, str(path), tmp_path):
        adata = case.adata
        cp.tl.embed(adata, weights)
        np.testing.assert_allclose(
            adata.obsm["X_cellplm"], case["one_sentence__vae_mu"], rtol=1e-5, atol=1e-5
        )
        assert adata.uns["cellprior"]["X_cellplm"]["weights"] == str(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("cellplm-startr", "neither a registry name nor an existing file.*cellplm-starter"),
        ("gencode-human-48", "gencode-human-48"),
        ("scbert-panglao", "scbert-panglao"),
    ],
)
def test_weights_that_no_model_knows_or_that_cannot_be_had_are_an_error(adata, weights, message):
    with pytest.raises(cp.weights.WeightsError, match=message):
        cp.tl.embed(adata, weights)
    assert not adata.obsm
    assert "cellprior" not in adata.uns


def test_nothing_is_written_when_the_counts_are_refused(adata):
    adata.X = adata.layers["log"]
    with pytest.raises(cp.model.NotCountsError, match="recover_counts"):
        cp.tl.embed(adata, STARTER)
    assert not adata.obsm
    assert "cellprior" not in adata.uns


def test_a_model_that_holds_the_same_data_goes_on_working(adata):
    CellPLM.setup_anndata(adata, batch_key="batch")
    model = CellPLM.from_pretrained(STARTER, adata)
    latent = model.get_latent_representation()
    cp.tl.embed(adata, STARTER)
    np.testing.assert_array_equal(model.get_latent_representation(), latent)


def test_the_data_are_let_go_also_after_an_error():
    embedded, refused = blood_cells(), blood_cells()
    cp.tl.embed(embedded, STARTER)
    refused.X.data[-1] = 0.5
    with pytest.raises(cp.model.NotCountsError):
        cp.tl.embed(refused, STARTER)
    kept = [weakref.ref(embedded), weakref.ref(refused)]
    del embedded, refused
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_a_model_is_opened_on_some_data_and_lets_go_of_them(adata):
    with CellPLM.opened(STARTER, adata) as model:
        latent = model.get_latent_representation()
    cp.tl.embed(adata, STARTER)
    np.testing.assert_allclose(adata.obsm["X_cellplm"], latent, rtol=1e-5, atol=1e-5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_models_whose_authors_pickle_no_objects_take_no_pickle():
    for model in (cp.model.CellPLM, cp.model.ScBERT):
        assert model.from_pickle(None, {}, reference=None, layer=None) is None
