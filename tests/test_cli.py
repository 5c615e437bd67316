from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from anndata import AnnData

import cellprior as cp
from cellprior.cli import _write, main
from tests.contract.models import blood_cells

STARTER = "cellplm-starter"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    path = tmp_path / "counts.h5ad"
    blood_cells()[:150].copy().write_h5ad(path)
    return path


def embedded(path: Path, **arguments: object) -> AnnData:
    adata = ad.read_h5ad(path)
    cp.tl.embed(adata, STARTER, **arguments)
    return adata


def test_list_names_all_that_can_be_had(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in cp.weights.available().index:
        assert name in shown


def test_card_prints_the_card(capsys):
    assert main(["card", STARTER]) == 0
    assert capsys.readouterr().out == f"{cp.weights.card(STARTER)}\n"


def test_download_fetches_and_says_where_to(tmp_path, monkeypatch, capsys):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    name = "gencode-mouse-M37"
    content = b"what the registry has a hash of"
    entry = cp.weights._registry.get_entry(name)
    (mirror / entry.files[0].name).write_bytes(content)
    monkeypatch.setattr(cp.weights._fetch, "_known_hash", lambda path, file: None)
    monkeypatch.setenv("CELLPRIOR_MIRROR", str(mirror))
    assert main(["download", STARTER, name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{STARTER}: {cp.weights.fetch(STARTER)}", f"{name}: {cp.settings.cache_dir / name}"]
    assert (cp.settings.cache_dir / name / entry.files[0].name).read_bytes() == content


def test_embed_writes_what_tl_embed_gives(counts, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    arguments = ["--batch-key", "batch", "--key-added", "X_mine", "--batch-size", "40", "--device", "cpu"]
    assert main(["embed", str(counts), str(output), "--weights", STARTER, *arguments]) == 0
    found = ad.read_h5ad(output)
    expected = embedded(counts, batch_key="batch", key_added="X_mine", batch_size=40)
    np.testing.assert_array_equal(found.obsm["X_mine"], expected.obsm["X_mine"])
    assert found.uns["cellprior"] == expected.uns["cellprior"]
    width = found.obsm["X_mine"].shape[1]
    share = found.uns["cellprior"]["X_mine"]["counts_share"]
    said = capsys.readouterr().out
    assert said == f"{output}: obsm['X_mine'], 150 cells x {width}, {share:.1%} of the counts used\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.h5ad", "out.h5ad"]


def test_embed_streams_to_a_zarr_folder_and_goes_on_where_it_was_cut_short(
    counts, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out.zarr"
    arguments = ["embed", str(counts), str(output), "--weights", STARTER, "--batch-key", "batch"]
    arguments += ["--hidden", str(tmp_path / "hidden"), "--progress"]
    with monkeypatch.context() as patch:
        patch.setattr(cp.model.engine._stream.LatentStore, "close", lambda self: sys.exit("cut short"))
        with pytest.raises(SystemExit):
            main(arguments)
    assert not output.exists()
    capsys.readouterr()
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{output}: complete\n"
    assert "150 of 150 cells" in shown.err
    expected = embedded(counts, batch_key="batch").obsm["X_cellplm"]
    np.testing.assert_allclose(ad.read_zarr(output).obsm["X_cellplm"], expected, rtol=1e-5, atol=1e-5)
    assert main([*arguments, "--key-added", "X_mine"]) == 1
    assert "differs in parameters" in capsys.readouterr().err
    assert main([*arguments, "--key-added", "X_mine", "--overwrite"]) == 0
    assert list(ad.read_zarr(output).obsm) == ["X_mine"]


def test_embed_takes_a_layer_and_a_column_of_names_and_may_write_over_its_input(counts):
    adata = ad.read_h5ad(counts)
    adata.layers["counts"], adata.X = adata.X, adata.layers["log"]
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"row{i}" for i in range(adata.n_vars)]
    adata.write_h5ad(counts)
    expected = embedded(counts, layer="counts", gene_key="symbol").obsm["X_cellplm"]
    arguments = ["--layer", "counts", "--gene-key", "symbol"]
    assert main(["embed", str(counts), str(counts), "--weights", STARTER, *arguments]) == 0
    np.testing.assert_array_equal(ad.read_h5ad(counts).obsm["X_cellplm"], expected)


def test_embed_again_reports_the_embedding_it_has_just_made(counts, capsys):
    for key in ("X_one", "X_two", "X_one"):
        assert main(["embed", str(counts), str(counts), "--weights", STARTER, "--key-added", key]) == 0
        assert f"obsm[{key!r}]" in capsys.readouterr().out


def test_cells_without_any_count_can_be_embedded(counts, capsys):
    adata = ad.read_h5ad(counts)
    adata.X = adata.X * 0
    adata.write_h5ad(counts)
    assert main(["embed", str(counts), str(counts), "--weights", STARTER]) == 0
    assert np.isfinite(ad.read_h5ad(counts).obsm["X_cellplm"]).all()


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["card", "nope"], "nope"),
        (["download", "cellplm-20231027"], "CELLPRIOR_OFFLINE"),
        (
            ["embed", "nope.h5ad", "out.h5ad", "--weights", STARTER],
            "nope.h5ad is not there. The folder has counts.h5ad",
        ),
        (["embed", "text.h5ad", "out.h5ad", "--weights", STARTER], "text.h5ad"),
        (
            ["embed", "nope.h5ad", "out.zarr", "--weights", STARTER],
            "nope.h5ad is not there. The folder has counts.h5ad",
        ),
        (
            ["annotate", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--labels", "a"],
            "--reference, an h5ad file of cells with",
        ),
        (
            ["annotate", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--reference", "a.h5ad"],
            "--labels-key, its column",
        ),
        (["embed", "text.h5ad", "out.zarr", "--weights", STARTER], "text.h5ad"),
        (["embed", "counts.h5ad", "nope/out.h5ad", "--weights", STARTER], "There is no folder nope"),
        (["embed", "counts.h5ad", "out.h5ad", "--weights", "nope"], "'nope' is neither a registry name nor"),
        (
            ["embed", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--layer", "log"],
            "leave out layer='log'",
        ),
        (
            ["embed", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--layer", "nope"],
            "There is no layer 'nope' in the AnnData; its layers are",
        ),
        (
            ["embed", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--batch-key", "nope"],
            "'nope' not found in adata.obs; its columns are",
        ),
        (
            ["embed", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--gene-key", "nope"],
            "'nope' not found in",
        ),
        (["embed", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--batch-size", "0"], "batch_size=0"),
        (["embed", "counts.h5ad", "out.h5ad", "--weights", STARTER, "--device", "nope"], "nope"),
    ],
)
def test_an_error_is_one_message_on_stderr_and_exit_code_1(counts, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(counts.parent)
    Path("text.h5ad").write_text("not an HDF5 file")
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"cellprior {arguments[0]}: ")
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not Path("out.h5ad").exists()
    assert not list(Path().glob("*.part"))


def test_when_writing_fails_the_old_output_is_kept(counts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.h5ad"
    output.write_text("the old one")

    def fails(self: AnnData, path: Path) -> None:
        Path(path).write_text("half of it")
        msg = "No space left on device"
        raise OSError(msg)

    monkeypatch.setattr(AnnData, "write_h5ad", fails)
    assert main(["embed", str(counts), str(output), "--weights", STARTER, "--overwrite"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert output.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counts.h5ad", "out.h5ad"]


def test_an_output_that_is_there_is_replaced_only_if_asked(counts, tmp_path, capsys):
    output, link = tmp_path / "out.h5ad", tmp_path / "link.h5ad"
    output.write_text("the old one")
    link.symlink_to(output)
    arguments = ["embed", str(counts), str(link), "--weights", STARTER]
    assert main(arguments) == 1
    assert "link.h5ad is there already: --overwrite replaces it" in capsys.readouterr().err
    assert output.read_text() == "the old one"
    assert main([*arguments, "--overwrite"]) == 0
    assert link.is_symlink()
    assert "X_cellplm" in ad.read_h5ad(output).obsm
    assert main(["embed", str(counts), str(tmp_path), "--weights", STARTER]) == 1
    assert "is a folder: name a file to write" in capsys.readouterr().err


def test_two_writers_of_one_file_do_not_harm_each_other(counts, tmp_path, monkeypatch):
    mine, theirs = ad.read_h5ad(counts), ad.read_h5ad(counts)[:9].copy()
    output, write = tmp_path / "out.h5ad", AnnData.write_h5ad

    def meanwhile(self: AnnData, path: Path) -> None:
        write(self, path)
        monkeypatch.setattr(AnnData, "write_h5ad", write)
        _write(theirs, output, replace=False)
        assert Path(path).exists()

    monkeypatch.setattr(AnnData, "write_h5ad", meanwhile)
    with pytest.raises(FileExistsError, match="by another process meanwhile.*this result is .*out-.*h5ad"):
        _write(mine, output, replace=False)
    assert ad.read_h5ad(output).n_obs == 9
    (kept,) = tmp_path.glob("out-*.h5ad")
    assert ad.read_h5ad(kept).n_obs == 150
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_run_that_is_stopped_says_in_one_line_how_it_goes_on(
    counts, tmp_path, monkeypatch, capsys, name, code
):
    output, write = tmp_path / "out.zarr", cp.model.engine._stream.LatentStore.write
    arguments = ["embed", str(counts), str(output), "--weights", STARTER, "--batch-key", "batch"]

    def stopped(self: object, part: object) -> None:
        write(self, part)
        os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(signal.SIGTERM)
    # a shell has it ignored by what it runs in the background
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(cp.model.engine._stream.LatentStore, "write", stopped)
        try:
            assert main([*arguments, "--overwrite"]) == code
        finally:
            signal.signal(signal.SIGINT, inherited)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cellprior embed: ")
    assert last.endswith(f"kept in out.zarr.part: cellprior {' '.join(arguments)}")
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(arguments) == 0
    assert ad.read_zarr(output).n_obs == 150


def test_nothing_that_goes_wrong_is_a_traceback_unless_asked(monkeypatch, capsys):
    def fails(name: str) -> None:
        raise AssertionError("\x1b[31mred\u202e")

    monkeypatch.setattr(cp.weights, "card", fails)
    assert main(["card", STARTER]) == 1
    expected = "cellprior card: AssertionError: \\x1b[31mred\\u202e (--debug shows where)\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(AssertionError):
        main(["card", STARTER, "--debug"])


def test_a_reader_that_has_gone_ends_the_command_in_silence(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patch, os.fdopen(write, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            main(["list"])
    assert stopped.value.code == 141
    assert not capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nope"], ["embed", "a.h5ad", "b.h5ad"]])
def test_a_command_line_that_makes_no_sense_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: cellprior" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == version("cellprior")


def test_as_a_process_it_embeds_and_fails_like_any_command(counts, tmp_path):
    command = [sys.executable, "-m", "cellprior"]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
        )

    good = run("embed", "counts.h5ad", "out.h5ad", "--weights", STARTER)
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("out.h5ad: obsm['X_cellplm'], 150 cells")
    found = ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_cellplm"]
    np.testing.assert_allclose(found, embedded(counts).obsm["X_cellplm"], rtol=1e-5, atol=1e-5)
    bad = run("card", "nope")
    assert bad.returncode == 1
    assert bad.stderr.startswith("cellprior card: ")
    assert "Traceback" not in bad.stderr
    assert not bad.stdout
