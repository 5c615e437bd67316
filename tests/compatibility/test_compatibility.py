"""What older versions wrote is still read, and gives the numbers that it gave then."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cellprior as cp
from cellprior.weights._bundle import FORMAT_VERSION
from tests.compatibility.cells import multiome, rna

HERE = Path(__file__).parent
BUNDLES = sorted(path.parent for path in HERE.glob("bundle-format-*/*/expected.npz"))
SAVES = sorted(path.parent for path in HERE.glob("save-*/*/expected.npz"))


def name_of(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def check(model: Any, folder: Path) -> None:
    """Compare with what the version that wrote it found."""
    with np.load(folder / "expected.npz") as numbers:
        np.testing.assert_allclose(model.get_latent_representation(), numbers["latent"], rtol=1e-3, atol=1e-4)
        if "named" in numbers:
            np.testing.assert_allclose(
                model.predict(soft=True).to_numpy(), numbers["probability"], rtol=1e-3, atol=1e-4
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that all are unknown, should it be so
                assert model.predict(reject=0.3).tolist() == numbers["named"].tolist()


def cells(name: str) -> Any:
    return multiome() if name == "MultiomeCLIP" else rna()


def test_there_is_a_bundle_of_every_format_and_a_saved_model_of_every_kind():
    formats = {int(folder.parent.name.rpartition("-")[2]) for folder in BUNDLES}
    assert formats == set(range(1, FORMAT_VERSION + 1))
    for folders in (BUNDLES, SAVES):
        assert {folder.name for folder in folders} == {"CellPLM", "ScBERT", "MultiomeCLIP", "UCE"}
    for folder in BUNDLES:
        config = json.loads((folder / "config.json").read_text())
        assert folder.parent.name == f"bundle-format-{config['format_version']}"


@pytest.mark.parametrize("folder", BUNDLES, ids=name_of)
def test_a_bundle_of_an_older_version_gives_the_same_numbers(folder):
    data = cells(folder.name)
    model_class = cp.model.model_class(folder)
    assert model_class.__name__ == folder.name
    if folder.name != "MultiomeCLIP":
        model_class.setup_anndata(data, batch_key="sample")
    check(model_class.from_pretrained(folder, data, device="cpu"), folder)


@pytest.mark.parametrize("folder", SAVES, ids=name_of)
def test_a_model_that_an_older_version_saved_gives_the_same_numbers(folder):
    model = getattr(cp.model, folder.name).load(str(folder), cells(folder.name), accelerator="cpu")
    check(model, folder)
