from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

import cellprior as cp


@pytest.fixture(scope="module")
def blood():
    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()[:120].copy()
    adata.layers["counts"] = cp.pp.recover_counts(adata)
    adata.obs["panel"] = np.where(np.arange(120) < 50, "small", "whole")
    return adata


@pytest.fixture
def model(blood):
    cp.model.CellPLM.setup_anndata(blood, layer="counts", batch_key="panel")
    return cp.model.CellPLM.from_pretrained("cellplm-starter", blood)


def test_normalized_expression_adds_up_to_the_library_size(model, blood):
    whole = model.get_normalized_expression(library_size=1e4)
    assert whole.shape == (120, len(model.genes))
    np.testing.assert_allclose(whole.sum(axis=1), 1e4, rtol=1e-4)
    some = model.get_normalized_expression(gene_list=["CD3D", "LYZ"], library_size=1e4, batch_size=7)
    assert some.columns.tolist() == ["CD3D", "LYZ"]
    assert some.index.equals(blood.obs_names)
    np.testing.assert_allclose(some, whole[["CD3D", "LYZ"]], rtol=1e-4)


def test_decoded_expression_knows_which_cells_are_which(model, blood):
    values = (
        model.get_normalized_expression(gene_list=["CD79A", "LYZ"])
        .groupby(blood.obs["bulk_labels"], observed=True)
        .mean()
    )
    assert values["CD79A"].idxmax() == "CD19+ B"
    assert values["LYZ"].idxmax() in ("CD14+ Monocyte", "Dendritic")


def test_imputed_counts_of_the_measured_genes_add_up_to_the_depth_of_the_cell(model, blood):
    known = blood.var_names[model.gene_match.index >= 0]
    imputed = model.impute(known)
    depth = np.asarray(blood[:, known].layers["counts"].sum(axis=1)).ravel()
    np.testing.assert_allclose(imputed.sum(axis=1), depth, rtol=1e-4)


def test_each_batch_is_scaled_by_the_genes_measured_there(model, blood):
    known = blood.var_names[model.gene_match.index >= 0]
    measured = {"small": known[:40], "whole": known}
    with pytest.raises(ValueError, match="genes have counts in a batch where measured= does not list them"):
        model.impute(known, measured=measured)
    blood = blood.copy()
    unmeasured = np.outer(blood.obs["panel"] == "small", ~blood.var_names.isin(known[:40]))
    blood.layers["counts"] = sp.csr_matrix(np.where(unmeasured, 0, blood.layers["counts"].toarray()))
    imputed = model.impute(known, blood, measured=measured)
    for panel, genes in measured.items():
        cells = blood.obs["panel"] == panel
        depth = np.asarray(blood[cells, genes].layers["counts"].sum(axis=1)).ravel()
        np.testing.assert_allclose(imputed.loc[cells.to_numpy(), genes].sum(axis=1), depth, rtol=1e-4)


def test_genes_that_the_data_lack_are_imputed_by_symbol_or_id_and_for_the_cells_asked_for(model):
    absent = model.genes.drop(index=model.gene_match.index[model.gene_match.index >= 0]).iloc[0]
    imputed = model.impute([absent["symbol"], absent["ensembl_id"]], indices=[5, 3])
    assert imputed.index.tolist() == model.adata.obs_names[[5, 3]].tolist()
    assert (imputed.iloc[:, 0] == imputed.iloc[:, 1]).all()
    assert (imputed > 0).all(axis=None)


def test_what_cannot_be_imputed_is_named(model, blood):
    with pytest.raises(KeyError, match="NOT-A-GENE"):
        model.impute(["CD3D", "NOT-A-GENE"])
    with pytest.raises(KeyError, match="whole"):
        model.impute(["CD3D"], measured={"small": ["CD3D"]})
    other = blood.copy()
    cp.model.CellPLM.setup_anndata(other, layer="counts")
    without = cp.model.CellPLM.from_pretrained("cellplm-starter", other)
    with pytest.raises(ValueError, match="batch_key"):
        without.impute(["CD3D"], measured={"small": ["CD3D"]})
    assert isinstance(without.impute(["CD3D"]), pd.DataFrame)


def hidden_loss(model, truth, genes, **options):
    """Poisson loss of the counts of genes that the data do not have, up to what does not depend on the guess."""
    guess = np.maximum(model.impute(genes, **options).to_numpy(), 1e-4)
    return (guess - truth * np.log(guess)).mean()


def test_covariates_that_fit_the_cells_predict_hidden_genes_better_than_their_mean_and_than_gene_means(blood):
    hidden = np.arange(blood.n_vars) % 5 == 0
    query = blood[:, ~hidden].copy()
    cp.model.CellPLM.setup_anndata(query, layer="counts", batch_key="panel")
    model = cp.model.CellPLM.from_pretrained("cellplm-starter", query)
    genes = [name for name in blood.var_names[hidden] if name in set(model.genes["symbol"])]
    truth = np.asarray(blood[:, genes].layers["counts"].todense())
    depth = np.asarray(query.layers["counts"].sum(axis=1))
    gene_means = depth * truth.sum(axis=0) / depth.sum()
    fitted, mean = (hidden_loss(model, truth, genes, covariates=how) for how in ("fitted", "mean"))
    assert fitted < mean
    assert fitted < (gene_means - truth * np.log(np.maximum(gene_means, 1e-4))).mean()


def test_the_covariates_are_those_of_a_cells_batch_whichever_cells_are_asked_for(model):
    assert model.module.decoder.dataset is not None
    whole = model.get_normalized_expression(gene_list=["CD3D", "LYZ"])
    some = model.get_normalized_expression(gene_list=["CD3D", "LYZ"], indices=np.arange(120) >= 50)
    np.testing.assert_allclose(some, whole.iloc[50:], rtol=1e-4)
    mean = model.get_normalized_expression(gene_list=["CD3D", "LYZ"], covariates="mean")
    assert not np.allclose(mean, whole, rtol=1e-2)
    with pytest.raises(ValueError, match="covariates='median' is not known"):
        model.get_normalized_expression(covariates="median")
