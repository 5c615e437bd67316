from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch

from cellprior.model import ScBERT, model_class
from cellprior.weights import WeightsError

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
SMALL = {"n_hidden": 16, "n_layers": 2, "n_heads": 2, "head_dim": 8}
# with random weights and a few steps, what is learned is not the point
above_floor = pytest.mark.filterwarnings("ignore:After training, .* cells is:UserWarning")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are not in the vocabulary are otherwise looked up."""
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


def make_cells(n_cells: int = 90, n_genes: int = 60, seed: int = 0) -> ad.AnnData:
    """Two types that differ in half of their genes."""
    rng = np.random.default_rng(seed)
    rate = np.exp(np.random.default_rng(5).normal(0, 1.5, size=(2, n_genes)))
    kind = rng.integers(2, size=n_cells)
    x = rng.poisson(rate[kind] * rng.gamma(4.0, 0.25, size=(n_cells, 1))).astype(np.float32)
    obs = pd.DataFrame({"kind": np.array(["A", "B"])[kind]}, index=[f"cell {i}" for i in range(n_cells)])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]))


def scratch(adata: ad.AnnData, seed: int = 0, **network) -> ScBERT:
    scvi.settings.seed = seed
    ScBERT.setup_anndata(adata)
    return ScBERT(adata, **{**SMALL, **network})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    """Random weights, saved as if they were pretrained."""
    folder = tmp_path_factory.mktemp("weights") / "bundle"
    scratch(make_cells()).save_pretrained(folder)
    return folder


@pytest.fixture
def model(bundle) -> ScBERT:
    return ScBERT.from_pretrained(bundle, make_cells())


def tokens_of(model: ScBERT, adata: ad.AnnData) -> torch.Tensor:
    return model.module.tokens(torch.from_numpy(adata.X.toarray()))


@pytest.mark.parametrize("pooling", ["mean", "expressed", "cls"])
def test_the_embedding_is_what_the_pooling_says(model, pooling):
    tokens = tokens_of(model, model.adata)
    with torch.no_grad():
        hidden = model.module.encode(tokens)
    expected = {
        "mean": hidden[:, :-1].mean(1),
        "cls": hidden[:, -1],
        "expressed": torch.stack([h[:-1][t > 0].mean(0) for h, t in zip(hidden, tokens, strict=True)]),
    }
    found = model.get_latent_representation(pooling=pooling)
    np.testing.assert_allclose(found, expected[pooling], rtol=1e-5, atol=1e-5)


def test_an_unknown_pooling_is_refused(model):
    with pytest.raises(ValueError, match='"mean", "cls" or "expressed"'):
        model.get_latent_representation(pooling="max")


def test_a_cell_has_the_same_vector_alone_among_four_and_in_any_order(model):
    together = model.get_latent_representation()
    alone = np.concatenate([model.get_latent_representation(indices=[i]) for i in range(4)])
    order = np.random.default_rng(0).permutation(model.adata.n_obs)
    np.testing.assert_allclose(alone, together[:4], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        model.get_latent_representation(indices=range(4)), together[:4], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        model.get_latent_representation(indices=order), together[order], rtol=0, atol=1e-6
    )


def test_half_the_bits_and_a_sample_of_the_unexpressed_genes_are_near_the_exact_embedding(model):
    exact = model.get_latent_representation()
    for options in ({"precision": "bfloat16"}, {"n_zero_genes": 30}):
        near = model.get_latent_representation(**options)
        cosine = (near * exact).sum(1) / np.linalg.norm(near, axis=1) / np.linalg.norm(exact, axis=1)
        assert cosine.min() > 0.99
        assert not np.array_equal(near, exact)


@pytest.mark.parametrize("in_layer", [False, True])
def test_cells_too_deep_for_single_counts_are_a_warning_once_per_call(bundle, in_layer):
    adata = make_cells()
    x = adata.X.toarray()
    x[[3, 50], 0] = 10_000
    adata.X = sp.csr_matrix(x)
    model = ScBERT.from_pretrained(bundle, adata)
    with pytest.warns(UserWarning, match="2 cells have more than 10,000 counts") as found:
        model.get_latent_representation(batch_size=16)
    assert len(found) == 1


def test_gene_vectors_are_means_over_cells_under_the_data_s_names(model):
    query = make_cells(seed=1)[:20]
    query = query[:, ::-1].copy()
    query.var_names = [*query.var_names[:-5], *(f"FOREIGN{i}" for i in range(5))]  # without GENE4 to GENE0
    found = model.get_gene_representation(query, indices=np.arange(10))
    assert list(found.index) == [f"GENE{i}" for i in range(59, 4, -1)]
    assert found.shape == (55, 16)
    seen = make_cells(seed=1).X.toarray()[:10]
    seen[:, :5] = 0
    with torch.no_grad():
        hidden = model.module.encode(model.module.tokens(torch.from_numpy(seen)))
    np.testing.assert_allclose(found.loc["GENE7"], hidden[:, 7].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.to_numpy(), hidden[:, 5:-1].mean(0).numpy()[::-1], rtol=1e-4, atol=1e-5)


def test_attention_between_genes_and_what_each_gene_receives_agree(model):
    names = [f"GENE{i}" for i in (7, 2, 33)]
    pairs = model.get_attention(indices=[4, 9], genes=names)
    assert list(pairs.index) == list(pairs.columns) == names
    tokens = tokens_of(model, model.adata)
    by_hand = [
        model.module.attention(tokens[i : i + 1], genes=torch.tensor([7, 2, 33])).numpy() for i in (4, 9)
    ]
    np.testing.assert_allclose(pairs, np.mean(by_hand, axis=0), rtol=1e-5)

    received = model.get_attention(indices=[4, 9])
    assert list(received.index) == list(model.adata.var_names)
    everyone = torch.arange(61)
    whole = np.mean(
        [model.module.attention(tokens[i : i + 1], genes=everyone).numpy() for i in (4, 9)], axis=0
    )
    np.testing.assert_allclose(whole.sum(axis=1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(received, whole.mean(axis=0)[:-1], rtol=1e-4)


def test_attention_of_unknown_genes_or_of_no_cells_is_an_error(model):
    with pytest.raises(KeyError, match="NOT-A-GENE"):
        model.get_attention(indices=[0], genes=["GENE1", "NOT-A-GENE"])
    for method in (model.get_attention, model.get_gene_representation):
        with pytest.raises(ValueError, match="names no cells"):
            method(indices=[])


@above_floor  # that of the rates: eight epochs more pass it
@pytest.mark.parametrize("name", ["pbmc3k_seurat", "pbmc_facs_zheng2017"])
def test_training_on_real_cells_from_scratch_ends_below_the_frequencies(shared_data, name):
    adata = ad.read_h5ad(shared_data / "rna" / f"{name}.h5ad")
    total = np.asarray(adata.X.sum(axis=0)).ravel()
    cells = np.random.default_rng(0).permutation(adata.n_obs)[:400]
    model = scratch(adata[cells, np.argsort(-total)[:300]].copy(), n_hidden=32, head_dim=16)
    model.train(max_epochs=5, batch_size=32, plan_kwargs={"lr": 1e-2}, **QUIET)
    history = {column: float(values.iloc[-1, 0]) for column, values in model.history.items()}
    for floor in ("uniform", "all_genes", "per_cell"):
        assert history["validation_masked"] < history[f"validation_masked_floor_{floor}"], floor
        assert history["validation_masked_accuracy"] > history[f"validation_masked_accuracy_floor_{floor}"], (
            floor
        )


@above_floor
@pytest.mark.parametrize("objective", ["masked", "ordinal", "contrastive", "masked+contrastive"])
def test_every_objective_trains_and_is_shown_beside_its_floors(objective):
    model = scratch(make_cells())
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    model.train(max_epochs=2, objective=objective, batch_size=32, **QUIET)
    losses = {"masked": ["masked"], "ordinal": ["ordinal"], "contrastive": ["contrastive"]}
    parts = losses.get(objective, ["masked", "contrastive"])
    for part in parts:
        floor = "chance" if part == "contrastive" else "rate_and_depth"
        assert {f"validation_{part}", f"validation_{part}_floor_{floor}"} <= set(model.history)
    moved = {
        name for name, tensor in model.module.state_dict().items() if not torch.equal(tensor, before[name])
    }
    without_gradient = {"bins.weight", "bins.bias"} if objective == "contrastive" else set()
    assert moved == {n for n in before if "projection" not in n} - without_gradient


@above_floor
def test_the_redraws_go_on_where_they_stopped(tmp_path):
    model = scratch(make_cells())
    model.train(max_epochs=3, train_size=1.0, batch_size=30, **QUIET)
    assert model.module.steps_since_redraw == 9
    model.save_pretrained(tmp_path / "bundle")
    again = ScBERT.from_pretrained(tmp_path / "bundle", make_cells())
    assert again.module.steps_since_redraw == 9
    again.train(max_epochs=1, train_size=1.0, batch_size=30, plan_kwargs={"redraw_every": 9}, **QUIET)
    assert again.module.steps_since_redraw == 3
    assert not torch.equal(
        again.module.encoder[0].attention.projection, model.module.encoder[0].attention.projection
    )


def test_large_vocabularies_are_trained_a_few_cells_at_a_time(monkeypatch):
    model = scratch(make_cells())
    assert model._objective("masked")["micro_batch_size"] == 333
    monkeypatch.setattr("cellprior.model.scbert._model.TRAINED_POSITIONS", 10)
    assert model._objective("contrastive")["micro_batch_size"] == 1


@pytest.mark.parametrize("trainable", ["head", "last", "original", "all", "lora"])
def test_fine_tuning_changes_what_it_says_and_with_all_of_it_learns_the_labels(bundle, trainable):
    adata = make_cells(200)
    scvi.settings.seed = 0
    model = ScBERT.from_pretrained(bundle, adata)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    model.fine_tune("kind", trainable=trainable, max_epochs=20, lr=1e-2, batch_size=64, **QUIET)
    after = model.module.state_dict()
    moved = {".".join(name.split(".")[:2]) for name in before if not before[name].equal(after[name])}
    expected = {
        "head": set(),
        "last": {"encoder.1"},
        "original": {"encoder.0"},
        "all": {"embedder.token_embedding", "embedder.gene_vectors", "encoder.0", "encoder.1"},
        "lora": {"encoder.0", "encoder.1"},
    }
    assert moved - {"norm.weight", "norm.bias"} == expected[trainable]
    assert ("norm.weight" in moved) == (trainable != "head")
    query = make_cells(100, seed=3)
    named = model.predict(query)
    assert set(named) <= {"A", "B"}
    assert trainable != "all" or np.mean(named == query.obs["kind"]) > 0.9


def test_the_head_learns_from_what_differs_between_cells(bundle, tmp_path):
    adata = make_cells(200)
    model = ScBERT.from_pretrained(bundle, adata)
    model.fine_tune("kind", trainable="head", max_epochs=1, batch_size=64, **QUIET)
    hidden = model.get_latent_representation(indices=model.train_indices)
    head = model.module.annotation
    np.testing.assert_allclose(head.shift, hidden.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert head.scale.item() == pytest.approx(hidden.std(axis=0).mean(), rel=1e-4)
    model.save_pretrained(tmp_path / "tuned")
    again = ScBERT.from_pretrained(tmp_path / "tuned", make_cells(50, seed=3))
    np.testing.assert_allclose(
        again.predict(soft=True), model.predict(make_cells(50, seed=3), soft=True), rtol=1e-4
    )


def test_what_was_fine_tuned_approximately_names_cells_by_the_same_approximation(bundle, tmp_path):
    model = ScBERT.from_pretrained(bundle, make_cells(100))
    model.fine_tune("kind", trainable="all", max_epochs=3, lr=1e-2, n_zero_genes=3, batch_size=64, **QUIET)
    query = make_cells(30, seed=3)
    soft = model.predict(query, soft=True)
    with torch.inference_mode():
        hidden = model.module.pool(tokens_of(model, query), n_zero_genes=3)
        expected = model.module.annotation(hidden).softmax(1)
    np.testing.assert_allclose(soft, expected, rtol=1e-4)
    model.save_pretrained(tmp_path / "tuned")
    again = ScBERT.from_pretrained(tmp_path / "tuned", query)
    np.testing.assert_allclose(again.predict(soft=True), soft, rtol=1e-4)
    model.module.n_zero_genes = None
    assert not np.allclose(model.predict(query, soft=True), soft, atol=1e-4)
    with pytest.raises(ValueError, match="n_zero_genes=0; at least 1"):
        model.fine_tune("kind", n_zero_genes=0, **QUIET)


def test_a_foreign_file_is_not_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"no")
    assert model_class(tmp_path / "x.pth") is ScBERT
    assert model_class(tmp_path) is ScBERT
    with pytest.raises(WeightsError):
        ScBERT.from_pretrained(tmp_path / "x.pth", make_cells())
    (tmp_path / "x.bin").write_bytes(b"no")
    with pytest.raises(WeightsError, match="neither a bundle"):
        ScBERT.from_pretrained(tmp_path / "x.bin", make_cells())
