"""Sizes of new networks, of minibatches and of trainings, where nobody gives them."""

from __future__ import annotations

import pandas as pd
import pytest

import cellprior as cp
from cellprior.model import _base
from cellprior.model.learning._fit import warn_above_floor
from cellprior.model.learning._training import default_batch_size, default_epochs
from tests.contract.models import blood_cells

SIZED = ("CellPLM", "ScBERT", "Geneformer", "ScGPT", "Nicheformer", "UCE")


@pytest.fixture(scope="module")
def adata():
    adata = blood_cells()[:40].copy()
    cp.model.CellPLM.setup_anndata(adata)
    return adata


@pytest.mark.parametrize("name", SIZED)
def test_both_sizes_name_the_same_arguments_and_these_have_no_other_default(name):
    cls = getattr(cp.model, name)
    assert set(cls.sizes) == {"small", "released"}
    assert set(cls.sizes["small"]) == set(cls.sizes["released"])
    small, released = (
        cls(genes=[f"GENE{i}" for i in range(30)], size=size) for size in ("small", "released")
    )
    for model, size in ((small, "small"), (released, "released")):
        assert cls.sizes[size].items() <= model._network().items()
    n_small, n_released = (sum(p.numel() for p in m.module.parameters()) for m in (small, released))
    assert 4 * n_small < n_released


def test_few_cells_have_a_small_network_and_many_the_released(adata, monkeypatch):
    sizes = cp.model.CellPLM.sizes
    assert sizes["small"].items() <= cp.model.CellPLM(adata)._network().items()
    assert sizes["released"].items() <= cp.model.CellPLM(adata, size="released")._network().items()
    monkeypatch.setattr(_base, "MANY", 40)
    assert sizes["released"].items() <= cp.model.CellPLM(adata)._network().items()


def test_a_size_that_is_given_leaves_the_others_as_they_always_were(adata):
    network = cp.model.CellPLM(adata, n_hidden=64, n_layers=1)._network()
    assert (network["n_hidden"], network["n_layers"], network["n_latent"]) == (64, 1, 512)
    assert cp.model.CellPLM(adata, n_hidden=64, size="small")._network()["n_latent"] == 48


def test_a_saved_network_keeps_its_size_whatever_data_it_meets(adata, tmp_path, monkeypatch):
    model = cp.model.CellPLM(adata)
    model.is_trained_ = True
    model.save(tmp_path / "saved")
    model.save_pretrained(tmp_path / "bundle")
    monkeypatch.setattr(_base, "MANY", 0)
    for again in (
        cp.model.CellPLM.load(tmp_path / "saved", adata),
        cp.model.CellPLM.from_pretrained(tmp_path / "bundle", adata),
    ):
        assert again._network() == model._network()


def test_an_unknown_size_is_refused(adata):
    with pytest.raises(ValueError, match="size='huge' is not known; choose one of 'small', 'released'"):
        cp.model.CellPLM(adata, size="huge")


def test_minibatches_and_epochs_follow_the_number_of_cells():
    assert [default_batch_size(n, None) for n in (40, 500, 2_000, 9_000, 10_000, 10**6)] == [
        32, 32, 64, 256, 512, 512,
    ]  # fmt: skip
    assert default_batch_size(1_000, 0.5) == 32
    assert [default_epochs(n) for n in (40, 20_000, 40_000, 10**6)] == [100, 100, 50, 10]


def test_a_model_above_its_floor_is_told_what_to_change():
    columns = {"validation_loss": 3.0, "validation_masked": 3.0, "validation_masked_floor_gene_means": 2.0}
    history = {name: pd.DataFrame({name: [value]}) for name, value in columns.items()}

    def said(**sizes: int) -> str:
        with pytest.warns(UserWarning, match="masked on held-out cells is 3, no better than") as caught:
            warn_above_floor(history, **sizes)
        return str(caught[0].message)

    few_steps = said(n_parameters=100, n_cells=50, n_steps=20)
    assert "It took 20 steps: raise max_epochs" in few_steps and "size=" not in few_steps
    too_large = said(n_parameters=38_000_000, n_cells=450, n_steps=5_000)
    assert '38,000,000 parameters for 450 cells: size="small"' in too_large and "steps" not in too_large
    assert "Else try another lr" in said(n_parameters=100, n_cells=50, n_steps=5_000)
