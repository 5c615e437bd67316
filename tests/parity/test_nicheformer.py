"""Nicheformer against numbers of the original; every test here is a `test_against_nicheformer`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cellprior.model import Nicheformer, convert
from cellprior.model.data._counts import read_rows
from cellprior.model.data._minibatches import csr_tensor
from cellprior.model.nicheformer._checkpoint import rename
from cellprior.model.nicheformer._inputs import PAD, rank_tokens
from cellprior.model.nicheformer._vocabulary import names_of, read_means, read_reference, shipped

from .nicheformer_golden import KEYS, Golden

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def case() -> Golden:
    return Golden()


@pytest.fixture
def module(case: Golden, tmp_path: Path):
    return case.module(tmp_path / "official")


def padded(tokens: torch.Tensor) -> torch.Tensor:
    return F.pad(tokens, (0, 96 - tokens.shape[1]), value=PAD)


@pytest.mark.parametrize("gene_scale", ["clean", "rounded"])
def test_against_nicheformer_tokens_exactly(case, module, gene_scale):
    expected = case.with_context(case[f"tokens_{gene_scale}"])
    for counts in (case.counts, csr_tensor(read_rows(case.counts.numpy(), np.arange(24)))):
        tokens = module.tokens(counts, context=case.context, gene_scale=gene_scale)
        assert torch.equal(padded(tokens), expected)
    if gene_scale == "clean":
        assert torch.equal(expected, case["input_ids_clean"])
    else:  # the order of ties is not that of a stable sort
        order = torch.sort(expected[:, 3:], stable=True).indices
        assert not torch.equal(order, torch.arange(93).expand_as(order))
        clean = rank_tokens(case.counts, (module.gene_means + 0.5).floor(), case.context, n_positions=96)
        assert (padded(clean) != expected).sum() > 300


def test_against_nicheformer_tokens_of_the_hub_which_divides_by_no_means(case, module):
    no_means = torch.zeros_like(module.gene_means)
    tokens = rank_tokens(case.counts, no_means, case.context, n_positions=96, gene_scale="rounded")
    assert torch.equal(padded(tokens), case["hub_input_ids"])


def test_against_nicheformer_genes_that_nobody_measured_are_in_no_cell(case, module):
    """The original's notebook puts every gene with a mean of NaN behind the genes of every cell."""
    nan = 30 + torch.isnan(case["mean/dissociated"]).nonzero()[:, 0]
    theirs, ours = case["tokens_asis"], case["tokens_clean"]
    has_mean = ~torch.isin(torch.arange(30, 296), nan)
    n_expressed = (case.counts[:, has_mean] != 0).sum(1)
    assert len(nan) == 6
    assert torch.equal(torch.isin(theirs, nan).sum(1), (96 - n_expressed).clamp(0, 6))
    assert torch.equal(torch.isin(ours, nan).sum(1), (case.counts[:, ~has_mean] != 0).sum(1))
    for their_cell, our_cell in zip(theirs, ours, strict=True):
        other = [cell[(cell != 0) & ~torch.isin(cell, nan)] for cell in (their_cell, our_cell)]
        n = min(map(len, other))
        assert torch.equal(other[0][:n], other[1][:n])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("emb_clean_layer-1", {}),
        ("emb_clean_layer-1_context", {"with_context": True}),
        ("emb_clean_layer0", {"layer": 0}),
        ("emb_clean_layer0_context", {"layer": 0, "with_context": True}),
        ("emb_rounded_layer-1", {"gene_scale": "rounded"}),
    ],
)
@torch.inference_mode()
def test_against_nicheformer_cells(case, module, name, options):
    found = module.encode(case.counts, context=case.context, **options)
    np.testing.assert_allclose(found, case[name], **TOLERANCE)


@torch.inference_mode()
def test_against_nicheformer_cells_from_the_tokens_of_its_notebook_and_of_the_hub(case, module):
    asis = case.with_context(case["tokens_asis"])
    np.testing.assert_allclose(module.pool(asis), case["emb_asis_layer-1"], **TOLERANCE)
    np.testing.assert_allclose(module.pool(case["hub_input_ids"]), case["emb_hub_layer-1"], **TOLERANCE)


@torch.inference_mode()
def test_against_nicheformer_hidden_states_of_every_layer_those_of_padding_too(case, module):
    tokens = case["input_ids_clean"][:2]
    assert (tokens == PAD).any(1).all()
    for layer in range(len(module.encoder)):
        found = module.states(tokens, layer=layer, padding=True)
        np.testing.assert_allclose(found, case["hidden_states"][layer + 1], **TOLERANCE)
        ours = module.states(tokens, layer=layer)
        np.testing.assert_allclose(ours[tokens != PAD], found[tokens != PAD], rtol=0, atol=1e-6)
        assert not ours[tokens == PAD].any()


@torch.inference_mode()
def test_against_nicheformer_the_mean_over_genes_is_that_of_its_states(case, module):
    tokens = case["input_ids_clean"][:2]
    for with_context in (False, True):
        part = (tokens != PAD) & (with_context | (tokens >= 30))
        expected = torch.stack([h[p].mean(0) for h, p in zip(case["hidden_states"][-1], part, strict=True)])
        found = module.pool(tokens, "genes", with_context=with_context)
        np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_against_nicheformer_masked_loss_and_its_gradients(case, module):
    shown, target = case["mlm_masked"], case["mlm_targets"]
    selected = target != -100
    logits = module.predict_genes(module.states(shown)[selected])
    loss = F.cross_entropy(logits, target[selected])
    assert loss.item() == pytest.approx(float(case.arrays["mlm_loss"]), rel=5e-6)
    np.testing.assert_allclose(logits[::6].detach(), case["mlm_logits_at_targets"], rtol=1e-5, atol=2e-5)
    loss.backward()
    ours = {name: p.grad for name, p in module.named_parameters()}
    theirs = dict(
        zip(case.arrays["mlm_grad_names"].tolist(), case.arrays["mlm_grad_l2"].tolist(), strict=True)
    )
    seen = set()
    for name, norm in theirs.items():
        # three projections of ours are one of theirs
        parts = rename({name: torch.zeros(3, 2)}, "golden", n_tokens=296)
        found = torch.stack([ours[part].norm() for part in parts]).norm().item()
        assert found == pytest.approx(norm, rel=1e-4, abs=1e-6), name
        seen |= parts.keys()
    assert seen == ours.keys()
    for i in range(3):  # which the softmax does not see
        assert ours[f"encoder.{i}.key.bias"].norm().item() == pytest.approx(0.0, abs=1e-6)
    assert not ours["embedder.tokens.weight"][PAD].any()


def test_against_nicheformer_from_its_files_and_columns_to_the_embedding(case, tmp_path):
    case.write(tmp_path / "hub")
    convert(case.write_lightning(tmp_path / "lightning"), tmp_path / "bundle", trust=True)
    for weights in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors", tmp_path / "bundle"):
        adata = case.adata()
        Nicheformer.setup_anndata(adata, **KEYS)
        model = Nicheformer.from_pretrained(weights, adata)
        np.testing.assert_allclose(model.get_latent_representation(), case["emb_clean_layer-1"], **TOLERANCE)
        model.release()


def test_against_nicheformer_a_checkpoint_that_lightning_wrote(case, golden, tmp_path):
    for path in (golden / "nicheformer" / "caseA").iterdir():
        if path.suffix in (".ckpt", ".npy", ".h5ad"):
            (tmp_path / path.name).symlink_to(path)
    convert(tmp_path / "nicheformer.ckpt", tmp_path / "bundle", trust=True)
    adata = case.adata()
    Nicheformer.setup_anndata(adata, **KEYS)
    model = Nicheformer.from_pretrained(tmp_path / "bundle", adata)
    np.testing.assert_allclose(model.get_latent_representation(), case["emb_clean_layer-1"], **TOLERANCE)
    model.release()


def test_against_nicheformer_the_vocabulary_in_the_package_is_the_authors(mirror):
    ours = shipped()
    assert names_of(ours.genes) == read_reference(mirror / "nicheformer_model.h5ad")
    means, files = read_means(mirror, 20_310)
    assert len(files) == 5
    np.testing.assert_array_equal(ours.means, means)
    assert [(row == 0).sum() for row in ours.means] == [60, 14_505, 18_453, 18_575, 19_776]
