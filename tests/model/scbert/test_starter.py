"""The weights that come with the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellprior.model import ScBERT, model_class
from cellprior.model.scbert._floors import BinFloors
from cellprior.model.scbert._inputs import sample_mask
from cellprior.model.scbert._loss import masked_floors, masked_losses
from tests.contract.models import blood_cells


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture
def model() -> ScBERT:
    """With cells of a set that the starter was not trained on."""
    return ScBERT.from_pretrained("scbert-starter", blood_cells())


def test_a_cell_has_the_same_vector_alone_among_four_and_in_any_order(model):
    together = model.get_latent_representation(indices=range(24))
    order = np.random.default_rng(0).permutation(24)
    for cells in ([0], [5], range(4), order):
        found = model.get_latent_representation(indices=cells, batch_size=16)
        np.testing.assert_allclose(found, together[list(cells)], rtol=1e-6, atol=1e-6)


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "bundle")
    assert model_class(tmp_path / "bundle") is model_class("scbert-starter") is ScBERT
    again = ScBERT.from_pretrained(tmp_path / "bundle", blood_cells())
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


def test_the_sampled_unexpressed_genes_and_half_the_bits_hardly_move_it(model):
    exact = model.get_latent_representation(indices=range(12))
    for options in ({"n_zero_genes": 500}, {"precision": "bfloat16"}):
        near = model.get_latent_representation(indices=range(12), **options)
        cosine = (near * exact).sum(1) / np.linalg.norm(near, axis=1) / np.linalg.norm(exact, axis=1)
        assert cosine.min() > 0.99, options


def test_of_a_panel_that_it_has_not_seen_it_knows_more_than_how_many_bins_there_are(model):
    adata = model.adata
    counts = torch.zeros(adata.n_obs, len(model.genes))
    known = model.gene_match.index >= 0
    counts[:, model.gene_match.index[known]] = torch.from_numpy(adata.X.toarray()[:, known])
    test, train = counts[:40], counts[40:]
    measured = torch.zeros(1, len(model.genes), dtype=torch.bool)
    measured[0, model.gene_match.index[known]] = True
    tokens = model.module.tokens(test)
    n_bins = model.module.n_bins
    mask = sample_mask(tokens.numpy(), np.random.default_rng(0), n_bins=n_bins)
    selected = torch.from_numpy(mask.selected)
    with torch.no_grad():
        losses = masked_losses(model.module, tokens, selected, selected)
    predictions = BinFloors.fit([{"X": train}], measured, n_bins).predict(test, tokens, selected)
    losses |= masked_floors(predictions, tokens[selected])
    # which bins are common in a panel of variable genes, it does not know: its card says so
    assert losses["masked"] < losses["masked_floor_uniform"]
    assert losses["masked_accuracy"] > 1.5 * losses["masked_accuracy_floor_uniform"]
