from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch

import cellprior as cp
from cellprior.model._hooks import Hooks
from cellprior.model.cellplm._loss import GeneMeans
from cellprior.model.data._minibatches import SentenceSampler
from cellprior.model.learning._plan import adamw

FLOOR = "reconstruction_floor_gene_means"
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
pytestmark = pytest.mark.filterwarnings("ignore:After training, reconstruction on:UserWarning")


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
        f"{s}_{n}" for s in ("train", "validation") for n in ("loss", "latent", "reconstruction", FLOOR)
    }
    reached, floor = history["validation_reconstruction"], history[f"validation_{FLOOR}"]
    assert reached.iloc[-1] < 0.9 * floor.iloc[-1]
    assert reached.iloc[0] > floor.iloc[0]
    assert not [w for w in recwarn if "After training" in str(w.message)]
    latent = model.get_latent_representation()
    kinds = [latent[adata.obs["kind"] == kind].mean(axis=0) for kind in (0, 1)]
    assert np.linalg.norm(kinds[0] - kinds[1]) > latent.std(axis=0).max()


def test_a_model_that_stays_above_its_floor_says_so(adata):
    with pytest.warns(UserWarning, match="without looking at cells: gene means"):
        scratch(adata).train(max_epochs=1, plan_kwargs={"lr": 1e-6}, **QUIET)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(adata):
    trained = []
    for seed in (0, 0, 1):
        model = scratch(adata, seed)
        model.train(max_epochs=2, batch_size=64, **QUIET)
        trained.append(weights(model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert not all(torch.equal(trained[0][name], trained[2][name]) for name in trained[0])


def test_validation_cells_have_the_same_mask_in_every_epoch_and_training_cells_another(adata):
    model = scratch(adata)
    model.train(max_epochs=3, batch_size=64, shuffle_set_split=False, **QUIET)
    # the floor knows nothing of the network: only the mask can change it
    assert model.history[f"validation_{FLOOR}"].iloc[:, 0].nunique() == 1
    assert model.history[f"train_{FLOOR}"].iloc[:, 0].nunique() == 3


def test_the_weight_of_the_kl_rises_with_training_sentences_and_not_with_validation(adata):
    model = scratch(adata)
    model.train(max_epochs=2, batch_size=16, train_size=0.5, **QUIET)
    assert model.trainer.global_step >= 10
    assert model.module.kl_weight == pytest.approx(model.trainer.global_step / 10_000)


def test_matrices_decay_and_biases_and_norms_do_not():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.nn.init.ones_(module[0].bias)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    (optimizer,), _ = adamw(module, 10, lr=0.1, weight_decay=0.5, warmup=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim > 1 else 1.0))


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


@pytest.fixture
def panels(adata) -> dict[str, list[str]]:
    """Batch a was measured with genes 0 to 49, batch b with 30 to 54; 55 to 59 are in the data and not measured."""
    dense = adata.X.toarray()
    in_a = (adata.obs["batch"] == "a").to_numpy()
    dense[in_a, 50:] = 0
    dense[~in_a, :30] = 0
    dense[:, 55:] = 0
    adata.X = sp.csr_matrix(dense)
    return {"a": list(adata.var_names[:50]), "b": list(adata.var_names[30:55])}


@pytest.mark.parametrize("objective", ["masked", "imputation"])
def test_only_genes_that_were_measured_somewhere_are_learned(adata, panels, objective):
    model = scratch(adata)
    before = weights(model)
    options = {"plan_kwargs": {"weight_decay": 0.0}, "objective": objective, **QUIET}
    model.train(max_epochs=2, measured=panels, **options)
    learned = before["decoder.log_mean.weight"].ne(weights(model)["decoder.log_mean.weight"]).any(dim=1)
    assert learned.nonzero().ravel().tolist() == list(range(55))


def test_a_gene_says_nothing_in_the_loss_of_batches_that_did_not_measure_it(adata, panels):
    model = scratch(adata)
    batch = {
        "X": torch.from_numpy(adata.X.toarray()[(adata.obs["batch"] == "b").to_numpy()]),
        "batch": torch.ones(1),
    }
    seen = torch.tensor([[name in panels[key] for name in adata.var_names] for key in "ab"])
    floor = GeneMeans.fit([batch | {"batch": torch.tensor([code])} for code in (0, 1)], seen)
    model.module.eval()
    losses = model.module.training_losses(batch, floor=floor, measured=seen, rng_seed=0)
    losses["loss"].backward()
    learned = model.module.decoder.log_mean.weight.grad.ne(0).any(dim=1)
    assert learned.nonzero().ravel().tolist() == list(range(30, 55))


def test_counts_of_genes_that_were_not_measured_are_refused(adata, panels):
    panels["a"] = panels["a"][3:]
    with pytest.raises(ValueError, match="3 genes have counts in a batch where measured= does not list them"):
        scratch(adata).train(max_epochs=1, measured=panels, **QUIET)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": None}, KeyError, "says nothing about the batches b"),
        ({"b": ["NOT-A-GENE"]}, KeyError, "NOT-A-GENE"),
    ],
)
def test_panels_that_do_not_fit_the_data_are_refused(adata, panels, change, error, message):
    measured = {key: names for key, names in (panels | change).items() if names}
    with pytest.raises(error, match=message):
        scratch(adata).train(max_epochs=1, measured=measured, **QUIET)


def test_a_panel_may_name_genes_of_the_data_that_the_vocabulary_lacks(adata, panels):
    names = list(adata.var_names)
    model = scratch(adata, genes=names[5:])
    model.train(max_epochs=1, measured=panels, **QUIET)
    with pytest.raises(KeyError, match=names[0]):
        model.impute(names[:6], measured=panels)


def test_panels_need_a_batch_key(adata, panels):
    cp.model.CellPLM.setup_anndata(adata)
    with pytest.raises(ValueError, match="batch_key"):
        cp.model.CellPLM(adata, n_hidden=32, n_layers=1, n_heads=4).train(
            max_epochs=1, measured=panels, **QUIET
        )


@pytest.mark.filterwarnings("ignore:Category . in adata.obs:UserWarning")  # of scvi-tools: fewer than 3 cells
@pytest.mark.parametrize("latent", ["vae", "gmvae"])
@pytest.mark.parametrize("objective", ["masked", "imputation"])
def test_a_training_sentence_may_be_one_cell_or_empty_of_counts(adata, latent, objective):
    adata.obs["batch"] = ["alone", *adata.obs["batch"].iloc[1:-2], "empty", "empty"]
    adata.X = sp.csr_matrix(
        adata.X.toarray() * (adata.obs[["batch"]] != "empty").to_numpy(), dtype=np.float32
    )
    model = scratch(adata, latent=latent)
    model.train(max_epochs=2, train_size=1.0, objective=objective, **QUIET)
    assert np.isfinite(model.history["train_loss"].to_numpy(dtype=float)).all()
    assert np.isfinite(model.get_latent_representation()).all()


def test_an_unknown_objective_is_refused_with_those_there_are(adata):
    with pytest.raises(ValueError, match="'masked', 'imputation'"):
        scratch(adata).train(max_epochs=1, objective="guess", **QUIET)


def covariate(model: cp.model.CellPLM) -> torch.Tensor:
    return weights(model)["decoder.batch.embedding.weight"]


def test_the_batch_covariate_is_learned_and_known_by_name_after_loading(adata, tmp_path):
    model = scratch(adata, n_batches=2)
    start = covariate(model)
    model.train(max_epochs=1, **QUIET)
    assert model.training_state_["batches"] == ["a", "b"]
    assert not covariate(model).eq(start).all(dim=1).any()
    model.save_pretrained(tmp_path / "bundle")

    adata.obs["batch"] = adata.obs["batch"].map({"a": "z", "b": "a"})  # now "a" comes first, "z" is new
    cp.model.CellPLM.setup_anndata(adata, batch_key="batch")
    again = cp.model.CellPLM.from_pretrained(tmp_path / "bundle", adata)
    start = covariate(again)
    again.train(max_epochs=1, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    assert covariate(again).ne(start).any(dim=1).tolist() == [True, False]


def test_more_batches_than_the_covariate_has_are_refused(adata):
    with pytest.raises(ValueError, match="2 batches, the model n_batches=1"):
        scratch(adata, n_batches=1).train(max_epochs=1, **QUIET)


def test_the_best_epoch_is_kept_when_asked_for(adata, tmp_path):
    from scvi.train import SaveCheckpoint

    model = scratch(adata)
    model.train(max_epochs=1, **QUIET)
    # of a loss that falls, the highest is an early one
    best = SaveCheckpoint(dirpath=str(tmp_path), load_best_on_end=True, mode="max")
    model.train(max_epochs=5, callbacks=[best], enable_checkpointing=True, **QUIET)
    losses = model.history["validation_loss"].iloc[:, 0].astype(float).to_numpy()
    assert len(losses) == 6
    assert losses[1:].argmax() < 4
    assert f"epoch={losses[1:].argmax()}-" in best.best_model_path
    saved = cp.model.CellPLM.load(best.best_model_path, adata=adata)
    np.testing.assert_array_equal(saved.get_latent_representation(), model.get_latent_representation())


def test_training_without_validation_cells_works_and_early_stopping_without_them_is_refused(adata):
    scratch(adata).train(max_epochs=1, train_size=1.0, **QUIET)
    with pytest.raises(ValueError, match="validation"):
        scratch(adata).train(max_epochs=1, train_size=1.0, early_stopping=True, **QUIET)


def test_a_subclass_can_replace_the_splitter_the_plan_and_the_runner(adata):
    used = []

    def noting(cls: type) -> type:
        return type(
            cls.__name__,
            (cls,),
            {
                "__init__": lambda self, *args, **kwargs: (
                    used.append(cls.__name__),
                    cls.__init__(self, *args, **kwargs),
                )[1]
            },
        )

    names = ("_data_splitter_cls", "_training_plan_cls", "_train_runner_cls")
    own = {name: noting(getattr(cp.model.CellPLM, name)) for name in names}
    model_class = type("Own", (cp.model.CellPLM,), own)
    model_class.setup_anndata(adata)
    model = model_class(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4)
    model.train(max_epochs=1, **QUIET)
    assert used == [own[name].__mro__[1].__name__ for name in names]


@pytest.mark.parametrize("missing", ["objectives", "_fit_floor", "training_losses"])
def test_a_model_that_does_not_say_what_it_learns_is_refused_in_words_and_nothing_is_read(
    adata, missing, monkeypatch
):
    model = scratch(adata)
    if missing == "training_losses":
        monkeypatch.delattr(type(model.module), missing)
    else:
        monkeypatch.setattr(type(model), missing, vars(Hooks)[missing])
    monkeypatch.setattr(type(model), "_attached_cells", None)
    with pytest.raises(NotImplementedError, match=f"CellPLM cannot be trained: it does not give {missing}"):
        model.train(max_epochs=1, **QUIET)


def test_early_stopping_watches_the_validation_loss(adata):
    model = scratch(adata)
    model.train(
        max_epochs=50, early_stopping=True, early_stopping_patience=2, early_stopping_min_delta=1e9, **QUIET
    )
    assert len(model.history["train_loss"]) < 10


@pytest.mark.parametrize(
    ("schedule", "share_at_the_end"), [("cosine", 0.0), ("restarts", 0.01 + 0.99 * 2 / 5)]
)
def test_the_learning_rate_follows_the_schedule(adata, schedule, share_at_the_end):
    model = scratch(adata)
    model.train(max_epochs=2, plan_kwargs={"lr": 1e-3, "schedule": schedule}, **QUIET)
    (optimizer,) = model.trainer.optimizers
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3 * share_at_the_end] * 2, abs=1e-9)
    with pytest.raises(ValueError, match='choose "cosine" or "restarts"'):
        scratch(adata).train(max_epochs=1, plan_kwargs={"schedule": "step"}, **QUIET)


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
    batches = [{"X": torch.from_numpy(part)} for part in np.array_split(x, 3)]
    floor = GeneMeans.fit(batches, torch.ones(1, 3, dtype=torch.bool))
    np.testing.assert_allclose(floor.share[0], x.sum(axis=0) / x.sum(), rtol=1e-5)
    depth = x.sum(axis=1, keepdims=True).astype(np.float64)
    expected = depth * np.asarray(x.sum(axis=0) / x.sum(), dtype=np.float64)
    by_hand = (expected**2).sum(axis=0) / ((x - expected) ** 2 - expected).sum(axis=0)
    np.testing.assert_allclose(floor.dispersion[0], by_hand, rtol=1e-3)


def test_the_training_plot_shows_each_loss_beside_its_floor(adata):
    from matplotlib.figure import Figure

    model = scratch(adata)
    with pytest.raises(ValueError, match="no history"):
        cp.pl.training(model)
    model.train(max_epochs=2, **QUIET)
    with pytest.raises(ValueError, match="those that have are reconstruction"):
        cp.pl.training(model, loss="latent")
    labels = [line.get_label() for line in cp.pl.training(model, ax=Figure().subplots()).lines]
    assert labels == ["training cells", "training cells, floor: gene means",
                      "held-out cells", "held-out cells, floor: gene means"]  # fmt: skip


def test_what_weights_were_trained_on_goes_along_until_they_are_trained_on_more(adata, tmp_path):
    scratch(adata).save_pretrained(tmp_path / "first")
    cells = np.arange(1, 20, dtype=np.uint32)
    cp.weights.write_trained_on(tmp_path / "first", cells)
    model = cp.model.CellPLM.from_pretrained(tmp_path / "first", adata)
    model.save_pretrained(tmp_path / "same")
    model.save(tmp_path / "own")
    for again in (
        cp.model.CellPLM.from_pretrained(tmp_path / "same"),
        cp.model.CellPLM.load(tmp_path / "own", adata),
    ):
        np.testing.assert_array_equal(again.trained_on_, cells)
    model.train(max_epochs=1, **QUIET)
    model.save_pretrained(tmp_path / "more")
    assert cp.weights.read_trained_on(tmp_path / "more") is None
    assert cp.model.CellPLM.from_pretrained(tmp_path / "more").trained_on_ is None
