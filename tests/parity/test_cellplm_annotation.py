"""The annotation head against numbers of the original."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cellprior.model.learning._annotation_plan import NO_CLASS, AnnotationHead, annotation_loss

from .cellplm_golden import DATA

NAMES = {
    "latent.weight": "latent.layers.1.lat_2lat.0.weight",
    "latent.bias": "latent.layers.1.lat_2lat.0.bias",
    "linear.weight": "head.mlp.1.weight",
    "linear.bias": "head.mlp.1.bias",
}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    with np.load(DATA / "cellplm_annotation.npz") as file:
        return dict(file)


def test_against_cellplm_annotation_logits_cross_entropy_and_gradients(arrays):
    tensors = {ours: torch.from_numpy(arrays["state_dict/" + theirs]) for ours, theirs in NAMES.items()}
    head = AnnotationHead(64, 32, 4).eval()
    head.load_state_dict({**head.state_dict(), **tensors})
    # the original's latents are given and not its hidden states: these here lead to the same latents
    offset = arrays["out/latent"].astype(np.float64) - arrays["state_dict/" + NAMES["latent.bias"]]
    hidden = np.linalg.lstsq(arrays["state_dict/" + NAMES["latent.weight"]].astype(np.float64), offset.T)[0].T
    target = torch.from_numpy(np.where(arrays["out/loss_mask"], arrays["out/label"], NO_CLASS))

    logits = head(torch.from_numpy(hidden.astype(np.float32)))
    loss = annotation_loss(logits, target, torch.ones(4))
    loss.backward()

    known = arrays["out/loss_mask"]
    np.testing.assert_allclose(logits.detach()[known], arrays["out/logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits.argmax(1)[known], arrays["out/pred"])
    values = json.loads(str(arrays["values"]))
    assert loss.item() == pytest.approx(values["ce_loss"], rel=1e-5)
    gradients = {
        NAMES[name]: p.grad.norm().item() for name, p in head.named_parameters() if name != "latent.weight"
    }
    assert gradients == pytest.approx(values["grad_l2_eval_mode"], rel=1e-5)
