"""One AnnData with genes and peaks, and barcodes that are the same but for a suffix."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import cellprior as cp
from cellprior.genes._kinds import which_are_genes
from cellprior.model.data._barcodes import differ_by_suffix
from tests.contract.models import blood_cells

from .data import N_GENES, N_PEAKS, QUIET, cells, multiome


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    mdata = cells()
    cp.model.MultiomeCLIP.setup_mudata(mdata)
    model = cp.model.MultiomeCLIP(mdata, n_latent=8, n_hidden=16, n_components=(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has hardly learned
        model.train(max_epochs=1, **QUIET)
    model.save_pretrained(tmp_path_factory.mktemp("weights") / "w")
    return model


def joined(mdata) -> ad.AnnData:
    both = ad.concat([mdata["rna"], mdata["atac"]], axis=1)
    both.var["feature_types"] = ["Gene Expression"] * N_GENES + ["Peaks"] * N_PEAKS
    return both


@pytest.mark.parametrize("how", ["by type", "as categories", "by name", "shuffled"])
def test_one_table_with_genes_and_peaks_is_read_as_both(weights, how):
    mdata = cells(40, seed=3)
    expected, both = weights.get_latent_representation(mdata), joined(mdata)
    if how == "as categories":
        both.var["feature_types"] = pd.Categorical(both.var["feature_types"].str.lower())
    if how == "by name":
        del both.var["feature_types"]
    if how == "shuffled":
        both = both[:, np.random.default_rng(0).permutation(both.n_vars)].copy()
    np.testing.assert_allclose(weights.get_latent_representation(both), expected, atol=1e-6)
    np.testing.assert_allclose(
        weights.get_latent_representation(both, modality="rna"),
        weights.get_latent_representation(mdata["rna"].copy()),
        atol=1e-6,
    )
    if how != "by name":
        found = weights.feature_match(both)
        assert found["rna"].coverage == found["atac"].coverage == 1
        assert found["rna"].not_genes == {"peak": N_PEAKS}


def test_genes_beside_peaks_are_no_lost_peaks_and_no_places(weights):
    mdata = cells(40, seed=3)
    rna, atac = mdata["rna"].copy(), mdata["atac"][:, :30].copy()
    expected = weights.get_latent_representation(multiome({"rna": rna, "atac": atac}))
    rest = [f"FAKE{i}" for i in range(120)] + ["H1-10-1"]  # the second H1-10, which reads like a place
    more = ad.AnnData(np.ones((40, 121), dtype=np.float32), obs=rna.obs, var=pd.DataFrame(index=rest))
    both = ad.concat([rna, more, atac], axis=1)
    assert weights.feature_match(both)["atac"].coverage == 1
    np.testing.assert_allclose(weights.get_latent_representation(both), expected, atol=1e-6)


def test_a_table_with_both_is_streamed_as_both(weights, tmp_path):
    mdata = cells(40, seed=3)
    joined(mdata).write_h5ad(tmp_path / "both.h5ad")
    weights.save_pretrained(tmp_path / "w")
    cp.tl.embed(
        tmp_path / "both.h5ad", tmp_path / "w", out=tmp_path / "out.zarr", key_added="E", progress=False
    )
    expected = weights.get_latent_representation(mdata)
    np.testing.assert_allclose(ad.read_zarr(tmp_path / "out.zarr").obsm["E"], expected, atol=1e-5)


def test_antibodies_among_the_genes_of_a_modality_are_not_learned(weights):
    mdata = cells()
    rna = mdata["rna"].copy()
    rna.var["feature_types"] = ["Antibody Capture"] * 5 + ["Gene Expression"] * (N_GENES - 5)
    mdata = multiome({"rna": rna, "atac": mdata["atac"]})
    cp.model.MultiomeCLIP.setup_mudata(mdata)
    model = cp.model.MultiomeCLIP(mdata, n_latent=8, n_hidden=16, n_components=(16, 16))
    assert model.genes["symbol"].tolist() == rna.var_names[5:].tolist()


def test_a_model_made_from_data_learns_their_genes_alone():
    adata = blood_cells()[:60].copy()
    del adata.layers["log"]
    adata.var["feature_types"] = ["Antibody Capture"] * 10 + ["Gene Expression"] * (adata.n_vars - 10)
    cp.model.CellPLM.setup_anndata(adata)
    model = cp.model.CellPLM(adata, n_hidden=8, n_layers=1, n_heads=1, n_latent=4)
    assert model.genes["symbol"].tolist() == adata.var_names[10:].tolist()
    assert which_are_genes(adata.var).sum() == len(model.genes)


def test_barcodes_that_differ_by_a_suffix_are_warned_of_with_an_example_of_each(weights):
    mdata = cells(40, seed=3)
    rna, atac = mdata["rna"].copy(), mdata["atac"].copy()
    rna.obs_names, atac.obs_names = rna.obs_names + "-1", atac.obs_names + "-2"
    differ = "differ by what was added.*'cell0-1' and 'cell0-2': 40 cells"
    with pytest.raises(ValueError, match=f"No cell has both.*{differ}"):
        cp.model.MultiomeCLIP.setup_mudata(multiome({"rna": rna, "atac": atac}))
    with pytest.warns(UserWarning, match=differ):
        weights.get_latent_representation(multiome({"rna": rna, "atac": atac}))


def test_other_cells_are_not_taken_for_the_same_without_their_suffix():
    one, other = pd.Index([f"cell_{i}" for i in range(50)]), pd.Index([f"cell_{i}" for i in range(50, 100)])
    assert differ_by_suffix(one, other) == "" and differ_by_suffix(one, one[:5]) == ""
    assert differ_by_suffix(
        pd.Index([f"s1#AC{i}" for i in range(9)]), pd.Index([f"AC{i}-1" for i in range(9)])
    )
