"""scripts/pretrain.py, on a collection of made-up cells in several shards."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from cellprior.model import CellPLM
from tests.contract.models import blood_cells

ROOT = Path(__file__).parents[2]
annbatch = pytest.importorskip("annbatch")
zarr = pytest.importorskip("zarr")
# annbatch and anndata announce many changes to come; a model of a few steps is above its floors
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "scripts" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collection")
    adata = blood_cells()[:, :300].copy()
    del adata.layers["log"]
    adata.write_h5ad(folder / "cells.h5ad")
    cells = annbatch.DatasetCollection(zarr.open_group(folder / "cells.zarr", mode="w"))
    cells.add_adatas(
        [folder / "cells.h5ad"], dataset_size=300, shuffle_chunk_size=10, rng=np.random.default_rng(0)
    )
    assert len(list(cells)) > 1
    return folder / "cells.zarr"


def command(collection: Path, out: Path, *more: str) -> list[str]:
    small = "n_hidden=8 n_layers=1 n_heads=2 n_latent=4".split()
    options = f"--data {collection} --out {out} --section 200 --batch-size 32 --held-out 0.2 --accelerator cpu".split()
    return ["--model", "cellplm", *options, "--network", *small, "--plan", "lr=0.01", *more]


def test_a_training_that_was_cut_short_ends_with_the_weights_of_one_that_was_not(
    script, collection, tmp_path, monkeypatch
):
    kept = blood_cells()[:120]
    del kept.layers["log"]
    kept.obs["cell_type"] = np.where(np.asarray(kept[:, "CD3D"].X.todense()).ravel() > 0, "T cell", "other")
    kept.write_h5ad(tmp_path / "kept.h5ad")
    judged = ["--evaluate", str(tmp_path / "kept.h5ad"), "--labels-key", "cell_type"]
    assert script.main(command(collection, tmp_path / "whole", *judged)) == 0
    bundle = tmp_path / "whole" / "bundle"
    log = pd.read_csv(tmp_path / "whole" / "training.csv")
    assert log["section"].tolist() == list(range(len(log))) and len(log) > 2
    assert log["validation_reconstruction_floor_gene_means"].notna().all()
    card = (bundle / "README.md").read_text()
    assert "Labels of kept, which was not trained on" in card and "| whole | linear probe |" in card
    for word in ("floor_gene_means", "Hidden genes of held-out cells", "| gene_means |", '"section": 200'):
        assert word in card

    monkeypatch.setattr(script, "judge", lambda *args: {})
    save = script.Sections.on_train_epoch_end

    def save_and_fall(self, trainer, plan):
        save(self, trainer, plan)
        if trainer.current_epoch == 1:
            raise RuntimeError("the power is gone")

    monkeypatch.setattr(script.Sections, "on_train_epoch_end", save_and_fall)
    with pytest.raises(RuntimeError, match="the power is gone"):
        script.main(command(collection, tmp_path / "cut"))
    monkeypatch.setattr(script.Sections, "on_train_epoch_end", save)
    assert not (tmp_path / "cut" / "bundle").exists()
    assert script.main(command(collection, tmp_path / "cut")) == 0
    expected, found = (
        load_file(folder / "bundle" / "model.safetensors") for folder in (bundle.parent, tmp_path / "cut")
    )
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    columns = [name for name in log if name != "cells_per_second"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "cut" / "training.csv")[columns], log[columns])

    assert script.main(command(collection, tmp_path / "cut", "--seed", "1")) == 2  # another training
    adata = blood_cells()
    assert CellPLM.from_pretrained(bundle, adata).get_latent_representation().shape == (adata.n_obs, 4)
    assert json.loads((tmp_path / "cut" / "plan.json").read_text())["network"]["n_hidden"] == 8
