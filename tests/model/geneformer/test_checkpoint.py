"""Folders and dictionaries of the authors, here tiny ones that the original was run on; numbers are in tests/parity."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cellprior.genes import GeneMatchError
from cellprior.model import CellPLM, Geneformer, NotCountsError, convert, model_class
from cellprior.model.geneformer._checkpoint import find_official, network, read_official
from cellprior.model.geneformer._vocabulary import V1_TOKENS, find_vocabulary, shipped
from cellprior.weights import WeightsError, read_bundle, sha256
from tests.contract.shared import Bomb
from tests.parity.geneformer_golden import Golden


@pytest.fixture(params=["v1", "v2"])
def case(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


def change(path: Path, **changes: object) -> None:
    """Change a JSON file, or a pickled dictionary."""
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    else:
        path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), **changes}))


def dictionary(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}*.pkl")
    return path


def test_the_folder_and_the_file_in_it_are_recognised_and_other_folders_with_a_config_are_not(tmp_path, case):
    path = case.write(tmp_path / "official")
    assert model_class(path.parent) is model_class(path) is Geneformer
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    (other / "model.safetensors").write_bytes(path.read_bytes())
    for cls in (Geneformer, CellPLM):
        with pytest.raises(WeightsError, match="holds no Geneformer|no bundle"):
            cls.from_pretrained(other, case.adata())
    with pytest.raises(WeightsError, match="of an unknown model"):
        model_class(other)
    with pytest.raises(WeightsError, match="official checkpoints"):
        CellPLM.from_pretrained(path.parent, case.adata())


def test_a_bundle_holds_the_medians_and_all_names_and_embeds_alike(tmp_path, case):
    path = case.write(tmp_path / "official")
    model = Geneformer.from_pretrained(path.parent, case.adata())
    expected = model.get_latent_representation()
    assert model.pretrained_["sha256"] == sha256(
        path, path.parent / "config.json", *path.parent.glob("*_dict*.pkl")
    )
    model.save_pretrained(tmp_path / "bundle")
    convert(path, tmp_path / "converted")
    for bundle in (tmp_path / "bundle", tmp_path / "converted"):
        assert model_class(bundle) is Geneformer
        again = Geneformer.from_pretrained(bundle, case.adata())
        np.testing.assert_array_equal(again.get_latent_representation(), expected)
        again.release()
        stored = read_bundle(bundle)
        assert stored.state_dict["gene_scale"].dtype == torch.float64
        retired = stored.genes.set_index("ensembl_id").loc["ENSG00000152795", "previous_symbols"]
        assert retired == "ENSG00000990000"
        assert stored.genes["symbol"].tolist() == [f"SYM{i}" for i in range(375)]
    model.release()


def test_retired_ids_and_versions_and_symbols_count_as_the_gene_and_are_summed(tmp_path, case):
    case.write(tmp_path)
    adata = case.adata()
    model = Geneformer.from_pretrained(tmp_path, adata)
    assert model.gene_match.routes["retired_id"] == 4
    assert model.gene_match.n_summed == 2  # a retired id beside its gene, and one id on two columns
    expected = model.get_latent_representation()
    ids = model.genes["ensembl_id"].to_numpy()[model.gene_match.index]
    symbols = model.genes["symbol"].to_numpy()[model.gene_match.index]
    for names in (ids + ".12", symbols):
        renamed = case.adata()
        renamed.var["ensembl_id"] = np.where(model.gene_match.index >= 0, names, "lost")
        np.testing.assert_array_equal(model.get_latent_representation(renamed), expected)
    model.release()


def test_dictionaries_of_another_version_are_refused_by_their_sizes(tmp_path):
    Golden.load("v2").write(tmp_path / "v2")
    path = Golden.load("v1").write(tmp_path / "v1", dictionaries=tmp_path / "unused")
    for file in (tmp_path / "v2").glob("*.pkl"):
        file.rename(tmp_path / "v1" / file.name)
    with pytest.raises(
        WeightsError, match=r"has 377 tokens, the dictionary in .* 379: .* do not belong together"
    ):
        read_official(path)


def test_a_network_of_v1_brings_its_vocabulary_and_v2_says_what_to_get(tmp_path):
    vocabulary = find_vocabulary(tmp_path, V1_TOKENS)
    assert len(vocabulary.genes) == 25_424
    assert vocabulary.scale.min() == pytest.approx(0.0947, abs=1e-4)
    assert vocabulary.scale.max() == pytest.approx(634, abs=1)
    assert not vocabulary.special
    assert set(shipped().genes["symbol"]) >= {"CD3D", "MS4A1", "GAPDH", "ENSGR0000002586"}
    (tmp_path / "ensembl_mapping_dict_gc30M.pkl").write_bytes(
        pickle.dumps({"ENSG00000999999": "ENSG00000000003", "ENSG00000000003": "ENSG00000000003"})
    )
    genes = find_vocabulary(tmp_path, V1_TOKENS).genes
    assert (
        genes["previous_symbols"][genes["ensembl_id"] == "ENSG00000000003"].item().endswith("ENSG00000999999")
    )
    with pytest.raises(WeightsError, match=r"20,275 tokens.*gene_median_dictionary_gc104M\.pkl"):
        find_vocabulary(tmp_path, 20_275)
    with pytest.raises(WeightsError, match="nothing there says which genes they are"):
        find_vocabulary(tmp_path, 30_522)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("token_dictionary", {"ENSG00000999998": 5}, "is not Geneformer's"),
        ("token_dictionary", {"ENSG00000000001": 377}, "is not Geneformer's"),  # not in the order of names
        ("token_dictionary", {"<mask>": 0}, "is not Geneformer's"),
        ("gene_median_dictionary", {"ENSG00000006831": 0.0}, "no median above 0, the first ENSG00000006831"),
        ("gene_median_dictionary", {"ENSG00000006831": float("nan")}, "no median above 0"),
        ("gene_median_dictionary", {"ENSG00000006831": "much"}, "no median above 0"),
    ],
)
def test_a_dictionary_with_other_contents_is_refused(tmp_path, name, changes, message):
    path = Golden.load("v1").write(tmp_path)
    change(dictionary(tmp_path, name), **changes)
    with pytest.raises(WeightsError, match=message):
        read_official(path)


def test_a_dictionary_that_is_missing_or_there_twice_or_cut_or_a_program_is_refused(tmp_path):
    path = Golden.load("v1").write(tmp_path)
    median = dictionary(tmp_path, "gene_median_dictionary")
    content = median.read_bytes()
    median.unlink()
    with pytest.raises(WeightsError, match=r"put gene_median_dictionary_gc30M\.pkl beside it"):
        read_official(path)
    median.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        read_official(path)
    median.write_bytes(pickle.dumps({"a": Bomb(tmp_path / "exploded")}))
    with pytest.raises(WeightsError, match="nothing in it was executed"):
        read_official(path)
    assert not (tmp_path / "exploded").exists()
    median.write_bytes(content)
    (tmp_path / "gene_median_dictionary_gc104M.pkl").write_bytes(content)
    with pytest.raises(WeightsError, match="leave the one that the network was trained with"):
        read_official(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and 'relu' in all Geneformers"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_size": "32"}, "hidden_size is '32'; a whole number above 0"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_the_config_of_another_network_is_refused_with_its_field(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        network({**Golden.load("v1").config, **changes}, tmp_path / "config.json")


def test_every_tensor_is_used_or_the_error_lists_it(tmp_path):
    case = Golden.load("v1")
    path = case.write(tmp_path)

    def refused(message: str, **tensors: torch.Tensor) -> None:
        save_file(case.tensors | tensors, path)
        with pytest.raises(WeightsError, match=message):
            Geneformer.from_pretrained(tmp_path, case.adata())

    refused("1 tensors that Geneformer does not have: lm_head.weight", **{"lm_head.weight": torch.zeros(2)})
    refused("fine-tuned with the authors' code", **{"classifier.weight": torch.zeros(2)})
    refused("to which it is tied", **{"cls.predictions.decoder.weight": torch.zeros(377, 32)})
    refused(r"gene_bias is \(5,\), needed \(377,\)", **{"cls.predictions.bias": torch.zeros(5)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="damaged or truncated"):
        read_official(path)
    path.unlink()
    torch.save({"bert": Bomb(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="nothing in it was executed"):
        read_official(find_official(tmp_path))
    assert not (tmp_path / "exploded").exists()


def test_log_values_and_ids_of_mouse_are_refused(tmp_path, case):
    case.write(tmp_path)
    model = Geneformer.from_pretrained(tmp_path, case.adata())
    logged = case.adata()
    logged.X = logged.X.log1p()
    with pytest.raises(NotCountsError, match="is not an integer"):
        model.get_latent_representation(logged)
    mouse = case.adata()
    mouse.var["ensembl_id"] = [f"ENSMUSG{i:011d}" for i in range(mouse.n_vars)]
    with pytest.raises(GeneMatchError, match="mouse"):
        model.get_latent_representation(mouse)
    model.release()
