"""The network by itself: what it computes, for whom, and what it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cellprior.model.geneformer import _module
from cellprior.model.geneformer._inputs import mask_tokens, nonzero_medians, rank_tokens
from cellprior.model.geneformer._loss import gene_scores, masked_losses
from cellprior.model.geneformer._module import GeneformerModule
from cellprior.model.learning._rank_floors import RankFloors, rank_bins

N_GENES = 60


@pytest.fixture(params=[False, True], ids=["v1", "v2"])
def module(request: pytest.FixtureRequest) -> GeneformerModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GeneformerModule(
            N_GENES,
            n_hidden=16,
            n_layers=3,
            n_heads=2,
            n_feedforward=24,
            n_positions=40,
            special_tokens=request.param,
        )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return network.eval()


@pytest.fixture
def counts() -> Tensor:
    """Cells of 0 to 60 genes."""
    rng = np.random.default_rng(0)
    x = rng.poisson(np.linspace(0, 3, 20)[:, None] * rng.random(N_GENES))
    x[3] = 0
    x[-1] = rng.integers(1, 9, N_GENES)
    return torch.from_numpy(x.astype(np.float32))


def test_genes_are_in_the_order_of_their_share_of_the_median_and_equals_in_that_of_the_vocabulary():
    counts = torch.tensor([[4.0, 0, 6, 4, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 9]])
    scale = torch.tensor([2.0, 1, 3, 2, 9], dtype=torch.float64)
    v1 = rank_tokens(counts, scale, n_positions=9, special=False)
    np.testing.assert_array_equal(v1, [[2, 4, 5, 6], [0, 0, 0, 0], [3, 6, 4, 0]])
    v2 = rank_tokens(counts, scale, n_positions=4, special=True)
    np.testing.assert_array_equal(v2, [[2, 4, 6, 3], [2, 3, 0, 0], [2, 5, 8, 3]])
    columns = torch.tensor([1, 4])
    some = rank_tokens(counts[:, columns], scale, n_positions=9, special=False, gene_index=columns)
    np.testing.assert_array_equal(some, [[6, 0], [0, 0], [3, 6]])
    assert rank_tokens(counts[:0], scale, n_positions=9, special=False).shape == (0, 0)


def test_medians_are_those_of_the_cells_that_have_the_gene():
    rng = np.random.default_rng(0)
    x = rng.poisson(0.8, (30, 7)).astype(np.float32)
    x[:, 2] = 0
    x[4] = 0
    share = 1e4 * x.astype(np.float64) / np.maximum(x.sum(1, keepdims=True), 1)
    known = [np.median(column[column > 0]) if column.any() else np.nan for column in share.T]
    expected = np.where(np.isnan(known), np.nanmedian(known), known)
    parts = list(torch.from_numpy(x).split(11))
    np.testing.assert_allclose(nonzero_medians(parts, 7), expected, rtol=1e-12)
    np.testing.assert_array_equal(nonzero_medians([torch.zeros(2, 3)], 3), 1)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.inference_mode()
def test_a_cell_is_the_same_alone_in_a_batch_and_in_any_order(module, counts, pooling, monkeypatch):
    if pooling == "cls" and not module.special:
        with pytest.raises(ValueError, match="no <cls> token"):
            module.encode(counts, pooling="cls")
        return
    for layer in (0, -1, -3):
        together = module.encode(counts, pooling=pooling, layer=layer)
        alone = torch.cat([module.encode(cell[None], pooling=pooling, layer=layer) for cell in counts])
        order = torch.from_numpy(np.random.default_rng(1).permutation(20))
        shuffled = module.encode(counts[order].to_sparse_csr(), pooling=pooling, layer=layer)
        monkeypatch.setattr(_module, "CPU_TOKENS", 50)
        few = module.encode(counts, pooling=pooling, layer=layer)
        monkeypatch.undo()
        for found in (alone, shuffled[order.argsort()], few):
            np.testing.assert_allclose(found, together, rtol=0, atol=2e-6)
        assert together.isfinite().all()
        assert not module.encode(counts, pooling="mean")[3].any()  # the cell without counts


@torch.inference_mode()
def test_the_mean_is_that_of_the_genes_states_and_can_leave_some_out(module, counts):
    tokens = module.tokens(counts)
    states = module.states(tokens, layer=-1)
    genes = tokens >= module.first_gene
    expected = (states * genes[..., None]).sum(1) / genes.sum(1, keepdim=True).clamp(min=1)
    np.testing.assert_allclose(module.pool(tokens, "mean"), expected, rtol=1e-5, atol=1e-5)
    left_out = torch.zeros_like(genes)
    left_out[:, 2] = True
    kept = genes & ~left_out
    expected = (states * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
    np.testing.assert_allclose(module.pool(tokens, "mean", left_out=left_out), expected, rtol=1e-5, atol=1e-5)
    if module.special:
        np.testing.assert_allclose(module.pool(tokens), states[:, 0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_is_not_read_is_not_computed(module, counts, monkeypatch):
    ran: list[str] = []
    names = {part: name for name, part in module.named_modules()}

    def note(part, *_):
        ran.append(names[part])

    for part in module.modules():
        part.register_forward_pre_hook(note)
    module.encode(counts, layer=-1)
    assert "encoder.1" in ran
    assert not {"encoder.2", "transform"} & set(ran)
    ran.clear()
    module.encode(counts, layer=0)
    assert "encoder.2" in ran
    assert "transform" not in ran


@torch.inference_mode()
def test_little_of_the_work_is_padding(module, counts):
    lengths = (module.tokens(counts) != 0).sum(1)
    groups = list(module._groups(module.tokens(counts)))
    assert sorted(torch.cat([cells for cells, _ in groups]).tolist()) == lengths.nonzero()[:, 0].tolist()
    for cells, longest in groups:
        assert lengths[cells].max() == longest
        assert lengths[cells].min() >= 0.9 * longest


def test_a_layer_or_a_pooling_or_tokens_that_are_not_there_are_refused(module, counts):
    for layer in (1, -4):
        with pytest.raises(ValueError, match=f"layer={layer}; from 0, the last of 3 layers, to -3"):
            module.encode(counts, layer=layer)
    with pytest.raises(ValueError, match='choose "mean" or "cls"'):
        module.encode(counts, pooling="max")
    with pytest.raises(ValueError, match="40 at most"):
        module.pool(torch.ones(1, 41, dtype=torch.long), "mean")
    with pytest.raises(ValueError, match="one cell at a time"):
        module.attention(torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="no multiple of n_heads=3"):
        GeneformerModule(9, n_hidden=16, n_heads=3)


def test_masks_follow_their_rates_and_never_touch_what_is_no_gene():
    rng = np.random.default_rng(0)
    tokens = np.where(np.arange(300) < 250, rng.integers(4, 64, (200, 300)), 0)
    tokens[:, 0], tokens[:, 249] = 2, 3
    shown, selected = mask_tokens(tokens, np.random.default_rng(1), n_tokens=64, special=True)
    assert not selected[tokens < 4].any()
    np.testing.assert_array_equal(shown[~selected], tokens[~selected])
    genes = tokens >= 4
    assert selected[genes].mean() == pytest.approx(0.15, abs=0.005)
    assert (shown[selected] == 1).mean() == pytest.approx(0.8 + 0.1 / 63, abs=0.01)
    assert (shown[selected] == tokens[selected]).mean() == pytest.approx(0.1 + 0.1 / 63, abs=0.01)
    assert (shown[selected] > 0).all()
    hidden, again = mask_tokens(
        tokens, np.random.default_rng(1), n_tokens=64, special=True, hide=1.0, swap=0.0
    )
    np.testing.assert_array_equal(again, selected)
    assert (hidden[selected] == 1).all()


def test_the_loss_is_the_same_in_small_pieces_and_so_is_its_gradient(module, counts):
    tokens = module.tokens(counts)
    floor = RankFloors.fit([tokens], n_genes=N_GENES, n_positions=40, first=module.first_gene)
    gradients, losses = [], []
    for size in (None, 3, 1):
        module.zero_grad()
        found = masked_losses(
            module, {"X": counts}, floor=floor, measured=torch.ones(1, N_GENES, dtype=torch.bool), rng_seed=3,
            mask_rate=0.4, micro_batch_size=size,
        )  # fmt: skip
        found["loss"].backward()
        gradients.append(torch.cat([p.grad.ravel() for p in module.parameters() if p.grad is not None]))
        losses.append({name: value.item() for name, value in found.items()})
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        np.testing.assert_allclose(gradient, gradients[0], rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        masked_losses(module, {"X": counts}, floor=floor, measured=counts, rng_seed=3, micro_batch_size=0)
    empty = masked_losses(module, {"X": counts[3:4]}, floor=floor, measured=counts, rng_seed=3)
    assert all(value.item() == 0 for value in empty.values())


@torch.inference_mode()
def test_scores_are_log_probabilities_of_the_right_gene(module, counts):
    tokens = module.tokens(counts[10:])
    shown, selected = (
        torch.from_numpy(part)
        for part in mask_tokens(
            tokens.numpy(), np.random.default_rng(0), n_tokens=module.n_tokens, special=module.special
        )
    )
    logits = module.predict_genes(module.states(shown)[selected])
    expected = logits.log_softmax(1)[torch.arange(len(logits)), tokens[selected]]
    found = gene_scores(module, tokens, shown, selected, micro_batch_size=2)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[:, 1], (logits.argmax(1) == tokens[selected]).float())


def test_floors_are_frequencies_by_hand():
    assert rank_bins(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])).tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        7,
        8,
        8,
    ]
    tokens = torch.tensor([[2, 3, 4], [2, 4, 0], [3, 2, 0]])  # genes 0, 1, 2
    floor = RankFloors.fit([tokens[:2], tokens[2:]], n_genes=3, n_positions=4, first=2)
    np.testing.assert_array_equal(floor.counts, [[2, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]])
    selected = torch.zeros_like(tokens, dtype=torch.bool)
    selected[0, 0] = selected[1, 1] = True
    logs, hits = floor.predict(tokens, selected, first=2)
    average = np.array([3, 2, 2]) / 7
    average = (7 * average + 1 / 3) / 8
    first, second = (np.array(row) for row in ([2, 1, 0], [1, 1, 1]))
    first, second = (first + 2 * average) / 5, (second + 3 * average) / 6
    np.testing.assert_allclose(logs["uniform"].exp(), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(logs["token_frequency"].exp(), average[[0, 2]], rtol=1e-6)
    np.testing.assert_allclose(logs["gene_at_rank"].exp(), [first[0], second[2]], rtol=1e-6)
    unseen = [
        first[0] / (1 - first[1] - first[2]),
        second[2] / (1 - second[0]),
    ]  # 1 and 2, and 0, are in sight
    np.testing.assert_allclose(logs["gene_at_rank_not_in_sight"].exp(), unseen, rtol=1e-5)
    np.testing.assert_allclose(hits["token_frequency"], [1, 0])
    np.testing.assert_allclose(hits["gene_at_rank"], [1, 0])
