"""Embeddings that go to disk as they are computed: the same numbers, and whole or not there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from anndata import AnnData
from filelock import FileLock

import cellprior as cp
from cellprior import _outputs as _files
from cellprior._compat import new_group
from cellprior.model import CellPLM
from cellprior.model.cellplm import _hidden
from cellprior.model.data import _cells as _data
from cellprior.model.data import _fingerprint
from cellprior.model.engine import _stream as _streaming
from cellprior.model.engine._embedding import Embedding
from cellprior.model.engine._stream import LatentStore
from tests.contract.models import blood_cells, tiny_scbert

STARTER = "cellplm-starter"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Cut(BaseException):
    """The run ends here."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture
def adata() -> AnnData:
    return blood_cells()[:90].copy()


@pytest.fixture
def counts(adata: AnnData, tmp_path: Path) -> Path:
    adata.write_h5ad(tmp_path / "counts.h5ad")
    return tmp_path / "counts.h5ad"


@pytest.fixture
def zarr_counts(adata: AnnData, tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata announces other defaults of writing
        adata.write_zarr(tmp_path / "counts.zarr")
    return tmp_path / "counts.zarr"


def stream(data: AnnData | Path, out: Path, weights: str = STARTER, **options: Any) -> None:
    cp.tl.embed(data, weights, out=out, progress=False, **options)


def read(out: Path) -> np.ndarray:
    (latent,) = ad.read_zarr(out).obsm.values()
    return latent


# what is written


def test_the_folder_holds_an_anndata_with_the_embedding_and_its_origin(adata, counts, tmp_path):
    stream(counts, tmp_path / "out.zarr", batch_key="batch")
    cp.tl.embed(adata, STARTER, batch_key="batch")
    found = ad.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_allclose(found.obsm["X_cellplm"], adata.obsm["X_cellplm"], **CLOSE)
    assert found.obs_names.equals(adata.obs_names)
    assert list(found.obs) == ["bulk_labels", "batch"]
    record, expected = found.uns["cellprior"]["X_cellplm"], adata.uns["cellprior"]["X_cellplm"]
    del expected["counts_share"]  # would cost a pass over the file
    assert record == expected
    assert zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["cellprior"]["complete"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.h5ad", "out.zarr"]


@pytest.mark.parametrize("weights", [STARTER, "scbert"])
@pytest.mark.parametrize("how", ["backed", "h5ad", "zarr", "dask", "lazy", "in memory"])
def test_counts_are_streamed_from_wherever_they_are(request, adata, tmp_path, weights, how):
    weights = tiny_scbert() if weights == "scbert" else weights
    if how in ("backed", "h5ad"):
        data = request.getfixturevalue("counts")
    elif how != "in memory":
        data = request.getfixturevalue("zarr_counts")
    if how == "backed":
        data = ad.read_h5ad(data, backed="r")
    elif how == "dask":
        da = pytest.importorskip("dask.array")
        data = AnnData(da.from_array(adata.X, chunks=(60, -1)), obs=adata.obs, var=adata.var)
    elif how == "lazy":
        pytest.importorskip("xarray")
        data = ad.experimental.read_lazy(data)
    elif how == "in memory":
        data = adata.copy()
    stream(data, tmp_path / "out.zarr", weights, batch_size=50)
    cp.tl.embed(adata, weights)
    np.testing.assert_allclose(read(tmp_path / "out.zarr"), next(iter(adata.obsm.values())), **CLOSE)


def test_a_layer_of_a_file_is_streamed(adata, tmp_path):
    adata.layers["counts"], adata.X = adata.X, adata.layers["log"]
    adata.write_h5ad(tmp_path / "counts.h5ad")
    stream(tmp_path / "counts.h5ad", tmp_path / "out.zarr", layer="counts")
    cp.tl.embed(adata, STARTER, layer="counts")
    np.testing.assert_allclose(read(tmp_path / "out.zarr"), adata.obsm["X_cellplm"], **CLOSE)


def test_no_more_than_a_batch_of_the_matrix_is_ever_read(counts, tmp_path, monkeypatch):
    n_read = []
    read_rows = _data.read_rows
    for place in (_data, _fingerprint):
        monkeypatch.setattr(
            place, "read_rows", lambda x, rows, **kw: n_read.append(len(rows)) or read_rows(x, rows, **kw)
        )
    monkeypatch.setattr(_data, "N_CHECKED", 20)
    monkeypatch.setattr(_fingerprint, "N_SAMPLED", 20)
    stream(counts, tmp_path / "out.zarr", batch_key="batch", batch_size=20, hidden=tmp_path / "hidden")
    assert max(n_read) <= 20
    assert sum(n_read) == 90 + 20 + 2 * 20  # the first cells, and a sample before and after


def test_the_users_data_are_left_alone(counts, tmp_path):
    backed = ad.read_h5ad(counts, backed="r")
    stream(backed, tmp_path / "out.zarr", batch_key="batch")
    assert not backed.obsm
    assert set(backed.uns) <= {"_scvi_uuid", "_scvi_manager_uuid"}


def test_the_bar_counts_cells_and_shows_their_speed_and_the_time_left(counts, tmp_path, capsys):
    for weights, name in ((STARTER, "cellplm"), (tiny_scbert(), "scbert")):
        cp.tl.embed(
            counts, weights, batch_key="batch", batch_size=20, out=tmp_path / f"{name}.zarr", progress=True
        )
        last = capsys.readouterr().err.strip().split("\r")[-1]
        assert re.search(r"100%.*\| 90 of 90 cells \[[\d:]+<-?[\d:]+, [\d.]+.*cells/s\]", last)
    stream(counts, tmp_path / "quiet.zarr")
    assert "cells/s" not in capsys.readouterr().err


# a run that is cut short


def cut_after(monkeypatch: pytest.MonkeyPatch, n_writes: int) -> None:
    """Let the n-th write to disk be the last; hidden states and latents both count."""
    left = n_writes

    def counted(function: Callable) -> Callable:
        def write(*args: Any) -> None:
            nonlocal left
            if not left:
                raise Cut
            left -= 1
            function(*args)

        return write

    for place, name in ((_hidden, "write_file"), (_streaming, "write_file"), (LatentStore, "write")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))


RUNS: dict[str, dict[str, Any]] = {
    "ScBERT": {"weights": "scbert"},
    "CellPLM, one sentence in memory": {},
    "CellPLM, two sentences on disk": {"batch_key": "batch", "hidden": "hidden"},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_is_cut_short_anywhere_goes_on_to_the_same_numbers(counts, tmp_path, run):
    options = {"batch_size": 20, **RUNS[run]}
    if "weights" in options:
        options["weights"] = tiny_scbert()
    if "hidden" in options:
        options["hidden"] = tmp_path / "hidden"
    stream(counts, tmp_path / "whole.zarr", **options)
    expected = read(tmp_path / "whole.zarr")
    n_writes, out, part = 0, tmp_path / "out.zarr", tmp_path / "out.zarr.part"
    while not out.exists():
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, n_writes)
            n_writes += 1  # further from run to run, each from where the last has been
            try:
                stream(counts, out, **options)
            except Cut:
                assert not out.exists()
                assert "cellprior" not in zarr.open_group(part / "store", mode="r").attrs
    np.testing.assert_array_equal(read(out), expected)
    assert not part.exists()
    assert not list(tmp_path.glob("hidden/*"))
    assert n_writes > 3


def test_a_run_that_goes_on_does_not_do_again_what_is_done(counts, tmp_path, monkeypatch):
    n_embedded: list[int] = []
    encoded = Embedding._encoded

    def watched(self: Embedding, chunks: Any, unit: np.ndarray) -> Any:
        for latent in encoded(self, chunks, unit):
            n_embedded.append(len(latent))
            yield latent

    monkeypatch.setattr(Embedding, "_encoded", watched)
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 3)  # the first is that of the state
        with pytest.raises(Cut):
            stream(counts, tmp_path / "out.zarr", tiny_scbert(), batch_size=18)
    n_embedded.clear()
    stream(counts, tmp_path / "out.zarr", tiny_scbert())  # the batch size is that of the beginning
    assert n_embedded == [18] * 3
    n_embedded.clear()
    stream(counts, tmp_path / "out.zarr", tiny_scbert())  # complete
    assert not n_embedded


KILLED = """
import os, signal, sys
from pathlib import Path
import cellprior as cp
from cellprior.model.cellplm._hidden import StoredStates

write, n_written = StoredStates._write, 0
def kill(self, i, stage, chunk):
    global n_written
    write(self, i, stage, chunk)
    n_written += 1
    if n_written == 6:  # 4 chunks from the embedder, 2 from the first layer
        os.kill(os.getpid(), signal.SIGKILL)
StoredStates._write = kill
cp.tl.embed("counts.h5ad", "cellplm-starter", out="out.zarr", hidden="hidden", batch_size=25, progress=False)
"""


def test_after_kill_9_in_the_middle_of_a_layer_the_result_is_that_of_an_uninterrupted_run(
    counts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED], env=os.environ, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (folder,) = (tmp_path / "hidden").glob("*/0")
    stages = sorted(path.suffix for path in folder.glob("chunk*"))
    assert stages == [".0", ".0", ".1", ".1"]
    assert not Path("out.zarr").exists()
    options = {"hidden": "hidden", "batch_size": 25}
    stream(Path("counts.h5ad"), Path("out.zarr"), **options)
    stream(counts, tmp_path / "whole.zarr", **options)
    np.testing.assert_array_equal(read(Path("out.zarr")), read(tmp_path / "whole.zarr"))


def test_another_batch_size_does_not_mix_with_the_hidden_states_of_the_first(counts, tmp_path):
    options = {"hidden": tmp_path / "hidden"}
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 10)
        with pytest.raises(Cut):
            stream(counts, tmp_path / "out.zarr", batch_size=20, **options)
    stream(counts, tmp_path / "out.zarr", batch_size=50, **options)
    stream(counts, tmp_path / "whole.zarr", **options)
    np.testing.assert_allclose(read(tmp_path / "out.zarr"), read(tmp_path / "whole.zarr"), **CLOSE)


# what is there already


def begun(counts: Path, out: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            stream(counts, out, **{"weights": tiny_scbert(), "batch_size": 20, **options})


def other_counts(adata: AnnData) -> None:
    adata.X[0, int(adata.X[0].indices[0])] += 1


def other_number_of_values(adata: AnnData) -> None:
    adata.X[1, int(adata.X[1].indices[0])] = 0  # a cell that is not one of the 64
    adata.X.eliminate_zeros()


def other_names(adata: AnnData) -> None:
    adata.obs_names = [f"cell {i}" for i in range(adata.n_obs)]


def other_genes(adata: AnnData) -> None:
    adata.var_names = [*adata.var_names[:-2], *adata.var_names[[-1, -2]]]


@pytest.mark.parametrize(
    ("state", "change", "options", "what"),
    [
        ("begun", other_counts, {}, "counts"),
        ("begun", other_number_of_values, {}, "counts"),
        ("begun", other_names, {}, "cells"),
        ("begun", other_genes, {}, "genes"),
        ("begun", None, {"weights": STARTER}, "genes, parameters, weights"),
        ("begun", None, {"batch_key": "batch"}, "batches, parameters"),
        ("begun", None, {"min_coverage": 0.1}, "parameters"),
        ("begun", None, {"key_added": "X_mine"}, "parameters"),
        ("complete", other_counts, {}, "counts"),
        ("complete", None, {"weights": STARTER}, "genes, parameters, weights"),
    ],
)
def test_another_input_weight_or_parameter_is_noticed_and_replaced_only_if_asked(
    adata, counts, tmp_path, state, change, options, what
):
    out = tmp_path / "out.zarr"
    begun(counts, out)
    if state == "complete":
        stream(counts, out, tiny_scbert())
    before = sorted(tmp_path.rglob("*"))
    if change is not None:
        change(adata)
        adata.write_h5ad(counts)
    options = {"weights": tiny_scbert(), **options}
    where = "out.zarr holds an embedding" if state == "complete" else r"out.zarr.part is the beginning of"
    with pytest.raises(FileExistsError, match=f"{where}.* differs in {what} .*overwrite=True"):
        stream(counts, out, **options)
    assert sorted(tmp_path.rglob("*")) == before
    stream(counts, out, **options, overwrite=True)
    cp.tl.embed(adata, **options)
    np.testing.assert_allclose(read(out), next(iter(adata.obsm.values())), **CLOSE)


def test_what_is_to_be_replaced_is_there_until_the_new_one_is_complete(counts, tmp_path):
    out = tmp_path / "out.zarr"
    stream(counts, out, tiny_scbert())
    old = read(out)
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 2)
        with pytest.raises(Cut):
            stream(counts, out, batch_key="batch", overwrite=True)
    np.testing.assert_array_equal(read(out), old)
    stream(counts, out, batch_key="batch", overwrite=True)
    assert read(out).shape != old.shape


def test_a_complete_embedding_is_left_alone_whatever_else_was_begun_there(counts, tmp_path):
    out, part = tmp_path / "out.zarr", tmp_path / "out.zarr.part"
    stream(counts, out, tiny_scbert())
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 2)
        with pytest.raises(Cut):
            stream(counts, out, batch_key="batch", overwrite=True)
    stream(counts, out, tiny_scbert())
    assert (part / "store").exists()
    shutil.rmtree(part / "store")  # as after a run that was killed at the very end
    stream(counts, out, tiny_scbert())
    assert not part.exists()


@pytest.mark.parametrize("what", ["a file", "a folder", "another AnnData"])
def test_what_is_none_of_ours_is_never_replaced(adata, counts, tmp_path, what):
    out = tmp_path / "out.zarr"
    if what == "a file":
        out.write_text("precious")
    elif what == "a folder":
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    else:
        ad.io.write_elem(new_group(out), "obs", adata.obs)
    before = sorted(out.rglob("*"))
    with pytest.raises(FileExistsError, match="out.zarr is there already, and is not an embedding"):
        stream(counts, out, overwrite=True)
    assert sorted(out.rglob("*")) == before
    assert not (tmp_path / "out.zarr.part").exists()


def test_two_processes_do_not_write_the_same_folder(counts, tmp_path):
    out = tmp_path / "out.zarr"
    begun(counts, out)
    with FileLock(tmp_path / "out.zarr.part" / "lock"), pytest.raises(RuntimeError, match="Another process"):
        stream(counts, out, tiny_scbert())
    stream(counts, out, tiny_scbert())


DAMAGE: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "a missing chunk": (lambda part: (part / CHUNK).unlink(), "36 cells are not as they were written"),
    "an empty chunk": (lambda part: (part / CHUNK).write_bytes(b""), "36 cells are not as they were written"),
    "a chunk with another bit": (lambda part: flip(part / CHUNK), "36 cells are not as they were written"),
    "no array": (lambda part: (part / CHUNK).with_name(".zarray").unlink(), "begun anew"),
    "a journal with NUL bytes": (lambda part: (part / "finished").write_bytes(b"0 \0\0\n1 zz\n7"), None),
}
CHUNK = "store/obsm/X_scbert/0.0"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 4  # of the last values, which are stored as they are
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_in_a_beginning_is_noticed_and_embedded_again(counts, tmp_path, damage):
    out = tmp_path / "out.zarr"
    begun(counts, out)
    change, message = DAMAGE[damage]
    change(tmp_path / "out.zarr.part")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream(counts, out, tiny_scbert())
    said = [str(w.message) for w in caught if "out.zarr.part is damaged" in str(w.message)]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]
    stream(counts, tmp_path / "whole.zarr", tiny_scbert(), batch_size=20)
    np.testing.assert_array_equal(read(out), read(tmp_path / "whole.zarr"))


def test_a_state_that_cannot_be_read_is_refused_and_begun_anew_only_if_asked(counts, tmp_path):
    out, state = tmp_path / "out.zarr", tmp_path / "out.zarr.part" / "state.json"
    begun(counts, out)
    for text in ("", "{}", state.read_text().replace('"batch_size": 20', '"batch_size": 30')):
        state.write_text(text)
        with pytest.raises(FileExistsError, match="state.json cannot be read.*overwrite=True"):
            stream(counts, out, tiny_scbert())
    stream(counts, out, tiny_scbert(), overwrite=True)
    assert not state.parent.exists()


def test_a_complete_embedding_that_is_damaged_is_not_called_complete(counts, tmp_path):
    out = tmp_path / "out.zarr"
    stream(counts, out, tiny_scbert())
    expected = read(out)
    (out / "obsm/X_scbert/0.0").unlink()
    with pytest.raises(FileExistsError, match="out.zarr is complete, but damaged.*overwrite=True"):
        stream(counts, out, tiny_scbert())
    stream(counts, out, tiny_scbert(), overwrite=True)
    np.testing.assert_array_equal(read(out), expected)


def test_to_overwrite_is_to_begin_anew_and_the_call_without_it_goes_on(counts, tmp_path):
    out, part = tmp_path / "out.zarr", tmp_path / "out.zarr.part"
    stream(counts, out, tiny_scbert(), key_added="X_old")
    for _ in range(2):
        begun(counts, out, overwrite=True)
        assert len((part / "finished").read_text().splitlines()) == 2
    stream(counts, out, tiny_scbert())
    assert list(ad.read_zarr(out).obsm) == ["X_scbert"]


def test_weights_with_equal_tensors_and_another_configuration_are_others(counts, tmp_path):
    for name, target_sum in (("one", 1e3), ("two", 1e4)):
        bundle = cp.weights.read_bundle(cp.weights.fetch(STARTER))
        config = {**bundle.config, "network": {**bundle.config["network"], "target_sum": target_sum}}
        parts = {"state_dict": bundle.state_dict, "genes": bundle.genes, "card": ""}
        cp.weights.write_bundle(tmp_path / name, config=config, **parts)
    stream(counts, tmp_path / "out.zarr", tmp_path / "one")
    with pytest.raises(FileExistsError, match="differs in weights"):
        stream(counts, tmp_path / "out.zarr", tmp_path / "two")


def test_the_annotation_is_that_of_the_run_that_finishes_and_nothing_of_a_killed_one_is_left(
    adata, counts, tmp_path
):
    out = tmp_path / "out.zarr"
    begun(counts, out)
    (tmp_path / "out.zarr.part/store/obsm/X_scbert" / f"0.{'0f' * 16}.partial").touch()
    adata.obs["new"] = "here"
    adata.write_h5ad(counts)
    stream(counts, out, tiny_scbert())
    assert set(ad.read_zarr(out).obs["new"]) == {"here"}
    assert not list(out.rglob("*partial*"))


@pytest.mark.parametrize("how", ["h5ad", "zarr", "a chunk"])
def test_an_input_that_is_written_to_while_it_is_read_is_an_error(request, tmp_path, how):
    data, out = request.getfixturevalue("counts" if how == "h5ad" else "zarr_counts"), tmp_path / "out.zarr"
    names = {"zarr": (".zarray", "zarr.json"), "a chunk": ("0",)}  # of both formats of zarr
    file = data
    if how != "h5ad":
        file = next(path for path in sorted((data / "X" / "data").rglob("*")) if path.name in names[how])
    write, n_written = LatentStore.write, 0

    def touched(self: LatentStore, part: Any) -> None:
        nonlocal n_written
        write(self, part)
        if (n_written := n_written + 1) == 2:
            os.utime(file, ns=(0, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentStore, "write", touched)
        said = "has changed while" if how == "a chunk" else "was written to, or replaced, while"
        with pytest.raises(RuntimeError, match=f"{data.name} {said} it was read"):
            stream(data, out, tiny_scbert(), batch_size=20)
    assert not out.exists()
    assert (tmp_path / "out.zarr.part" / "state.json").exists() == (how != "a chunk")


def test_the_output_is_where_a_link_leads_and_not_in_the_input(counts, zarr_counts, tmp_path):
    (tmp_path / "link.zarr").symlink_to("real.zarr")
    stream(counts, tmp_path / "link.zarr")
    assert (tmp_path / "link.zarr").is_symlink()
    assert len(read(tmp_path / "real.zarr")) == 90
    (tmp_path / "nowhere.zarr").symlink_to("nope/real.zarr")
    with pytest.raises(FileNotFoundError, match="no folder .*nope"):
        stream(counts, tmp_path / "nowhere.zarr")
    with pytest.raises(ValueError, match="lie in each other"):
        stream(zarr_counts, zarr_counts / "out.zarr")
    (tmp_path / "mine.zarr.part").mkdir()
    (tmp_path / "mine.zarr.part" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="not the beginning of an embedding"):
        stream(counts, tmp_path / "mine.zarr", overwrite=True)


# disks


def test_a_disk_that_fills_up_is_an_error_and_what_is_done_is_kept(counts, tmp_path):
    resource = pytest.importorskip("resource")
    out = tmp_path / "out.zarr"
    stream(counts, tmp_path / "whole.zarr", batch_size=20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))  # the array has 17,280 bytes
    try:
        with pytest.raises(OSError, match=r"out\.zarr cannot be written: .*What is done is kept"):
            stream(counts, out, batch_size=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not out.exists()
    stream(counts, out)
    np.testing.assert_array_equal(read(out), read(tmp_path / "whole.zarr"))


def test_a_disk_that_fills_up_with_hidden_states_is_an_error_that_names_the_file(counts, tmp_path):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    begun_with = {"hidden": tmp_path / "hidden", "batch_size": 20}
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 5)
        with pytest.raises(Cut):
            stream(counts, tmp_path / "out.zarr", **begun_with)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files.os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left on device: .*hidden/cellprior-.*"):
            stream(counts, tmp_path / "out.zarr", **begun_with)
    assert not list((tmp_path / "hidden").rglob("*.part"))
    stream(counts, tmp_path / "out.zarr", **begun_with)


def test_a_run_that_is_killed_between_the_two_last_steps_is_complete_after_the_next(counts, tmp_path):
    out = tmp_path / "out.zarr"
    stream(counts, out, tiny_scbert())
    rename = Path.rename

    def cut(self: Path, target: Path) -> None:
        if target == out:
            raise Cut
        rename(self, target)

    options = {"batch_key": "batch", "overwrite": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(Cut):
            stream(counts, out, **options)
    assert not out.exists()
    stream(counts, out, **options)
    assert list(ad.read_zarr(out).obsm) == ["X_cellplm"]
    assert not (tmp_path / "out.zarr.part").exists()


def test_what_will_not_fit_is_not_begun(counts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_streaming.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OSError, match="has 0.0 GB free, and"):
        stream(counts, tmp_path / "out.zarr")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_an_error(counts, tmp_path, monkeypatch, code):
    def mkdir(path: Path, *args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(OSError, match="out.zarr cannot be written: (the disk is r|R|P)"):
            stream(counts, tmp_path / "out.zarr")
    with pytest.raises(FileNotFoundError, match="no folder .*nope to write out.zarr into"):
        stream(counts, tmp_path / "nope" / "out.zarr")


def test_an_input_that_vanishes_is_an_error_and_no_zeros(zarr_counts, tmp_path):
    moved, out = tmp_path / "moved", tmp_path / "out.zarr"
    write, n_written = LatentStore.write, 0

    def vanish(self: LatentStore, part: Any) -> None:
        nonlocal n_written
        write(self, part)
        n_written += 1
        if n_written == 2:
            zarr_counts.rename(moved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentStore, "write", vanish)
        with pytest.raises(
            OSError, match=r"cells 36 to 53 cannot be read .*counts.zarr/X was there .*is gone"
        ):
            stream(zarr_counts, out, tiny_scbert(), batch_size=18)
    assert not out.exists()
    moved.rename(zarr_counts)
    stream(zarr_counts, out, tiny_scbert())
    stream(zarr_counts, tmp_path / "whole.zarr", tiny_scbert(), batch_size=18)
    np.testing.assert_array_equal(read(out), read(tmp_path / "whole.zarr"))


# what cannot be meant


def test_counts_that_are_stored_gene_by_gene_are_refused_on_disk(adata, tmp_path):
    adata.X = adata.layers["counts"] = adata.X.tocsc()
    adata.raw = adata
    adata.write_h5ad(tmp_path / "csc.h5ad")
    for layer, line in (
        (None, r"read_h5ad\(path\); adata.X = adata.X.tocsr\(\)"),
        ("counts", r"adata.layers\['counts'\] = adata.layers\['counts'\].tocsr\(\)"),
        ("raw", r"read_h5ad\(path\).raw.to_adata\(\); adata.X = adata.X.tocsr\(\)"),
    ):
        with pytest.raises(ValueError, match=rf"stored gene by gene \(CSC\).*{line}"):
            stream(tmp_path / "csc.h5ad", tmp_path / "out.zarr", layer=layer)
    stream(adata, tmp_path / "out.zarr")


def test_a_path_needs_a_folder_to_write_to_and_a_folder_no_copy(adata, counts, tmp_path):
    with pytest.raises(ValueError, match=r"'.*counts.h5ad' is a path: name a folder to write to, out="):
        cp.tl.embed(str(counts), STARTER)
    with pytest.raises(ValueError, match="choose one of them"):
        stream(adata, tmp_path / "out.zarr", copy=True)


def test_a_model_that_looks_at_one_cell_at_a_time_has_no_hidden_states_to_keep(counts, tmp_path):
    with pytest.raises(ValueError, match="hidden='scratch': a ScBERT looks at one cell at a time"):
        stream(counts, tmp_path / "out.zarr", tiny_scbert(), hidden="scratch")


def write_null(path: Path) -> None:
    """A file without a matrix, as anndata 0.12 writes it."""
    AnnData(obs=blood_cells().obs).write_h5ad(path)
    with h5py.File(path, "a") as file:
        file.pop("X", None)
        file["X"] = h5py.Empty("f4")
        file["X"].attrs["encoding-type"] = "null"


@pytest.mark.parametrize(
    ("write", "layer", "message"),
    [
        (lambda path: path.write_text("no HDF5"), None, "cannot be read as an h5ad file"),
        (lambda path: path.mkdir(), None, "cannot be read as a zarr folder"),
        (lambda path: None, None, "is not there"),
        (lambda path: blood_cells()[:9].copy().write_h5ad(path), "nope", "no layers/nope.* layers are log"),
        (lambda path: AnnData(obs=blood_cells().obs).write_h5ad(path), None, "has no X; it holds"),
        (write_null, None, "has no X; it holds"),
    ],
    ids=["text", "empty folder", "nothing", "no layer", "no matrix", "null"],
)
def test_a_file_without_counts_is_an_error_that_says_what_it_holds(tmp_path, write, layer, message):
    write(tmp_path / "input")
    with pytest.raises((ValueError, FileNotFoundError), match=f"input.* {message}"):
        stream(tmp_path / "input", tmp_path / "out.zarr", layer=layer)


def test_counts_that_are_no_counts_are_refused_before_anything_is_written(adata, tmp_path):
    adata.X = adata.layers["log"]
    adata.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(cp.model.NotCountsError, match="recover_counts"):
        stream(tmp_path / "log.h5ad", tmp_path / "out.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["log.h5ad"]


def test_the_data_are_let_go_when_the_stream_ends_or_fails(counts, tmp_path):
    before = len(CellPLM._setup_adata_manager_store)
    stream(counts, tmp_path / "out.zarr")
    with pytest.raises(FileExistsError):
        stream(counts, tmp_path / "out.zarr", key_added="X_other")
    assert len(CellPLM._setup_adata_manager_store) == before
