"""The transformer of MultiomeCLIP against numbers of scCLIP; every test here is a `test_against_scclip`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

from cellprior.model.data._counts import csr_tensor
from cellprior.model.multiomeclip._checkpoint import rename
from cellprior.model.multiomeclip._loss import infonce
from cellprior.model.multiomeclip._metrics import foscttm, matching_score
from cellprior.model.multiomeclip._module import MultiomeCLIPModule

from .scclip_golden import DATA, Golden

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["a", "b", "overpad"])
def case(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


def embeddings(module: MultiomeCLIPModule, case: Golden) -> dict[str, torch.Tensor]:
    return {name: module.encoder_of(name)(x) for name, x in case.inputs.items()}


@pytest.mark.parametrize("name", ["a", "overpad"])
@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_against_scclip_every_activation_on_the_way(name, modality):
    case = Golden.load(name)
    encoder = case.module().encoder_of(modality)
    expected = case.group("io")
    n_cells = len(expected[f"{modality}.embeddings"])
    with torch.no_grad():
        hidden = encoder.embed(case.inputs[modality][:n_cells])
        tokens = hidden - encoder.positions
        np.testing.assert_allclose(tokens[:, 1:], expected[f"{modality}.patch_embeddings"], **TOLERANCE)
        np.testing.assert_allclose(hidden, expected[f"{modality}.embeddings"], **TOLERANCE)
        for i, layer in enumerate(encoder.encoder):
            hidden = layer(hidden)
            np.testing.assert_allclose(hidden, expected[f"{modality}.hidden_states.{i + 1}"], **TOLERANCE)
        np.testing.assert_allclose(
            encoder.norm(hidden), expected[f"{modality}.last_hidden_state"], **TOLERANCE
        )
        np.testing.assert_allclose(encoder.pool(hidden), expected[f"{modality}.pooler_output"], **TOLERANCE)


def test_against_scclip_embeddings_scores_and_loss(case):
    module = case.module()
    with torch.no_grad():
        out = module(case.inputs)
        for name in ("rna", "atac"):
            unit = torch.nn.functional.normalize(out[name], dim=1)
            np.testing.assert_allclose(unit, case[f"io/{name}_embeds"], **TOLERANCE)
        scores = module.scores(out["rna"], out["atac"])
    np.testing.assert_allclose(scores, case["io/logits_per_atac"], **TOLERANCE)
    np.testing.assert_allclose(out["loss"], case["io/loss"].item(), **TOLERANCE)


@pytest.mark.parametrize("micro_batch_size", [None, 5], ids=["at once", "5 cells at a time"])
def test_against_scclip_gradients(case, micro_batch_size):
    module = case.module()
    module(case.inputs, micro_batch_size=micro_batch_size)["loss"].backward()
    expected = rename(case.group("grads"), "golden")
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(expected) >= 20 and expected.keys() <= found.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["a", "b"])
def test_against_scclip_twelve_steps_of_adamw(name):
    case = Golden.load(name)
    module = case.module()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.05)  # the original decays everything
    losses, norms = [], []
    for lr in case["train/lrs"].tolist():
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = module(case.inputs)["loss"]
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 5.0)))
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, case["train/losses"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(norms, case["train/grad_norms"], rtol=1e-3)
    with torch.no_grad():
        out = module(case.inputs)
        for modality in ("rna", "atac"):
            unit = torch.nn.functional.normalize(out[modality], dim=1)
            np.testing.assert_allclose(unit, case[f"after/{modality}_embeds"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(out["loss"], case["after/loss"].item(), rtol=0, atol=1e-3)


def test_against_scclip_the_metrics_by_their_right_definitions(case):
    scores = case["io/logits_per_atac"]
    expected = case.group("metrics")
    assert foscttm(scores) == pytest.approx(float(expected["foscttm_atac_to_rna"]), abs=1e-9)
    assert foscttm(scores.T) == pytest.approx(float(expected["foscttm_rna_to_atac"]), abs=1e-9)
    assert matching_score(scores) == pytest.approx(float(expected["softmatch_atac_to_rna"]), abs=1e-6)
    assert matching_score(scores.T) == pytest.approx(float(expected["softmatch_rna_to_atac"]), abs=1e-6)


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_against_scclip_what_enters_the_encoders(layout):
    with np.load(DATA / "scclip_preprocess.npz") as file:
        arrays = dict(file)
    kept = np.isin(arrays["genes"], arrays["kept"])  # the original's genes are our vocabulary
    counts = {
        "rna": sp.csr_matrix(arrays["counts/rna"][:, kept]),
        "atac": sp.csr_matrix(arrays["counts/atac"]),
    }
    module = MultiomeCLIPModule(
        int(kept.sum()), 90, encoder="vit", n_hidden=8, n_heads=1, n_layers=1, n_patches=(4, 4)
    )
    for name, x in counts.items():
        encoder = module.encoder_of(name)
        tensor = csr_tensor(x) if layout == "sparse" else torch.from_numpy(x.toarray())
        np.testing.assert_allclose(encoder.inputs(tensor), arrays[f"log/{name}"], **TOLERANCE)
        encoder.fit(x, seed=0)
        np.testing.assert_allclose(encoder.inputs(tensor), arrays[f"scaled/{name}"], **TOLERANCE)


def test_against_scclip_without_normalisation(golden):
    folder = golden / "scclip"
    config = json.loads((folder / "tiny_nonorm.json").read_text())
    names = ("state_dict", "io", "grads")
    arrays = {
        f"{name}/{key.removeprefix('grad.')}": tensor.numpy()
        for name in names
        for key, tensor in load_file(folder / f"tiny_nonorm.{name}.safetensors").items()
    }
    heads, learned = np.asarray(config["vit"]["num_attention_heads"]), np.asarray(False)
    case = Golden(arrays | {"config/n_heads": heads, "config/learn_scale": learned})
    module = case.module()
    found = embeddings(module, case)
    for name, latent in found.items():
        np.testing.assert_allclose(latent.detach(), case[f"io/{name}_embeds"], **TOLERANCE)
    scores = module.logit_scale.exp() * found["atac"] @ found["rna"].T
    np.testing.assert_allclose(scores.detach(), case["io/logits_per_atac"], **TOLERANCE)
    infonce(scores).backward()
    for name, gradient in rename(case.group("grads"), "golden").items():
        np.testing.assert_allclose(
            module.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5, err_msg=name
        )
    assert foscttm(scores) == pytest.approx(config["correct_metrics"]["foscttm_atac_to_rna"], abs=1e-9)
