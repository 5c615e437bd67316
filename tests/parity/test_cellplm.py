"""CellPLM against numbers of the original; every test here is a `test_against_cellplm`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cellprior.model import CellPLM
from cellprior.model.cellplm._checkpoint import network, rename
from cellprior.model.cellplm._loss import reconstruction_loss
from cellprior.model.cellplm._module import CellPLMModule, GMVAELatent, VAELatent

from .cellplm_golden import DATA, Golden

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["vae", "gmvae"])
def golden_case(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


def module_of(case: Golden) -> CellPLMModule:
    tensors = rename(case.tensors, "golden")
    module = CellPLMModule(60, **network(case.config, tensors))
    module.load_state_dict(tensors)
    return module.eval()


def attach(case: Golden, folder: Path, batch_key: str | None) -> CellPLM:
    adata = case.adata
    CellPLM.setup_anndata(adata, batch_key=batch_key)
    return CellPLM.from_pretrained(case.write(folder), adata)


@pytest.mark.filterwarnings(
    "ignore:Category 0 in adata.obs:UserWarning"
)  # a sentence of one cell is the point
def test_against_cellplm_with_interleaved_batches_and_a_one_cell_sentence(tmp_path):
    case = Golden.load("vae")
    model = attach(case, tmp_path, "batch")
    for batch_size in (1, 7, None):
        latent = model.get_latent_representation(batch_size=batch_size)
        np.testing.assert_allclose(latent, case["embedding_bs0"], **TOLERANCE)


@pytest.mark.filterwarnings("ignore:Category .* in adata.obs:UserWarning")
def test_against_cellplm_where_the_original_makes_each_chunk_a_sentence(tmp_path):
    case = Golden.load("vae")
    adata = case.adata
    # chunks of 7 of each batch, in the original's order, as batches of their own
    names = np.empty(adata.n_obs, dtype=object)
    order = case["bs7__processing_order"]
    for name in np.unique(adata.obs["batch"]):
        cells = order[adata.obs["batch"].to_numpy()[order] == name]
        for start in range(0, len(cells), 7):
            names[cells[start : start + 7]] = f"{name}/{start}"
    adata.obs["chunk"] = names
    CellPLM.setup_anndata(adata, batch_key="chunk")
    model = CellPLM.from_pretrained(case.write(tmp_path), adata)
    np.testing.assert_allclose(model.get_latent_representation(), case["embedding_bs7"], **TOLERANCE)


def test_against_cellplm_vae_as_one_sentence(tmp_path):
    case = Golden.load("vae")
    model = attach(case, tmp_path, None)
    np.testing.assert_allclose(model.get_latent_representation(), case["one_sentence__vae_mu"], **TOLERANCE)


@pytest.mark.parametrize("mixture", ["expected", "argmax"])
def test_against_cellplm_gmvae_component_means(tmp_path, mixture):
    case = Golden.load("gmvae")
    model = attach(case, tmp_path, None)
    for batch_size in (1, 7, None):
        latent = model.get_latent_representation(mixture=mixture, batch_size=batch_size)
        np.testing.assert_allclose(latent, case[f"one_sentence__gmvae_mean_{mixture}"], **TOLERANCE)


@pytest.mark.parametrize("chunks", [0, 7])
def test_against_cellplm_gmvae_with_the_components_it_drew(chunks):
    case = Golden.load("gmvae")
    module = module_of(case)
    order = case[f"bs{chunks}__processing_order"]
    batch = case.arrays["batch"][order]
    gene_index, counts = columns(case)
    z = torch.empty(len(order), 16)
    with torch.inference_mode():
        for name in np.unique(batch):
            cells = np.flatnonzero(batch == name)
            for start in range(0, len(cells), chunks or len(cells)):
                rows = cells[start : start + (chunks or len(cells))]
                (hidden,) = module.hidden_chunks([counts[order[rows]]], gene_index=gene_index)
                drawn = torch.from_numpy(case[f"bs{chunks}__gmvae_y"][rows])
                z[order[rows]] = module.latent.mean_given(hidden, drawn)
    np.testing.assert_allclose(z, case[f"embedding_bs{chunks}"], **TOLERANCE)


def test_sampled_components_are_seeded_and_do_not_depend_on_the_batch_size(tmp_path):
    model = attach(Golden.load("gmvae"), tmp_path, None)
    drawn = []
    for batch_size in (7, None, None):
        torch.manual_seed(len(drawn) // 2)  # 0, 0, 1
        drawn.append(model.get_latent_representation(mixture="sampled", batch_size=batch_size))
    np.testing.assert_allclose(drawn[0], drawn[1], **TOLERANCE)
    assert np.abs(drawn[1] - drawn[2]).max() > 0.01


def columns(case: Golden) -> tuple[torch.Tensor, torch.Tensor]:
    """Vocabulary rows of the matched genes, and their counts."""
    row = {gene: i for i, gene in enumerate(case.config["gene_list"])}
    matched = [j for j, name in enumerate(case.arrays["var_names"]) if name in row]
    index = torch.tensor([row[case.arrays["var_names"][j]] for j in matched])
    return index, torch.from_numpy(case.arrays["counts"][:, matched])


def test_against_cellplm_decoder_means(golden_case):
    module = module_of(golden_case)
    z, batch, dataset = (
        torch.from_numpy(golden_case[f"dec_{name}"]) for name in ("in_z", "batch", "dataset")
    )
    with torch.inference_mode():
        mean, dispersion = module.decode(z, batch=batch, dataset=dataset)
        averaged, _ = module.decode(z)
    np.testing.assert_allclose(mean, golden_case["dec_mean_with_cov"], rtol=1e-5)
    np.testing.assert_allclose(averaged, golden_case["dec_mean_no_cov"], rtol=1e-5)
    np.testing.assert_allclose(dispersion, golden_case["dec_disp"].ravel(), rtol=1e-5)


def test_against_cellplm_one_pretraining_step_with_its_gradients(golden_case, monkeypatch):
    module = module_of(golden_case).train()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    monkeypatch.setattr(torch, "randn_like", lambda x: golden_case.step("noise"))
    if golden_case.latent == "gmvae":
        monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: golden_case.step("U"))
    values = golden_case.step_values
    losses = module.pretraining_loss(
        golden_case.step("x"),
        golden_case.step("input_mask").bool(),
        batch=golden_case.step("batch"),
        dataset=golden_case.step("dataset"),
        kl_weight=values["kl_weight_before"] or 1.0,
    )
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(values["loss"], rel=1e-5)
    assert losses["latent"].item() == pytest.approx(values["latent_loss"], rel=1e-5)
    assert losses["reconstruction"].item() == pytest.approx(values["target_loss"], rel=1e-5)
    ours = dict(module.named_parameters())
    theirs = {
        name: torch.tensor(np.nan if norm is None else norm) for name, norm in values["grad_l2"].items()
    }
    for name, norm in rename(theirs, "golden").items():
        grad = ours[name].grad
        if norm.isnan():
            assert grad is None, name
        else:
            assert grad.norm().item() == pytest.approx(norm.item(), rel=1e-5, abs=1e-6), name


@pytest.fixture
def terms() -> dict[str, np.ndarray]:
    with np.load(DATA / "cellplm_losses.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("denoise", "name"), [(True, "nb_recon_train_dae"), (False, "nb_recon_eval")])
def test_against_cellplm_reconstruction_loss(terms, denoise, name):
    x, mean, dispersion, mask = (
        torch.from_numpy(terms[f"nb_{key}"]) for key in ("x", "mean", "disp", "input_mask")
    )
    rows = mask.bool().any(1)  # the fixture has a dispersion per cell, which only these rows need
    loss = reconstruction_loss(x[rows], mean[rows], dispersion[rows], mask.bool()[rows], denoise=denoise)
    assert loss.item() == pytest.approx(json.loads(str(terms["values"]))[name], rel=1e-5)


def test_against_cellplm_fine_tuning_for_imputation(terms):
    columns = torch.from_numpy(terms["imp_input_gene_index"])
    mean, dispersion = (torch.from_numpy(terms[name])[:, columns] for name in ("imp_mean", "imp_disp"))
    measured = torch.from_numpy(terms["imp_gene_mask"]).bool()
    x = torch.from_numpy(terms["nb_x"])[:, measured]
    loss = reconstruction_loss(x, mean[:, measured], dispersion[:, measured])
    assert loss.item() == pytest.approx(json.loads(str(terms["values"]))["nb_imputation"], rel=1e-5)
    scaled = mean * (x.sum(1) / mean[:, measured].sum(1))[:, None]
    np.testing.assert_allclose(scaled, terms["imp_pred"], rtol=1e-5)


def test_reconstruction_loss_is_the_negative_binomial_of_scipy():
    from scipy.stats import nbinom

    rng = np.random.default_rng(0)
    x, mean, dispersion = rng.poisson(1, (5, 40)), rng.gamma(2, 2, (5, 40)), rng.gamma(2, 1, 40)
    mask = rng.random((5, 40)) < 0.3
    mask[3] = False  # context only

    def loss(keep: np.ndarray) -> float:
        total = 0.0
        for i in (0, 1, 2, 4):
            scaled = mean[i] * x[i, keep[i]].sum() / mean[i, keep[i]].sum()
            total -= nbinom.logpmf(x[i], dispersion, dispersion / (dispersion + scaled))[keep[i]].sum()
        return total / 4

    tensors = (torch.tensor(a, dtype=torch.float64) for a in (x, mean, dispersion))
    ours = reconstruction_loss(*tensors, torch.tensor(mask))
    assert ours.item() == pytest.approx(loss(np.ones_like(mask)) + loss(mask), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_against_cellplm_vae_latent(terms, monkeypatch, weight):
    latent = VAELatent(12, 6)
    names = {"hid_2mu": "mu", "hid_2sigma": "log_var"}
    latent.load_state_dict(
        {f"{names[k.split('__')[1].split('.')[0]]}.{k.split('.')[1]}": torch.from_numpy(v)
         for k, v in terms.items() if k.startswith("vae__")}
    )  # fmt: skip
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.from_numpy(terms["vae_eps"]))
    z, kl = latent.sample(torch.from_numpy(terms["vae_h"]), kl_weight=weight)
    np.testing.assert_allclose(z.detach(), terms["vae_z_train"], **TOLERANCE)
    assert kl.item() == pytest.approx(
        json.loads(str(terms["values"]))[f"vae_kl_at_weight_{weight}"], rel=1e-5
    )


@pytest.mark.parametrize("free_nats", [5.0, 0.5])
def test_against_cellplm_gmvae_latent(terms, monkeypatch, free_nats):
    names = {
        "inference_qyx.0.logits": "logits", "inference_qzyx.0": "joint", "inference_qzyx.2.mu": "mu",
        "inference_qzyx.2.var": "var", "y_mu": "prior_mu", "y_var": "prior_var",
    }  # fmt: skip
    latent = GMVAELatent(12, 6, 5)
    state = {}
    for key, array in terms.items():
        if key.startswith("gmvae__inference."):
            theirs, kind = key.removeprefix("gmvae__inference.").rsplit(".", 1)
            state[f"{names[theirs]}.{kind}"] = torch.from_numpy(array)
    latent.load_state_dict(state)
    latent.FREE_NATS = free_nats
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.from_numpy(terms["gmvae_noise"]))
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.from_numpy(terms["gmvae_U"]))
    z, loss = latent.sample(torch.from_numpy(terms["gmvae_h"]), kl_weight=1.0)
    np.testing.assert_allclose(z.detach(), terms["gmvae_z_train"], **TOLERANCE)
    name = f"gmvae_loss_lamda{free_nats:g}"
    assert loss.item() == pytest.approx(json.loads(str(terms["values"]))[name], rel=1e-5)


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("latent", ["vae", "gmvae"])
def test_against_cellplm_with_the_shapes_of_the_released_models(golden, mirror, size, latent):
    import importlib.util

    import anndata as ad

    folder = golden / "cellplm" / "caseC_85M_shape"
    spec = importlib.util.spec_from_file_location("recipe_weights", folder / "recipe_weights.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    case = json.loads((folder / f"{size}_{latent}.json").read_text())
    outputs = np.load(folder / f"{size}_{latent}.outputs.npz")
    tensors = {
        name: torch.zeros(1) if "pe_enc" in name else torch.from_numpy(recipe.make_tensor(name, tuple(shape)))
        for name, shape in case["state_dict"].items()
    }
    vocabulary = case["gene_list"]
    if isinstance(vocabulary, str):
        vocabulary = json.loads((mirror / "20230926_85M.config.json").read_text())["gene_list"]
    tensors = rename(tensors, "recipe")
    module = CellPLMModule(len(vocabulary), **network(case["config"], tensors))
    module.load_state_dict(tensors)
    module.eval()

    adata = ad.read_h5ad(folder / f"{size}_{latent}.counts.h5ad")
    row = {gene: i for i, gene in enumerate(vocabulary)}
    matched = [j for j, name in enumerate(adata.var_names) if name in row]
    gene_index = torch.tensor([row[adata.var_names[j]] for j in matched])
    counts = torch.from_numpy(adata.X[:, matched].toarray().astype(np.float32))
    expected = {"expected": "gmvae_mean_expected", "argmax": "gmvae_mean_argmax"}
    with torch.inference_mode():
        for mixture, name in expected.items() if latent == "gmvae" else [("expected", "embedding")]:
            chunks = module.encode_chunks(counts.split(5), gene_index=gene_index, mixture=mixture)
            np.testing.assert_allclose(torch.cat(list(chunks)), outputs[name], **TOLERANCE)
        z = torch.from_numpy(outputs["embedding" if latent == "vae" else "gmvae_mean_argmax"])
        mean, dispersion = module.decode(z)
    columns = outputs["dec_gene_index"]
    np.testing.assert_allclose(mean[:, columns], outputs["dec_mean_no_cov"], rtol=1e-5)
    np.testing.assert_allclose(dispersion[columns], outputs["dec_disp"], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Category 0 in adata.obs:UserWarning")
def test_against_cellplm_imputation(tmp_path):
    case = Golden.load("vae")
    imputed = attach(case, tmp_path, "batch").impute(case.arrays["imputed_genes"], covariates="mean")
    np.testing.assert_allclose(imputed, case["imputed"], **TOLERANCE)
