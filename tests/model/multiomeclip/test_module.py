from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellprior.model.data._counts import csr_tensor
from cellprior.model.multiomeclip import _module
from cellprior.model.multiomeclip._module import MultiomeCLIPModule, ViTEncoder

VIT = {"encoder": "vit", "n_hidden": 16, "n_heads": 2, "n_layers": 2, "n_mlp": 32, "n_latent": 8}


@pytest.fixture
def counts() -> dict[str, sp.csr_matrix]:
    rng = np.random.default_rng(0)
    return {
        name: sp.csr_matrix(rng.poisson(0.5, (40, n)).astype(np.float32))
        for name, n in (("rna", 30), ("atac", 70))
    }


def fitted(counts: dict[str, sp.csr_matrix], **options) -> MultiomeCLIPModule:
    torch.manual_seed(0)
    module = MultiomeCLIPModule(30, 70, **{"n_components": (8, 12), **options}).eval()
    for name, x in counts.items():
        module.encoder_of(name).fit(x, seed=0)
    return module


def inputs_of(module: MultiomeCLIPModule, counts: dict[str, sp.csr_matrix]) -> dict[str, torch.Tensor]:
    return {name: module.encoder_of(name).inputs(csr_tensor(x)) for name, x in counts.items()}


def test_the_peaks_of_a_cell_are_opened_and_added_up_once(counts, monkeypatch):
    module, calls = fitted(counts), []
    for name in ("open_peaks", "cell_depth"):
        function = getattr(_module, name)
        monkeypatch.setattr(_module, name, lambda x, f=function, name=name: calls.append(name) or f(x))
    module.atac.inputs(csr_tensor(counts["atac"]))
    assert sorted(calls) == ["cell_depth", "open_peaks"]


@pytest.mark.parametrize("options", [{}, VIT], ids=["mlp", "vit"])
def test_latents_have_unit_length_and_a_cell_does_not_see_the_others(counts, options):
    module = fitted(counts, **options)
    for name, x in counts.items():
        with torch.no_grad():
            together = module.embed(name, csr_tensor(x))
            alone = torch.cat([module.embed(name, csr_tensor(x[i])) for i in range(5)])
            dense = module.embed(name, torch.from_numpy(x.toarray()))
        np.testing.assert_allclose(together.norm(dim=1), np.ones(40), rtol=1e-5)
        np.testing.assert_allclose(alone, together[:5], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dense, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, VIT], ids=["mlp", "vit"])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_few_cells_at_a_time_give_the_gradient_of_all_dropout_included(counts, options, kind):
    gradients = []
    for size in (None, 7):
        module = fitted(counts, loss=kind, dropout_rate=0.0, **options).train()
        module(inputs_of(module, counts), micro_batch_size=size)["loss"].backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("kind", "scale", "bias"), [("infonce", 1 / 0.07, None), ("sigmoid", 10.0, -10.0)])
def test_the_scale_starts_where_the_papers_say_and_stops_at_100(kind, scale, bias):
    module = MultiomeCLIPModule(5, 5, loss=kind)
    assert module.logit_scale.exp().item() == pytest.approx(scale, rel=1e-5)
    assert (module.logit_bias is None) == (bias is None)
    first = torch.eye(3)
    expected = torch.eye(3) * scale + (bias or 0.0)
    np.testing.assert_allclose(module.scores(first, first).detach(), expected, rtol=1e-5)
    with torch.no_grad():
        module.logit_scale.fill_(math.log(500.0))
    module.limit_scale()
    assert module.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)


def vit(**options) -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder(
        130,
        4,
        is_atac=True,
        n_patches=128,
        n_hidden=8,
        n_layers=1,
        n_heads=1,
        n_mlp=16,
        dropout_rate=0.0,
        **{"mask_padding": True, **options},
    )


def test_patches_without_a_feature_are_left_out_as_if_masked_in_the_attention():
    trimmed = vit()
    assert (trimmed.patch_size, trimmed.n_used) == (2, 65)
    x = torch.rand(3, 130)
    whole = vit(mask_padding=False)
    whole.load_state_dict(trimmed.state_dict())
    hidden = whole.embed(x)
    layer = whole.encoder[0]
    normed = layer.norm_before(hidden)
    scores = layer.query(normed) @ layer.key(normed).transpose(1, 2) / 8**0.5
    scores[:, :, 66:] = float("-inf")
    hidden = hidden + layer.out(scores.softmax(2) @ layer.value(normed))
    hidden = hidden + layer.down(torch.nn.functional.gelu(layer.up(layer.norm_after(hidden))))
    expected = whole.projection(whole.pool(hidden))
    torch.testing.assert_close(trimmed(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole(x), expected, atol=1e-5)


def test_the_order_of_the_patches_is_that_of_the_genome_if_given():
    order = np.random.default_rng(0).permutation(130)
    ordered, plain = vit(order=order), vit()
    x = torch.rand(2, 130)
    torch.testing.assert_close(ordered(x), plain(x[:, order]))


def test_a_query_is_scaled_by_the_maxima_of_the_training_cells(counts):
    module = fitted(counts, **VIT)
    x = csr_tensor(counts["rna"])
    all_cells = module.rna.inputs(x)
    assert all_cells.max() == pytest.approx(1.0)
    np.testing.assert_allclose(module.rna.inputs(csr_tensor(counts["rna"][:3])), all_cells[:3])


@pytest.mark.parametrize("options", [{"encoder": "cnn"}, {"loss": "triplet"}, VIT | {"n_heads": 3}])
def test_an_unknown_choice_is_refused_with_those_that_there_are(options):
    with pytest.raises(ValueError, match="choose"):
        MultiomeCLIPModule(5, 5, **options)


def test_aligned_modalities_correlate_with_themselves_only_and_weigh_by_how_much_they_do():
    rng = torch.Generator().manual_seed(0)
    shared = torch.randn(500, 3, generator=rng) * torch.tensor([4.0, 2.0, 1.0])
    views = []
    for _ in range(2):
        own = torch.randn(500, 5, generator=rng)
        turn = torch.linalg.qr(torch.randn(8, 8, generator=rng))[0]
        views.append(torch.cat([shared + 0.2 * torch.randn(500, 3, generator=rng), own], dim=1) @ turn + 4.0)
    module = MultiomeCLIPModule(5, 5, n_latent=8)
    module.align(*views)
    rna, atac = (
        (x - module.alignment[name].mean) @ module.alignment[name].axes
        for name, x in zip(("rna", "atac"), views, strict=True)
    )
    cross = np.corrcoef(rna.T, atac.T)[:8, 8:]
    assert np.abs(cross - np.diag(np.diag(cross))).max() < 0.15
    np.testing.assert_allclose(rna.std(0, correction=0), np.diag(cross), atol=1e-3)
    np.testing.assert_allclose(atac.std(0, correction=0), np.diag(cross), atol=1e-3)
    assert np.diag(cross)[:3].min() > 0.9 and np.abs(np.diag(cross)[3:]).max() < 0.25
    one = module.alignment["rna"](views[0][:1])
    assert one.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_the_means_are_those_of_cells_that_were_not_trained_on_if_there_are_any():
    rng = torch.Generator().manual_seed(0)
    seen = torch.randn(200, 4, generator=rng), torch.randn(200, 4, generator=rng)
    unseen = tuple(torch.randn(30, 4, generator=rng) + 2.0 for _ in seen)
    found = []
    for others in (None, unseen):
        module = MultiomeCLIPModule(5, 5, n_latent=4)
        module.align(*seen, unseen=others)
        for name, latent in zip(("rna", "atac"), others or seen, strict=True):
            torch.testing.assert_close(module.alignment[name].mean, latent.mean(0))
        found.append(module.alignment["rna"].axes)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("encoder", ["mlp-depth", "mlp"])
def test_a_deeper_cell_of_the_same_composition_is_told_apart_where_the_depth_is_read_only(counts, encoder):
    module = fitted(counts, encoder=encoder)
    rna = torch.from_numpy(counts["rna"].toarray())
    with torch.no_grad():
        once, twice = (module.embed("rna", x) for x in (rna, 2 * rna))
    assert torch.allclose(once, twice, atol=1e-5) == (encoder == "mlp")


def test_the_depth_of_atac_is_the_number_of_open_peaks_in_units_of_the_training_cells(counts):
    atac = counts["atac"]
    encoder = fitted(counts).encoder_of("atac")
    depth = np.log1p(np.asarray((atac > 0).sum(axis=1)).ravel())
    expected = (depth - depth.mean()) / depth.std()
    for x in (csr_tensor(atac), torch.from_numpy(atac.toarray())):
        np.testing.assert_allclose(encoder.inputs(x)[:, -1], expected, rtol=1e-4, atol=1e-4)
        assert encoder.places(x).shape[1] == encoder.inputs(x).shape[1] - 1


def test_cells_of_one_depth_make_no_cell_of_another_depth_infinitely_strange(counts):
    encoder = fitted(counts).encoder_of("rna")
    x = np.random.default_rng(0).multinomial(149, np.full(30, 1 / 30), 40).astype(np.float32)
    encoder.fit(sp.csr_matrix(x), seed=0)
    x[:, :3] = 0  # a query that lacks a tenth of the genes
    assert encoder.inputs(torch.from_numpy(x))[:, -1].abs().max() < 4
