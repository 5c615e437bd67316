"""Another package adds a model: it is found like ours, and a broken one harms nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch

import cellprior as cp
from cellprior.cli import main
from tests.contract.models import blood_cells

from .conftest import environment

FILES = "[{name: model.safetensors}]"
ENTRY = (
    "{type: model, model: Broken, support: ready, packaged: weights, size: 1, licence: x, citation: x, genes: x, "
    f"page: x, files: {FILES}}}"
)


@pytest.fixture
def adata() -> ad.AnnData:
    return blood_cells()[:200].copy()


def broken(
    folder: Path, code: str = "", *, registry: str | None = None, value: str = "broken:Broken"
) -> Path:
    """A folder with a plug-in installed whose package holds this code and this registry."""
    package, info = folder / "broken", folder / "broken_plugin-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(code)
    if registry is not None:
        (package / "registry.yaml").write_text(registry)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cellprior.models]\nshaky = {value}\n")
    return folder


def test_the_weights_of_a_plugin_are_listed_without_importing_it(site):
    code = (
        "import sys, json, cellprior as cp; table = cp.weights.available(); "
        "print(json.dumps([table.loc['pca-pbmc'].to_dict(), sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(site), capture_output=True, text=True, check=True
    )
    row, modules = json.loads(done.stdout)
    assert (row["model"], row["status"], row["licence"]) == ("ReferencePCA", "packaged", "CC-BY-4.0")
    assert {"reference_pca", "torch", "scvi"}.isdisjoint(modules)


def test_a_plugin_can_be_named_wherever_our_own_models_can(site, use, adata, tmp_path, capsys):
    use(site)
    assert cp.model.model_class("pca-pbmc").__name__ == "ReferencePCA"
    assert str(cp.weights.card("pca-pbmc")).startswith("# pca-pbmc\n")
    adata.write_h5ad(tmp_path / "in.h5ad")
    cp.tl.embed(adata, "pca-pbmc")
    assert adata.uns["cellprior"]["X_reference_pca"]["weights"] == "pca-pbmc"

    assert main(["list"]) == 0
    assert "pca-pbmc" in capsys.readouterr().out
    assert (
        main(["embed", str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad"), "--weights", "pca-pbmc"]) == 0
    )
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(written.obsm["X_reference_pca"], adata.obsm["X_reference_pca"])


def test_the_plugin_of_the_documentation_gives_the_principal_components_of_scanpy(site, use):
    use(site)
    adata = blood_cells()
    cp.tl.embed(adata, "pca-pbmc")
    sc.pp.normalize_total(adata, target_sum=10_000)
    sc.pp.log1p(adata)
    expected = sc.pp.pca(adata.X.toarray(), n_comps=16, svd_solver="full")
    found = adata.obsm["X_reference_pca"]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_a_plugin_learns_labels_and_calls_cells_unknown_with_our_code(site, use):
    use(site)
    adata = blood_cells()
    adata.obs["label"] = adata.obs["bulk_labels"].astype(str).str.replace("CD[48].*", "T", regex=True)
    model_class = cp.model.model_class("pca-pbmc")
    model_class.setup_anndata(adata, labels_key="label")
    model = model_class.from_pretrained("pca-pbmc", adata)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    model.fine_tune(trainable="head", max_epochs=30, lr=0.02, accelerator="cpu", **quiet)
    named = model.predict(reject=0.1)
    known = named != "unknown"
    assert 0 < known.mean() < 1
    assert (named == adata.obs["label"])[known].mean() > 0.9


def test_the_model_of_the_documentation_that_learns_beats_its_floor(site, use, tmp_path):
    use(site)
    from reference_pca._training import TrainedPCA

    adata = blood_cells()
    TrainedPCA.setup_anndata(adata, batch_key="batch")
    model = TrainedPCA(adata, n_latent=8)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        measured = {"a": list(adata.var_names), "b": list(adata.var_names)}
        options = {"plan_kwargs": {"lr": 0.02}, "measured": measured, "accelerator": "cpu", **quiet}
        model.train(max_epochs=15, batch_size=128, **options)
    error = model.history["validation_error"].iloc[-1].item()
    assert error < 0.9 * model.history["validation_error_floor_gene_mean"].iloc[-1].item()
    model.save_pretrained(tmp_path / "bundle")
    again = TrainedPCA.from_pretrained(tmp_path / "bundle", adata)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())


def test_a_plugin_that_forgets_what_the_base_needs_is_told_what(site, use, adata, monkeypatch):
    use(site)
    from reference_pca._training import TrainedPCA

    TrainedPCA.setup_anndata(adata, labels_key="bulk_labels")
    model = TrainedPCA(adata, n_latent=8)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1}

    monkeypatch.setattr(model.module, "trainable_parts", lambda: {"last": [model.module.loadings]})
    with pytest.raises(
        TypeError, match=r"trainable_parts\(\)\['last'\] of TrainedPCAModule has a Parameter; modules"
    ):
        model.fine_tune(**quiet)
    monkeypatch.setattr(model.module, "training_losses", lambda batch, **kwargs: {"error": batch["X"].mean()})
    with pytest.raises(KeyError, match="training_losses of TrainedPCAModule gives error, and no"):
        model.train(log_every_n_steps=1, **quiet)
    monkeypatch.setattr(TrainedPCA, "_finish_init", lambda self, init_locals: None)
    with pytest.raises(
        NotImplementedError, match=r"TrainedPCA.__init__ does not call self._finish_init\(locals"
    ):
        TrainedPCA(adata, n_latent=8)
    model.release()


@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        (
            "raise OSError('no such library')",
            "broken:Broken",
            r"its import fails \(OSError\('no such library'\)\)",
        ),
        ("", "broken:Broken", "its import fails .AttributeError"),
        ("class Broken: pass", "broken:Broken", "it is no subclass of cellprior.model.PretrainedModel"),
        ("", "not_there:Broken", "its import fails .ModuleNotFoundError"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_once_and_ours_work_as_before(
    tmp_path, use, adata, code, value, reason
):
    site = tmp_path / "site"
    site.mkdir()
    use(broken(site, code, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cp.tl.embed(adata, "cellplm-starter")  # nobody asked for the plug-in
    unknown = tmp_path / "bundle"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model": "Broken"}')
    with (
        pytest.warns(UserWarning, match=rf"'shaky' \({value} of broken-plugin 1.0\) is left out: {reason}"),
        pytest.raises(cp.weights.WeightsError, match="of an unknown model. Known are CellPLM, ScBERT, Multi"),
    ):
        cp.model.model_class(unknown)
    with pytest.raises(cp.weights.WeightsError):  # and no second warning
        cp.model.model_class(unknown)


@pytest.mark.parametrize(
    ("registry", "reason"),
    [
        ("datasets: [", r"its registry\.yaml cannot be read"),
        ("datasets: {tiny: {type: model}}", "missing keys"),
        (f"datasets: {{cellplm-starter: {ENTRY}}}", "weights called cellplm-starter are there already"),
    ],
)
def test_a_registry_that_is_malformed_or_takes_our_names_is_left_out_whole(tmp_path, use, registry, reason):
    names = list(cp.weights.available().index)
    folder = cp.weights.fetch("cellplm-starter")
    use(broken(tmp_path, registry=registry))
    with pytest.warns(UserWarning, match=f"'shaky' .*{reason}"):
        table = cp.weights.available()
    assert list(table.index) == names
    assert cp.weights.fetch("cellplm-starter") == folder


def test_a_registry_may_stand_alone_and_its_files_are_looked_for_beside_it(tmp_path, use):
    use(broken(tmp_path, registry=f"datasets: {{shaky-one: {ENTRY}}}"))
    (tmp_path / "broken" / "weights").mkdir()
    (tmp_path / "broken" / "weights" / "model.safetensors").touch()
    assert cp.weights.fetch("shaky-one") == tmp_path / "broken" / "weights"
