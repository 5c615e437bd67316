"""The embedding of a MuData that goes to disk; what is the same for all models is tested with the others."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pytest
import torch
from anndata import AnnData
from mudata import MuData

import cellprior as cp
from cellprior._compat import without_pulled_columns
from cellprior.cli import main
from cellprior.model import NotCountsError
from cellprior.model.engine import _stream as _streaming
from cellprior.model.multiomeclip import MultiomeCLIP

from .data import N_CELLS, multiome

KEY = "X_multiomeclip"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def stream(model: MultiomeCLIP, out: object, **options: object) -> None:
    model._stream(out, key="X_multiomeclip", params={}, progress=False, **options)


@pytest.fixture
def attached(trained, mdata, tmp_path) -> MultiomeCLIP:
    """The model with a backed MuData, of which one cell lacks ATAC."""
    trained.save_pretrained(tmp_path / "weights")
    mdata.mod["atac"] = mdata.mod["atac"][1:].copy()
    with without_pulled_columns():
        mdata.update()
        mdata.write(tmp_path / "cells.h5mu")
        stored = md.read_h5mu(tmp_path / "cells.h5mu", backed="r")
    assert stored.mod["rna"].isbacked
    MultiomeCLIP.setup_mudata(stored)
    return MultiomeCLIP.from_pretrained(tmp_path / "weights", stored)


def test_a_backed_mudata_is_streamed_by_what_each_cell_has(attached, tmp_path):
    stream(attached, tmp_path / "out.zarr", batch_size=50)
    found = ad.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_allclose(found.obsm["X_multiomeclip"], attached.get_latent_representation(), **CLOSE)
    assert found.obs_names.equals(attached.adata.obs_names)
    assert found.uns["cellprior"]["X_multiomeclip"]["model"] == "MultiomeCLIP"


def test_a_stream_that_is_cut_short_goes_on_and_other_data_are_noticed(attached, tmp_path, monkeypatch):
    stream(attached, tmp_path / "whole.zarr", batch_size=50)
    write, n_written = _streaming.LatentStore.write, 0

    def cut(self: _streaming.LatentStore, part: object) -> None:
        nonlocal n_written
        if (n_written := n_written + 1) == 2:
            raise KeyboardInterrupt
        write(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(_streaming.LatentStore, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            stream(attached, tmp_path / "out.zarr", batch_size=50)
    with without_pulled_columns():
        other = MuData({name: adata.to_memory() for name, adata in attached.adata.mod.items()})
    other.mod["rna"].X.data[0] += 1
    MultiomeCLIP.setup_mudata(other)
    with pytest.raises(FileExistsError, match=r"differs in rna counts \("):
        stream(MultiomeCLIP.from_pretrained(tmp_path / "weights", other), tmp_path / "out.zarr")
    stream(attached, tmp_path / "out.zarr")
    found, expected = (
        ad.read_zarr(tmp_path / f"{name}.zarr").obsm["X_multiomeclip"] for name in ("out", "whole")
    )
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def files(mdata, tmp_path) -> tuple[Path, Path]:
    """The same cells in two files: counts in a layer, the first cells without ATAC and the last without RNA."""
    for name, adata in mdata.mod.items():
        adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
        mdata.mod[name] = adata[3:].copy() if name == "atac" else adata[:-3].copy()
    protein = AnnData(np.ones((N_CELLS, 1), dtype=np.float32), obs=mdata.obs[[]].copy())
    found = multiome({"GEX": mdata.mod["rna"], "protein": protein, "atac": mdata.mod["atac"]}, mdata.obs)
    with without_pulled_columns():
        found = found[np.random.default_rng(0).permutation(N_CELLS)].copy()
        found.write_h5mu(tmp_path / "cells.h5mu")
        with warnings.catch_warnings():
            # mudata 0.4 asks anndata 0.13 for a setting of which it has announced the end
            warnings.simplefilter("ignore", DeprecationWarning)
            found.write_zarr(tmp_path / "cells.zarr")
    return tmp_path / "cells.h5mu", tmp_path / "cells.zarr"


SETUP = {"layer": "counts", "modalities": {"rna": "GEX"}, "progress": False}


def test_a_mudata_in_a_file_is_streamed_and_its_counts_stay_there(
    bundle, files, tmp_path, capsys, monkeypatch
):
    with without_pulled_columns():
        inside = md.read_h5mu(files[0])
    cp.tl.embed(inside, bundle, **SETUP)
    monkeypatch.setattr(md, "read_h5mu", None)
    for path in files:
        out = tmp_path / f"{path.suffix[1:]}.zarr"
        cp.tl.embed(path, bundle, out=out, batch_size=50, **SETUP)
        found = ad.read_zarr(out)
        assert found.obs_names.equals(inside.obs_names) and list(found.obs) == list(inside.obs)
        np.testing.assert_allclose(found.obsm[KEY], inside.obsm[KEY], **CLOSE)
    command = ["embed", str(files[0]), str(tmp_path / "cli.zarr"), "--weights", str(bundle)]
    assert main([*command, "--layer", "counts", "--modalities", "rna=GEX"]) == 0
    np.testing.assert_array_equal(ad.read_zarr(tmp_path / "cli.zarr").obsm[KEY], found.obsm[KEY])
    assert "complete" in capsys.readouterr().out


def test_one_modality_in_a_file_is_streamed(bundle, latent, mdata, tmp_path):
    for name, adata in mdata.mod.items():
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        cp.tl.embed(tmp_path / f"{name}.h5ad", bundle, out=tmp_path / f"{name}.zarr", progress=False)
        found = ad.read_zarr(tmp_path / f"{name}.zarr")
        np.testing.assert_allclose(found.obsm[KEY], latent[name], **CLOSE)


def test_a_cluster_embeds_each_cell_by_what_it_has(client, bundle, files, tmp_path):
    with without_pulled_columns():
        inside = md.read_h5mu(files[0])
    cp.tl.embed(inside, bundle, **SETUP)
    assert not np.isnan(inside.obsm[KEY]).any()
    for path in files:
        out = tmp_path / f"{path.suffix[1:]}.zarr"
        cp.tl.embed(path, bundle, out=out, batch_size=20, client=client, **SETUP)
        np.testing.assert_allclose(ad.read_zarr(out).obsm[KEY], inside.obsm[KEY], **CLOSE)
    with pytest.raises(TypeError, match="a dask array; these are a csr_matrix"):
        cp.tl.embed(inside, bundle, client=client, **SETUP)


def test_counts_that_are_none_are_found_on_a_cluster_by_their_cell_and_peak(client, bundle, mdata, tmp_path):
    atac = mdata.mod["atac"]
    atac.X.data[-1] = 0.5
    cell, peak = atac.obs_names[-1], atac.var_names[atac.X.indices[-1]]
    with without_pulled_columns():
        mdata.write_h5mu(tmp_path / "cells.h5mu")
    with pytest.raises(NotCountsError, match=f"cell '{cell}', peak '{peak}' is 0.5.*atac_layer"):
        cp.tl.embed(tmp_path / "cells.h5mu", bundle, out=tmp_path / "o.zarr", client=client, progress=False)
    assert not (tmp_path / "o.zarr").exists()


def test_a_file_that_cannot_be_read_is_an_error_that_says_what_it_has(bundle, files, tmp_path):
    for options, message in (
        ({}, r"has the modalities .*'GEX'.*needed: 'RNA' or 'ATAC'. Name them: modalities=."),
        ({"layer": "raw"}, "GEX has no raw/var and no raw/X; .*Its layers are counts"),
    ):
        names = {"modalities": {"rna": "RNA", "atac": "ATAC"}} if not options else {}
        with pytest.raises(ValueError, match=message):
            cp.tl.embed(files[0], bundle, out=tmp_path / "o.zarr", **{**SETUP, **options, **names})
    with pytest.raises(ValueError, match="is a MuData, which MultiomeCLIP reads"):
        cp.tl.embed(files[0], "cellplm-starter", out=tmp_path / "o.zarr")
    adata = ad.AnnData(np.ones((3, 2)))
    adata.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(ValueError, match="is an AnnData, which has one matrix of counts: name one layer"):
        cp.tl.embed(tmp_path / "x.h5ad", bundle, layer={"rna": "counts"}, out=tmp_path / "o.zarr")


def test_where_memory_runs_out_fewer_cells_at_a_time_give_the_same(trained, latent, monkeypatch):
    embed = trained.module.embed

    def out_of_memory(modality: str, counts: torch.Tensor) -> torch.Tensor:
        if len(counts) > 40:
            msg = "CUDA out of memory."
            raise torch.cuda.OutOfMemoryError(msg)
        return embed(modality, counts)

    monkeypatch.setattr(trained.module, "embed", out_of_memory)
    with pytest.warns(UserWarning, match="going on with 64"):
        found = trained.get_latent_representation(batch_size=128)
    np.testing.assert_allclose(found, latent["joint"], **CLOSE)
