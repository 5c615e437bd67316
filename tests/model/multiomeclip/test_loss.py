from __future__ import annotations

import math

import pytest
import torch

from cellprior.model.learning._contrast import info_nce
from cellprior.model.multiomeclip._loss import infonce, same_label, sigmoid_loss


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_infonce_is_that_of_the_other_models():
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 10, 4, generator=rng)
    cosine = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=2)
    assert infonce(cosine / 0.2).item() == pytest.approx(info_nce(first, second, temperature=0.2).item())


def test_cells_of_the_same_label_are_no_negatives(scores):
    code = torch.tensor([0, 0, 1, 2, 1, -1, -1, 0])
    total = 0.0
    for i in range(8):
        allowed = [j for j in range(8) if j == i or code[i] != code[j] or code[i] < 0]
        for row in (scores[i], scores[:, i]):
            total -= math.log(math.exp(row[i]) / sum(math.exp(row[j]) for j in allowed)) / 16
    assert infonce(scores, same=same_label(code)).item() == pytest.approx(total)


def test_the_sigmoid_loss_judges_each_pair_by_itself(scores):
    code = torch.tensor([0, 0, 1, 2, 1, -1, -1, 3])
    pairs = [(i, j) for i in range(8) for j in range(8)]
    cost = {(i, j): math.log1p(math.exp(-scores[i, j] if i == j else scores[i, j])) for i, j in pairs}
    assert sigmoid_loss(scores).item() == pytest.approx(sum(cost.values()) / 8)
    kept = [(i, j) for i, j in pairs if i == j or code[i] != code[j] or code[i] < 0]
    expected = sum(cost[pair] for pair in kept) / 8
    assert sigmoid_loss(scores, same=same_label(code)).item() == pytest.approx(expected)


def test_cells_without_a_label_are_like_no_other():
    assert same_label(torch.tensor([-1, -1, 0])).tolist() == [[False] * 3, [False] * 3, [False, False, True]]


@pytest.mark.parametrize("loss", [infonce, sigmoid_loss])
def test_masked_negatives_leave_finite_gradients_even_if_all_cells_are_alike(scores, loss):
    scores.requires_grad_(True)
    loss(scores, same=torch.ones(8, 8, dtype=torch.bool)).backward()
    assert torch.isfinite(scores.grad).all()
