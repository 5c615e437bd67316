"""Our models in scvi-tools' hub: packed with a card and metadata, and loaded back from disk by scvi-tools alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from cellprior._compat import without_pulled_columns
from cellprior.model import CellPLM, MultiomeCLIP
from tests.contract.models import blood_cells
from tests.model.multiomeclip.data import QUIET, cells

pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface-hub: pip install cellprior[hub]")

from huggingface_hub import ModelCard
from scvi.hub import HubMetadata, HubModel, HubModelCardHelper


def pack(model: CellPLM | MultiomeCLIP, folder: Path) -> None:
    """As the documentation does it."""
    model.save(str(folder), save_anndata=True)
    metadata = HubMetadata.from_dir(
        str(folder), anndata_version=version("anndata"), model_parent_module="cellprior.model"
    )
    card = ModelCard("---\nlicense: bsd-3-clause\nlibrary_name: scvi-tools\n---\n\n# Mine\n")
    HubModel(str(folder), metadata=metadata, model_card=card).save()


def test_a_packed_model_is_found_loaded_with_its_data_and_embeds_as_before(tmp_path: Path):
    adata = blood_cells()[:100].copy()
    CellPLM.setup_anndata(adata, batch_key="batch")
    model = CellPLM.from_pretrained("cellplm-starter", adata)
    pack(model, tmp_path / "hub")
    written = json.loads((tmp_path / "hub" / "_scvi_required_metadata.json").read_text())
    assert (written["model_cls_name"], written["model_parent_module"]) == ("CellPLM", "cellprior.model")

    hub = HubModel(str(tmp_path / "hub"))
    assert isinstance(hub.model, CellPLM)
    assert hub.model_card.data.license == "bsd-3-clause"
    expected = model.get_latent_representation()
    np.testing.assert_allclose(hub.model.get_latent_representation(), expected, rtol=1e-5, atol=1e-5)
    assert hub.model.gene_match.n_matched == model.gene_match.n_matched


def test_a_packed_model_takes_other_data_whose_genes_have_another_order(tmp_path: Path):
    adata = blood_cells()[:100].copy()
    CellPLM.setup_anndata(adata)
    model = CellPLM.from_pretrained("cellplm-starter", adata)
    pack(model, tmp_path / "hub")
    hub = HubModel(str(tmp_path / "hub"))
    hub.load_model(adata[:, ::-1].copy())
    expected = model.get_latent_representation()
    np.testing.assert_allclose(hub.model.get_latent_representation(), expected, rtol=1e-5, atol=1e-5)


def test_a_packed_model_of_two_modalities_is_loaded_with_its_mudata(tmp_path: Path):
    mdata = cells()
    MultiomeCLIP.setup_mudata(mdata, labels_key="type")
    model = MultiomeCLIP(mdata, n_hidden=32, n_latent=16, n_components=(12, 20), dropout_rate=0.2)
    model.train(max_epochs=30, batch_size=64, train_size=0.8, **QUIET)
    with without_pulled_columns():  # mudata 0.3 announces a change whenever it writes or reads
        pack(model, tmp_path / "hub")
        again = HubModel(str(tmp_path / "hub")).model
    assert isinstance(again, MultiomeCLIP)
    np.testing.assert_allclose(
        again.get_latent_representation(), model.get_latent_representation(), rtol=1e-5, atol=1e-5
    )


def test_scvi_tools_helper_for_cards_still_knows_its_own_models_alone(tmp_path: Path):
    """When this fails, the documentation can use the helper."""
    adata = blood_cells()[:20].copy()
    model = CellPLM.from_pretrained("cellplm-starter", adata)
    model.save(str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="CellPLM not recognized"):
        HubModelCardHelper.from_dir(
            str(tmp_path / "hub"), license_info="bsd-3-clause", anndata_version=version("anndata")
        )
