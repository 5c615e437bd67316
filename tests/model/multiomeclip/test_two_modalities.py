"""What tests/contract asks of RNA, of ATAC and of both together."""

from __future__ import annotations

import warnings
from itertools import cycle
from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from mudata import MuData

from cellprior._compat import without_pulled_columns
from cellprior.genes import PeakMatchError
from cellprior.model import NotCountsError
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.weights import WeightsError
from tests.contract.shared import (
    FORMATS,
    NOT_COUNTS,
    fingerprint,
    in_memory,
    no_network,  # noqa: F401  a fixture for every test
)

from .data import N_CELLS, QUIET, cells, multiome, part, peak_names

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SOME = np.array([5, 3, 3, N_CELLS - 1, 0, 100, 101, 102, 5])  # unsorted and repeated
OLD_BUNDLE = Path(__file__).parent / "stored" / "bundle_with_peaks_in_config"
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")


def attach(bundle: Path, mdata: MuData, **setup: Any) -> MultiomeCLIP:
    MultiomeCLIP.setup_mudata(mdata, **setup)
    return MultiomeCLIP.from_pretrained(bundle, mdata)


# formats


@pytest.mark.parametrize("how", ["csc_array", "backed view", "backed csr", "dask csr"])
def test_any_format_of_atac_gives_the_same_embedding(trained, latent, mdata, tmp_path, how):
    place, convert = FORMATS[how]
    query = place(mdata.mod["atac"], tmp_path, convert(mdata.mod["atac"].X))
    np.testing.assert_allclose(trained.get_latent_representation(query), latent["atac"], **CLOSE)
    some = trained.get_latent_representation(query, indices=SOME, batch_size=4)
    np.testing.assert_allclose(some, latent["atac"][SOME], **CLOSE)


@pytest.mark.parametrize("how", ["csc", "dense F float32", "dask dense", "zarr csr"])
def test_any_format_of_atac_can_be_in_the_mudata_that_is_set_up(bundle, latent, mdata, tmp_path, how):
    place, convert = FORMATS[how]
    atac = place(mdata.mod["atac"], tmp_path, convert(mdata.mod["atac"].X))
    model = attach(bundle, multiome({"rna": mdata.mod["rna"], "atac": atac}))
    np.testing.assert_allclose(model.get_latent_representation(batch_size=50), latent["joint"], **CLOSE)
    model.release()


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


def test_views_of_a_mudata_can_be_queries(trained, latent, mdata, tmp_path):
    rows = np.arange(1, N_CELLS, 3)
    for data in (mdata, backed(mdata, tmp_path / "cells.h5mu")):
        np.testing.assert_allclose(
            trained.get_latent_representation(data[rows]), latent["joint"][rows], **CLOSE
        )


def test_counts_in_a_layer_are_as_good_as_in_x(trained, latent, mdata):
    for adata in mdata.mod.values():
        adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    MultiomeCLIP.setup_mudata(mdata, rna_layer="counts", atac_layer="counts")
    model = MultiomeCLIP(mdata, **trained._network())
    model.module.load_state_dict(trained.module.state_dict())
    model.is_trained_ = True
    np.testing.assert_allclose(model.get_latent_representation(), latent["joint"], **CLOSE)


# batch size and order


@pytest.mark.parametrize("setup", [{}, {"batch_key": "batch"}], ids=["one group", "two batches"])
def test_the_embedding_does_not_depend_on_the_batch_size(bundle, latent, mdata, setup):
    model = attach(bundle, mdata, **setup)
    for batch_size in (1, 7, 1000):
        found = model.get_latent_representation(batch_size=batch_size)
        np.testing.assert_allclose(found, latent["joint"], **CLOSE)
    model.release()


def test_cells_in_another_order_have_the_same_embedding(bundle, latent, mdata):
    order = np.random.default_rng(0).permutation(N_CELLS)
    shuffled = multiome({name: part(mdata, name, order) for name in mdata.mod}, mdata.obs)
    model = attach(bundle, shuffled, batch_key="batch")
    place = mdata.obs_names.get_indexer(shuffled.obs_names)
    np.testing.assert_allclose(
        model.get_latent_representation(batch_size=64), latent["joint"][place], **CLOSE
    )
    model.release()


# genes and peaks


def with_names(adata: AnnData, names: Any, x: Any = None) -> AnnData:
    return AnnData(adata.X if x is None else x, obs=adata.obs.copy(), var=pd.DataFrame(index=pd.Index(names)))


def shuffled(adata: AnnData) -> AnnData:
    return adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()


def others(n: int) -> list[str]:
    """Names of as many peaks that the vocabulary lacks."""
    return [f"chr17:{i}000-{i}100" for i in range(n)]


def with_unknown_peaks(adata: AnnData) -> AnnData:
    unknown = sp.random(adata.n_obs, 50, 0.3, "csr", random_state=np.random.default_rng(0)).ceil() * 5
    return with_names(adata, [*adata.var_names, *others(50)], sp.hstack([adata.X, unknown], "csr"))


def with_repeated_names(adata: AnnData) -> AnnData:
    """Every count above one is divided between two columns of the same name."""
    half = adata.X.copy()
    half.data = np.floor(half.data / 2)
    return with_names(adata, [*adata.var_names] * 2, sp.hstack([half, adata.X - half], "csr"))


@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
@pytest.mark.parametrize("change", [shuffled, with_unknown_peaks, with_repeated_names])
def test_peaks_are_found_wherever_they_are(trained, latent, mdata, change):
    changed = change(mdata.mod["atac"])
    np.testing.assert_allclose(trained.get_latent_representation(changed), latent["atac"], **CLOSE)


def test_a_peak_that_is_missing_counts_as_zero(trained, mdata):
    adata = mdata.mod["atac"]
    missing = np.arange(adata.n_vars) % 4 == 0
    zeroed = with_names(adata, adata.var_names, sp.csr_matrix(adata.X.multiply(~missing)))
    np.testing.assert_allclose(
        trained.get_latent_representation(adata[:, ~missing].copy()),
        trained.get_latent_representation(zeroed),
        **CLOSE,
    )


def test_genes_whose_places_are_known_are_no_peaks(trained, latent, mdata):
    rna = mdata.mod["rna"].copy()
    rna.var["chrom"] = "chr1"
    rna.var["start"] = np.where(
        np.arange(60) % 7 == 0, np.nan, np.arange(60) * 1000.0
    )  # a gene without a place
    rna.var["end"] = rna.var["start"] + 500
    np.testing.assert_allclose(trained.get_latent_representation(rna), latent["rna"], **CLOSE)


@pytest.mark.parametrize("n", [0, 10])
def test_too_few_peaks_are_an_error_that_says_what_was_found_and_needed(bundle, trained, mdata, n):
    atac = mdata.mod["atac"]
    names = [*atac.var_names[:n], *others(atac.n_vars - n)]
    mdata = multiome({"rna": mdata.mod["rna"], "atac": with_names(atac, names)})
    for attempt in (lambda: attach(bundle, mdata), lambda: trained.get_latent_representation(mdata)):
        with pytest.raises(PeakMatchError) as error:
            attempt()
        assert str(error.value).startswith(f"{n} of {atac.n_vars} peaks match the reference")
        assert "needed: 20 peaks and a coverage of 0.25" in str(error.value)


# raw counts

PLACES = ("X", "a layer", "a sparse query", "a dense query")


@pytest.mark.parametrize(("kind", "place"), [*zip(NOT_COUNTS, cycle(PLACES), strict=False)])
def test_what_is_no_raw_atac_is_refused_with_the_cell_the_peak_and_the_way_out(bundle, trained, kind, place):
    mdata = cells(410)
    adata = mdata.mod["atac"]
    x = NOT_COUNTS[kind][0](adata.X.toarray())
    with np.errstate(invalid="ignore"):
        cell, feature = np.argwhere(~((x >= 0) & (x == np.rint(x)) & np.isfinite(x)))[0]
    if place == "a layer":
        adata.layers["other"] = sp.csr_matrix(x)
    else:
        adata.X = x if place == "a dense query" else sp.csr_matrix(x)
    with pytest.raises(NotCountsError) as error:
        if "query" in place:
            trained.get_latent_representation(mdata, batch_size=150)
        else:
            setup = {"atac_layer": "other"} if place == "a layer" else {}
            attach(bundle, mdata, **setup).get_latent_representation()
    message = str(error.value)
    assert ("layers['other']" if place == "a layer" else "X") in message.split()[0]
    value = x[cell, feature]
    place = f"peak {adata.var_names[feature]!r} is {value:g}"
    assert f"cell {adata.obs_names[cell]!r}, {place}" in message
    assert (
        "not finite" if not np.isfinite(value) else "negative" if value < 0 else "not an integer"
    ) in message
    assert "atac_layer=" in message and "recover_counts" in message


def test_a_cell_without_counts_has_a_finite_row(bundle, mdata):
    empty = np.isin(np.arange(N_CELLS), [0, 50, 159])
    for adata in mdata.mod.values():
        adata.X = sp.csr_matrix(adata.X.multiply(~empty[:, None]))
    model = attach(bundle, mdata)
    for modality in ("rna", "atac", "joint"):
        found = model.get_latent_representation(modality=modality)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[empty], np.broadcast_to(found[0], (3, found.shape[1])), **CLOSE)
    model.release()


@pytest.mark.parametrize("shape", [(0, None), (None, 0)], ids=["no cells", "no peaks"])
def test_atac_without_cells_or_peaks_is_refused(bundle, trained, mdata, shape):
    adata = mdata.mod["atac"][: shape[0], : shape[1]].copy()
    needed = f"has {adata.n_obs} cells and {adata.n_vars} (genes|peaks); at least one of each is needed"
    with pytest.raises(ValueError, match=needed):
        trained.get_latent_representation(adata)
    if shape[0] is None:
        with pytest.raises(ValueError, match=needed):
            attach(bundle, multiome({"rna": mdata.mod["rna"], "atac": adata}))


def test_data_without_a_matrix_are_refused_with_the_layers_that_there_are(trained, mdata):
    rna = mdata.mod["rna"]
    empty = AnnData(obs=rna.obs.copy(), var=rna.var.copy(), layers={"counts": rna.X})
    message = r"'rna' has no X; its layers are \['counts'\].*rna_layer="
    with pytest.raises(ValueError, match=message):
        trained.get_latent_representation(empty)
    with pytest.raises(ValueError, match=message):
        MultiomeCLIP.setup_mudata(multiome({"rna": empty, "atac": mdata.mod["atac"]}))


# the user's objects


def everything_in(mdata: MuData) -> dict[str, Any]:
    """Everything in a MuData but scvi-tools' own keys."""
    return {
        "obs": mdata.obs.to_dict("list"),
        "names": list(mdata.obs_names),
        "view": mdata.is_view,
        "keys": {name: list(getattr(mdata, name)) for name in ("obsm", "varm", "obsp", "varp")},
        "uns": {name: value for name, value in mdata.uns.items() if not name.startswith("_scvi_")},
        **{name: fingerprint(adata) for name, adata in mdata.mod.items()},
    }


@pytest.mark.parametrize(
    "how",
    ["csr with repeated and unsorted indices", "a file", "a view"],
)
def test_the_users_data_are_left_as_they_were(bundle, trained, mdata, tmp_path, how):
    if how == "a file":
        mdata = backed(mdata, tmp_path / "cells.h5mu")
    elif how != "a view":
        _, convert = FORMATS[how]
        formatted = {name: in_memory(adata, tmp_path, convert(adata.X)) for name, adata in mdata.mod.items()}
        mdata = multiome(formatted, mdata.obs)
    data = mdata[::2] if how == "a view" else mdata
    before = everything_in(mdata), everything_in(data)
    trained.get_latent_representation(data)
    trained.match(data)
    trained.transfer_labels(data, data, labels_key="type")
    trained.predict_modality(data)
    if how != "a view":
        model = attach(bundle, data, batch_key="batch", labels_key="type")
        model.get_latent_representation()
        if how != "a file":
            model.train(max_epochs=1, batch_size=64, **QUIET)
        model.release()
    assert (everything_in(mdata), everything_in(data)) == before


def test_setup_changes_nothing_but_the_keys_of_scvi_tools():
    mdata = cells()
    MultiomeCLIP.setup_mudata(mdata, batch_key="batch", labels_key="type")
    assert set(mdata.uns) == {"_scvi_uuid", "_scvi_manager_uuid"}
    reference = cells()
    pd.testing.assert_frame_equal(mdata.obs, reference.obs)
    for name, adata in mdata.mod.items():
        assert not adata.uns and list(adata.obs) == []
        assert (adata.X != reference.mod[name].X).nnz == 0


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


# saving


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


def test_a_bundle_whose_peaks_are_cut_short_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path / "bundle")
    path = tmp_path / "bundle" / "peaks.tsv"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match="truncated|contradicts itself"):
        MultiomeCLIP.from_pretrained(tmp_path / "bundle")


def test_training_changes_the_layers_and_the_alignment_and_no_fitted_inputs(bundle, mdata):
    def tensors() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = attach(bundle, mdata)
        before = {name: x.clone() for name, x in model.module.state_dict().items()}
        model.train(max_epochs=2, batch_size=64, **QUIET)
        after = model.module.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        learned = {name for name, _ in model.module.named_parameters()}
        assert changed == learned | {
            f"alignment.{m}.{part}" for m in ("rna", "atac") for part in ("mean", "axes")
        }
        model.release()
        return after

    first, second = tensors(), tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


# what it is for


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

    atac = mdata.mod["atac"][held_out].copy()
    parts = [name.replace(":", "-").split("-") for name in atac.var_names]
    moved = [
        f"{c}_{int(s) + by}_{int(e) + by}"
        for (c, s, e), by in zip(parts, rng.integers(-90, 90, len(parts)), strict=True)
    ]
    atac = AnnData(atac.X, obs=atac.obs, var=pd.DataFrame(index=moved))[:, rng.permutation(15_000)].copy()
    assert model.feature_match(atac)["atac"].counts_share > 0.9
    assert np.isfinite(model.get_latent_representation(atac)).all()

    order = rng.permutation(mdata.n_obs)
    some = {"rna": np.sort(order[300:]), "atac": np.sort(np.r_[order[:300], order[600:]])}  # 30 % lack one
    ragged = multiome({name: part(mdata, name, rows) for name, rows in some.items()})
    found, joint = (model.get_latent_representation(data) for data in (ragged, mdata))
    assert np.isfinite(found).all() and len(found) == mdata.n_obs
    complete = ragged.obs_names.isin(mdata.obs_names[order[600:]])
    place = mdata.obs_names.get_indexer(ragged.obs_names[complete])
    np.testing.assert_allclose(found[complete], joint[place], **CLOSE)
    np.testing.assert_allclose(model.get_latent_representation(batch_size=7), joint, **CLOSE)
