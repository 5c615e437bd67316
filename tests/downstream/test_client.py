"""Another package uses cellprior from outside, through public names alone."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.metadata import version

import anndata as ad
import numpy as np
import pytest

import cellprior as cp
from tests.contract.models import blood_cells

from .install import HERE

SOURCES = sorted(HERE.glob("*/src/*/*.py"))


@pytest.fixture
def client(site, use):
    use(site)
    return importlib.import_module("methods_note")


@pytest.fixture
def adata() -> ad.AnnData:
    adata = blood_cells()[:200].copy()
    adata.layers["counts"] = adata.X
    return adata


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_packages_use_public_names_of_ours_alone(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    used = {("cellprior", name) for name in re.findall(r"\bcp\.(\w+)", ast.unparse(tree))}
    used |= {
        (f"cellprior.{room}", name) for room, name in re.findall(r"\bcp\.(\w+)\.(\w+)", ast.unparse(tree))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cellprior"):
            used |= {(node.module, alias.name) for alias in node.names}
    for module, name in used:
        assert name in importlib.import_module(module).__all__, (module, name)


def test_it_embeds_cells_and_the_record_in_the_file_says_how(client, adata, tmp_path):
    sentence = client.embed_with_note(adata, "cellplm-starter", layer="counts")
    assert sentence.startswith("Cells were embedded with CellPLM (weights cellplm-starter, sha256 ")
    assert f"by cellprior {version('cellprior')}, from " in sentence
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert client.note(ad.read_h5ad(tmp_path / "cells.h5ad"), "X_cellplm") == sentence


def test_it_sees_what_needs_no_download_and_names_what_is_not_there(client, adata):
    assert set(client.public_weights()) >= {"cellplm-starter", "scbert-starter"}
    with pytest.raises(cp.weights.WeightsError, match="No such weights"):
        client.embed_with_note(adata, "cellplm-sarter")


def test_it_loads_a_bundle_that_was_saved_before(client, adata, tmp_path):
    cp.model.CellPLM.setup_anndata(adata, layer="counts")
    model = cp.model.CellPLM.from_pretrained("cellplm-starter", adata)
    model.save_pretrained(tmp_path / "bundle")
    latent = client.embed_with_bundle(blood_cells()[:200].copy(), tmp_path / "bundle")
    np.testing.assert_allclose(latent, model.get_latent_representation(), rtol=1e-5, atol=1e-5)
