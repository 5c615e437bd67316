"""Two worker processes of a Dask cluster give what one process gives."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from anndata import AnnData

import cellprior as cp
from cellprior.model.cellplm import _cluster
from cellprior.model.engine import _dask as clusters
from cellprior.model.engine import _stream as _streaming
from cellprior.model.scbert._module import ScBERTModule
from tests.contract.models import blood_cells, tiny_nicheformer, tiny_scbert

pytest.importorskip("distributed")
da = pytest.importorskip("dask.array")

STARTER = "cellplm-starter"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture
def adata() -> AnnData:
    return blood_cells()[:300].copy()


def as_dask(adata: AnnData) -> AnnData:
    """Counts in blocks that know nothing of batches, parts and minibatches."""
    return AnnData(da.from_array(adata.X, chunks=(70, -1)), obs=adata.obs.copy(), var=adata.var.copy())


def expected(adata: AnnData, weights: str, **options: Any) -> np.ndarray:
    adata = adata.copy()
    cp.tl.embed(adata, weights, **options)
    return next(iter(adata.obsm.values()))


@pytest.mark.parametrize("batch_key", [None, "batch"])
def test_a_sentence_in_parts_on_two_workers_is_embedded_as_in_one_process(
    client, adata, monkeypatch, batch_key
):
    monkeypatch.setattr(_cluster, "PART_CELLS", 64)
    lazy = as_dask(adata)
    cp.tl.embed(lazy, STARTER, batch_key=batch_key, batch_size=30, client=client)
    latent = expected(adata, STARTER, batch_key=batch_key)
    np.testing.assert_allclose(lazy.obsm["X_cellplm"], latent, **CLOSE)


def test_cells_that_see_no_others_are_spread_over_the_workers(client, adata):
    def n_tasks() -> dict[str, int]:
        return client.run(lambda dask_worker: dask_worker.state.executed_count)

    lazy, before = as_dask(adata), n_tasks()
    cp.tl.embed(lazy, tiny_scbert(), batch_size=50, client=client)
    np.testing.assert_allclose(lazy.obsm["X_scbert"], expected(adata, tiny_scbert()), **CLOSE)
    after = n_tasks()
    assert all(after[worker] > before[worker] for worker in before)


def test_workers_know_how_each_cell_was_made(client, adata, tmp_path):
    adata.obs["assay"] = np.resize(["Xenium", "10x 3' v3", "10x 5' v2"], adata.n_obs)
    options = {"setup": {"assay_key": "assay"}}
    latent = expected(adata, tiny_nicheformer(), **options)
    lazy = as_dask(adata)
    cp.tl.embed(lazy, tiny_nicheformer(), batch_size=50, client=client, **options)
    np.testing.assert_allclose(lazy.obsm["X_nicheformer"], latent, **CLOSE)
    adata.write_h5ad(tmp_path / "counts.h5ad")
    out = tmp_path / "out.zarr"
    cp.tl.embed(
        tmp_path / "counts.h5ad", tiny_nicheformer(), out=out, client=client, progress=False, **options
    )
    np.testing.assert_allclose(ad.read_zarr(out).obsm["X_nicheformer"], latent, **CLOSE)
    other = expected(adata, tiny_nicheformer(), setup={"assay": "Xenium"})
    assert np.abs(other - latent)[1::3].max(1).min() > 1e-4


def test_a_cluster_streams_a_file_to_disk_and_goes_on_where_it_was_cut_short(
    client, adata, tmp_path, monkeypatch
):
    adata.write_h5ad(tmp_path / "counts.h5ad")
    options = {"out": tmp_path / "out.zarr", "batch_size": 50, "client": client, "progress": False}
    write, n_written = cp.model.engine._stream.LatentStore.write, 0

    def cut(self: Any, part: Any) -> None:
        nonlocal n_written
        if (n_written := n_written + 1) == 3:
            raise KeyboardInterrupt
        write(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(cp.model.engine._stream.LatentStore, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            cp.tl.embed(tmp_path / "counts.h5ad", tiny_scbert(), **options)
    cp.tl.embed(tmp_path / "counts.h5ad", tiny_scbert(), **options)
    latent = ad.read_zarr(tmp_path / "out.zarr").obsm["X_scbert"]
    np.testing.assert_allclose(latent, expected(adata, tiny_scbert()), **CLOSE)


def test_counts_that_are_no_counts_are_refused_by_cell_and_gene_wherever_they_are_found(client, adata):
    adata.X.data[-1] = 0.5
    cell, gene = adata.obs_names[-1], adata.var_names[adata.X.indices[-1]]
    with pytest.raises(cp.model.NotCountsError, match=f"cell '{cell}', gene '{gene}' is 0.5"):
        cp.tl.embed(as_dask(adata), tiny_scbert(), client=client)


def test_counts_in_this_process_are_refused(client, adata, tmp_path):
    with pytest.raises(TypeError, match="a dask array; these are a csr_matrix.*read_lazy"):
        cp.tl.embed(adata, STARTER, client=client)
    with pytest.raises(ValueError, match="on a cluster, the workers hold the hidden states"):
        cp.tl.embed(as_dask(adata), STARTER, client=client, out=tmp_path / "o.zarr", hidden=Path("h"))


def die_in_a_layer() -> None:
    """On a worker: end the process at the first output of a layer, when cells and their sums are there."""
    from cellprior.model.cellplm._module import FlowformerLayer

    FlowformerLayer.output = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_in_the_middle_of_a_sentence_changes_nothing(client, adata, monkeypatch):
    monkeypatch.setattr(_cluster, "PART_CELLS", 40)
    before = set(client.run(os.getpid).values())
    victim, _ = sorted(client.scheduler_info()["workers"])
    client.run(die_in_a_layer, workers=[victim])
    lazy = as_dask(adata)
    cp.tl.embed(lazy, STARTER, batch_size=20, client=client)
    np.testing.assert_allclose(lazy.obsm["X_cellplm"], expected(adata, STARTER), **CLOSE)
    client.wait_for_workers(2)
    assert set(client.run(os.getpid).values()) != before


def always_die() -> None:
    """On a worker: end the process whenever cells are embedded."""
    ScBERTModule.pool = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_again_and_again_are_an_error_that_says_so(client, adata, monkeypatch):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    client.run(always_die)
    with pytest.raises(RuntimeError, match="workers died one after the other over the same 300 cells"):
        cp.tl.embed(as_dask(adata), tiny_scbert(), batch_size=300, client=client)


@pytest.mark.parametrize("ending", ["client closed", "workers gone"])
def test_a_cluster_that_ends_is_an_error_that_says_so_and_the_same_call_goes_on(
    adata, tmp_path, monkeypatch, ending
):
    distributed = pytest.importorskip("distributed")
    adata.write_h5ad(tmp_path / "counts.h5ad")
    options = {"out": tmp_path / "out.zarr", "batch_size": 50, "progress": False}
    write = _streaming.LatentStore.write

    def ends(self: Any, part: Any) -> None:
        write(self, part)
        if ending == "client closed":
            client.close()
        else:
            cluster.sync(next(iter(cluster.workers.values())).close, nanny=False)

    monkeypatch.setattr(clusters, "PATIENCE", 0.3)
    how = {"processes": False, "dashboard_address": ":0", "threads_per_worker": 1}
    with distributed.LocalCluster(n_workers=1, **how) as cluster, distributed.Client(cluster) as client:
        with monkeypatch.context() as patch:
            patch.setattr(_streaming.LatentStore, "write", ends)
            with pytest.raises(RuntimeError, match="Dask cluster .* the same call goes on from there"):
                cp.tl.embed(tmp_path / "counts.h5ad", tiny_scbert(), **options, client=client)
        with pytest.raises(RuntimeError, match="Dask cluster has ended|has had no worker for 0 seconds"):
            cp.tl.embed(tmp_path / "counts.h5ad", tiny_scbert(), **options, client=client)
    with distributed.LocalCluster(n_workers=1, **how) as cluster, distributed.Client(cluster) as client:
        cp.tl.embed(tmp_path / "counts.h5ad", tiny_scbert(), **options, client=client)
    latent = ad.read_zarr(tmp_path / "out.zarr").obsm["X_scbert"]
    np.testing.assert_allclose(latent, expected(adata, tiny_scbert()), **CLOSE)
