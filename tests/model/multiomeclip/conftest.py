from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mudata import MuData

from cellprior.model.multiomeclip import MultiomeCLIP

from .data import QUIET, cells


@pytest.fixture(scope="session")
def trained() -> MultiomeCLIP:
    """A model that has learned the made-up types; tests leave it as it is."""
    torch.manual_seed(0)
    mdata = cells()
    MultiomeCLIP.setup_mudata(mdata, labels_key="type")
    model = MultiomeCLIP(mdata, n_hidden=32, n_latent=16, n_components=(12, 20), dropout_rate=0.2)
    model.train(max_epochs=30, batch_size=64, train_size=0.8, thin_to=1.0, **QUIET)  # of one depth
    return model


@pytest.fixture
def mdata() -> MuData:
    return cells()


@pytest.fixture(scope="session")
def latent(trained: MultiomeCLIP) -> dict[str, np.ndarray]:
    """Embedding of the attached data by modality."""
    return {name: trained.get_latent_representation(modality=name) for name in ("rna", "atac", "joint")}


@pytest.fixture(scope="session")
def bundle(trained: MultiomeCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of that model; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("weights") / "bundle"
    trained.save_pretrained(folder)
    return folder
