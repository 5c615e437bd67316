"""Official checkpoints that hold tensors only, into bundles; those that are pickles are in the model's own folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData

from cellprior.model import CellPLM, ScBERT, convert, model_class
from cellprior.weights import WeightsError
from tests.parity.cellplm_golden import Golden as CellPLMGolden
from tests.parity.scbert_golden import Golden as ScBERTGolden


def counts(n_genes: int) -> AnnData:
    adata = AnnData(np.random.default_rng(0).poisson(1.0, (9, n_genes)).astype(np.float32))
    adata.var_names = [f"GENE{i}" for i in range(n_genes)]
    return adata


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_cellplm_checkpoint_becomes_a_bundle_that_embeds_alike(tmp_path, place):
    case = CellPLMGolden.load("vae")
    path = case.write(tmp_path / "official")
    convert(path if place == "file" else path.parent, tmp_path / "bundle")
    assert model_class(tmp_path / "bundle") is CellPLM
    model = CellPLM.from_pretrained(tmp_path / "bundle", case.adata)
    np.testing.assert_allclose(
        model.get_latent_representation(), case["one_sentence__vae_mu"], rtol=1e-5, atol=1e-5
    )
    assert path.name in (tmp_path / "bundle" / "README.md").read_text()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(path, tmp_path / "bundle")
    convert(path, tmp_path / "bundle", overwrite=True)


def test_a_scbert_checkpoint_becomes_a_bundle_that_embeds_alike(tmp_path):
    path = ScBERTGolden.load("a").write(tmp_path / "official")
    convert(path, tmp_path / "bundle")
    first, second = (ScBERT.from_pretrained(weights, counts(60)) for weights in (path, tmp_path / "bundle"))
    np.testing.assert_array_equal(second.get_latent_representation(), first.get_latent_representation())


def test_tensors_that_do_not_fit_are_an_error_before_anything_is_written(tmp_path):
    case = CellPLMGolden.load("vae")
    tensors = dict(case.tensors)
    del tensors["encoder.layers.0.norm1.weight"]
    path = case.write(tmp_path / "official", tensors=tensors)
    with pytest.raises(WeightsError, match="encoder.0.norm1.weight is missing"):
        convert(path, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["missing.ckpt", "missing.pth"])
def test_a_file_that_is_not_there_is_an_error(tmp_path, name):
    with pytest.raises(WeightsError, match="There is no checkpoint file"):
        convert(tmp_path / name, tmp_path / "bundle")


def test_global_random_states_are_left_as_they_were(tmp_path):
    path = CellPLMGolden.load("vae").write(tmp_path / "official")
    before = torch.get_rng_state()
    convert(path, tmp_path / "bundle")
    assert torch.equal(torch.get_rng_state(), before)
