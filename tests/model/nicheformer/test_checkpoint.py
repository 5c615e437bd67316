"""Files of the authors and of the hub, here tiny ones that the original was run on; numbers are in tests/parity."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cellprior.model import CellPLM, Nicheformer, convert, model_class
from cellprior.model.nicheformer._checkpoint import network, read_hub
from cellprior.model.nicheformer._vocabulary import find_vocabulary
from cellprior.weights import WeightsError, read_bundle
from tests.contract.shared import Bomb
from tests.parity.nicheformer_golden import KEYS, Golden


@pytest.fixture(scope="module")
def case() -> Golden:
    return Golden()


def test_the_hubs_folder_and_the_file_in_it_are_recognised_and_no_other(tmp_path, case):
    path = case.write(tmp_path / "hub")
    assert model_class(path) is model_class(path.parent) is Nicheformer
    (path.parent / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(WeightsError, match="of an unknown model"):
        model_class(path)
    with pytest.raises(WeightsError, match="holds no Nicheformer"):
        Nicheformer.from_pretrained(path, case.adata())


def test_the_authors_file_needs_trust_and_becomes_the_same_bundle_as_the_hubs(tmp_path, case):
    path = case.write_lightning(tmp_path / "authors")
    with pytest.raises(WeightsError, match=r"numpy\S+scalar(.|\n)*trust=True"):
        convert(path, tmp_path / "bundle")
    with pytest.raises(WeightsError, match="cellprior.model.convert"):
        Nicheformer.from_pretrained(path, case.adata())
    with pytest.raises(WeightsError, match="Nicheformer can be made into a bundle"):
        model_class(path)
    convert(path, tmp_path / "bundle", trust=True)
    convert(case.write(tmp_path / "hub"), tmp_path / "other")
    one, other = read_bundle(tmp_path / "bundle"), read_bundle(tmp_path / "other")
    assert one.config["network"] == other.config["network"]
    assert one.genes.equals(other.genes)
    assert one.state_dict.keys() == other.state_dict.keys()
    assert all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)
    assert one.state_dict["gene_means"].dtype == torch.float64
    assert model_class(tmp_path / "bundle") is Nicheformer
    assert "nicheformer.ckpt" in one.card


def test_nothing_in_the_authors_file_is_executed(tmp_path, case):
    path = case.write_lightning(tmp_path, callbacks=Bomb(tmp_path / "exploded"))
    with pytest.raises(WeightsError, match="which no checkpoint needs|No checkpoint needs"):
        convert(path, tmp_path / "bundle", trust=True)
    assert not (tmp_path / "exploded").exists()


def test_every_tensor_is_used_or_known_to_be_of_no_use_or_listed(tmp_path, case):
    path = case.write(tmp_path)
    tensors = load_file(path)

    def refused(message: str, **changes: torch.Tensor) -> None:
        save_file(tensors | changes, path)
        with pytest.raises(WeightsError, match=message):
            Nicheformer.from_pretrained(tmp_path, case.adata())

    refused(
        "1 tensors that the pretrained Nicheformer does not have: head.weight",
        **{"head.weight": torch.zeros(2)},
    )
    refused("1 tensors that the pretrained", **{"nicheformer.position": torch.zeros(2)})
    refused(r"gene_logits.bias is \(5,\), needed \(296,\)", **{"classifier_head.bias": torch.zeros(5)})
    refused(
        "not three projections", **{"nicheformer.encoder.layers.0.self_attn.in_proj_bias": torch.zeros(95)}
    )
    refused(
        r"embedder.tokens.weight is \(300, 32\)", **{"nicheformer.embeddings.weight": torch.zeros(300, 32)}
    )
    save_file({name: x for name, x in tensors.items() if "norm2" not in name}, path)
    with pytest.raises(WeightsError, match="norm2.bias is missing"):
        Nicheformer.from_pretrained(tmp_path, case.adata())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="damaged or truncated"):
        read_hub(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nheads": None}, "nheads is None; a whole number above 0"),
        ({"nheads": 5}, "no multiple of nheads"),
        ({"learnable_pe": False}, "learnable_pe is False, and True in the released"),
        ({"assay": False}, "assay is False"),
        ({"n_tokens": 30}, "the first 30 are no genes"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_arguments_of_another_network_are_refused_by_name(tmp_path, case, changes, message):
    with pytest.raises(WeightsError, match=message):
        network({**case.config, **changes}, tmp_path / "config.json")


def test_means_and_genes_of_another_vocabulary_are_refused(tmp_path, case):
    case.write(tmp_path)
    path = tmp_path / "dissociated_mean_script.npy"
    means = np.load(path)
    for wrong, message in (
        (
            means[:-1],
            r"float64 of shape \(265,\), and so belongs to another vocabulary; needed are the means of its 266",
        ),
        (np.full(266, np.nan), "infinite means, or none at all"),
        (np.where(np.arange(266) == 5, np.inf, means), "infinite means"),
        (means.astype(str), "belongs to another vocabulary"),
    ):
        np.save(path, wrong)
        with pytest.raises(WeightsError, match=message):
            find_vocabulary(tmp_path, 296)
    np.save(path, np.array([{}, Bomb(tmp_path / "exploded")], dtype=object), allow_pickle=True)
    with pytest.raises(WeightsError, match="cannot be read as an array of numbers"):
        find_vocabulary(tmp_path, 296)
    assert not (tmp_path / "exploded").exists()
    for file in tmp_path.glob("*.npy"):
        file.unlink()
    with pytest.raises(WeightsError, match="none of the means"):
        find_vocabulary(tmp_path, 296)
    with pytest.raises(WeightsError, match="has 266 genes, the network 267"):
        find_vocabulary(tmp_path, 297)
    (tmp_path / "model.h5ad").write_bytes(b"no file of HDF5")
    with pytest.raises(WeightsError, match="cannot be read as an h5ad file"):
        find_vocabulary(tmp_path, 296)
    (tmp_path / "model.h5ad").unlink()
    with pytest.raises(WeightsError, match=r"put model\.h5ad beside it"):
        find_vocabulary(tmp_path, 296)


def test_a_network_of_the_authors_size_brings_its_vocabulary_along(tmp_path):
    vocabulary = find_vocabulary(tmp_path, 20_340)
    assert len(vocabulary.genes) == 20_310
    assert vocabulary.genes["ensembl_id"].str.startswith("ENSMUSG").sum() == 151
    assert vocabulary.means.shape == (5, 20_310)


def test_a_model_and_its_bundle_keep_what_genes_are_divided_by(tmp_path, case):
    case.write(tmp_path / "hub")
    adata = case.adata()
    Nicheformer.setup_anndata(adata, **KEYS)
    model = Nicheformer.from_pretrained(tmp_path / "hub", adata)
    expected = model.get_latent_representation(gene_scale="rounded", pooling="genes")
    model.save_pretrained(tmp_path / "bundle")
    again = Nicheformer.from_pretrained(tmp_path / "bundle", adata)
    found = again.get_latent_representation(gene_scale="rounded", pooling="genes")
    np.testing.assert_array_equal(found, expected)
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config["network"]["gene_scale"] == "clean"
    with pytest.raises(WeightsError, match="holds a Nicheformer"):
        CellPLM.from_pretrained(tmp_path / "bundle", case.adata())
    again.release()
    model.release()
