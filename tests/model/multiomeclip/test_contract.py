"""What every model promises, for the one that reads a MuData."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from mudata import MuData
from safetensors.torch import load_file, save_file

from cellprior._compat import without_pulled_columns
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.weights import WeightsError

from .data import N_CELLS, QUIET, cells, multiome, part, peak_names

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OLD_BUNDLE = Path(__file__).parent / "stored" / "bundle_with_peaks_in_config"
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")

IN_A_FRESH_PROCESS = """
import sys, warnings
import numpy as np
from anndata import read_h5ad
from cellprior.model.multiomeclip import MultiomeCLIP
model = getattr(MultiomeCLIP, sys.argv[1])(sys.argv[2], *([False] if sys.argv[1] == "load" else []))
np.save(sys.argv[4], model.get_latent_representation(read_h5ad(sys.argv[3])))
"""


@pytest.mark.parametrize("how", ["load", "from_pretrained"])
def test_a_saved_model_gives_the_same_embedding_in_a_fresh_process(trained, latent, mdata, tmp_path, how):
    if how == "load":
        trained.save(str(tmp_path / "model"))
    else:
        trained.save_pretrained(tmp_path / "model")
    mdata.mod["rna"].write_h5ad(tmp_path / "rna.h5ad")
    arguments = [how, tmp_path / "model", tmp_path / "rna.h5ad", tmp_path / "z.npy"]
    subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, *map(str, arguments)],
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "CELLPRIOR_OFFLINE": "1"},
    )
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), latent["rna"], **CLOSE)


def backed(mdata: MuData, path: Path) -> MuData:
    with without_pulled_columns():
        mdata.write(path)
        return md.read_h5mu(path, backed="r")


def test_data_in_a_file_are_read_a_few_cells_at_a_time(trained, latent, mdata, tmp_path):
    stored = backed(mdata, tmp_path / "cells.h5mu")
    assert stored.mod["rna"].isbacked
    for size in (7, None):
        np.testing.assert_allclose(
            trained.get_latent_representation(stored, batch_size=size), latent["joint"], **CLOSE
        )
    some = np.array([5, 3, 3, 100, 0])
    found = trained.get_latent_representation(stored, indices=some)
    np.testing.assert_allclose(found, latent["joint"][some], **CLOSE)


def test_counts_in_a_layer_are_as_good_as_in_x(trained, latent, mdata):
    for adata in mdata.mod.values():
        adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    MultiomeCLIP.setup_mudata(mdata, rna_layer="counts", atac_layer="counts")
    model = MultiomeCLIP(mdata, **trained._network())
    model.module.load_state_dict(trained.module.state_dict())
    model.is_trained_ = True
    np.testing.assert_allclose(model.get_latent_representation(), latent["joint"], **CLOSE)


def test_global_random_states_are_left_as_they_were(trained, mdata):
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    MultiomeCLIP.setup_mudata(mdata)
    trained.get_latent_representation(mdata)
    trained.match(mdata)
    trained.transfer_labels(query=mdata)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_setup_changes_nothing_but_the_keys_of_scvi_tools():
    mdata = cells()
    MultiomeCLIP.setup_mudata(mdata, batch_key="batch", labels_key="type")
    assert set(mdata.uns) == {"_scvi_uuid", "_scvi_manager_uuid"}
    reference = cells()
    pd.testing.assert_frame_equal(mdata.obs, reference.obs)
    for name, adata in mdata.mod.items():
        assert not adata.uns and list(adata.obs) == []
        assert (adata.X != reference.mod[name].X).nnz == 0


def test_a_copy_or_a_part_of_data_that_are_set_up_is_set_up_alike(trained, latent, tmp_path):
    trained.save_pretrained(tmp_path / "bundle")
    mdata = cells()
    mdata.mod["rna"].layers["raw"] = mdata.mod["rna"].X.copy()
    MultiomeCLIP.setup_mudata(mdata, rna_layer="raw")
    rows = np.arange(0, N_CELLS, 2)
    some = multiome({name: part(mdata, name, rows) for name in mdata.mod}, mdata.obs.iloc[rows])
    some.uns.update(mdata.uns)
    model = MultiomeCLIP.from_pretrained(tmp_path / "bundle", some)
    assert model.registry["setup_args"]["rna_layer"] == "raw"
    np.testing.assert_allclose(model.get_latent_representation(), latent["joint"][rows], **CLOSE)
    model.release()
    assert not MultiomeCLIP._per_instance_manager_store.get(model.id)


def test_every_tensor_of_a_bundle_has_its_place_or_the_error_lists_it(trained, tmp_path):
    trained.save_pretrained(tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.safetensors"
    tensors = load_file(path)
    del tensors["atac.components"]
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="atac.components is missing; extra has no place"):
        MultiomeCLIP.from_pretrained(tmp_path / "bundle")


def test_the_bundle_of_an_older_version_with_its_peaks_in_the_config_is_read_for_ever(mdata, tmp_path):
    with np.load(OLD_BUNDLE / "cells.npz") as file:
        old = dict(file)
    for name, adata in mdata.mod.items():
        adata.X = np.vstack([old[name], np.zeros((N_CELLS - 10, adata.n_vars))]).astype(np.float32)
    model = MultiomeCLIP.from_pretrained(OLD_BUNDLE)
    np.testing.assert_allclose(
        model.get_latent_representation(mdata, indices=range(10)), old["latent"], **CLOSE
    )
    model.save_pretrained(tmp_path / "new")
    assert "chr1" in (tmp_path / "new" / "peaks.tsv").read_text()
    assert "chr1" not in (tmp_path / "new" / "config.json").read_text()
    again = MultiomeCLIP.from_pretrained(tmp_path / "new")
    assert again.peaks == model.peaks == peak_names()
    np.testing.assert_array_equal(
        again.get_latent_representation(mdata), model.get_latent_representation(mdata)
    )


def test_gene_names_may_be_in_a_column(trained, latent, mdata):
    query = mdata.mod["rna"].copy()
    query.var["symbol"] = query.var_names
    query.var_names = [f"feature {i}" for i in range(query.n_vars)]
    assert trained.feature_match(query)["rna"].source == "symbol"
    np.testing.assert_allclose(trained.get_latent_representation(query), latent["rna"], **CLOSE)


def test_real_cells_are_matched_beyond_depth_and_lie_with_their_type_whatever_the_modality(shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # mudata announces other defaults
        mdata = md.read_h5mu(shared_data / "multiome" / "snareseq_mouse_cortex_2k.h5mu")
    torch.manual_seed(0)
    MultiomeCLIP.setup_mudata(mdata)
    model = MultiomeCLIP(mdata)
    model.train(max_epochs=30, batch_size=256, train_size=0.8, **QUIET)
    reached = model.history["validation_foscttm"].iloc[-1, 0]
    assert reached < 0.23 < 0.33 < model.history["validation_foscttm_floor_depth_only"].iloc[-1, 0]
    held_out = model.validation_indices
    kind = mdata.mod["rna"].obs["cell_type"].astype(str).to_numpy()
    points = np.concatenate(
        [model.get_latent_representation(indices=held_out, modality=name) for name in ("rna", "atac")]
    )
    near = np.argsort(-points @ points.T, axis=1)[:, 1:16]
    n = len(held_out)
    assert ((near >= n) != (np.arange(2 * n) >= n)[:, None]).mean() > 0.15  # 0.5 where they lie as one
    of_type = np.tile(kind[held_out], 2)
    assert (of_type[near] == of_type[:, None]).mean() > 0.4

    rng = np.random.default_rng(0)
    genes = rng.permutation(1677)[: round(0.9 * 1677)]
    query = mdata.mod["rna"][held_out, genes].copy()
    found = model.get_latent_representation(query)
    full = model.get_latent_representation(mdata.mod["rna"][held_out])
    assert np.median((found * full).sum(axis=1)) > 0.8
