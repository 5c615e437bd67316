"""Where files and analysts keep counts: raw, layers, damaged matrices, files of other programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

import cellprior as cp
from cellprior._compat import new_group
from cellprior._matrix import Matrix, matrix_of, totals
from cellprior.cli import main
from cellprior.evaluate._expression import raw_counts
from cellprior.evaluate._task import make_task
from cellprior.model import CellPLM, NotCountsError
from cellprior.model.data._counts import read_rows
from cellprior.model.data._files import open_counts, refuse_foreign
from cellprior.weights import write_bundle

N_CELLS, N_GENES = 40, 60
NETWORK = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4}
OPTIONS = {"batch_key": None, "seeds": 1, "test_size": 0.2, "scvi_epochs": None, "max_cells": 1000}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    number = pd.Series(range(N_GENES)).astype(str)
    genes = pd.DataFrame({"ensembl_id": "ENSG" + number.str.zfill(11), "symbol": "GENE" + number})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = CellPLM._module_cls(N_GENES, **NETWORK).state_dict()
    config = {"model": "CellPLM", "network": NETWORK}
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    return write_bundle(folder, state_dict=tensors, config=config, genes=genes, card="# Tiny\n")


def counts() -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(1, (N_CELLS, N_GENES)).astype(np.float32))


def plain(x: Any = None) -> AnnData:
    obs = pd.DataFrame({"sample": ["a", "b"] * (N_CELLS // 2)}, index=[f"c{i}" for i in range(N_CELLS)])
    return AnnData(counts() if x is None else x, obs=obs, var=pd.DataFrame(index=names("GENE")))


def names(prefix: str) -> list[str]:
    return [f"{prefix}{i:011d}" if prefix == "ENSG" else f"{prefix}{i}" for i in range(N_GENES)]


def cellxgene(x: Any = None) -> AnnData:
    """Normalised values of some genes in X; counts of all of them in raw, by Ensembl id."""
    adata = plain(x)
    adata.var = pd.DataFrame({"feature_name": names("GENE")}, index=names("ENSG"))
    normalised = AnnData(
        sp.csr_matrix(counts()[:, ::3] / 2).log1p(), obs=adata.obs, var=adata.var.iloc[::3].copy()
    )
    normalised.raw = adata
    return normalised


@pytest.fixture
def expected(bundle: Path) -> np.ndarray:
    return embedded(plain(), bundle)


def embedded(adata: AnnData, bundle: Path, **options: Any) -> np.ndarray:
    cp.tl.embed(adata, bundle, batch_key="sample", device="cpu", **options)
    return adata.obsm["X_cellplm"]


def write(adata: AnnData, path: Path) -> None:
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
    else:
        ad.io.write_elem(new_group(path), "/", adata)


def as_view(adata: AnnData, path: Path) -> AnnData:
    padded = ad.concat([adata, adata[:1]], index_unique="-")
    padded.raw = ad.concat([adata.raw.to_adata(), adata.raw.to_adata()[:1]], index_unique="-")
    return padded[:N_CELLS]


def as_backed(adata: AnnData, path: Path) -> AnnData:
    adata.write_h5ad(path / "x.h5ad")
    return ad.read_h5ad(path / "x.h5ad", backed="r+")


RAW: dict[str, Callable[[Path], AnnData]] = {
    "csr": lambda path: cellxgene(),
    "csc": lambda path: cellxgene(counts().tocsc()),
    "dense": lambda path: cellxgene(counts().toarray()),
    "backed": lambda path: as_backed(cellxgene(), path),
    "view": lambda path: as_view(cellxgene(), path),
}


@pytest.mark.parametrize("make", RAW.values(), ids=RAW.keys())
def test_counts_in_raw_are_embedded_with_the_genes_of_raw(make, bundle, expected, tmp_path):
    options = {"layer": "raw", "batch_key": "sample", "device": "cpu"}
    with CellPLM.opened(bundle, make(tmp_path), **options) as model:
        np.testing.assert_allclose(model.get_latent_representation(), expected, **CLOSE)
        assert model.gene_match.vocabulary_share == 1


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_counts_in_raw_stream_from_a_file(kind, bundle, expected, tmp_path):
    path = tmp_path / f"in.{kind}"
    write(cellxgene(), path)
    options = {"layer": "raw", "batch_key": "sample", "device": "cpu", "progress": False}
    cp.tl.embed(path, bundle, out=tmp_path / "out.zarr", **options)
    found = ad.read_zarr(tmp_path / "out.zarr").obsm["X_cellplm"]
    np.testing.assert_allclose(found, expected, **CLOSE)
    opened = open_counts(path, "raw", as_dask=True)
    np.testing.assert_array_equal(matrix_of(opened, "raw").x.compute().toarray(), counts().toarray())
    assert matrix_of(opened, "raw").var.index.tolist() == names("ENSG")


def test_a_lazy_file_gives_the_counts_in_its_raw(bundle, expected, tmp_path):
    pytest.importorskip("xarray")
    write(cellxgene(), tmp_path / "in.h5ad")
    lazy = ad.experimental.read_lazy(tmp_path / "in.h5ad")
    with CellPLM.opened(bundle, lazy, layer="raw", batch_key="sample", device="cpu") as model:
        np.testing.assert_allclose(model.get_latent_representation(), expected, **CLOSE)


def test_a_layer_that_is_called_raw_is_that_layer():
    adata = cellxgene()
    adata.layers["raw"] = adata.X * 3
    assert matrix_of(adata, "raw").x is adata.layers["raw"]
    assert len(matrix_of(adata, "raw").var) == adata.n_vars


def test_a_saved_model_finds_the_counts_in_raw_again(bundle, expected, tmp_path):
    adata = cellxgene()
    CellPLM.setup_anndata(adata, layer="raw", batch_key="sample", gene_key="feature_name")
    model = CellPLM.from_pretrained(bundle, adata, device="cpu")
    model.save(tmp_path / "model")
    loaded = CellPLM.load(tmp_path / "model", adata=cellxgene(), accelerator="cpu")
    np.testing.assert_allclose(loaded.get_latent_representation(), expected, **CLOSE)
    np.testing.assert_allclose(loaded.get_latent_representation(cellxgene()), expected, **CLOSE)
    assert loaded.gene_match.var_names.tolist() == names("ENSG")
    with pytest.raises(ValueError, match="no layer 'raw' in the AnnData.*given here or in the setup"):
        loaded.get_latent_representation(plain())


def test_a_model_from_scratch_has_the_genes_of_raw():
    adata = cellxgene()
    CellPLM.setup_anndata(adata, layer="raw")
    assert CellPLM(adata, **NETWORK).genes["ensembl_id"].tolist() == names("ENSG")


def test_the_baselines_of_an_evaluation_see_the_counts_in_raw():
    np.testing.assert_array_equal(raw_counts(cellxgene(), "raw").toarray(), counts().toarray())
    adata = cellxgene()
    adata.obs["type"] = np.repeat(["x", "y"], N_CELLS // 2)
    adata.obsm["E"] = np.random.default_rng(0).normal(size=(N_CELLS, 3))
    found, same = (
        make_task(data, {"E": adata.obsm["E"]}, layer=layer, labels_key="type", **OPTIONS)
        for data, layer in ((adata, "raw"), (adata.raw.to_adata(), None))
    )
    assert found.log.shape == (N_CELLS, N_GENES)
    np.testing.assert_array_equal(found.log.toarray(), same.log.toarray())


def test_the_command_line_takes_counts_from_raw(bundle, tmp_path, capsys):
    cellxgene().write_h5ad(tmp_path / "in.h5ad")
    arguments = ["--weights", str(bundle), "--device", "cpu"]
    paths = [str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad")]
    assert main(["embed", *paths, *arguments, "--layer", "raw"]) == 0
    alone = embedded(plain(), bundle) * 0 + ad.read_h5ad(paths[1]).obsm["X_cellplm"]
    assert np.isfinite(alone).all()
    for output in ("out2.h5ad", "out.zarr"):
        capsys.readouterr()
        assert main(["embed", paths[0], str(tmp_path / output), *arguments]) == 1
        assert "adata.raw holds raw counts, name it: layer='raw'" in capsys.readouterr().err


def test_the_error_names_the_place_that_holds_counts(bundle):
    adata = plain(sp.csr_matrix(counts() / 2))
    adata.layers["scaled"] = -counts()
    adata.layers["counts"] = counts()
    with pytest.raises(NotCountsError, match=r"layers\['counts'\] holds raw counts, name it: layer='counts'"):
        CellPLM.setup_anndata(adata)
    adata.X, adata.layers["counts"] = counts(), counts() / 2
    with pytest.raises(NotCountsError, match="X holds raw counts: leave out layer='counts'"):
        CellPLM.setup_anndata(adata, layer="counts")
    with pytest.raises(ValueError, match=r"raw\.X holds integers.*layer=\"raw\".*raw\.to_adata"):
        cp.pp.recover_counts(cellxgene().raw)


def test_log_normalised_values_in_raw_are_recovered_by_name():
    adata = plain()
    adata.layers["log"] = sp.csr_matrix(counts() * 0.7).log1p()
    adata.X = adata.layers["log"]
    adata.raw = adata
    np.testing.assert_array_equal(cp.pp.recover_counts(adata, layer="raw").toarray(), counts().toarray())


NEARLY = {
    "X": (None, r"is 1\.00000095, which is not an integer.*adata\.X = np\.rint\(adata\.X\)"),
    "layer": ("counts", r"adata\.layers\['counts'\] = np\.rint\(adata\.layers\['counts'\]\)"),
    "raw": ("raw", r"adata = adata\.raw\.to_adata\(\); adata\.X = np\.rint\(adata\.X\)"),
}


@pytest.mark.parametrize(("layer", "message"), NEARLY.values(), ids=NEARLY.keys())
def test_values_that_are_nearly_counts_are_shown_with_all_digits_and_how_to_round_them(layer, message):
    adata = plain(counts() * np.float32(1 + 1e-6))
    adata.layers["counts"] = adata.X
    adata.raw = adata
    with pytest.raises(NotCountsError, match=message):
        CellPLM.setup_anndata(adata, layer=layer)
    adata.X = np.rint(adata.X)
    CellPLM.setup_anndata(adata)


def test_values_that_are_no_integers_by_far_are_not_called_nearly_counts():
    x = counts()
    x.data[:2] = 1.00001, 1.5
    with pytest.raises(NotCountsError, match="recover_counts"):
        CellPLM.setup_anndata(plain(x))


@pytest.mark.parametrize("value", [2e38, np.inf, 1e300, np.nan])
def test_counts_beyond_counting_are_refused(value):
    x = counts().astype(np.float64)
    x.data[:2] = value
    with pytest.raises(NotCountsError, match="too large for a count|not finite"):
        CellPLM.setup_anndata(plain(x))


def test_without_x_there_is_one_message_everywhere(bundle, tmp_path, capsys):
    adata = AnnData(obs=plain().obs, var=plain().var, layers={"counts": counts()})
    message = r"has no X; its layers are \['counts'\]. Name the one with raw counts: layer="
    for call in (
        lambda: CellPLM.setup_anndata(adata),
        lambda: cp.tl.embed(adata, bundle),
        lambda: cp.pp.recover_counts(adata),
        lambda: make_task(adata, {"E": np.ones((N_CELLS, 1))}, layer=None, labels_key="sample", **OPTIONS),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    adata.write_h5ad(tmp_path / "in.h5ad")
    assert main(["embed", f"{tmp_path}/in.h5ad", f"{tmp_path}/out.h5ad", "--weights", str(bundle)]) == 1
    assert "has no X; its layers are ['counts']" in capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        CellPLM.setup_anndata(ad.read_h5ad(tmp_path / "in.h5ad", backed="r"))
    in_a_stream = r"has no X; .* Its layers are counts. Name the one with raw counts, such as layer='counts'"
    with pytest.raises(ValueError, match=in_a_stream):
        cp.tl.embed(tmp_path / "in.h5ad", bundle, out=tmp_path / "out.zarr")


def test_an_open_file_without_x_is_embedded_by_its_layer_and_cannot_be_copied(bundle, tmp_path):
    AnnData(obs=plain().obs, var=plain().var, layers={"counts": counts()}).write_h5ad(tmp_path / "in.h5ad")
    opened, expected = ad.read_h5ad(tmp_path / "in.h5ad", backed="r"), plain()
    cp.tl.embed(opened, bundle, layer="counts", key_added="E")
    cp.tl.embed(expected, bundle, key_added="E")
    np.testing.assert_allclose(opened.obsm["E"], expected.obsm["E"], **CLOSE)
    message = r"in.h5ad has no X, and anndata makes no copy .*anndata.read_h5ad\("
    with pytest.raises(ValueError, match=message):
        cp.tl.embed(opened, bundle, layer="counts", copy=True)
    with pytest.raises(ValueError, match=message):
        cp.tl.embed(opened[:20], bundle, layer="counts", out=tmp_path / "out.zarr")


def test_a_stream_names_the_layer_that_holds_the_counts(bundle, tmp_path):
    adata = plain()
    adata.layers["counts"], adata.X = adata.X, adata.X * 0.5
    adata.layers["table"] = adata.to_df()
    adata.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(NotCountsError, match=r"layers\['counts'\] holds raw counts, name it: layer='counts'"):
        cp.tl.embed(tmp_path / "in.h5ad", bundle, out=tmp_path / "out.zarr")


# numbers


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64", "bool"])
@pytest.mark.parametrize("convert", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, sp.csr_array])
def test_sums_are_made_in_double_precision_whatever_the_type(dtype, convert):
    x = np.random.default_rng(0).poisson(8, (30_000, 7))
    x[:, 3] = 0
    x = x.astype(dtype)
    if dtype == "float16" and convert is not np.asarray:
        pytest.skip("SciPy has no sparse matrices of half precision")
    found = totals(Matrix(convert(x), pd.DataFrame(index=range(7)), "X"))
    np.testing.assert_array_equal(found, x.astype(np.float64).sum(axis=0))
    assert found.dtype == np.float64


def test_what_is_not_in_memory_is_not_summed(tmp_path):
    adata = as_backed(plain(), tmp_path)
    assert totals(matrix_of(adata, None)) is None


def negative(x: Any) -> None:
    x.indices[3] = -5


def beyond(x: Any) -> None:
    x.indices[3] = 10**6


def far(x: Any) -> None:
    x.indptr[5] = 10**9


def backwards(x: Any) -> None:
    x.indptr[5] = x.indptr[4] - 1


def short(x: Any) -> None:
    x.data = x.data[:-3]


DAMAGE = [negative, beyond, far, backwards, short]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_damaged_sparse_matrix_is_refused_and_named(damage, layout, bundle):
    x = counts().asformat(layout)
    adata = plain(x)
    damage(adata.X)
    for call in (
        lambda: cp.tl.embed(adata, bundle, device="cpu"),
        lambda: totals(matrix_of(adata, None)),
        lambda: read_rows(adata.X, np.array([30, 2, 0, 3, 4, 5, N_CELLS - 1]), where="X"),
        lambda: cp.pp.recover_counts(adata),
    ):
        with pytest.raises(ValueError, match="The sparse matrix X is damaged"):
            call()


@pytest.mark.parametrize("damage", DAMAGE[:-1])
@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("client", [False, True], ids=["here", "dask"])
def test_a_damaged_file_is_refused_and_named(damage, layout, client, tmp_path):
    plain(counts().asformat(layout)).write_h5ad(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "a") as file:
        parts = {name: file["X"][name][:] for name in ("data", "indices", "indptr")}
        x = type("Parts", (), parts)
        damage(x)
        for name in parts:
            file["X"][name][:] = getattr(x, name)
    with pytest.raises(ValueError, match=r"damaged"):
        read_rows(open_counts(tmp_path / "in.h5ad", None, as_dask=client).X, np.array([0, 3, 4, 5, 9, 20]))
    with pytest.raises(ValueError, match=r"/X of .*in\.h5ad is damaged"):
        read_rows(ad.read_h5ad(tmp_path / "in.h5ad", backed="r").X, np.arange(N_CELLS))


# files


def write_10x(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("matrix")["barcodes"] = np.array([b"AAA-1"])


def write_old_10x(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("GRCh38")["barcodes"] = np.array([b"AAA-1"])


def write_loom(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = np.zeros((2, 2))
        file.create_group("row_attrs")
        file.create_group("col_attrs")


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "matrix.mtx.gz").write_bytes(b"")


FOREIGN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "Cell Ranger": ("filtered_feature_bc_matrix.h5", write_10x, "10x file of Cell Ranger.*sc.read_10x_h5"),
    "Cell Ranger 2": ("filtered_gene_bc_matrices.h5", write_old_10x, "sc.read_10x_h5"),
    "loom": ("x.loom", write_loom, "loom file.*sc.read_loom"),
    "mtx": ("matrix.mtx.gz", lambda path: path.write_bytes(b""), "sc.read_10x_mtx"),
    "folder": ("filtered", write_folder, "sc.read_10x_mtx"),
    "csv": ("counts.csv", lambda path: path.write_text(""), "sc.read_text"),
    "R": ("counts.rds", lambda path: path.write_text(""), "conversion in R"),
}


@pytest.mark.parametrize(("name", "write", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_of_another_program_is_told_from_a_broken_one(name, write, message, tmp_path, capsys):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        refuse_foreign(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        open_counts(tmp_path / name, None)
    assert (
        main(["embed", str(tmp_path / name), str(tmp_path / "o.h5ad"), "--weights", "cellplm-starter"]) == 1
    )
    assert "is not an h5ad file" in capsys.readouterr().err.replace(", not an", " is not an")


def test_a_file_from_before_anndata_07_does_not_stream_and_says_why(tmp_path):
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"] = np.array([(b"c0", 1)], dtype=[("index", "S5"), ("n", "i4")])
        file["var"] = np.array([(b"g0",)], dtype=[("index", "S5")])
        file["X"] = np.ones((1, 1), dtype=np.float32)
    with pytest.raises(ValueError, match=r"older than 0\.7.*read_h5ad\(path\)\.write_h5ad\(path\)"):
        open_counts(tmp_path / "old.h5ad", None)


def test_a_zarr_folder_can_become_an_h5ad_file(bundle, expected, tmp_path):
    write(plain(), tmp_path / "in.zarr")
    arguments = ["--weights", str(bundle), "--batch-key", "sample", "--device", "cpu"]
    assert main(["embed", f"{tmp_path}/in.zarr", f"{tmp_path}/out.h5ad", *arguments]) == 0
    found = ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_cellplm"]
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
def test_strings_of_pandas_3_are_read_and_written(output, bundle, expected, tmp_path):
    adata = plain()
    adata.obs["sample"] = adata.obs["sample"].astype("string")
    adata.obs.index, adata.var.index = adata.obs.index.astype("string"), adata.var.index.astype("string")
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "in.h5ad", convert_strings_to_categoricals=False)
    arguments = ["--weights", str(bundle), "--batch-key", "sample", "--device", "cpu"]
    assert main(["embed", f"{tmp_path}/in.h5ad", f"{tmp_path}/{output}", *arguments]) == 0
    found = (ad.read_zarr if output.endswith("zarr") else ad.read_h5ad)(tmp_path / output)
    np.testing.assert_allclose(found.obsm["X_cellplm"], expected, **CLOSE)
    assert found.obs["sample"].astype(str).tolist() == ["a", "b"] * (N_CELLS // 2)


def test_a_part_of_a_backed_file_is_refused_before_anything_is_computed(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(CellPLM, "opened", lambda *args, **kwargs: pytest.fail("The model was opened."))
    part = as_backed(plain(), tmp_path)[:20]
    with pytest.raises(ValueError, match=r"copy=True.*to_memory"):
        cp.tl.embed(part, bundle)
    with pytest.raises(ValueError, match=r"copy=True.*to_memory"):
        cp.tl.annotate(part, bundle)


# batches


def test_a_query_and_a_loaded_model_know_batches_by_their_value(bundle, expected, tmp_path):
    def numbers(kind: Any) -> AnnData:
        adata = plain()
        adata.obs["sample"] = pd.Series([1, 2] * (N_CELLS // 2), index=adata.obs_names).astype(kind)
        return adata

    attached = numbers(int)
    CellPLM.setup_anndata(attached, batch_key="sample")
    model = CellPLM.from_pretrained(bundle, attached, device="cpu")
    model.save(tmp_path / "model")
    mapping = model.adata_manager.get_state_registry("batch").categorical_mapping
    assert list(mapping) == ["1", "2"]
    for kind in (float, str, "category", "Int64", "string", object):
        np.testing.assert_allclose(model.get_latent_representation(numbers(kind)), expected, **CLOSE)
        loaded = CellPLM.load(tmp_path / "model", adata=numbers(kind), accelerator="cpu")
        np.testing.assert_allclose(loaded.get_latent_representation(), expected, **CLOSE)
        assert list(loaded.adata_manager.get_state_registry("batch").categorical_mapping) == ["1", "2"]
    other = plain()
    with pytest.raises(ValueError, match=r"obs\['sample'\] has the batch 'a'.*they had \['1', '2'\]"):
        CellPLM.load(tmp_path / "model", adata=other, accelerator="cpu")
    other.obs.loc["c7":"c9", "sample"] = None
    with pytest.raises(
        ValueError, match=r"obs\['sample'\] is missing \(NaN\) in 3 of 40 cells, the first 'c7'"
    ):
        model.get_latent_representation(other)


def test_a_covariate_that_was_learned_as_a_float_is_the_same_number(bundle):
    adata = plain()
    adata.obs["sample"] = [1.0, 2.0] * (N_CELLS // 2)
    CellPLM.setup_anndata(adata, batch_key="sample")
    model = CellPLM(adata, n_batches=2, **NETWORK)
    model.is_trained_ = True
    model.training_state_ = json.loads('{"kl_weight": 1.0, "batches": ["2.0", "1.0"]}')
    assert model._covariate() == [1, 0]
