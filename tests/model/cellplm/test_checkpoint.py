"""Official checkpoints, here a tiny one that the original was run on; numbers are compared in tests/parity."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cellprior.model import CellPLM, model_class
from cellprior.model.cellplm._checkpoint import read_official
from cellprior.weights import WeightsError
from tests.parity.cellplm_golden import Golden


@pytest.fixture
def golden_vae() -> Golden:
    return Golden.load("vae")


def embed(path: Path, case: Golden) -> np.ndarray:
    model = CellPLM.from_pretrained(path, case.adata)
    latent = model.get_latent_representation()
    model.release()
    return latent


@pytest.mark.parametrize("latent", ["vae", "gmvae"])
def test_every_tensor_is_read_under_our_name(tmp_path, latent):
    case = Golden.load(latent)
    bundle = read_official(case.write(tmp_path))
    assert bundle.config["network"]["latent"] == latent
    assert bundle.genes["ensembl_id"].tolist() == case.config["gene_list"]
    n_unused = sum(name.startswith(("embedder.norm0.", "embedder.pe_enc.")) for name in case.tensors)
    assert len(bundle.state_dict) == len(case.tensors) - n_unused


def test_the_folder_of_a_checkpoint_and_the_prefix_of_distributed_training_make_no_difference(
    tmp_path, golden_vae
):
    plain = golden_vae.write(tmp_path / "plain")
    prefixed = golden_vae.write(
        tmp_path / "prefixed",
        tensors={f"module.{name}": tensor for name, tensor in golden_vae.tensors.items()},
    )
    reference = embed(plain, golden_vae)
    np.testing.assert_array_equal(embed(plain.parent, golden_vae), reference)
    np.testing.assert_array_equal(embed(prefixed, golden_vae), reference)
    assert model_class(plain) is model_class(plain.parent) is CellPLM


def test_an_unknown_tensor_is_listed(tmp_path, golden_vae):
    tensors = {**golden_vae.tensors, "head.weight": torch.zeros(2), "module.head.bias": torch.zeros(2)}
    with pytest.raises(
        WeightsError, match=r"2 tensors that .* not have: head\.weight, head\.bias\. .*task head"
    ):
        embed(golden_vae.write(tmp_path, tensors=tensors), golden_vae)


def test_a_missing_tensor_and_one_of_another_shape_are_listed(tmp_path, golden_vae):
    tensors = golden_vae.tensors
    del tensors["encoder.layers.1.norm2.bias"]
    tensors["latent.layers.1.hid_2mu.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError) as error:
        embed(golden_vae.write(tmp_path, tensors=tensors), golden_vae)
    assert "encoder.1.norm2.bias is missing; latent.mu.bias is (3,), needed (16,)" in str(error.value)


@pytest.mark.parametrize(("latent", "says"), [("vae", "gmvae"), ("gmvae", "vae")])
def test_a_configuration_of_the_other_latent_is_refused_by_name(tmp_path, latent, says):
    case = Golden.load(latent)
    with pytest.raises(WeightsError, match=f"latent_mod='{says}', the checkpoint holds a '{latent}' latent"):
        embed(case.write(tmp_path, latent_mod=says), case)


@pytest.mark.parametrize(
    ("key", "value"), [("enc_mod", "transformer"), ("dec_layers", 3), ("norm", "batchnorm"), ("enc_head", 4)]
)
def test_a_network_that_was_never_released_is_refused_and_the_setting_named(tmp_path, golden_vae, key, value):
    with pytest.raises(WeightsError, match=f"{key}={value!r}; .*released models"):
        embed(golden_vae.write(tmp_path, **{key: value}), golden_vae)


def test_a_checkpoint_without_its_configuration_says_which_file_is_needed(tmp_path, golden_vae):
    path = golden_vae.write(tmp_path)
    (tmp_path / "tiny_vae.config.json").unlink()
    with pytest.raises(WeightsError, match=r"tiny_vae\.best\.ckpt needs tiny_vae\.config\.json beside it"):
        embed(path, golden_vae)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"gene_list": ["a"]}'], ids=["half", "a list", "keys missing"]
)
def test_a_broken_configuration_is_an_error_of_the_weights(tmp_path, golden_vae, content):
    path = golden_vae.write(tmp_path)
    (tmp_path / "tiny_vae.config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"tiny_vae\.config\.json"):
        embed(path, golden_vae)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, golden_vae, share):
    path = golden_vae.write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"tiny_vae\.best\.ckpt is (truncated|refused)"):
        embed(path, golden_vae)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_bomb_beside_a_good_configuration_is_refused_and_not_executed(tmp_path, golden_vae):
    path = golden_vae.write(tmp_path, tensors={**golden_vae.tensors, "x": Bomb(tmp_path / "exploded")})
    with pytest.raises(WeightsError, match="nothing in it was executed"):
        embed(path, golden_vae)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)  # the bomb is live
    assert (tmp_path / "exploded").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path, golden_vae):
    path = golden_vae.write(tmp_path)
    torch.save({"state_dict": golden_vae.tensors}, path)
    with pytest.raises(WeightsError, match="has no 'model_state_dict': it is not a CellPLM checkpoint"):
        embed(path, golden_vae)


def test_a_folder_with_two_checkpoints_or_none_and_a_file_of_another_name_are_refused(tmp_path, golden_vae):
    path = golden_vae.write(tmp_path)
    other = path.with_name("weights.pt")
    other.write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match=r"weights\.pt is neither a bundle .* \(\*\.best\.ckpt\)"):
        embed(other, golden_vae)
    path.with_name("another.best.ckpt").write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match=r"2 official checkpoints .*; give the path of one"):
        embed(tmp_path, golden_vae)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="holds no bundle .* and 0 official checkpoints"):
        embed(tmp_path / "empty", golden_vae)
    with pytest.raises(WeightsError, match="of an unknown model"):
        model_class(other)
