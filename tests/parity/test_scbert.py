"""ScBERT against numbers of the original; every test here is a `test_against_scbert`."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from cellprior.model.data._counts import csr_tensor
from cellprior.model.scbert import _module
from cellprior.model.scbert._attention import FavorAttention, orthogonal_features
from cellprior.model.scbert._checkpoint import read_official, rename
from cellprior.model.scbert._inputs import sample_mask
from cellprior.model.scbert._module import ScBERTModule

from .scbert_golden import Golden, load, module_of

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["a", "b"])
def case(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(params=["whole, with gradients", "whole", "in chunks of 32 positions"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The ways through a cell."""
    if request.param.startswith("in chunks"):
        monkeypatch.setattr(_module, "CPU_CHUNK_BYTES", 1)
    with torch.set_grad_enabled(request.param.endswith("gradients")):
        yield


def test_against_scbert_one_cell_at_a_time_however_many_are_given(case, way):
    module = case.module()
    found = module.encode(case.tokens).detach()
    np.testing.assert_allclose(found, case["encodings_b4_one_cell_at_a_time"], **TOLERANCE)
    np.testing.assert_allclose(module.predict_bins(found)[:1].detach(), case["logits_b1"], **TOLERANCE)


def test_against_scbert_with_the_keys_maximum_over_the_batch(case, way):
    module = case.module(key_max="batch")
    found = module.encode(case.tokens).detach()
    np.testing.assert_allclose(found[:, :: case.stored_step], case["encodings_b4"], **TOLERANCE)
    np.testing.assert_allclose(module.predict_bins(found).detach(), case["logits_b4"], **TOLERANCE)


def test_cells_of_a_batch_change_each_other_in_the_original_and_not_here(case):
    alone = case["encodings_b4_one_cell_at_a_time"][:, :: case.stored_step]
    assert (alone - case["encodings_b4"]).abs().max() > 5e-5
    module = case.module()
    with torch.inference_mode():
        together, shuffled = module.pool(case.tokens), module.pool(case.tokens[[2, 0, 3, 1]])
        single = torch.cat([module.pool(case.tokens[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, single, rtol=0, atol=1e-6)
    np.testing.assert_allclose(shuffled, single[[2, 0, 3, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "expressed"])
def test_against_scbert_pooled(case, way, pooling):
    encodings = case["encodings_b4_one_cell_at_a_time"]
    genes, expressed = encodings[:, :-1], case.tokens[:, :, None] > 0
    pooled = {
        "mean": genes.mean(1),
        "cls": encodings[:, -1],
        "expressed": (genes * expressed).sum(1) / expressed.sum(1),
    }
    found = case.module().pool(case.tokens, pooling)
    np.testing.assert_allclose(found.detach(), pooled[pooling], **TOLERANCE)


@pytest.fixture
def kernel() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in load("kernel").items()}


@pytest.fixture
def attention(kernel: dict[str, Tensor]) -> FavorAttention:
    """An attention whose queries, keys and values are three thirds of its input, and whose output is what it read."""
    favor = FavorAttention(72, n_heads=3, head_dim=8, n_features=16)
    favor.projection.copy_(kernel["projection"])
    identity = torch.eye(72)
    with torch.no_grad():
        for i, linear in enumerate((favor.query, favor.key, favor.value)):
            linear.weight.copy_(identity[24 * i : 24 * (i + 1)])
        favor.out.weight.copy_(identity[:, :24])
        favor.out.bias.zero_()
    return favor


def thirds(kernel: dict[str, Tensor]) -> Tensor:
    """Input ``(2, 17, 72)`` for ``attention``."""
    return torch.cat([kernel[name].transpose(1, 2).flatten(2) for name in "qkv"], dim=2)


@torch.no_grad()
def test_against_scbert_kernel(kernel, attention):
    x = thirds(kernel)
    keys = attention.reduce([(x, None)], "batch")
    read = attention(x, keys)[..., :24].unflatten(2, (3, 8)).transpose(1, 2)
    np.testing.assert_allclose(read, kernel["out"], **TOLERANCE)

    def as_theirs(features: Tensor, eps: float) -> Tensor:
        return (features.unflatten(0, (-1, 3)).transpose(2, 3) + eps) * 16**-0.5

    np.testing.assert_allclose(as_theirs(attention._query_kernel(x), 1e-4), kernel["q_prime"], **TOLERANCE)
    np.testing.assert_allclose(as_theirs(attention._key_kernel(x, keys), 0), kernel["k_prime"], **TOLERANCE)
    alone = attention.reduce([(x[:1], None)], "cell")
    np.testing.assert_allclose(
        as_theirs(attention._key_kernel(x[:1], alone), 0), kernel["k_prime_item0_alone"], **TOLERANCE
    )


def test_against_scbert_orthogonal_features(kernel):
    names = [name for name in kernel if name.startswith("ortho")]
    assert len(names) == 4
    for name in names:
        n_features, dim, seed = (int("".join(filter(str.isdigit, part))) for part in name.split("_")[1:])
        found = orthogonal_features(n_features, dim, torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(found, kernel[name], **TOLERANCE)


def test_against_scbert_redrawn_features():
    case = Golden.load("a")
    module = case.module()
    module.redraw_projections(torch.Generator().manual_seed(9))
    for i, layer in enumerate(module.encoder):
        redrawn = case.arrays[f"redraw/layer{i}"]
        np.testing.assert_allclose(layer.attention.projection, redrawn, **TOLERANCE)


@torch.no_grad()
def test_the_attention_map_of_scbert_is_ours_taken_from_the_wrong_input():
    case = Golden.load("a")
    module = case.module()
    x = module.embedder(case.tokens[:1])
    everything = torch.arange(61)
    maps = []
    for layer in module.encoder:
        chunk = module._chunk(x, torch.float32)
        too_late = x + layer.attention(layer.norm1(x), layer._keys(x, None, chunk))
        maps.append(layer.attention_map(too_late, everything, chunk))
        x = layer(x, None, chunk)
    theirs = case["attn_b1"].float()
    np.testing.assert_allclose(torch.stack(maps).mean(0), theirs, atol=5e-5)  # theirs is float16
    ours = module.attention(case.tokens[:1], genes=everything)
    assert (ours - theirs).abs().max() > 1e-3


def test_against_scbert_preprocessing_tokens_exactly():
    arrays = load("preprocess")
    row = {gene: i for i, gene in enumerate(arrays["vocabulary"])}
    known = [j for j, name in enumerate(arrays["var_names"]) if name in row]
    gene_index = torch.tensor([row[arrays["var_names"][j]] for j in known])
    counts = arrays["counts"][:, known].astype(np.float32)
    module = ScBERTModule(len(row), n_hidden=8, n_layers=1, n_heads=1, head_dim=8)
    for x in (torch.from_numpy(counts), csr_tensor(sp.csr_matrix(counts))):
        np.testing.assert_array_equal(module.tokens(x, gene_index=gene_index), arrays["tokens"][:, :-1])


@pytest.mark.parametrize("name", ["a", "b"])
def test_against_scbert_how_many_genes_are_masked(name):
    case = Golden.load(name)
    tokens, labels = (case.pretraining(f"{what}_{name.upper()}") for what in ("tokens", "labels"))
    selected = (labels != 6).sum(1)
    mask = sample_mask(tokens.numpy(), np.random.default_rng(0))
    np.testing.assert_array_equal(mask.selected.sum(1), selected)


def test_against_scbert_one_pretraining_step_with_its_gradients():
    case = Golden.load("a")
    module = case.module(key_max="batch").train()
    masked, labels = (case.pretraining(f"{what}_A") for what in ("masked", "labels"))
    logits = module.predict_bins(module.encode(masked[:, :-1]))
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=6)
    loss.backward()
    np.testing.assert_allclose(logits.detach(), case.pretraining("train_logits_A"), **TOLERANCE)
    assert loss.item() == pytest.approx(float(case.arrays["pretrain/loss"]), rel=1e-5)
    names = [name for name in case.arrays if name.startswith("pretrain/grad.")]
    theirs = {name.removeprefix("pretrain/grad."): torch.from_numpy(case.arrays[name]) for name in names}
    ours = dict(module.named_parameters())
    assert len(theirs) == len(names) > 20
    for name, gradient in rename(theirs, "golden").items():
        np.testing.assert_allclose(ours[name].grad, gradient, err_msg=name, **TOLERANCE)


def test_against_scbert_fine_tuned_classifier_and_its_gradients(golden):
    from safetensors.torch import load_file

    stored = load_file(golden / "scbert" / "finetune" / "finetune.safetensors")
    path = golden / "scbert" / "finetune" / "finetuned_best.pth"
    content = torch.load(path, weights_only=True)["model_state_dict"]
    module = module_of(content)
    tokens = stored["tokens"][:, :-1]
    with torch.inference_mode():
        logits = module.classify(tokens)
    np.testing.assert_allclose(logits, stored["class_logits_one_by_one"], **TOLERANCE)
    np.testing.assert_allclose(logits.softmax(1), stored["probs_one_by_one"], **TOLERANCE)
    together = module_of(content, key_max="batch")
    together.requires_grad_(False)
    for part in [*together.trainable_parts()["original"], together.official_head]:
        part.requires_grad_(True)
    logits = together.classify(tokens)
    np.testing.assert_allclose(logits.detach(), stored["class_logits_b4"], **TOLERANCE)
    F.cross_entropy(logits, stored["labels"]).backward()
    theirs = {name.removeprefix("grad."): value for name, value in stored.items() if name.startswith("grad.")}
    ours = dict(together.named_parameters())
    for name, gradient in rename(theirs, "golden").items():
        np.testing.assert_allclose(ours[name].grad, gradient, err_msg=name, **TOLERANCE)
    trained = {name for name, parameter in ours.items() if parameter.grad is not None}
    assert all(name.startswith(("encoder.0.", "norm.", "official_head.")) for name in trained)


@pytest.mark.parametrize("name", ["a", "b"])
def test_against_scbert_a_released_file_of_any_size(tmp_path, name):
    case = Golden.load(name)
    bundle = read_official(case.write(tmp_path))
    module = ScBERTModule(len(bundle.genes), **bundle.config["network"])
    module.load_state_dict(bundle.state_dict)
    assert module.embedder.gene_vectors.dtype == torch.float64
    with torch.inference_mode():
        encodings = module.eval().encode(case.tokens)
    np.testing.assert_allclose(encodings, case["encodings_b4_one_cell_at_a_time"], **TOLERANCE)


@pytest.mark.parametrize(
    "file", ["case_A/checkpoint.pth", "case_B/checkpoint.pth", "finetune/pretrained_for_finetune.pth"]
)
def test_against_scbert_files_that_the_original_wrote(golden, tmp_path, file):
    original = golden / "scbert" / file
    path = tmp_path / original.name
    path.write_bytes(original.read_bytes())
    n_genes = 200 if "case_B" in file else 60
    (tmp_path / "genes.txt").write_text("\n".join(f"GENE{i}" for i in range(n_genes)))
    bundle = read_official(path)
    module = ScBERTModule(len(bundle.genes), **bundle.config["network"])
    module.load_state_dict(bundle.state_dict)
    assert bundle.genes["symbol"].tolist()[:2] == ["GENE0", "GENE1"]
