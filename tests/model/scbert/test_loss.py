from __future__ import annotations

import numpy as np
import pytest
import torch

from cellprior.model.scbert._floors import BinFloors
from cellprior.model.scbert._inputs import counts_to_bins
from cellprior.model.scbert._loss import (
    accuracy,
    cell_losses,
    contrastive_losses,
    cross_entropy,
    gene_subsets,
    masked_losses,
    ordinal_loss,
)
from cellprior.model.scbert._module import ScBERTModule

N_GENES = 50


@pytest.fixture
def counts() -> torch.Tensor:
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(0, 2, size=N_GENES))
    return torch.from_numpy(rng.poisson(rng.gamma(4.0, 0.2, size=(12, 1)) * rate).astype(np.float32))


@pytest.fixture
def module() -> ScBERTModule:
    torch.manual_seed(0)
    return ScBERTModule(N_GENES, n_hidden=16, n_layers=2, n_heads=2, head_dim=8)


@pytest.fixture
def measured() -> torch.Tensor:
    return torch.ones(1, N_GENES, dtype=torch.bool)


@pytest.fixture
def arguments(counts, measured) -> dict:
    return {"floor": BinFloors.fit([{"X": counts}], measured, 5), "measured": measured, "rng_seed": 3}


def certain(bin_of_five: int, share: float = 0.99) -> torch.Tensor:
    """A prediction that is nearly sure of one bin."""
    probability = torch.full((5,), (1 - share) / 4)
    probability[bin_of_five - 1] = share
    return probability.log()[None]


def test_the_ordinal_loss_adds_up_the_cross_entropies_of_the_questions_whether_the_bin_is_above_k():
    p = np.array([0.1, 0.4, 0.2, 0.05, 0.25])
    for y in range(1, 6):
        total = 0.0
        for k in range(1, 5):
            above = p[k:].sum()
            total -= np.log(above if y > k else 1 - above)
        found = ordinal_loss(torch.from_numpy(p).log()[None], torch.tensor([y - 1]))
        assert found.item() == pytest.approx(total, rel=1e-6)


def test_a_bin_far_off_costs_more_in_the_ordinal_loss_and_as_much_in_the_cross_entropy():
    truth = torch.tensor([3])  # bin 4
    ordinal = [ordinal_loss(certain(b), truth).item() for b in (4, 5, 3, 2, 1)]
    assert ordinal == sorted(ordinal)
    assert ordinal[4] > 2 * ordinal[1]
    assert len({round(cross_entropy(certain(b), truth).item(), 5) for b in (5, 3, 2, 1)}) == 1


def test_no_prediction_beats_the_true_probabilities_in_either_loss():
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.dirichlet(np.ones(5)))
    every = torch.arange(5)
    for loss in (ordinal_loss, cross_entropy):

        def expected(q: torch.Tensor, loss=loss) -> float:
            return sum(float(p[y]) * loss(q.log()[None], every[y : y + 1]).item() for y in range(5))

        others = [p * 0.9 + 0.1 * torch.from_numpy(rng.dirichlet(np.ones(5))) for _ in range(30)]
        assert all(expected(p) < expected(q) for q in others)


def test_equals_share_the_accuracy():
    log_probability = torch.tensor([[0.4, 0.4, 0.2], [0.5, 0.3, 0.2]]).log()
    assert accuracy(log_probability, torch.tensor([1, 0])).item() == pytest.approx(0.75)


def test_the_masked_loss_is_the_cross_entropy_of_all_classes_at_the_selected_genes(module, counts):
    tokens = counts_to_bins(counts)
    selected = (tokens > 0) & (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    replaced = selected & (torch.arange(N_GENES) % 2 == 0)
    shown = torch.where(replaced, 6, tokens)
    logits = module.predict_bins(module.encode(shown))[:, :-1].detach()
    by_hand = [
        -logits[cell, gene].log_softmax(0)[tokens[cell, gene].long()].item()
        for cell, gene in selected.nonzero().tolist()
    ]
    losses = masked_losses(module, tokens, selected, replaced)
    assert losses["masked"].item() == pytest.approx(np.mean(by_hand), rel=1e-5)


def seen_by(module: ScBERTModule, counts: torch.Tensor, arguments: dict, monkeypatch) -> torch.Tensor:
    shown = []
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda tokens: shown.append(tokens) or encode(tokens))
    cell_losses(module, {"X": counts}, **arguments)
    return shown[0]


def test_held_out_cells_do_not_show_what_is_to_be_predicted_and_training_cells_some_of_it(
    module, counts, arguments, monkeypatch
):
    expressed = (counts_to_bins(counts) > 0).sum(1)
    n_selected = np.ceil(expressed.numpy().astype(np.float32) * np.float32(0.5)).sum()
    arguments |= {"mask_rate": 0.5, "replace_rate": 0.5}
    in_evaluation = (seen_by(module.eval(), counts, arguments, monkeypatch) == 6).sum().item()
    in_training = (seen_by(module.train(), counts, arguments, monkeypatch) == 6).sum().item()
    assert in_evaluation == n_selected
    assert 0.3 * n_selected < in_training < 0.7 * n_selected


@pytest.mark.parametrize("objective", [{}, {"bin_loss": "ordinal"}, {"contrast_weight": 0.5}])
def test_the_gradient_does_not_depend_on_the_micro_batches(module, counts, arguments, objective):
    found = []
    for size in (None, 5, 1):
        losses = cell_losses(module, {"X": counts}, micro_batch_size=size, **arguments, **objective)
        found.append(torch.autograd.grad(losses["loss"], list(module.parameters())))
    for gradients in found[1:]:
        for a, b in zip(gradients, found[0], strict=True):
            assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 0}, "at least one cell"),
        ({"bin_loss": "mse"}, "'cross_entropy', 'ordinal' or None"),
        ({"bin_loss": None}, "Neither hidden genes nor a contrast"),
    ],
)
def test_what_cannot_be_meant_is_refused(module, counts, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        cell_losses(module, {"X": counts}, **arguments, **options)


@pytest.mark.parametrize("objective", [{}, {"bin_loss": "ordinal"}, {"contrast_weight": 1.0}])
def test_cells_without_counts_give_finite_losses_and_gradients(module, arguments, objective):
    losses = cell_losses(module, {"X": torch.zeros(3, N_GENES)}, **arguments, **objective)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_random_features_are_redrawn_every_so_many_training_steps(module, counts, arguments):
    drawn = []
    for training in (True, True, False, True, True, True):
        module.train(training)
        cell_losses(module, {"X": counts}, redraw_every=2, **arguments)
        drawn.append(module.encoder[0].attention.projection.clone())
    changed = [not torch.equal(a, b) for a, b in zip(drawn[:-1], drawn[1:], strict=True)]
    assert changed == [False, False, True, False, True]


def test_the_two_views_are_halves_of_the_measured_genes_and_have_none_in_common():
    measured = torch.arange(N_GENES) % 3 > 0
    first, second = gene_subsets(measured, np.random.default_rng(0))
    assert not (first & second).any()
    assert torch.equal(first | second, measured)
    assert abs(int(first.sum()) - int(second.sum())) <= 1
    other, _ = gene_subsets(measured, np.random.default_rng(1))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("poolings", [("mean", "expressed"), ("cls",)])
def test_a_view_is_embedded_as_cells_measured_with_its_genes_only(module, counts, poolings):
    module.eval()
    module.pooling = poolings[0]
    half = (torch.arange(N_GENES) % 2).float()
    views = (counts * half, counts * (1 - half))
    losses = contrastive_losses(module, views, temperature=0.3)
    by_hand = []
    for pooling in poolings:
        z = [module.pool(module.tokens(view), pooling).detach().double().numpy() for view in views]
        a, b = ((v - v.mean(0)) / np.linalg.norm(v - v.mean(0), axis=1, keepdims=True) for v in z)
        scores = a @ b.T
        if pooling == poolings[0]:
            found = [m.argmax(axis=1) == np.arange(12) for m in (scores, scores.T)]
        by_hand += [
            np.mean([np.log(np.exp(s / 0.3).sum()) - s[i] / 0.3 for i, s in enumerate(m)])
            for m in (scores, scores.T)
        ]
    assert losses["contrastive"].item() == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert losses["contrastive_accuracy"].item() == pytest.approx(np.mean(found))
    assert losses["contrastive_floor_chance"].item() == pytest.approx(np.log(12), rel=1e-6)


def test_the_depth_floor_finds_the_view_that_is_nearest_in_depth(module):
    depth = torch.tensor([[10.0], [100.0], [1000.0]])
    views = (depth.expand(3, N_GENES), depth[[0, 2, 1]].expand(3, N_GENES))
    losses = contrastive_losses(module, views)
    assert losses["contrastive_accuracy_floor_depth"].item() == pytest.approx(1 / 3)
    assert losses["contrastive_accuracy_floor_chance"].item() == pytest.approx(1 / 3)
