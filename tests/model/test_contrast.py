from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cellprior.model.learning._contrast import (
    chance_of_labels,
    in_micro_batches,
    info_nce,
    label_contrast,
    retrieval_accuracy,
    similarities,
)
from cellprior.model.learning._views import draw_view


def views(n_cells: int = 12, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(n_cells, width, generator=rng)
    return first, first + torch.randn(n_cells, width, generator=rng)


def test_info_nce_is_the_mean_negative_log_share_of_the_right_pair_in_both_directions():
    first, second = views()
    a, b = first.double().numpy(), second.double().numpy()
    total = 0.0
    for i in range(len(a)):
        for x, others in ((a[i], b), (b[i], a)):
            cosine = others @ x / np.linalg.norm(others, axis=1) / np.linalg.norm(x)
            share = np.exp(cosine / 0.3)
            total -= np.log(share[i] / share.sum()) / (2 * len(a))
    assert info_nce(first, second, temperature=0.3).item() == pytest.approx(total, rel=1e-5)


def test_who_cannot_tell_cells_apart_reaches_the_logarithm_of_their_number():
    same = torch.ones(7, 4)
    assert info_nce(same, same, temperature=0.1).item() == pytest.approx(math.log(7), rel=1e-6)


def test_retrieval_counts_the_cells_whose_other_view_is_the_most_similar():
    scores = torch.tensor([[3.0, 1.0, 5.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    assert retrieval_accuracy(scores).item() == pytest.approx((2 / 3 + 2 / 3) / 2)  # rows 1, 2; columns 0, 1


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 5)).train()


def gradients(network: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, list(network.parameters()))]


def parts_with_everything_kept(network: nn.Module, x: torch.Tensor, size: int) -> torch.Tensor:
    """The same numbers, and so the same dropout, without a second pass."""
    return torch.cat([network(part) for part in x.split(size)])


@pytest.mark.parametrize("size", [1, 5, 8])
def test_micro_batches_give_the_gradient_of_the_full_batch_with_dropout_on(network, size):
    x, y = torch.randn(20, 6), torch.randn(20, 6)
    found = []
    for run in (in_micro_batches, parts_with_everything_kept):
        torch.manual_seed(1)
        first, second = (run(network, view, size=size) for view in (x, y))
        found.append(gradients(network, info_nce(first, second, temperature=0.1)))
    for cached, full in zip(*found, strict=True):
        torch.testing.assert_close(cached, full, rtol=1e-6, atol=1e-6)


def test_adding_up_the_gradients_of_micro_batches_is_something_else(network):
    network.eval()
    x, y = torch.randn(20, 6), torch.randn(20, 6)
    full = gradients(network, info_nce(network(x), network(y), temperature=0.1))
    losses = [
        info_nce(network(a), network(b), temperature=0.1) / 4
        for a, b in zip(x.split(5), y.split(5), strict=True)
    ]
    accumulated = gradients(network, torch.stack(losses).sum())
    assert any((a - b).norm() > 0.1 * a.norm() for a, b in zip(full, accumulated, strict=True))


def test_only_the_outputs_of_micro_batches_are_kept(network):
    kept = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        in_micro_batches(network, torch.randn(20, 6), size=5)
    assert torch.Size([5, 32]) not in kept  # the hidden layer


def test_functions_may_read_several_tensors_and_give_any_number_of_rows():
    values = torch.arange(12.0).reshape(6, 2).requires_grad_()
    chosen = values > 4

    def choose(x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return x[which][:, None]

    for size in (None, 1, 4, 100):
        torch.testing.assert_close(in_micro_batches(choose, values, chosen, size=size)[:, 0], values[chosen])


def test_cosines_do_not_depend_on_length():
    first, second = views()
    torch.testing.assert_close(similarities(3 * first, second / 7), similarities(first, second))


def test_label_contrast_is_the_mean_over_all_other_views_of_a_label_and_leaves_out_cells_without_one():
    first, second = views(6)
    code = torch.tensor([0, 1, 0, -1, 2, 1])
    known = [i for i in range(6) if code[i] >= 0]
    x = np.concatenate([first.double().numpy()[known], second.double().numpy()[known]])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    label = np.tile(code[known].numpy(), 2)
    total = 0.0
    for a in range(len(x)):
        others = [j for j in range(len(x)) if j != a]
        share = np.exp(x[others] @ x[a] / 0.3)
        share /= share.sum()
        total -= np.mean([np.log(share[k]) for k, j in enumerate(others) if label[j] == label[a]]) / len(x)
    found = label_contrast(first, second, code, temperature=0.3)
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_the_chance_of_label_contrast_is_what_a_constant_embedding_reaches():
    same, code = torch.ones(7, 4), torch.tensor([0, 0, 1, -1, 2, 2, -1])
    found = label_contrast(same, same, code, temperature=0.1)
    assert found.item() == pytest.approx(chance_of_labels(code), rel=1e-6)
    assert chance_of_labels(code) == pytest.approx(math.log(9))
    none = torch.full((7,), -1)
    assert label_contrast(same, same, none, temperature=0.1).item() == chance_of_labels(none) == 0


def test_a_view_has_fewer_counts_of_some_of_the_measured_genes():
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.poisson(3.0, (40, 200)).astype(np.float32))
    measured = torch.arange(0, 200, 2)
    sizes, shares = [], []
    for _ in range(200):
        view = draw_view(counts, measured, rng, depths=(50.0, 500.0), panels=(0.1, 1.0))
        assert torch.isin(view.genes, measured).all() and (view.genes.diff() > 0).all()
        seen = counts[:, view.genes]
        assert (view.counts <= seen).all() and torch.equal(view.counts, view.counts.round())
        sizes.append(len(view.genes))
        shares.append(float(view.counts.sum() / seen.sum()))
    whole = np.mean(np.array(sizes) == 100)
    assert 0.4 < whole < 0.62 and 10 <= min(sizes) < 15
    # evenly on the logarithm: counts of about 600 become 50 to 500, in the middle of it 158
    assert 0.15 < np.median(shares) < 0.4 and max(shares) <= 1


def test_a_cell_with_fewer_counts_than_the_view_keeps_them_all():
    counts = torch.tensor([[2.0, 0.0, 3.0]])
    view = draw_view(counts, torch.arange(3), np.random.default_rng(0), depths=(1e3, 2e3), panel_rate=0.0)
    assert torch.equal(view.counts, counts)
