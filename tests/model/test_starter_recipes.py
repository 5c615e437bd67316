"""What the recipes of the starters share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cellprior.model import ScBERT
from cellprior.model.learning._plan import Plan
from tests.contract.models import blood_cells

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def recipes(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("_starter_fit", SCRIPTS / "_starter_fit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STEPS", 2)
    return module


class Shrink(Plan):
    """Makes the gene vectors smaller."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.module.embedder.token_embedding.weight**2).sum() * batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.module.parameters(), lr=0.1)


def test_a_recipe_trains_with_the_loop_of_the_library_and_ends_with_the_average_of_its_steps(recipes):
    adata = blood_cells()[:20, :50].copy()
    ScBERT.setup_anndata(adata)
    model = ScBERT(adata, genes=adata.var_names, n_hidden=8, n_layers=1, n_heads=2, head_dim=4)
    before = model.module.embedder.token_embedding.weight.detach().clone()
    drawn = []
    plan = Shrink(model.module, n_steps=4, lr=0.1, weight_decay=0.0)
    recipes.train(
        model, plan, lambda: drawn.append(1) or 1.0, n_train=adata.n_obs, steps=4, clip=1e9, average=0.5
    )
    assert len(drawn) == 4
    left = float((model.module.embedder.token_embedding.weight / before).detach().mean())
    assert 0.8**4 < left < 1, "the weights moved, and are not those of the last step"
