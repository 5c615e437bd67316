"""`tl.embed` and the command line for a MuData."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pytest
import scanpy as sc
from anndata._warnings import ImplicitModificationWarning
from mudata import MuData

import cellprior as cp
from cellprior._compat import without_pulled_columns
from cellprior.cli import main

from .data import N_CELLS, multiome, part

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KEY = "X_multiomeclip"


def written(mdata: MuData, path: Path) -> Path:
    with without_pulled_columns():
        mdata.write(path)
    return path


def read(path: Path, **options: str) -> MuData:
    with without_pulled_columns():
        return md.read_h5mu(path, **options)


def test_a_mudata_gets_the_joint_embedding_and_its_origin(bundle, latent, mdata, tmp_path):
    assert cp.tl.embed(mdata, bundle) is None
    np.testing.assert_allclose(mdata.obsm[KEY], latent["joint"], **CLOSE)
    assert mdata.uns["cellprior"][KEY] == {
        "model": "MultiomeCLIP",
        "weights": str(bundle),
        "sha256": cp.weights.sha256(bundle),
        "rna_coverage": 1.0,
        "rna_counts_share": 1.0,
        "atac_coverage": 1.0,
        "atac_counts_share": 1.0,
        "cellprior_version": version("cellprior"),
        "params": {"min_coverage": 0.25},
    }
    again = read(written(mdata, tmp_path / "x.h5mu"))
    assert again.uns["cellprior"] == mdata.uns["cellprior"]
    assert set(mdata.uns) == {"cellprior"}


@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_an_anndata_of_one_modality_is_embedded_by_it(bundle, latent, mdata, modality):
    adata = mdata.mod[modality]
    cp.tl.embed(adata, bundle)
    np.testing.assert_allclose(adata.obsm[KEY], latent[modality], **CLOSE)
    assert f"{modality}_coverage" in adata.uns["cellprior"][KEY]


def test_scanpy_finds_neighbours_in_the_mudata(bundle, mdata):
    cp.tl.embed(mdata, bundle)
    sc.pp.neighbors(mdata, use_rep=KEY)
    near = mdata.obsp["connectivities"] > 0.5
    kind = mdata.obs["type"].to_numpy()
    first, second = near.nonzero()
    assert (kind[first] == kind[second]).mean() > 0.9


def test_layers_names_of_modalities_and_of_genes_can_be_given(bundle, latent, mdata):
    rna, atac = mdata.mod["rna"], mdata.mod["atac"]
    for adata in (rna, atac):
        adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    atac.layers["open"] = atac.layers["counts"]
    del atac.layers["counts"]
    rna.var["symbol"] = rna.var_names
    rna.var_names = [f"feature {i}" for i in range(rna.n_vars)]
    renamed = multiome({"GEX": rna, "peaks": atac}, mdata.obs)
    setup = {
        "layer": {"rna": "counts", "atac": "open"},
        "modalities": {"rna": "GEX", "atac": "peaks"},
        "gene_key": "symbol",
        "batch_key": "batch",
    }
    copy = cp.tl.embed(
        renamed, bundle, **setup, key_added="X_mine", batch_size=33, min_coverage=0.4, device="cpu", copy=True
    )
    assert KEY not in renamed.obsm and "cellprior" not in renamed.uns
    np.testing.assert_allclose(copy.obsm["X_mine"], latent["joint"], **CLOSE)
    assert copy.uns["cellprior"]["X_mine"]["params"] == {**setup, "min_coverage": 0.4}
    one_name = part(mdata, "rna", np.arange(N_CELLS))
    cp.tl.embed(one_name, bundle, layer="counts")
    np.testing.assert_allclose(one_name.obsm[KEY], latent["rna"], **CLOSE)


def test_views_and_files_are_embedded_as_those_of_an_anndata_are(bundle, latent, mdata, tmp_path):
    half = mdata[::2]
    copy = cp.tl.embed(half, bundle, copy=True)
    assert half.is_view and not mdata.uns and not mdata.mod["rna"].uns
    with without_pulled_columns(), pytest.warns(ImplicitModificationWarning):
        cp.tl.embed(half, bundle)
    for embedded in (copy, half):
        np.testing.assert_allclose(embedded.obsm[KEY], latent["joint"][::2], **CLOSE)
    backed = read(written(mdata, tmp_path / "x.h5mu"), backed="r")
    cp.tl.embed(backed, bundle)
    assert backed.mod["rna"].isbacked
    np.testing.assert_allclose(backed.obsm[KEY], latent["joint"], **CLOSE)
    with pytest.raises(ValueError, match="read it without backed="):
        cp.tl.embed(backed, bundle, copy=True)


def test_what_cannot_be_embedded_is_an_error_that_says_what_to_do_and_nothing_is_written(bundle, mdata):
    for arguments, message in (
        ({"layer": "raw"}, "no layer 'raw' in 'rna'"),
        ({"layer": {"rna": None, "atac": "raw"}}, "no layer 'raw' in 'atac'"),
        ({"layer": {"GEX": "raw"}}, r"layer has the keys \['GEX'\]"),
        ({"modalities": {"rna": "GEX", "atac": "ATAC"}}, "'GEX' \\(RNA\\) or 'ATAC' \\(ATAC\\) is needed"),
        ({"gene_key": "nope"}, "no column 'nope'"),
    ):
        with pytest.raises(ValueError, match=message):
            cp.tl.embed(mdata, bundle, **arguments)
    with pytest.raises(KeyError, match="'nope' not found"):
        cp.tl.embed(mdata, bundle, batch_key="nope")
    assert set(mdata.obsm) == {"rna", "atac"} and not mdata.uns


@pytest.mark.parametrize("arguments", [{}, {"layer": {"rna": "counts"}}, {"modalities": {"rna": "rna"}}])
def test_a_model_of_genes_refuses_what_a_mudata_needs(mdata, arguments):
    data = mdata.mod["rna"] if arguments else mdata
    with pytest.raises(ValueError, match=r'CellPLM, which reads an AnnData.*mdata\["rna"\]'):
        cp.tl.embed(data, "cellplm-starter", **arguments)


def test_annotate_points_to_the_transfer_of_labels(bundle, mdata):
    with pytest.raises(ValueError, match="MultiomeCLIP, which names cells by its transfer_labels"):
        cp.tl.annotate(mdata.mod["rna"], bundle)


# on the command line


def test_embed_writes_an_h5mu_file(bundle, latent, mdata, tmp_path, capsys):
    for adata in mdata.mod.values():
        adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    renamed = multiome({"GEX": mdata.mod["rna"], "atac": mdata.mod["atac"]}, mdata.obs)
    given, output = written(renamed, tmp_path / "in.h5mu"), tmp_path / "out.h5mu"
    command = ["embed", str(given), str(output), "--weights", str(bundle), "--modalities", "rna=GEX"]
    for layer in ("counts", "rna=counts,atac=counts"):
        assert main([*command, "--layer", layer, "--overwrite"]) == 0
        found = read(output)
        np.testing.assert_allclose(found.obsm[KEY], latent["joint"], **CLOSE)
        assert list(found.obs) == list(mdata.obs)
        used = "100.0% of the counts of RNA used, 100.0% of the counts of ATAC used"
        assert capsys.readouterr().out == f"{output}: obsm['{KEY}'], 160 cells x 16, {used}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5mu", "out.h5mu"]


def test_embed_takes_peaks_in_an_h5ad_file(bundle, latent, mdata, tmp_path):
    mdata.mod["atac"].write_h5ad(tmp_path / "atac.h5ad")
    assert main(["embed", *[str(tmp_path / "atac.h5ad")] * 2, "--weights", str(bundle)]) == 0
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "atac.h5ad").obsm[KEY], latent["atac"], **CLOSE)


@pytest.mark.filterwarnings("ignore:The HDF5 file was not created by muon:UserWarning")
@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("cells.h5mu", "out.h5ad", "both .h5mu, or neither"),
        ("text.h5mu", "out.h5mu", "text.h5mu cannot be read as an h5mu file"),
        ("renamed.h5mu", "out.h5mu", "renamed.h5mu cannot be read as an h5mu file"),
        ("nope.h5mu", "out.h5mu", "nope.h5mu"),
    ],
)
def test_files_that_do_not_fit_are_one_message(
    bundle, mdata, tmp_path, monkeypatch, capsys, given, output, message
):
    monkeypatch.chdir(tmp_path)
    written(mdata, Path("cells.h5mu"))
    Path("text.h5mu").write_text("not an HDF5 file")
    mdata.mod["rna"].write_h5ad("renamed.h5mu")
    assert main(["embed", given, output, "--weights", str(bundle)]) == 1
    assert message in capsys.readouterr().err
    assert not Path(output).exists()
