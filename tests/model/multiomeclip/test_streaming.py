"""The embedding of a MuData that goes to disk; what is the same for all models is tested with the others."""

from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pytest
import torch
from mudata import MuData

from cellprior._compat import without_pulled_columns
from cellprior.model import _streaming
from cellprior.model.multiomeclip import MultiomeCLIP

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def stream(model: MultiomeCLIP, out: object, **options: object) -> None:
    _streaming.stream(model, out, key="X_multiomeclip", params={}, progress=False, **options)


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
