"""Geneformer with AnnData: real cells, training, labels, genes in context."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse as sp

from cellprior.evaluate import masked_prediction
from cellprior.evaluate._twin import random_twin
from cellprior.model import Geneformer
from cellprior.model.geneformer._module import GeneformerModule
from cellprior.model.geneformer._vocabulary import shipped
from cellprior.weights import write_bundle
from tests.contract.models import blood_cells, tiny_geneformer

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
SMALL: dict[str, Any] = {"n_hidden": 16, "n_layers": 2, "n_heads": 2, "n_feedforward": 32, "n_positions": 64}


@cache
def _cells() -> AnnData:
    """120 blood cells and 200 of their genes."""
    adata = blood_cells()
    order = np.argsort(-np.asarray(adata.X.sum(0)).ravel())
    return adata[::6, order[:200]].copy()


@pytest.fixture
def cells() -> AnnData:
    return _cells().copy()


@pytest.fixture
def tiny() -> Iterator[Geneformer]:
    model = Geneformer.from_pretrained(tiny_geneformer(), _cells().copy())
    yield model
    model.release()


def trained(adata: AnnData, *, epochs: int = 2, **network: Any) -> Geneformer:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="After training", category=UserWarning)
        torch.manual_seed(0)
        Geneformer.setup_anndata(adata, labels_key="bulk_labels")
        model = Geneformer(adata, **{**SMALL, **network})
        model.train(max_epochs=epochs, batch_size=40, log_every_n_steps=1, plan_kwargs={"lr": 1e-2}, **QUIET)
    return model


def test_the_same_real_cell_from_any_format_alone_and_shuffled_with_the_vocabulary_of_v1(
    shared_data, tmp_path
):
    vocabulary = shipped()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GeneformerModule(len(vocabulary.genes), n_hidden=32, n_layers=2, n_heads=2, n_feedforward=32)
    module.gene_scale.copy_(torch.from_numpy(vocabulary.scale))
    write_bundle(
        tmp_path / "bundle", state_dict=module.state_dict(), genes=vocabulary.genes, card="",
        config={"model": "Geneformer", "network": {"n_hidden": 32, "n_layers": 2, "n_heads": 2, "n_feedforward": 32}},
    )  # fmt: skip
    adata = ad.read_h5ad(shared_data / "rna" / "pbmc3k_seurat.h5ad")[:60].copy()
    adata = AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]])
    model = Geneformer.from_pretrained(tmp_path / "bundle", adata)
    assert model.gene_match.coverage > 0.8  # symbols of 2015
    reference = model.get_latent_representation()
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    dask = pytest.importorskip("dask.array")
    lazy = AnnData(dask.from_array(adata.X.toarray(), chunks=(17, -1)), obs=adata.obs, var=adata.var)
    dense = AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var)
    for query in (dense, lazy, ad.read_h5ad(path, backed="r")):
        np.testing.assert_allclose(
            model.get_latent_representation(query, batch_size=16), reference, rtol=0, atol=1e-6
        )
    order = np.random.default_rng(0).permutation(60)
    shuffled = model.get_latent_representation(indices=order)
    np.testing.assert_allclose(shuffled, reference[order], rtol=0, atol=1e-6)
    alone = np.concatenate([model.get_latent_representation(indices=[i]) for i in range(10)])
    np.testing.assert_allclose(alone, reference[:10], rtol=0, atol=1e-6)
    model.release()


def test_training_learns_medians_of_its_cells_and_beats_chance(cells):
    model = trained(cells, epochs=8)
    x = cells.X.toarray().astype(np.float64)
    assert (model.module.gene_scale > 0).all()
    assert np.corrcoef(model.module.gene_scale, [np.median(c[c > 0]) for c in x.T])[0, 1] > 0.3
    history = model.history
    for stage in ("train", "validation"):
        floors = ("uniform", "token_frequency", "gene_at_rank", "gene_at_rank_not_in_sight")
        assert {f"{stage}_masked_floor_{name}" for name in floors} <= set(history)
        assert f"{stage}_masked_accuracy_floor_gene_at_rank" in history
    loss = history["train_masked"].iloc[:, 0].astype(float)
    assert loss.iloc[-1] < loss.iloc[0]
    assert loss.iloc[-1] < history["train_masked_floor_uniform"].iloc[-1, 0]
    before = model.module.gene_scale.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="After training", category=UserWarning)
        model.train(max_epochs=1, batch_size=40, log_every_n_steps=1, **QUIET)
    assert torch.equal(model.module.gene_scale, before)  # what a trained network knows tokens by
    model.release()


def test_a_new_network_that_learns_labels_at_once_learns_medians_first(cells):
    Geneformer.setup_anndata(cells, labels_key="bulk_labels")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fewer than", category=UserWarning)
        torch.manual_seed(0)
        model = Geneformer(cells, **SMALL)
        model.fine_tune(max_epochs=1, trainable="all", log_every_n_steps=1, **QUIET)
    assert len(model.module.gene_scale.unique()) > 20
    assert set(model.predict()) <= set(cells.obs["bulk_labels"])
    model.release()


@pytest.mark.parametrize("trainable", ["last", "lora", "head", "all"])
def test_fine_tuning_trains_the_layers_that_the_embedding_has_and_can_be_saved(cells, tmp_path, trainable):
    Geneformer.setup_anndata(cells, labels_key="bulk_labels")
    model = Geneformer.from_pretrained(tiny_geneformer(), cells)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    embedding = model.get_latent_representation(pooling="mean")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fewer than", category=UserWarning)
        torch.manual_seed(0)
        model.fine_tune(max_epochs=2, trainable=trainable, lr=1e-2, log_every_n_steps=1, **QUIET)
    after = model.module.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    changed = not np.allclose(model.get_latent_representation(pooling="mean"), embedding, atol=1e-5)
    assert changed == (trainable != "head")
    assert not any(name.startswith(("encoder.1.", "transform", "gene_")) for name in moved)
    allowed = {"head": (), "all": ("encoder.0.", "embedder."), "last": ("encoder.0.",)}
    lora = ("encoder.0.norm1.", "encoder.0.query.weight", "encoder.0.value.weight")
    assert all(name.startswith(allowed.get(trainable, lora)) for name in moved)
    model.save_pretrained(tmp_path / "bundle")
    again = Geneformer.from_pretrained(tmp_path / "bundle", cells.copy())
    np.testing.assert_array_equal(again.predict(), model.predict())
    again.release()
    model.release()


def test_a_random_twin_ranks_genes_as_the_model_does(cells):
    model = trained(cells)
    twin = random_twin(model, cells.copy(), seed=1)
    assert torch.equal(twin.module.gene_scale, model.module.gene_scale)
    assert not torch.equal(twin.module.embedder.tokens.weight, model.module.embedder.tokens.weight)
    model.release()
    twin.release()


def test_hidden_genes_are_compared_with_what_is_known_without_biology(tiny):
    table = masked_prediction(tiny, mask_shares=(0.2,), seeds=2, progress=False)
    known = {"model", "uniform", "token_frequency", "gene_at_rank"}
    assert set(table.loc[table["metric"] == "accuracy", "method"]) == known
    losses = table[table["metric"] == "cross_entropy"].set_index("method")["value"]
    assert set(losses.index) == known | {"gene_at_rank_not_in_sight"}
    assert losses["uniform"] == pytest.approx(np.log(tiny.module.n_genes), rel=1e-4)
    assert losses["gene_at_rank_not_in_sight"] < losses["gene_at_rank"] < losses["uniform"] < losses["model"]


def test_the_authors_pooling_is_the_default_and_layers_differ(tiny):
    default = tiny.get_latent_representation()
    np.testing.assert_array_equal(default, tiny.get_latent_representation(pooling="cls", layer=-1))
    for other in ({"pooling": "mean"}, {"layer": 0}, {"layer": -2, "pooling": "mean"}):
        assert not np.allclose(default, tiny.get_latent_representation(**other), atol=1e-2)
    for wrong in ({"layer": 1}, {"layer": -3}, {"pooling": "max"}):
        with pytest.raises(ValueError, match="layer=|pooling="):
            tiny.get_latent_representation(**wrong)


def test_bfloat16_is_close(tiny):
    exact, half = (
        tiny.get_latent_representation(precision=p, pooling="mean") for p in ("float32", "bfloat16")
    )
    assert 0 < np.abs(exact - half).max() < 0.1


def test_attention_is_the_mean_of_the_cells_that_have_both_genes(tiny):
    genes = tiny.adata.var_names[:5].tolist()
    together = tiny.get_attention(indices=[0, 1, 2], genes=genes)
    alone = [tiny.get_attention(indices=[i], genes=genes) for i in range(3)]
    expected = pd.concat(alone).groupby(level=0, sort=False).mean()
    np.testing.assert_allclose(together, expected, rtol=1e-5)
    received = tiny.get_attention(indices=[0])
    n_here = received.notna().sum()
    assert 0 < n_here <= 126
    assert 0 < received.sum() <= 1
    silent = AnnData(sp.csr_matrix(tiny.adata.shape, dtype=np.float32), var=tiny.adata.var[[]])
    assert tiny.get_attention(silent).isna().all()
    assert tiny.get_gene_representation(silent).isna().all(axis=None)
    with pytest.raises(ValueError, match="at least one"):
        tiny.get_attention(indices=[])
    with pytest.raises(KeyError, match="NOGENE"):
        tiny.get_attention(genes=["NOGENE"])
