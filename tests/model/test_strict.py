"""A bundle's configuration against its network and tensors, before anything is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scvi.module.base import BaseModuleClass

from cellprior.model import CellPLM, MultiomeCLIP, ScBERT, model_class
from cellprior.model._base import PretrainedModel
from cellprior.model.files._strict import few_parts, load_strictly
from cellprior.weights import WeightsError

STORED = Path(__file__).parents[1] / "compatibility"
FOLDERS = {
    CellPLM: STORED / "bundle-format-1" / "CellPLM",
    ScBERT: STORED / "bundle-format-1" / "ScBERT",
    MultiomeCLIP: STORED / "bundle-format-2" / "MultiomeCLIP",
}


def changed(cls: type[PretrainedModel], folder: Path, part: str = "network", **values: Any) -> Path:
    shutil.copytree(FOLDERS[cls], folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[part] |= values
    path.write_text(json.dumps(config))
    return folder


VALUES: list[tuple[type[PretrainedModel], str, list[Any]]] = [
    (CellPLM, "target_sum", [0, -5, 1e308, "6000", True]),
    (CellPLM, "n_hidden", [0, -16, 17, 16.0, "16", None, [16], 2**62]),
    (CellPLM, "n_heads", [0, 3, "2"]),
    (CellPLM, "dropout_rate", [1, -0.1, "0.2", None]),
    (CellPLM, "latent", ["VAE", None, ["vae"]]),
    (CellPLM, "n_batches", [-1, 3]),
    (CellPLM, "n_layers", [0, 2, 10**6]),
    (CellPLM, "colour", ["blue"]),
    (ScBERT, "n_bins", [0, 300]),
    (ScBERT, "head_dim", [0, 3, 10**6]),
    (ScBERT, "n_features", [0, 10**6, 4.5]),
    (ScBERT, "gene_vectors", ["fixed or so", 1]),
    (ScBERT, "key_max", ["gene"]),
    (ScBERT, "n_layers", [10**6]),
    (ScBERT, "n_official_classes", [-1, 10**6, 3]),
    (MultiomeCLIP, "encoder", ["vit", "mlp ", 3]),
    (MultiomeCLIP, "n_components", [6, [6], [6, 0], "66"]),
    (MultiomeCLIP, "loss", ["sigmoid", "none"]),
    (MultiomeCLIP, "mask_padding", ["yes"]),
    (MultiomeCLIP, "genomic_order", [1]),
    (MultiomeCLIP, "n_layers", [-1, 10**6]),
]


@pytest.mark.parametrize(
    ("cls", "name", "values"), VALUES, ids=lambda value: getattr(value, "__name__", None)
)
def test_an_argument_that_the_network_cannot_have_is_refused(tmp_path, cls, name, values):
    for i, value in enumerate(values):
        folder = changed(cls, tmp_path / f"{i}", **{name: value})
        with pytest.raises(WeightsError) as error:
            cls._read_weights(folder)
        assert str(folder) in str(error.value), value
        assert (
            name in str(error.value)
            or "does not fit the network" in str(error.value)
            or "layers" in str(error.value)
        )


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (CellPLM, {"kl_weight": "a"}),
        (CellPLM, {"batches": "even"}),
        (ScBERT, {"steps_since_redraw": -1}),
        (ScBERT, {"n_zero_genes": 0}),
    ],
)
def test_a_state_of_training_that_cannot_be_is_refused(tmp_path, cls, values):
    from tests.compatibility.cells import rna

    folder = changed(cls, tmp_path / "b", "training_state", **values)
    with pytest.raises(WeightsError, match=f"`training_state` in its config.json.*{next(iter(values))}"):
        cls.from_pretrained(folder, rna())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_numbers_of_another_kind_are_no_weights(tmp_path, dtype):
    folder = changed(CellPLM, tmp_path / "b")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "latent.mu.weight": tensors["latent.mu.weight"].to(dtype)}, path)
    with pytest.raises(WeightsError, match=r"latent\.mu\.weight"):
        CellPLM._read_weights(folder)


@pytest.mark.parametrize(("name", "value"), [("atac.spread", 0.0), ("rna.spread", -1.0), ("atac.idf", -0.5)])
def test_a_value_that_would_make_embeddings_of_nan_is_refused(tmp_path, name, value):
    folder = changed(MultiomeCLIP, tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.full_like(tensors[name], value)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=f"the tensor {name} has values"):
        MultiomeCLIP.from_pretrained(folder)


def test_a_value_too_large_for_the_network_is_refused(tmp_path):
    folder = changed(CellPLM, tmp_path / "b")
    bundle, _ = CellPLM._read_weights(folder)
    with torch.random.fork_rng(devices=[]):
        module = CellPLM._blank(**bundle.config["network"], genes=bundle.genes)
    state_dict = {name: x for name, x in bundle.state_dict.items() if not name.startswith("annotation.")}
    state_dict["latent.mu.weight"] = state_dict["latent.mu.weight"].double() * 1e300
    with pytest.raises(WeightsError, match=r"latent\.mu\.weight.*too large for float32"):
        load_strictly(module, state_dict, "x")


@pytest.mark.parametrize("content", ["[]", "{", '{"format_version": 1, "model": [1], "network": {}}'])
def test_weights_are_asked_for_their_model_as_strictly(tmp_path, content):
    folder = changed(CellPLM, tmp_path / "b")
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsError):
        model_class(folder)


def test_a_network_of_many_parts_is_not_made():
    made = []

    def parts():
        for _ in range(10**6):
            made.append(1)
            yield torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="far more layers than the 4 tensors"), few_parts(4):
        torch.nn.ModuleList(parts())
    assert len(made) < 1000
    torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(1000))  # nobody counts any more


class LooksAtItsNumbers(BaseModuleClass):
    """A module of a plug-in that cannot be made without memory."""

    def __init__(self, n_genes: int, *, n_latent: int = 2) -> None:
        super().__init__()
        self.n_hidden = self.n_latent = n_latent
        self.weight = torch.nn.Parameter(torch.ones(n_genes, n_latent))
        assert self.weight.detach().cpu().sum().item() > 0


def test_a_module_that_needs_its_memory_is_compared_once_it_is_there(tmp_path):
    from cellprior.model.files._strict import check_fits
    from cellprior.weights import Bundle

    class Model:
        @classmethod
        def _blank(cls, *, genes, **network):
            return LooksAtItsNumbers(len(genes), **network)

    bundle = Bundle({"weight": torch.ones(3, 2)}, {"network": {}}, [0, 1, 2], "")
    check_fits(Model, bundle, "x")
    with pytest.raises(WeightsError, match=r"weight is \(2, 2\), needed \(3, 2\)"):
        load_strictly(LooksAtItsNumbers(3), {"weight": torch.ones(2, 2)}, "x")
