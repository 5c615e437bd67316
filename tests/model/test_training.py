from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch

import cellprior as cp
from cellprior.model._data import SentenceSampler
from cellprior.model._training import GeneMeans

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
pytestmark = pytest.mark.filterwarnings("ignore:After training, the reconstruction loss:UserWarning")


@pytest.fixture
def adata() -> ad.AnnData:
    """Two cell types that differ in half of their genes, in two batches."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(1.0, 1.0, size=(2, 60)) * np.where(rng.random((2, 60)) < 0.5, 5.0, 0.2)
    kind = rng.integers(2, size=200)
    obs = pd.DataFrame(
        {"batch": rng.choice(["a", "b"], 200), "kind": kind}, index=[f"cell {i}" for i in range(200)]
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(60)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(rate[kind]).astype(np.float32)), obs=obs, var=var)


def scratch(adata: ad.AnnData, seed: int = 0, **network) -> cp.model.CellPLM:
    scvi.settings.seed = seed
    cp.model.CellPLM.setup_anndata(adata, batch_key="batch")
    return cp.model.CellPLM(adata, n_hidden=32, n_layers=1, n_heads=4, n_latent=8, **network)


def weights(model: cp.model.CellPLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def test_a_model_that_is_neither_trained_nor_loaded_does_not_embed(adata):
    with pytest.raises(RuntimeError, match="[Tt]rain"):
        scratch(adata).get_latent_representation()


def test_training_takes_the_loss_below_its_floor_on_held_out_cells(adata, recwarn):
    model = scratch(adata)
    model.train(max_epochs=60, batch_size=64, plan_kwargs={"lr": 3e-3}, **QUIET)
    history = {name: frame.iloc[:, 0].astype(float) for name, frame in model.history.items()}
    assert set(history) >= {
        f"{s}_{n}" for s in ("train", "validation") for n in ("loss", "floor", "reconstruction")
    }
    assert history["validation_reconstruction"].iloc[-1] < 0.9 * history["validation_floor"].iloc[-1]
    assert history["validation_reconstruction"].iloc[0] > history["validation_floor"].iloc[0]
    assert not [w for w in recwarn if "After training" in str(w.message)]
    latent = model.get_latent_representation()
    kinds = [latent[adata.obs["kind"] == kind].mean(axis=0) for kind in (0, 1)]
    assert np.linalg.norm(kinds[0] - kinds[1]) > latent.std(axis=0).max()


def test_a_model_that_stays_above_its_floor_says_so(adata):
    with pytest.warns(UserWarning, match="knowing each gene's mean alone"):
        scratch(adata).train(max_epochs=1, plan_kwargs={"lr": 1e-6}, **QUIET)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(adata):
    trained = []
    for seed in (0, 0, 1):
        model = scratch(adata, seed)
        model.train(max_epochs=2, batch_size=64, **QUIET)
        trained.append(weights(model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert not all(torch.equal(trained[0][name], trained[2][name]) for name in trained[0])


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_a_loaded_model_goes_on_where_it_stopped_and_in_training_mode(adata, tmp_path, way):
    model = scratch(adata)
    model.train(max_epochs=2, batch_size=64, train_size=1.0, **QUIET)
    kl_weight = model.module.kl_weight
    assert kl_weight == pytest.approx(2 * 4 / 10_000)  # 4 sentences per epoch, as no sentence crosses batches
    if way == "save":
        model.save(tmp_path / "model")
        again = cp.model.CellPLM.load(tmp_path / "model", adata=adata)
    else:
        model.save_pretrained(tmp_path / "model")
        again = cp.model.CellPLM.from_pretrained(tmp_path / "model", adata)
    assert again.module.kl_weight == kl_weight
    again.train(max_epochs=1, batch_size=64, train_size=1.0, **QUIET)
    assert len(again.history["train_loss"]) == (3 if way == "save" else 1)
    assert again.module.kl_weight == pytest.approx(3 * 4 / 10_000)
    assert not again.module.training


def test_genes_that_are_filtered_in_place_after_setup_are_trained_on_under_their_own_names(adata):
    model = scratch(adata)
    before = weights(model)
    adata._inplace_subset_var(np.arange(60)[::-2])  # as sc.pp.filter_genes does; every other gene, reversed
    model.train(max_epochs=2, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    rows = before["decoder.log_mean.weight"].ne(weights(model)["decoder.log_mean.weight"]).any(dim=1)
    assert rows.nonzero().ravel().tolist() == list(range(1, 60, 2))


def test_genes_that_the_data_lack_say_nothing_in_training(adata):
    names = adata.var_names.tolist()
    model = scratch(adata, genes=names + [f"ENSG{i:011d}" for i in range(100, 130)])
    before = weights(model)
    model.train(max_epochs=2, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    after = weights(model)
    for name in ("decoder.log_mean.weight", "decoder.log_dispersion", "embedder.gene_embedding"):
        assert torch.equal(before[name][60:], after[name][60:]), name
        assert not torch.equal(before[name][:60], after[name][:60]), name


def test_training_without_validation_cells_works_and_early_stopping_without_them_is_refused(adata):
    scratch(adata).train(max_epochs=1, train_size=1.0, **QUIET)
    with pytest.raises(ValueError, match="validation"):
        scratch(adata).train(max_epochs=1, train_size=1.0, early_stopping=True, **QUIET)


def test_early_stopping_watches_the_validation_loss(adata):
    model = scratch(adata)
    model.train(
        max_epochs=50, early_stopping=True, early_stopping_patience=2, early_stopping_min_delta=1e9, **QUIET
    )
    assert len(model.history["train_loss"]) < 10


def test_a_gmvae_trains_too(adata):
    model = scratch(adata, latent="gmvae", n_clusters=3)
    model.train(max_epochs=30, batch_size=64, plan_kwargs={"lr": 3e-3}, **QUIET)
    history = model.history["train_reconstruction"].iloc[:, 0].astype(float)
    assert history.iloc[-1] < 0.7 * history.iloc[0]


def test_sentences_cover_every_cell_once_and_cross_no_batch():
    rows = np.arange(10, 60)
    batch = np.repeat([0, 1], [20, 30])
    sampler = SentenceSampler(rows, batch, batch_size=8, shuffle=True)
    passes = [list(sampler) for _ in range(2)]
    for pieces in passes:
        assert len(pieces) == len(sampler) == 7
        assert sorted(sum(pieces, [])) == rows.tolist()
        assert all(len(set(batch[np.array(piece) - 10])) == 1 and len(piece) <= 8 for piece in pieces)
    assert passes[0] != passes[1]


def test_the_floor_knows_each_genes_share_and_dispersion():
    rng = np.random.default_rng(0)
    share, dispersion = np.array([0.5, 0.3, 0.2]), np.array([1.0, 10.0, 0.5])
    mean = 50 * share * np.ones((20_000, 1))
    x = rng.poisson(rng.gamma(dispersion, mean / dispersion)).astype(np.float32)
    floor = GeneMeans.fit([{"X": torch.from_numpy(part)} for part in np.array_split(x, 3)])
    np.testing.assert_allclose(floor.share, x.sum(axis=0) / x.sum(), rtol=1e-5)
    depth = x.sum(axis=1, keepdims=True).astype(np.float64)
    expected = depth * np.asarray(x.sum(axis=0) / x.sum(), dtype=np.float64)
    by_hand = (expected**2).sum(axis=0) / ((x - expected) ** 2 - expected).sum(axis=0)
    np.testing.assert_allclose(floor.dispersion, by_hand, rtol=1e-3)


def test_the_training_plot_shows_each_loss_beside_its_floor(adata):
    from matplotlib.figure import Figure

    model = scratch(adata)
    with pytest.raises(ValueError, match="no history"):
        cp.pl.training(model)
    model.train(max_epochs=2, **QUIET)
    labels = [line.get_label() for line in cp.pl.training(model, ax=Figure().subplots()).lines]
    assert labels == ["training cells", "training cells, floor: gene means",
                      "held-out cells", "held-out cells, floor: gene means"]  # fmt: skip
