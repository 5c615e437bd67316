"""Nicheformer with AnnData: real cells of several assays, training, labels, what is refused."""

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

from cellprior import tl
from cellprior.cli import main
from cellprior.evaluate import masked_prediction, stability
from cellprior.evaluate._twin import random_twin
from cellprior.genes import GeneMatchError
from cellprior.model import Nicheformer, NotCountsError
from cellprior.model.nicheformer._inputs import TECHNOLOGIES, context_code
from cellprior.model.nicheformer._module import NicheformerModule
from cellprior.weights import read_bundle, write_bundle
from tests.contract.models import blood_cells, tiny_nicheformer

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
SMALL: dict[str, Any] = {"n_hidden": 16, "n_layers": 2, "n_heads": 2, "n_feedforward": 32, "n_positions": 64}
CLOSE: dict[str, float] = {"rtol": 0, "atol": 1e-6}


@cache
def _cells() -> AnnData:
    """120 blood cells and 200 of their genes, of three assays in turn."""
    adata = blood_cells()
    order = np.argsort(-np.asarray(adata.X.sum(0)).ravel())
    adata = adata[::6, order[:200]].copy()
    adata.X.data = np.rint(adata.X.data).astype(np.float32)
    adata.obs["tech"] = np.resize(["Xenium", "10x 3' v3", "MERFISH"], adata.n_obs)
    return adata


@pytest.fixture
def cells() -> AnnData:
    return _cells().copy()


@cache
def weights() -> str:
    """The tiny weights with means that differ between technologies."""
    bundle = read_bundle(tiny_nicheformer())
    folder = f"{tiny_nicheformer()}_with_means"
    rng = np.random.default_rng(0)
    means = torch.from_numpy(rng.gamma(1.0, 2.0, (len(TECHNOLOGIES), len(bundle.genes))))
    tensors = {**bundle.state_dict, "gene_means": means}
    write_bundle(folder, state_dict=tensors, config=bundle.config, genes=bundle.genes, card="")
    return folder


@pytest.fixture
def mixed() -> Iterator[Nicheformer]:
    adata = _cells().copy()
    Nicheformer.setup_anndata(adata, assay_key="tech", labels_key="bulk_labels")
    model = Nicheformer.from_pretrained(weights(), adata)
    yield model
    model.release()


def trained(adata: AnnData, *, epochs: int = 2, **setup: Any) -> Nicheformer:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="After training", category=UserWarning)
        torch.manual_seed(0)
        Nicheformer.setup_anndata(adata, labels_key="bulk_labels", **setup)
        model = Nicheformer(adata, **SMALL)
        model.train(max_epochs=epochs, batch_size=40, log_every_n_steps=1, plan_kwargs={"lr": 1e-2}, **QUIET)
    return model


@pytest.mark.parametrize("pooling", ["all", "genes"])
def test_spatial_and_dissociated_cells_in_one_anndata_are_each_read_by_its_assay(cells, mixed, pooling):
    together = mixed.get_latent_representation(pooling=pooling)
    for assay, of_assay in cells.obs.groupby("tech").groups.items():
        rows = cells.obs_names.get_indexer(of_assay)
        for setup in ({"assay": assay}, {"assay_key": "tech"}):
            alone = cells[rows].copy()
            Nicheformer.setup_anndata(alone, **setup)
            model = Nicheformer.from_pretrained(weights(), alone)
            found = model.get_latent_representation(pooling=pooling)
            np.testing.assert_allclose(found, together[rows], **CLOSE)
            model.release()
    one = cells.copy()
    Nicheformer.setup_anndata(one, assay="Xenium")
    model = Nicheformer.from_pretrained(weights(), one)
    as_xenium = model.get_latent_representation(pooling=pooling)
    other = (cells.obs["tech"] != "Xenium").to_numpy()
    np.testing.assert_allclose(as_xenium[~other], together[~other], **CLOSE)
    assert np.abs(as_xenium[other] - together[other]).max(1).min() > 1e-3
    model.release()


def test_a_query_is_read_by_its_own_column_and_in_any_order(cells, mixed):
    expected = mixed.get_latent_representation()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    np.testing.assert_allclose(
        mixed.get_latent_representation(indices=order, batch_size=16), expected[order], **CLOSE
    )
    query = cells[order].copy()
    np.testing.assert_allclose(mixed.get_latent_representation(query), expected[order], **CLOSE)
    query.obs["tech"] = query.obs["tech"].astype(str).replace("MERFISH", "seqFISH")
    with pytest.raises(ValueError, match="'seqFISH', which is no assay"):
        mixed.get_latent_representation(query)
    del query.obs["tech"]
    with pytest.raises(KeyError, match="'tech' not found in adata.obs"):
        mixed.get_latent_representation(query)


def test_the_embedding_is_that_of_the_network_alone(cells, mixed):
    """Counts over the vocabulary and codes by hand: no code shared with the reading of data."""
    x = np.zeros((cells.n_obs, len(mixed.genes)), dtype=np.float32)
    for column, row in zip(cells.X.toarray().T, mixed.gene_match.index, strict=True):
        if row >= 0:
            x[:, row] += column
    code = torch.tensor([context_code("human", assay) for assay in cells.obs["tech"]])
    for options in (
        {},
        {"pooling": "genes"},
        {"with_context": True},
        {"layer": 0},
        {"gene_scale": "rounded"},
    ):
        with torch.inference_mode():
            expected = mixed.module.encode(torch.from_numpy(x), context=code, **options)
        np.testing.assert_allclose(mixed.get_latent_representation(**options), expected, rtol=1e-5, atol=1e-5)


def test_padding_is_no_key_and_in_the_mean_only_where_that_is_asked_for(mixed):
    """Torch's own layer over all positions with a mask of keys, as the original runs it."""
    module: NicheformerModule = mixed.module
    torch.manual_seed(0)
    tokens = torch.full((5, 60), 1)
    for i, n in enumerate((60, 40, 39, 7, 0)):
        tokens[i, :3], tokens[i, 3:n] = torch.tensor([5, 9, 4]), torch.randperm(400)[: max(n - 3, 0)] + 30
    plain = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, layer_norm_eps=1e-12).eval()
    ours = module.encoder[0]
    state = {
        "self_attn.in_proj_weight": torch.cat([p.weight for p in (ours.query, ours.key, ours.value)]),
        "self_attn.in_proj_bias": torch.cat([p.bias for p in (ours.query, ours.key, ours.value)]),
        **{f"self_attn.out_proj.{n}": p for n, p in ours.out.state_dict().items()},
        **{f"linear1.{n}": p for n, p in ours.ff1.state_dict().items()},
        **{f"linear2.{n}": p for n, p in ours.ff2.state_dict().items()},
        **{
            f"{norm}.{n}": p
            for norm in ("norm1", "norm2")
            for n, p in getattr(ours, norm).state_dict().items()
        },
    }
    plain.load_state_dict(state)
    full = torch.nn.functional.pad(tokens, (0, module.n_positions - 60), value=1)
    x = module.embedder.tokens(full) + module.embedder.positions.weight
    hidden = plain(x, src_key_padding_mask=full == 1).detach()
    with torch.inference_mode():
        np.testing.assert_allclose(module.pool(tokens), hidden[:, 3:].mean(1), rtol=1e-5, atol=2e-6)
        genes = torch.stack(
            [h[t >= 30].mean(0) if (t >= 30).any() else h[0] * 0 for h, t in zip(hidden, full, strict=True)]
        )
        np.testing.assert_allclose(module.pool(tokens, "genes"), genes, rtol=1e-5, atol=2e-6)
        assert not torch.allclose(genes[:4], hidden[:4, 3:].mean(1), atol=1e-3)


def test_a_cell_without_counts_is_finite_in_every_way(mixed):
    silent = AnnData(
        np.zeros(mixed.adata.shape, dtype=np.float32), obs=mixed.adata.obs[["tech"]], var=mixed.adata.var[[]]
    )
    for with_context in (False, True):
        assert np.isfinite(mixed.get_latent_representation(silent, with_context=with_context)).all()
    assert not mixed.get_latent_representation(silent, pooling="genes").any()
    assert mixed.get_latent_representation(silent, pooling="genes", with_context=True).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "cls"}, "pooling"), ({"layer": 1}, "layer=1"), ({"layer": -2}, "layer=-2"),
        ({"layer": True}, "layer=True"), ({"gene_scale": "asis"}, "gene_scale"), ({"with_context": 1}, "with_context"),
        ({"precision": "half"}, "precision"),
    ],
)  # fmt: skip
def test_arguments_that_are_not_known_are_refused_by_name(mixed, options, message):
    with pytest.raises(ValueError, match=message):
        mixed.get_latent_representation(**options)


def test_streams_and_functions_and_the_command_line_are_told_of_the_assays(cells, mixed, tmp_path):
    expected = mixed.get_latent_representation()
    setup = {"assay_key": "tech"}
    tl.embed(cells, weights(), setup=setup)
    np.testing.assert_allclose(cells.obsm["X_nicheformer"], expected, **CLOSE)
    assert cells.uns["cellprior"]["X_nicheformer"]["params"]["assay_key"] == "tech"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for source, out in ((cells, "memory.zarr"), (tmp_path / "cells.h5ad", "file.zarr")):
        tl.embed(source, weights(), setup=setup, out=tmp_path / out, batch_size=20, progress=False)
        np.testing.assert_allclose(ad.read_zarr(tmp_path / out).obsm["X_nicheformer"], expected, **CLOSE)
    with pytest.raises(FileExistsError):  # of other assays, it is another embedding
        other = cells.copy()
        other.obs["tech"] = other.obs["tech"].to_numpy()[::-1]
        tl.embed(other, weights(), setup=setup, out=tmp_path / "memory.zarr", progress=False)
    command = ["embed", str(tmp_path / "cells.h5ad"), str(tmp_path / "out.h5ad"), "--weights", weights()]
    assert main([*command, "--setup", "assay_key=tech"]) == 0
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_nicheformer"], expected, **CLOSE)
    with pytest.raises(
        ValueError, match=r"setup= has 'assey_key'; Nicheformer\.setup_anndata takes assay, assay_key,"
    ):
        tl.embed(cells, weights(), setup={"assey_key": "tech"})
    with pytest.raises(ValueError, match=r"CellPLM\.setup_anndata takes nothing there"):
        tl.embed(cells, "cellplm-starter", setup=setup)


def test_no_assay_is_a_warning_that_names_them_and_saying_dissociated_is_enough(cells):
    with pytest.warns(UserWarning, match=r'read as dissociated ones.*assay="10x 3\' v3".*"Smart-seq v4"'):
        Nicheformer.setup_anndata(cells.copy())
    other = cells.copy()
    Nicheformer.setup_anndata(other, modality="dissociated")
    model = Nicheformer.from_pretrained(weights(), other)
    assert (other.obs["_scvi_context"] == context_code()).all()
    model.release()


def test_an_assay_that_is_refused_leaves_the_data_as_they_were(cells):
    before = cells.copy()
    with pytest.raises(ValueError, match="Slide-seq"):
        Nicheformer.setup_anndata(cells, assay="Slide-seq")
    assert list(cells.obs) == list(before.obs)
    assert cells.uns.keys() == before.uns.keys()


def test_spatial_counts_that_were_divided_by_the_volume_of_the_cell_are_refused_with_the_way_back(cells):
    volume = np.random.default_rng(0).gamma(9.0, 50.0, cells.n_obs)
    divided = cells.copy()
    divided.X = divided.X.multiply(1 / volume[:, None]).tocsr()
    with pytest.raises(
        NotCountsError, match=r"not an integer(.|\n)*divided by the volume.*np\.rint\(adata\.X \* volume"
    ):
        Nicheformer.setup_anndata(divided, assay="MERFISH")
    with pytest.raises(NotCountsError) as error:
        Nicheformer.setup_anndata(divided, assay="10x 3' v3")
    assert "volume" not in str(error.value)
    divided.layers["counts"] = np.rint(divided.X.toarray() * volume[:, None])
    Nicheformer.setup_anndata(divided, assay="MERFISH", layer="counts")
    model, whole = Nicheformer.from_pretrained(weights(), divided), cells.copy()
    Nicheformer.setup_anndata(whole, assay="MERFISH")
    other = Nicheformer.from_pretrained(weights(), whole)
    np.testing.assert_allclose(model.get_latent_representation(), other.get_latent_representation(), **CLOSE)
    for each in (model, other):
        each.release()


def test_mouse_is_read_by_the_orthologues_that_the_user_gives_and_else_refused(cells, mixed):
    mouse = cells.copy()
    table = pd.Series(cells.var_names, index=[f"ENSMUSG{i:011d}" for i in range(cells.n_vars)])
    mouse.var_names = table.index
    with pytest.raises(GeneMatchError, match=r"mouse(.|\n)*orthologues"):
        mixed.get_latent_representation(mouse)
    mouse.var["human"] = mouse.var_names.map(table[:150])  # the others have none
    with pytest.raises(ValueError, match=r"called as in mouse \('ENSMUSG.*say what the cells are"):
        Nicheformer.setup_anndata(mouse, gene_key="human", assay_key="tech")
    Nicheformer.setup_anndata(mouse, gene_key="human", species="mouse", assay_key="tech")
    model = Nicheformer.from_pretrained(weights(), mouse)
    as_mouse = model.get_latent_representation(pooling="genes")
    model.release()
    Nicheformer.setup_anndata(mouse, gene_key="human", species="human", assay_key="tech")
    expected = mixed.get_latent_representation(cells[:, :150].copy(), pooling="genes")
    as_human = Nicheformer.from_pretrained(weights(), mouse)
    np.testing.assert_allclose(as_human.get_latent_representation(pooling="genes"), expected, **CLOSE)
    assert np.abs(as_mouse - expected).max(1).min() > 1e-4  # the token of the species
    as_human.release()


def test_training_learns_means_by_technology_and_beats_chance(cells):
    model = trained(cells, epochs=12, assay_key="tech")
    means = model.module.gene_means.numpy()
    rows = model.train_indices
    assert len(rows) < cells.n_obs
    x = cells.X.toarray().astype(np.float64)[rows]
    share = 1e4 * x / x.sum(1, keepdims=True)
    for name in ("Xenium", "MERFISH"):
        of_it = share[(cells.obs["tech"] == name).to_numpy()[rows]]
        expected = [column[column > 0].mean() if column.any() else 0 for column in of_it.T]
        found = means[TECHNOLOGIES.index(name.lower())][model.gene_match.index]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not means[TECHNOLOGIES.index("cosmx")].any()
    history = model.history
    for stage in ("train", "validation"):
        floors = ("uniform", "token_frequency", "gene_at_rank", "gene_at_rank_not_in_sight")
        assert {f"{stage}_masked_floor_{name}" for name in floors} <= set(history)
        assert f"{stage}_masked_accuracy_floor_gene_at_rank" in history
    loss = history["train_masked"].iloc[:, 0].astype(float)
    assert loss.iloc[-1] < loss.iloc[0]
    assert loss.iloc[-1] < history["train_masked_floor_uniform"].iloc[-1, 0]
    before = model.module.gene_means.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="After training", category=UserWarning)
        model.train(max_epochs=1, batch_size=40, log_every_n_steps=1, **QUIET)
    assert torch.equal(model.module.gene_means, before)  # what a trained network knows tokens by
    model.release()


def test_minibatches_that_do_not_say_how_their_cells_were_made_are_refused_where_the_setup_does(mixed):
    batch = {"X": torch.zeros(3, mixed.module.n_genes)}
    with pytest.raises(ValueError, match="gives assay_key, and the minibatches of a datamodule do not say"):
        mixed._fit_floor([batch], torch.ones(1, mixed.module.n_genes, dtype=torch.bool))


@pytest.mark.parametrize("trainable", ["last", "lora", "head", "all"])
def test_fine_tuning_knows_the_assay_of_each_cell_trains_its_parts_and_can_be_saved(
    mixed, cells, tmp_path, trainable, monkeypatch
):
    before = {name: tensor.clone() for name, tensor in mixed.module.state_dict().items()}
    seen: set[int] = set()
    hidden = mixed.module.hidden

    def noted(*args: Any, context: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update(context.flatten().tolist())
        return hidden(*args, context=context, **options)

    monkeypatch.setattr(mixed.module, "hidden", noted)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fewer than", category=UserWarning)
        torch.manual_seed(0)
        mixed.fine_tune(max_epochs=2, trainable=trainable, lr=1e-2, log_every_n_steps=1, **QUIET)
    assert seen == {context_code("human", assay) for assay in cells.obs["tech"]}
    after = mixed.module.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    allowed = {"head": (), "all": ("encoder.", "embedder."), "last": ("encoder.0.",)}
    lora = ("encoder.0.norm1.", "encoder.0.query.weight", "encoder.0.value.weight")
    assert bool(moved) == (trainable != "head")
    assert all(name.startswith(allowed.get(trainable, lora)) for name in moved)
    monkeypatch.undo()
    mixed.save_pretrained(tmp_path / "bundle")
    again = Nicheformer.from_pretrained(tmp_path / "bundle", mixed.adata.copy())
    np.testing.assert_array_equal(again.predict(), mixed.predict())
    again.release()


def test_a_new_network_that_learns_labels_at_once_learns_means_first(cells):
    Nicheformer.setup_anndata(cells, labels_key="bulk_labels", assay="CosMx")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fewer than", category=UserWarning)
        torch.manual_seed(0)
        model = Nicheformer(cells, **SMALL)
        model.fine_tune(max_epochs=1, trainable="all", log_every_n_steps=1, **QUIET)
    assert len(model.module.gene_means[TECHNOLOGIES.index("cosmx")].unique()) > 20
    assert set(model.predict()) <= set(cells.obs["bulk_labels"])
    model.release()


def test_a_random_twin_ranks_genes_and_reads_assays_as_the_model_does(mixed, cells):
    twin = random_twin(mixed, cells.copy(), seed=1)
    assert torch.equal(twin.module.gene_means, mixed.module.gene_means)
    assert not torch.equal(twin.module.embedder.tokens.weight, mixed.module.embedder.tokens.weight)
    assert (twin.adata.obs["_scvi_context"] == mixed.adata.obs["_scvi_context"]).all()
    twin.release()


def test_hidden_genes_are_compared_with_what_is_known_without_biology_by_technology(mixed):
    table = masked_prediction(mixed, mask_shares=(0.2,), seeds=2, progress=False)
    known = {"model", "uniform", "token_frequency", "gene_at_rank"}
    assert set(table.loc[table["metric"] == "accuracy", "method"]) == known
    losses = table[table["metric"] == "cross_entropy"].set_index("method")["value"]
    assert set(losses.index) == known | {"gene_at_rank_not_in_sight"}
    assert losses["uniform"] == pytest.approx(np.log(mixed.module.n_genes), rel=1e-4)
    assert losses["gene_at_rank_not_in_sight"] < losses["gene_at_rank"] < losses["uniform"] < losses["model"]


def test_stability_of_a_panel_is_measured_beside_a_pca_with_the_assays_of_the_cells(mixed):
    table = stability(mixed, depths=(0.5,), gene_dropouts=(0.2,), seeds=1, progress=False)
    assert {"model", "pca"} <= {name.lower() for name in table["method"]}
    assert np.isfinite(table["value"] if "value" in table else table.select_dtypes("number")).all(axis=None)


def test_bfloat16_is_close(mixed):
    exact, half = (mixed.get_latent_representation(precision=p) for p in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - half).max() < 0.2
