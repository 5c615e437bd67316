from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf

from cellprior.model.learning._annotation_plan import AnnotationHead, only_trainable
from cellprior.model.scbert import _module, _pairs
from cellprior.model.scbert._module import ScBERTModule, sample_genes

N_GENES = 90


@pytest.fixture
def module() -> ScBERTModule:
    torch.manual_seed(0)
    module = ScBERTModule(N_GENES, n_hidden=24, n_layers=3, n_heads=3, head_dim=8)
    with torch.no_grad():
        for layer in module.encoder:  # so that some keys fall to the kernel's floor, and others do not
            layer.attention.query.weight *= 4
            layer.attention.key.weight *= 4
    return module.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 6, (5, N_GENES)) * (rng.random((5, N_GENES)) < rng.random((5, 1)))
    tokens[3] = 0
    return torch.from_numpy(tokens).to(torch.uint8)


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest pieces: 32 positions of one cell."""
    monkeypatch.setattr(_module, "CPU_CHUNK_BYTES", 1)


def plain(module: ScBERTModule, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One cell by the formulas of the paper, in NumPy: encodings, and the mean attention map."""
    w = {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def features(u, projection, top):
        logits = u @ projection.T / 8**0.25
        half_square = (u**2).sum(-1, keepdims=True) / (2 * 8**0.5)
        top = logits.max() if top == "all" else logits.max(-1, keepdims=True)
        return np.exp(logits - half_square - top) + 1e-4

    table = w["embedder.token_embedding.weight"]
    x = np.concatenate([table[tokens] + w["embedder.gene_vectors"], table[:1]])
    maps = []
    for i in range(len(module.encoder)):
        name = f"encoder.{i}."
        y = norm(x, name + "norm1")
        q, k, v = (
            (y @ w[f"{name}attention.{part}.weight"].T).reshape(len(x), 3, 8).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        projection = w[name + "attention.projection"]
        attention = features(q, projection, "row") @ features(k, projection, "all").swapaxes(1, 2)
        attention /= attention.sum(-1, keepdims=True)
        maps.append(attention.mean(0))
        read = (attention @ v).swapaxes(0, 1).reshape(len(x), -1)
        x = x + read @ w[name + "attention.out.weight"].T + w[name + "attention.out.bias"]
        y = norm(x, name + "norm2") @ w[name + "ff1.weight"].T + w[name + "ff1.bias"]
        x = x + (y * (1 + erf(y / 2**0.5)) / 2) @ w[name + "ff2.weight"].T + w[name + "ff2.bias"]
    return norm(x, "norm"), np.mean(maps, axis=0)


def test_the_formulas_of_the_paper_written_out_give_the_same(module, tokens):
    expected = np.stack([plain(module, cell)[0] for cell in tokens.numpy()])
    np.testing.assert_allclose(module.encode(tokens).detach(), expected, atol=1e-5)
    with torch.inference_mode():
        np.testing.assert_allclose(module.encode(tokens), expected, atol=1e-5)
        np.testing.assert_allclose(module.pool(tokens), expected[:, :-1].mean(1), atol=1e-5)


def test_a_stream_of_chunks_gives_the_same_and_a_cell_does_not_see_its_batch(module, tokens, in_chunks):
    expected = np.stack([plain(module, cell)[0] for cell in tokens.numpy()])
    with torch.inference_mode():
        np.testing.assert_allclose(module.encode(tokens), expected, atol=1e-5)
        together, shuffled = module.pool(tokens), module.pool(tokens[[4, 2, 0, 1, 3]])
        alone = torch.cat([module.pool(cell[None]) for cell in tokens])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(shuffled, alone[[4, 2, 0, 1, 3]], rtol=0, atol=1e-6)


def test_attention_far_beyond_what_exponentials_can_hold_stays_finite(module, tokens, in_chunks):
    with torch.no_grad():
        for layer in module.encoder:
            layer.attention.query.weight *= 10
            layer.attention.key.weight *= 10
        whole = plain(module, tokens[0].numpy())[0]
        np.testing.assert_allclose(module.encode(tokens)[0], whole, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "expressed"])
def test_pooling_takes_the_positions_it_says(module, tokens, pooling):
    encoded = module.encode(tokens).detach()
    rows = {
        "mean": lambda i: slice(-1),
        "cls": lambda i: slice(-1, None),
        # a cell without expressed genes: all of them
        "expressed": lambda i: slice(-1) if i == 3 else tokens[i].nonzero()[:, 0],
    }
    expected = torch.stack([encoded[i, rows[pooling](i)].mean(0) for i in range(5)])
    torch.testing.assert_close(module.pool(tokens, pooling).detach(), expected, rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(module.pool(tokens, pooling), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_with_one_layer_the_class_token_is_exact_and_so_are_its_gradients(tokens, monkeypatch, dropout_rate):
    torch.manual_seed(0)
    module = ScBERTModule(
        N_GENES, n_hidden=24, n_layers=1, n_heads=3, head_dim=8, pooling="cls", dropout_rate=dropout_rate
    ).eval()
    with torch.no_grad():  # so that some keys fall to the kernel's floor
        module.encoder[0].attention.query.weight *= 4
        module.encoder[0].attention.key.weight *= 6
    tokens[0, :7] = module.n_bins + 1  # hidden genes
    expected = module.encode(tokens)[:, -1]
    found = module.pool(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    gradients = []
    for z in (expected, found):
        module.zero_grad()
        (z * torch.arange(24)).square().sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert "embedder.gene_vectors" in gradients[0]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        monkeypatch.setattr(_pairs, "CELLS", 2)
        torch.testing.assert_close(module.pool(tokens), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            module.pool(tokens[3:4]), expected[3:4], rtol=1e-5, atol=1e-5
        )  # without counts
        sampled = module.pool(tokens, n_zero_genes=20)
    assert not torch.equal(sampled, found) and torch.cosine_similarity(sampled, expected).min() > 0.9


def test_gradients_are_the_same_when_layers_are_computed_again(module, tokens, monkeypatch):
    gradients = []
    for keep in (2**40, 0):
        monkeypatch.setattr(_module, "KEEP_BYTES", keep)
        module.zero_grad()
        module.pool(tokens, "expressed").square().sum().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        )
    assert len(gradients[0]) > 30
    torch.testing.assert_close(*gradients)


def test_a_sample_keeps_expressed_genes_and_lets_the_others_stand_for_all():
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(1, 6, (6, 400)) * (rng.random((6, 400)) < 0.3))
    tokens[2], tokens[4] = 0, 1
    positions, weight = sample_genes(tokens, 50)
    torch.testing.assert_close(weight.sum(1), torch.full((6,), 400.0))
    for cell, kept, stands_for in zip(tokens, positions, weight, strict=True):
        kept, stands_for = kept[stands_for > 0], stands_for[stands_for > 0]
        assert len(kept.unique()) == len(kept)
        assert set(cell.nonzero()[:, 0].tolist()) == set(kept[cell[kept] > 0].tolist())
        assert (stands_for[cell[kept] > 0] == 1).all()
        n_zero = int((cell == 0).sum())
        assert (cell[kept] == 0).sum() == min(50, n_zero)
        if n_zero:
            assert (stands_for[cell[kept] == 0] == n_zero / 50).all()


def test_a_sample_follows_the_order_that_it_is_given():
    tokens = torch.zeros(1, 10, dtype=torch.uint8)
    tokens[0, 4] = 1
    positions, weight = sample_genes(tokens, 2, torch.arange(9, -1, -1))
    assert positions.tolist() == [[9, 8, 4]] and weight.tolist() == [[4.5, 4.5, 1.0]]


def test_over_all_orders_of_the_genes_a_sample_is_unbiased(monkeypatch):
    tokens = torch.zeros(1, 60, dtype=torch.int64)
    tokens[0, ::5] = 2
    generator, randperm = torch.Generator().manual_seed(1), torch.randperm
    monkeypatch.setattr(
        torch, "randperm", lambda n, generator_=generator, **_: randperm(n, generator=generator_)
    )
    total = torch.zeros(60)
    for _ in range(4000):
        positions, weight = sample_genes(tokens, 12)
        total.index_add_(0, positions[0], weight[0])
    # a gene in bin 0 is kept in one sample of four, and then counts four times: deviation √3 a draw
    assert (total / 4000 - 1).abs().max() < 4.5 * (3 / 4000) ** 0.5


@pytest.mark.parametrize("pooling", ["mean", "cls", "expressed"])
def test_a_sample_of_all_genes_is_exact(module, tokens, pooling):
    with torch.inference_mode():
        exact, all_kept = module.pool(tokens, pooling), module.pool(tokens, pooling, n_zero_genes=N_GENES)
    torch.testing.assert_close(all_kept, exact, rtol=0, atol=1e-5)


def test_a_sampled_cell_is_close_and_the_same_alone_in_a_batch_and_with_gradients(module, tokens):
    with torch.inference_mode():
        exact = module.pool(tokens)
        together = module.pool(tokens, n_zero_genes=30)
        alone = torch.cat([module.pool(cell[None], n_zero_genes=30) for cell in tokens])
        fewer = module.pool(tokens, n_zero_genes=5)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    # with gradients the cells, of which each keeps another number of genes, are padded
    torch.testing.assert_close(module.pool(tokens, n_zero_genes=30).detach(), alone, rtol=0, atol=1e-5)
    error, more = ((x - exact).norm() / exact.norm() for x in (together, fewer))
    assert 0 < error < more
    assert torch.cosine_similarity(together, exact).min() > 0.9


@pytest.mark.parametrize("gradients", [False, True])
def test_in_bfloat16_a_cell_is_close_and_comes_back_in_float32(module, tokens, gradients):
    with torch.set_grad_enabled(gradients):
        exact = module.pool(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            half = module.pool(tokens)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05
    assert torch.cosine_similarity(half, exact).min() > 0.999
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_attention_is_that_of_each_layers_own_input_written_out(module, tokens, in_chunks):
    _, expected = plain(module, tokens[0].numpy())
    genes = torch.tensor([5, 40, N_GENES, 7])
    received = module.attention(tokens[:1])
    np.testing.assert_allclose(received, expected.mean(0), atol=1e-6)
    assert received.sum().item() == pytest.approx(1, abs=1e-5)
    between = module.attention(tokens[:1], genes=genes)
    np.testing.assert_allclose(between, expected[np.ix_(genes, genes)], atol=1e-6)


def test_projections_are_redrawn_on_demand_where_attention_trains_and_never_by_a_forward_pass(module, tokens):
    before = [layer.attention.projection.clone() for layer in module.encoder]
    module.train()
    module.pool(tokens)
    module.requires_grad_(False)
    module.encoder[1].requires_grad_(True)
    assert all(
        torch.equal(layer.attention.projection, b) for layer, b in zip(module.encoder, before, strict=True)
    )
    module.redraw_projections(torch.Generator().manual_seed(0))
    changed = [
        not torch.equal(layer.attention.projection, b)
        for layer, b in zip(module.encoder, before, strict=True)
    ]
    assert changed == [False, True, False]
    rows = module.encoder[1].attention.projection  # 16 of 8 dimensions: two orthogonal blocks
    products = rows[:8] @ rows[:8].T
    torch.testing.assert_close(products, torch.diag(products.diag()), rtol=0, atol=1e-4)


def test_fixed_gene_vectors_are_float64_saved_and_not_trained():
    fixed = ScBERTModule(10, n_hidden=8, n_layers=1, n_heads=1, head_dim=8, gene_vectors="fixed")
    learned = ScBERTModule(10, n_hidden=8, n_layers=1, n_heads=1, head_dim=8)
    name = "embedder.gene_vectors"
    assert fixed.state_dict()[name].dtype == torch.float64
    assert name not in dict(fixed.named_parameters())
    assert dict(learned.named_parameters())[name].dtype == torch.float32
    assert fixed.embedder(torch.zeros(1, 10)).dtype == torch.float32


@pytest.mark.parametrize(
    ("trainable", "prefixes"),
    [
        ("head", ()),
        ("last", ("encoder.2.", "norm.")),
        ("original", ("encoder.1.", "norm.")),
        ("all", ("embedder.", "encoder.", "norm.")),
        ("lora", ("norm.", "encoder.0.attention.", "encoder.1.attention.", "encoder.2.attention.")),
    ],
)
def test_fine_tuning_trains_what_it_says(module, trainable, prefixes):
    module.annotation = AnnotationHead(24, 24, 2)
    with only_trainable(module, trainable):
        counts = torch.poisson(torch.rand(3, N_GENES), generator=torch.Generator().manual_seed(0))
        module.annotation(module.hidden(counts)).square().sum().backward()
        trained = {name for name, p in module.named_parameters() if p.grad is not None}
    ours = {name for name in trained if not name.startswith("annotation.")}
    assert all(name.startswith(prefixes) for name in ours)
    assert {prefix for prefix in prefixes if any(name.startswith(prefix) for name in ours)} == set(prefixes)
    if trainable == "lora":
        assert {name.split(".")[3] for name in ours if "encoder" in name} == {"query", "value"}
    assert dict(module.named_parameters()).keys() >= {"encoder.0.attention.query.weight"}  # as it was


def test_genes_that_the_data_lack_are_in_bin_0_and_hidden_is_the_pooled_mean(module):
    counts = torch.poisson(torch.full((3, 20), 2.0), generator=torch.Generator().manual_seed(0))
    gene_index = torch.randperm(N_GENES, generator=torch.Generator().manual_seed(0))[:20]
    whole = torch.zeros(3, N_GENES)
    whole[:, gene_index] = counts
    tokens = module.tokens(counts, gene_index=gene_index)
    assert torch.equal(tokens, module.tokens(whole))
    assert not tokens[:, whole.sum(0) == 0].any()
    with torch.inference_mode():
        torch.testing.assert_close(module.hidden(counts, gene_index=gene_index), module.pool(tokens))


def test_what_cannot_be_asked_is_refused_with_the_way_out(module, tokens):
    with pytest.raises(ValueError, match=r"\(5, 91\), needed \(cells, 90\).*class token is added"):
        module.encode(torch.zeros(5, 91))
    with pytest.raises(ValueError, match="pooling='max' is not known; choose \"mean\""):
        module.pool(tokens, "max")
    with pytest.raises(ValueError, match="n_zero_genes=0; at least 1"):
        module.pool(tokens, n_zero_genes=0)
    with pytest.raises(ValueError, match="5 cells; attention is given for one"):
        module.attention(tokens)
    with pytest.raises(RuntimeError, match="no classifier of the original"):
        module.classify(tokens)
    with pytest.raises(ValueError, match="gene_vectors='gene2vec' is not known; choose \"learned\""):
        ScBERTModule(3, gene_vectors="gene2vec")
    with pytest.raises(ValueError, match="key_max='head' is not known; choose \"cell\""):
        ScBERTModule(3, key_max="head")


def test_the_annotation_head_gets_the_gradient_of_all_cells_with_the_memory_of_a_few(monkeypatch):
    torch.manual_seed(0)
    module = ScBERTModule(30, n_hidden=8, n_layers=2, n_heads=2, head_dim=4)
    counts = torch.poisson(torch.full((7, 30), 1.5))
    gradients = []
    for positions in (20_000, 60):  # all cells at once, two at a time
        monkeypatch.setattr("cellprior.model.scbert._module.TRAINED_POSITIONS", positions)
        module.zero_grad()
        hidden = module.hidden(counts)
        (hidden @ hidden.T).square().sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)
