"""A GPU gives what a CPU gives, up to rounding. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cellprior.model._base import PretrainedModel
from tests.contract.models import PRETRAINED, Entry
from tests.model.multiomeclip.data import cells as multiome_cells

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
    pytest.mark.filterwarnings("ignore:After training:UserWarning"),  # two epochs are too few to be good
    pytest.mark.filterwarnings("ignore:No assay is named:UserWarning"),  # of Nicheformer
]
DEVICE, ACCELERATOR = "cuda", "gpu"
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


@pytest.fixture(params=PRETRAINED, ids=lambda entry: entry.name)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


def load(entry: Entry, device: str, **setup: Any) -> PretrainedModel:
    data = entry.data(entry.make_data())
    entry.setup(data, **setup)
    return entry.looking(entry.model.from_pretrained(entry.weights, data, device=device))


def test_the_embedding_is_that_of_a_cpu(entry, monkeypatch):
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    model = load(entry, DEVICE)
    assert model.device.type == DEVICE
    expected = load(entry, "cpu").get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(), expected, **CLOSE)
    np.testing.assert_allclose(model.get_latent_representation(batch_size=64), expected, **CLOSE)


def test_what_was_trained_on_a_gpu_gives_the_same_on_a_cpu(entry, monkeypatch, tmp_path):
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    if not entry.model.can("annotate"):
        pytest.skip("it learns no labels; what it learns is tested below")
    model = load(entry, DEVICE, batch_key="batch", labels_key="bulk_labels")
    model.train(max_epochs=2, batch_size=256, accelerator=ACCELERATOR, **QUIET)
    model.fine_tune(max_epochs=2, accelerator=ACCELERATOR, **QUIET)
    assert model.device.type == DEVICE
    model.save_pretrained(tmp_path / "bundle")
    adata = entry.make_data()
    entry.model.setup_anndata(adata, batch_key="batch", labels_key="bulk_labels")
    again = entry.model.from_pretrained(tmp_path / "bundle", adata, device="cpu")
    np.testing.assert_allclose(again.get_latent_representation(), model.get_latent_representation(), **CLOSE)
    assert np.mean(again.predict() == model.predict()) > 0.99


def test_both_modalities_are_embedded_as_on_a_cpu():
    from cellprior.model import MultiomeCLIP

    mdata = multiome_cells()
    MultiomeCLIP.setup_mudata(mdata)
    model = MultiomeCLIP(mdata, n_hidden=16, n_latent=8, n_components=(6, 8))
    model.train(max_epochs=2, batch_size=64, accelerator=ACCELERATOR, **QUIET)
    on_gpu = model.get_latent_representation()
    assert model.device.type == DEVICE
    model.to_device("cpu")
    np.testing.assert_allclose(on_gpu, model.get_latent_representation(), **CLOSE)
