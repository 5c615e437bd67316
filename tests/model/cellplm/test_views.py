"""A cell's direction in its sentence, genes that are missing, and learning from two views."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData

import cellprior as cp
from cellprior.model import CellPLM
from cellprior.model.cellplm._module import CellPLMModule

NETWORK = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 6, "decoder_rank": 8, "target_sum": 1e4}
AVERAGE = {**NETWORK, "absent": "average", "embedding": "direction"}


def cells(n_cells: int = 60, n_genes: int = 40) -> AnnData:
    rng = np.random.default_rng(0)
    means = rng.gamma(1.0, 3.0, (3, n_genes))[np.arange(n_cells) % 3]
    names = [f"GENE{i}" for i in range(n_genes)]
    counts = sp.csr_matrix(rng.poisson(means).astype(np.float32))
    obs = pd.DataFrame({"batch": np.where(np.arange(n_cells) < 25, "a", "b")}, index=map(str, range(n_cells)))
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=names))


@pytest.fixture
def model() -> CellPLM:
    adata = cells()
    CellPLM.setup_anndata(adata, batch_key="batch")
    torch.manual_seed(0)
    model = CellPLM(adata, **AVERAGE)
    model.is_trained_ = True
    model.module.eval()
    return model


def test_a_direction_has_length_one_and_is_from_half_way_to_the_middle_of_the_whole_sentence(model):
    latent = model.get_latent_representation()
    np.testing.assert_allclose(np.linalg.norm(latent, axis=1), 1.0, rtol=1e-5)
    raw = model._embed(None, None, None, decodable=True)
    for rows in (slice(0, 25), slice(25, 60)):
        expected = raw[rows] - raw[rows].mean(axis=0) / 2
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(latent[rows], expected, atol=1e-5)


def test_a_direction_depends_on_neither_batch_size_nor_order(model):
    latent = model.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(batch_size=16), latent, atol=1e-5)
    shuffled = np.random.default_rng(1).permutation(60)
    other = model.get_latent_representation(model.adata[shuffled].copy())
    np.testing.assert_allclose(other, latent[shuffled], atol=1e-5)


def test_a_cell_by_itself_has_a_direction(model):
    latent = model.get_latent_representation(indices=[3])
    raw = model._embed(None, [3], None, decodable=True)
    np.testing.assert_allclose(latent, raw / np.linalg.norm(raw), atol=1e-5)


def test_a_stream_and_what_is_decoded_know_of_it(model, tmp_path):
    adata = model.adata
    model.save_pretrained(tmp_path / "bundle")
    cp.tl.embed(adata, tmp_path / "bundle", batch_key="batch", batch_size=16)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    streamed = tmp_path / "out.zarr"
    options = {"batch_key": "batch", "batch_size": 16, "hidden": tmp_path}
    cp.tl.embed(tmp_path / "cells.h5ad", tmp_path / "bundle", out=streamed, progress=False, **options)
    import anndata as ad

    np.testing.assert_allclose(ad.read_zarr(streamed).obsm["X_cellplm"], adata.obsm["X_cellplm"], atol=1e-5)
    raw = torch.from_numpy(model._embed(None, None, None, decodable=True))
    with torch.no_grad():
        mean, _ = model.module.decode(raw)
    expected = (mean / mean.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(model.get_normalized_expression(), expected, rtol=1e-4)


def test_a_missing_gene_that_is_average_changes_nothing():
    torch.manual_seed(0)
    module = CellPLMModule(5, **AVERAGE).eval()
    share = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    module.embedder.share.copy_(share)
    module.embedder.average.copy_(torch.log1p(1e4 * share))
    counts = torch.tensor(
        [[10.0, 60.0, 15.0, 5.0, 10.0], [25.0, 45.0, 10.0, 10.0, 10.0]]
    )  # the last is average
    with torch.no_grad():
        whole = module.encode(counts)
        without = module.encode(counts[:, :4], gene_index=torch.arange(4))
        as_zero = module.encode(counts * torch.tensor([1.0, 1, 1, 1, 0]))
    torch.testing.assert_close(without, whole, atol=1e-5, rtol=1e-5)
    assert (as_zero - whole).abs().max() > 1e-3


def test_training_on_views_tells_cells_apart_and_shows_its_floors():
    scvi.settings.seed = 0
    adata = cells(180)
    CellPLM.setup_anndata(adata)
    model = CellPLM(adata, dropout_rate=0.0, **AVERAGE)
    options = {"depths": (60.0, 400.0), "panels": (0.5, 1.0), "lr": 1e-2, "temperature": 0.2}
    options |= {"reconstruction_weight": 5.0}
    quick = {"enable_progress_bar": False, "batch_size": 64, "train_size": 0.8, "accelerator": "cpu"}
    model.train(60, objective="views", plan_kwargs=options, **quick)
    history = {name: float(values.iloc[-1, 0]) for name, values in model.history.items()}
    # the last minibatch of the held-out cells, and so chance, is that of 36 cells
    assert history["validation_view_contrast_floor_chance"] == pytest.approx(math.log(36))
    assert history["validation_view_contrast"] < history["validation_view_contrast_floor_chance"] - 0.3
    assert history["validation_reconstruction"] < history["validation_reconstruction_floor_gene_means"]
