"""ScGPT's face: one cell, one vector; training, labels, genes in context."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch

from cellprior.evaluate import masked_prediction
from cellprior.model import ScGPT
from cellprior.model.scgpt import _module
from cellprior.weights import WeightsError
from tests.contract.models import blood_cells, tiny_scgpt
from tests.parity.scgpt_golden import case_a

# a few epochs are too few to be good, and the models say so
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The golden case A: weights that make much of little, and 32 cells of which no two have as many genes."""
    case, folder = case_a(), tmp_path_factory.mktemp("case_a")
    case.write(folder)
    names = case.arrays["counts/names"].tolist()
    data, indices, indptr = (case.arrays[f"counts/{part}"] for part in ("data", "indices", "indptr"))
    parts = (data.astype(np.float32), indices.astype(np.int32), indptr)
    counts = sp.csr_matrix(parts, shape=(32, len(names)))
    model = ScGPT.from_pretrained(folder, ad.AnnData(counts, var=pd.DataFrame(index=names)))
    yield model
    model.release()


def last(model: ScGPT, name: str) -> float:
    """A column of the history, at its end."""
    return float(model.history[name].iloc[-1, 0])


def setup(n: int = 90, **keys: str) -> ScGPT:
    adata = blood_cells()[:n].copy()
    ScGPT.setup_anndata(adata, **keys)
    return ScGPT.from_pretrained(tiny_scgpt(), adata)


@pytest.mark.parametrize(
    "how", [{}, {"pooling": "mean"}, {"pooling": "weighted"}, {"ties": "random"}, {"max_genes": 60}]
)
def test_a_cell_has_the_same_vector_alone_in_any_batch_and_in_any_order(model, how):
    together = model.get_latent_representation(**how)
    order = np.random.default_rng(0).permutation(32)
    shuffled = model.get_latent_representation(indices=order, batch_size=17, **how)
    np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=1e-6)
    for i in (0, 20, 31):
        alone = model.get_latent_representation(indices=[i], **how)
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)


def test_cells_that_go_through_together_are_told_nothing_of_each_other(model, monkeypatch):
    expected = model.get_latent_representation()
    monkeypatch.setattr(_module, "CPU_TOKENS", 10**9)  # all at once, padded to the longest
    np.testing.assert_allclose(model.get_latent_representation(), expected, rtol=0, atol=1e-6)


def test_one_and_two_threads_give_the_same(model):
    expected, n = model.get_latent_representation(), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(n, 2))
        np.testing.assert_allclose(model.get_latent_representation(), expected, rtol=0, atol=1e-6)
    finally:
        torch.set_num_threads(n)


def test_another_process_gives_the_same_bits(tmp_path):
    model = setup(20)
    expected = hashlib.sha256(model.get_latent_representation().tobytes()).hexdigest()
    model.save_pretrained(tmp_path / "bundle")
    model.adata.write_h5ad(tmp_path / "cells.h5ad")
    model.release()
    code = (
        "import sys, hashlib, anndata as ad; from cellprior.model import ScGPT; folder = sys.argv[1]\n"
        "model = ScGPT.from_pretrained(folder + '/bundle', ad.read_h5ad(folder + '/cells.h5ad'))\n"
        "print(hashlib.sha256(model.get_latent_representation().tobytes()).hexdigest())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split()[-1] == expected


def test_other_ways_to_break_ties_and_fewer_genes_move_a_cell_and_not_far(model):
    expected = model.get_latent_representation()
    for how in (
        {"ties": "middle"},
        {"ties": "upper"},
        {"ties": "random"},
        {"ties": "random", "seed": 1},
        {"max_genes": 100},
    ):
        found = model.get_latent_representation(**how)
        cosine = (found * expected).sum(1)
        assert 0.9 < np.median(cosine) < 1 - 1e-5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is not known"),
        ({"ties": "none"}, "ties='none' is not known"),
        ({"max_genes": 0}, "max_genes=0"),
    ],
)
def test_an_argument_that_is_not_known_is_refused(model, how, message):
    with pytest.raises(ValueError, match=message):
        model.get_latent_representation(**how)


def test_a_cell_without_known_genes_is_its_class_token_alone_and_finite():
    adata = blood_cells()[:5].copy()
    adata.X = sp.csr_matrix(adata.X.multiply(np.arange(5)[:, None] != 2))
    model = ScGPT.from_pretrained(tiny_scgpt(), adata)
    for pooling in ("cls", "mean", "weighted"):
        assert np.isfinite(model.get_latent_representation(pooling=pooling)).all()
    assert np.isfinite(model.get_gene_representation(in_cells=True, indices=[0, 2]).to_numpy()).any()
    assert model.get_attention(indices=[2]).sum() == 0
    model.release()


def test_data_of_more_than_60000_genes_are_read():
    adata = blood_cells()[:4].copy()
    wide = ad.AnnData(np.zeros((4, 61_000), dtype=np.float32))
    wide.var_names = [*adata.var_names, *(f"FOREIGN{i}" for i in range(61_000 - adata.n_vars))]
    wide.X[:, : adata.n_vars] = adata.X.toarray()
    model = ScGPT.from_pretrained(tiny_scgpt(), wide)
    expected = ScGPT.from_pretrained(tiny_scgpt(), adata)
    np.testing.assert_allclose(
        model.get_latent_representation(), expected.get_latent_representation(), rtol=0, atol=1e-6
    )
    model.release(), expected.release()


# training


def test_training_lowers_the_loss_and_gives_each_part_beside_its_floors():
    scvi.settings.seed = 0
    model = setup(100)
    model.train(max_epochs=3, batch_size=16, plan_kwargs={"lr": 5e-3}, **QUIET)
    history = model.history
    for part in ("masked", "mvc"):
        values = history[f"train_{part}"].to_numpy()
        assert values[-1] < values[0]
        for floor in ("zero", "gene_mean", "gene_mean_at_depth"):
            assert np.isfinite(last(model, f"validation_{part}_floor_{floor}"))
    floors = {
        name: float(history[f"validation_masked_floor_{name}"].iloc[-1, 0])
        for name in ("zero", "gene_mean", "gene_mean_at_depth")
    }
    assert floors["gene_mean"] < floors["zero"] / 2
    assert "train_ecs" not in history
    model.release()


def test_the_contrast_and_integration_come_with_what_chance_would_reach():
    scvi.settings.seed = 0
    model = setup(100, batch_key="batch")
    model.train(max_epochs=1, batch_size=16, objective="contrastive", **QUIET)
    assert last(model, "train_contrastive_floor_chance") == pytest.approx(math.log(16), rel=0.1)
    model.train(max_epochs=2, batch_size=16, objective="integration", plan_kwargs={"max_genes": 100}, **QUIET)
    assert model.module.n_batches == 2
    assert model._network()["adversary"]
    shares = model.adata.obs["batch"].value_counts(normalize=True)
    entropy = -(shares * np.log(shares)).sum()
    assert last(model, "train_dab_chance") == pytest.approx(entropy, rel=0.1)
    assert last(model, "train_ecs") < 1
    assert "train_ecs_floor_alike" in model.history
    model.release()


def test_a_model_that_has_learned_to_hide_batches_is_saved_with_its_adversary(tmp_path):
    model = setup(60, batch_key="batch")
    model.train(max_epochs=1, batch_size=16, objective="integration", plan_kwargs={"max_genes": 50}, **QUIET)
    expected = model.get_latent_representation()
    model.save(tmp_path / "saved", save_anndata=True)
    model.save_pretrained(tmp_path / "bundle")
    loaded = ScGPT.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.get_latent_representation(), expected)
    again = ScGPT.from_pretrained(tmp_path / "bundle", model.adata.copy())
    np.testing.assert_array_equal(again.get_latent_representation(), expected)
    assert torch.equal(again.module.adversary.out.weight, model.module.adversary.out.weight)
    for each in (model, loaded, again):
        each.release()


def test_integration_without_batches_is_refused_before_anything_is_learned():
    model = setup(30)
    with pytest.raises(
        ValueError, match="objective='integration' hides the batch of a cell: .* needs a batch_key"
    ):
        model.train(max_epochs=1, objective="integration", **QUIET)
    with pytest.raises(ValueError, match="dab_weight needs the batch of each cell"):
        model.train(max_epochs=1, plan_kwargs={"dab_weight": 1.0}, **QUIET)
    model.release()


def test_the_same_seed_trains_the_same_weights():
    found = []
    for _ in range(2):
        scvi.settings.seed = 1
        model = setup(40)
        model.train(max_epochs=1, batch_size=20, **QUIET)
        found.append(model.get_latent_representation())
        model.release()
    np.testing.assert_array_equal(*found)


def test_a_network_that_norms_each_batch_learns_and_must_be_told_which():
    scvi.settings.seed = 0
    adata = blood_cells()[:60].copy()
    ScGPT.setup_anndata(adata, batch_key="batch")
    small: dict[str, Any] = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_ff": 16}
    model = ScGPT(adata, **small, batch_norm="domain", n_batches=2, batch_decoder=True, zero_probability=True)
    model.train(max_epochs=1, batch_size=20, plan_kwargs={"with_zeros": True, "max_genes": 100}, **QUIET)
    for part in ("masked_zero", "mvc_zero"):
        assert np.isfinite(last(model, f"train_{part}"))
        assert np.isfinite(last(model, f"train_{part}_floor_gene_rate"))
    with pytest.raises(ValueError, match="norms each of 2 batches on its own.*found domain=None"):
        model.get_latent_representation()
    first, second = (model.get_latent_representation(domain=i) for i in (0, 1))
    assert np.abs(first - second).max() > 1e-4
    model.release()


# labels


def test_labels_are_learned_and_cells_that_are_none_of_them_can_be_unknown(tmp_path):
    scvi.settings.seed = 0
    adata = blood_cells()
    kinds = ["CD14+ Monocyte", "CD19+ B", "CD56+ NK", "Dendritic"]
    known = adata[adata.obs["bulk_labels"].isin(kinds)].copy()
    ScGPT.setup_anndata(known, labels_key="bulk_labels")
    model = ScGPT.from_pretrained(tiny_scgpt(), known)
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    model.fine_tune(max_epochs=8, lr=5e-3, max_genes=200, **QUIET)
    moved = {
        name
        for name, x in model.module.state_dict().items()
        if name in before and not torch.equal(x, before[name])
    }
    assert any(name.startswith("gene_encoder") for name in moved)
    assert not any(name.startswith(("expression", "mvc")) for name in moved)
    names = model.predict()
    assert np.mean(names == known.obs["bulk_labels"].astype(str).to_numpy()) > 0.6
    rejected = model.predict(adata, reject=0.3)
    assert "unknown" in rejected
    soft = model.predict(indices=np.arange(5), soft=True)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    model.save_pretrained(tmp_path / "bundle")
    loaded = ScGPT.from_pretrained(tmp_path / "bundle", known.copy())
    assert loaded.module.max_genes == 200
    np.testing.assert_array_equal(loaded.predict(), names)
    model.release(), loaded.release()


@pytest.mark.parametrize(
    ("trainable", "moves"),
    [("transformer", {"encoder"}), ("last", {"encoder"}), ("head", set()), ("lora", {"encoder"})],
)
def test_what_is_not_trained_keeps_every_bit(trainable, moves):
    model = setup(60, labels_key="bulk_labels")
    before = {name: x.clone() for name, x in model.module.state_dict().items()}
    with pytest.warns(UserWarning, match="Fewer than 3 cells"):
        model.fine_tune(trainable=trainable, max_epochs=1, **QUIET)
    after = model.module.state_dict()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == moves
    model.release()


# genes in context


def test_a_genes_own_vector_is_that_of_the_embedding_and_data_name_it(model):
    found = model.get_gene_representation()
    match = model.gene_match
    known = match.index >= 0
    assert list(found.index) == list(match.var_names[known])
    rows = torch.as_tensor(match.index[known])
    expected = model.module.gene_encoder(rows).detach().numpy()
    np.testing.assert_array_equal(found.to_numpy(), expected)


def test_a_genes_vector_in_cells_is_the_mean_over_the_cells_that_express_it(model):
    cells = [3, 7, 20]
    found = model.get_gene_representation(indices=cells, in_cells=True)
    dense = model.adata.X.toarray()
    total, n = 0, 0
    gene = found.index[np.flatnonzero(~found.isna().any(axis=1))[0]]
    row = model.gene_match.index[list(model.gene_match.var_names).index(gene)]
    match = torch.as_tensor(np.where(model.gene_match.index >= 0, model.gene_match.index, 0))
    for cell in cells:
        counts = torch.from_numpy(dense[cell : cell + 1] * (model.gene_match.index >= 0))
        tokens = model.module.tokens(counts, gene_index=match)
        hidden = model.module.encode(tokens)[0].detach()
        at = (tokens.gene[0] == row).nonzero()[:, 0]
        total, n = total + hidden[at].sum(0), n + len(at)
    np.testing.assert_allclose(found.loc[gene], total / n, rtol=1e-4, atol=1e-5)
    silent = found.index[
        (dense[cells].sum(0) == 0)[[list(model.adata.var_names).index(g) for g in found.index]]
    ]
    assert found.loc[silent].isna().all().all()
    with pytest.raises(ValueError, match="indices names no cells"):
        model.get_gene_representation(indices=[], in_cells=True)


def test_attention_is_a_share_and_averages_layers_and_cells(model):
    received = model.get_attention(indices=[0, 1])
    assert 0.9 < received.sum() < 1
    one = model.get_attention(indices=[0])
    assert received.to_numpy() == pytest.approx(
        (one + model.get_attention(indices=[1])).to_numpy() / 2, abs=1e-7
    )
    genes = list(one[one > 0].index[:4])
    between = model.get_attention(indices=[0], genes=[*genes, genes[0]])
    assert between.shape == (5, 5)
    assert (between.to_numpy() > 0).all()
    assert between.iloc[0, 0] == between.iloc[4, 4]
    by_layer = [model.get_attention(indices=[0], genes=[*genes, genes[0]], layer=i) for i in range(3)]
    np.testing.assert_allclose(between, sum(by_layer) / 3, rtol=1e-5)
    with pytest.raises(KeyError, match="NOGENE"):
        model.get_attention(genes=["NOGENE"])


# what is asked of hidden genes


def test_hidden_genes_are_compared_with_what_is_known_without_biology(model):
    table = masked_prediction(model, seeds=2, mask_shares=(0.3,), progress=False)
    assert set(table["metric"]) == {"squared_error"}
    assert set(table["method"]) == {"model", "zero", "gene_mean", "gene_mean_at_depth"}
    value = table.set_index("method")["value"]
    assert value["gene_mean"] < value["zero"]
    assert value["gene_mean_at_depth"] < 1.05 * value["gene_mean"]


def test_weights_of_another_model_are_refused(model, tmp_path):
    (tmp_path / "best_model.pt").write_bytes(b"PK not all")
    with pytest.raises(WeightsError):
        ScGPT.from_pretrained(tmp_path, blood_cells())
