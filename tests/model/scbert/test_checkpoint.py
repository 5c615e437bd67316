"""Official checkpoints, here tiny ones that the original was run on; numbers are compared in tests/parity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cellprior.model.scbert._checkpoint import GENE_FILE, find_official, read_official
from cellprior.model.scbert._module import ScBERTModule
from cellprior.weights import WeightsError
from tests.parity.scbert_golden import Golden


@pytest.fixture
def case() -> Golden:
    return Golden.load("a")


def fine_tuned(case: Golden, n_classes: int = 3) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint that the original fine-tuned."""
    tensors = {name: tensor for name, tensor in case.tensors.items() if not name.startswith("to_out.")}
    shapes = {
        "conv1.weight": (1, 1, 1, 20), "conv1.bias": (1,),
        "fc1.weight": (512, 61), "fc1.bias": (512,),
        "fc2.weight": (128, 512), "fc2.bias": (128,),
        "fc3.weight": (n_classes, 128), "fc3.bias": (n_classes,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return tensors | {
        f"to_out.{name}": torch.randn(shape, generator=generator) / 10 for name, shape in shapes.items()
    }


def test_every_tensor_is_read_bit_for_bit_and_sizes_come_from_them(tmp_path, case):
    bundle = read_official(case.write(tmp_path))
    assert bundle.config == {
        "model": "ScBERT",
        "network": {
            "n_hidden": 20, "n_layers": 2, "n_heads": 2, "head_dim": 8, "n_bins": 5, "n_features": 16,
            "gene_vectors": "fixed", "n_official_classes": 0,
        },
    }  # fmt: skip
    assert bundle.genes["symbol"].tolist() == [f"GENE{i}" for i in range(60)]
    assert len(bundle.state_dict) == len(case.tensors) - 1  # without the counter
    stored = case.tensors["pos_emb.emb.weight"]
    assert stored.dtype == torch.float64
    assert torch.equal(bundle.state_dict["embedder.gene_vectors"], stored[:-1])


def test_a_fine_tuned_checkpoint_brings_its_classifier_in_place_of_the_bins(tmp_path, case):
    bundle = read_official(case.write(tmp_path, tensors=fine_tuned(case)))
    assert bundle.config["network"]["n_official_classes"] == 3
    module = ScBERTModule(60, **bundle.config["network"])
    module.load_state_dict(bundle.state_dict)
    assert module.classify(case.tokens).shape == (4, 3)
    with pytest.raises(RuntimeError, match="no prediction of bins"):
        module.predict_bins(torch.zeros(1, 1, 20))


def test_the_folder_and_the_prefix_of_distributed_training_make_no_difference(tmp_path, case):
    plain = case.write(tmp_path / "plain")
    prefixed = case.write(
        tmp_path / "prefixed", tensors={f"module.{name}": tensor for name, tensor in case.tensors.items()}
    )
    assert find_official(plain.parent) == find_official(plain) == plain
    first, second = (read_official(path).state_dict for path in (plain, prefixed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_gene_order_of_the_released_model_is_preferred_and_a_list_of_another_length_passed_over(
    tmp_path, case
):
    path = case.write(tmp_path, genes=False)
    (tmp_path / "other_genes.txt").write_text("A\nB\n")
    (tmp_path / "some_genes.txt").write_text("\n".join(f"X{i}" for i in range(60)))
    assert read_official(path).genes["symbol"][0] == "X0"
    (tmp_path / GENE_FILE).write_text("\n".join(f"Y{i}" for i in range(60)))
    assert read_official(path).genes["symbol"][0] == "Y0"


def test_without_gene_names_the_error_says_what_to_put_where(tmp_path, case):
    path = case.write(tmp_path, genes=False)
    with pytest.raises(
        WeightsError, match=r"vectors for 60 genes, but not their names.*no \*gene\*\.txt\. Put"
    ):
        read_official(path)
    (tmp_path / "my_genes.txt").write_text("A\nB\n")
    with pytest.raises(WeightsError, match=r"only my_genes\.txt"):
        read_official(path)


def test_unknown_tensors_are_listed(tmp_path, case):
    tensors = {**case.tensors, "head.weight": torch.zeros(2), "module.head.bias": torch.zeros(2)}
    with pytest.raises(
        WeightsError, match=r"2 tensors that scBERT does not have: head\.weight, head\.bias\."
    ):
        read_official(case.write(tmp_path, tensors=tensors))


@pytest.mark.parametrize("name", ["pos_emb.emb.weight", "token_emb.weight"])
def test_a_checkpoint_without_vectors_of_genes_or_tokens_is_refused(tmp_path, case, name):
    tensors = {key: tensor for key, tensor in case.tensors.items() if key != name}
    with pytest.raises(WeightsError, match="not a scBERT checkpoint with gene vectors"):
        read_official(case.write(tmp_path, tensors=tensors))


def test_a_class_token_with_a_vector_of_its_own_is_refused(tmp_path, case):
    tensors = case.tensors
    tensors["pos_emb.emb.weight"] = torch.ones(61, 20, dtype=torch.float64)
    with pytest.raises(WeightsError, match="position vector for the class token"):
        read_official(case.write(tmp_path, tensors=tensors))


def test_a_checkpoint_of_something_else_is_refused(tmp_path, case):
    path = case.write(tmp_path)
    torch.save({"state_dict": case.tensors}, path)
    with pytest.raises(WeightsError, match="has no 'model_state_dict'"):
        read_official(path)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_bomb_is_refused_and_not_executed(tmp_path, case):
    path = case.write(tmp_path, tensors={**case.tensors, "x": Bomb(tmp_path / "exploded")})
    with pytest.raises(WeightsError, match="nothing in it was executed"):
        read_official(path)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_with_two_checkpoints_or_none_and_a_file_of_another_name_are_refused(tmp_path, case):
    path = case.write(tmp_path)
    other = path.with_name("weights.pt")
    other.write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match=r"weights\.pt is neither a bundle .* \(\*\.pth\)"):
        find_official(other)
    path.with_name("another.pth").write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match=r"2 official checkpoints .*; give the path of one"):
        find_official(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="holds no bundle .* and 0 official checkpoints"):
        find_official(tmp_path / "empty")
