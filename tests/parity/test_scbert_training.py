"""ScBERT's loss function against one pretraining step of the original; every test is a `test_against_scbert`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellprior.model.learning._plan import restarts
from cellprior.model.scbert._loss import masked_losses

from .scbert_golden import Golden

# of that step: the norm of the gradient, and how many of the selected genes of each cell were right
GRADIENT_NORM, N_RIGHT = 2.302783727645874, [0, 0, 2, 0]


@pytest.fixture(scope="module")
def case() -> Golden:
    return Golden.load("a")


def step_of(case: Golden) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The network, and the losses with the genes that the original selected and masked."""
    # the last position is the class token; 6 is the mask, and the label of what is not to be predicted
    tokens, labels, masked = (
        case.pretraining(f"{name}_A")[:, :-1] for name in ("tokens", "labels", "masked")
    )
    # its step goes through all cells at once, with one maximum of the keys for all of them
    module = case.module(key_max="batch").train()
    return module, masked_losses(module, tokens, labels != 6, masked == 6)


def test_against_scbert_the_masked_loss_and_its_gradients(case):
    module, losses = step_of(case)
    assert losses["masked"].item() == pytest.approx(float(case.arrays["pretrain/loss"]), rel=1e-6)
    losses["masked"].backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert torch.stack([g.norm() for g in gradients]).norm().item() == pytest.approx(GRADIENT_NORM, rel=1e-5)
    attention, ours = "performer.net.layers.0.0.fn", module.encoder[0].attention
    for name, gradient in {
        "token_emb.weight": module.embedder.token_embedding.weight.grad,
        f"{attention}.to_k.weight": ours.key.weight.grad,
        f"{attention}.to_out.bias": ours.out.bias.grad,
        "to_out.weight": module.bins.weight.grad,
    }.items():
        expected = case.pretraining(f"grad.{name}")
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_against_scbert_the_accuracy_is_over_the_bins_that_a_masked_gene_can_be_in(case):
    _, losses = step_of(case)
    n_selected = (case.pretraining("labels_A") != 6).sum().item()
    assert losses["masked_accuracy"].item() * n_selected == pytest.approx(sum(N_RIGHT), abs=1e-4)


def test_against_scbert_learning_rate_by_epoch():
    by_epoch = {
        0: 1e-6, 1: 2.08e-5, 5: 1e-4, 6: 9.757729755661011e-05, 14: 3.4227024433899e-06, 15: 1e-6, 20: 9e-5,
        39: 1.5478688435163741e-06, 40: 1e-6, 45: 8.1e-5, 84: 1.1233066506748814e-06, 85: 1e-6, 90: 7.29e-5,
        99: 7.067797852641331e-05,
    }  # fmt: skip
    ours = {epoch: 1e-4 * restarts(epoch) for epoch in by_epoch}
    assert ours == pytest.approx(by_epoch, rel=1e-9)
