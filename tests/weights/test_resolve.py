from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cellprior import settings, weights

GOOD = b"the weights\n" * 100
HASH = hashlib.sha256(GOOD).hexdigest()


def test_an_existing_file_or_folder_is_itself(tmp_path: Path, monkeypatch):
    file = tmp_path / "my.ckpt"
    file.write_bytes(GOOD)
    assert weights.resolve(file) == file
    assert weights.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.resolve("~/my.ckpt") == file


def test_a_registry_name_is_fetched_even_where_a_folder_has_the_same_name(tmp_path: Path, monkeypatch):
    (tmp_path / "gencode-human-48").mkdir()
    monkeypatch.chdir(tmp_path)
    settings.offline = True
    with pytest.raises(weights.WeightsError, match="'gencode-human-48' is not in"):
        weights.resolve("gencode-human-48")
    assert weights.resolve("./gencode-human-48") == weights.resolve(Path("gencode-human-48"))


def test_a_registry_name_takes_no_hash():
    with pytest.raises(weights.WeightsError, match="leave known_hash out"):
        weights.resolve("gencode-human-48", known_hash=HASH)


def test_a_path_that_is_not_there_is_an_error_with_the_closest_names(tmp_path: Path):
    with pytest.raises(weights.WeightsError, match=r"neither .* nor .*Did you mean 'cellplm-starter'"):
        weights.resolve("cellplm_starter")


def test_a_file_with_another_hash_than_given_is_refused(tmp_path: Path):
    file = tmp_path / "my.ckpt"
    file.write_bytes(GOOD)
    assert weights.resolve(file, known_hash=HASH.upper()) == file
    file.write_bytes(GOOD + b"!")
    with pytest.raises(weights.WeightsError, match=HASH):
        weights.resolve(file, known_hash=HASH)


def test_an_address_is_downloaded_once_if_its_hash_is_given(server):
    url = server.serve("/x/my%20file.ckpt?dl=1", GOOD)
    path = weights.resolve(url, known_hash=f"sha256:{HASH}", progressbar=False)
    assert path.name == "my file.ckpt"
    assert path.read_bytes() == GOOD
    assert weights.resolve(url, known_hash=HASH) == path
    assert len(server.asked) == 1


def test_an_address_without_a_hash_is_refused_unread(server):
    with pytest.raises(weights.WeightsError, match="known_hash="):
        weights.resolve(f"{server.base}/my.ckpt")
    assert server.asked == []


def test_a_hash_that_is_none_is_refused():
    with pytest.raises(weights.WeightsError, match="64 hex digits"):
        weights.resolve("https://example.org/my.ckpt", known_hash="abc")


def bundle(folder: Path, peaks: bytes | None = None) -> Path:
    folder.mkdir()
    files = {"model.safetensors": GOOD, "config.json": b"{}", "genes.tsv": b"g", "README.md": b"anything"}
    for name, content in (files | ({} if peaks is None else {"peaks.tsv": peaks})).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "genes.tsv", "peaks.tsv"])
def test_the_hash_of_a_bundle_is_another_whatever_file_of_it_is_changed(tmp_path: Path, name: str):
    folder = bundle(tmp_path / "b", peaks=b"p")
    before = weights.sha256(folder)
    assert weights.resolve(folder, known_hash=before) == folder
    (folder / name).write_bytes(b"edited")
    with pytest.raises(weights.WeightsError, match=f"another folder.*needed is {before}"):
        weights.resolve(folder, known_hash=before)


def test_the_hash_of_a_bundle_does_not_depend_on_its_place_or_its_card(tmp_path: Path):
    first, second = bundle(tmp_path / "a"), bundle(tmp_path / "b")
    (second / "README.md").write_bytes(b"another text")
    assert weights.sha256(first) == weights.sha256(second)


def test_the_hash_of_a_bundle_is_that_of_the_list_of_its_hashes(tmp_path: Path):
    folder = bundle(tmp_path / "b", peaks=b"p")
    names = ["config.json", "genes.tsv", "model.safetensors", "peaks.tsv"]
    listed = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names
    )
    assert weights.sha256(folder) == hashlib.sha256(listed.encode()).hexdigest()
    assert weights.sha256(*(folder / name for name in names)) == weights.sha256(folder)


def test_a_hash_of_the_tensors_alone_is_refused_with_how_to_find_that_of_the_folder(tmp_path: Path):
    folder = bundle(tmp_path / "b")
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors alone.*weights\.sha256\("):
        weights.resolve(folder, known_hash=HASH)


def test_a_folder_that_is_no_bundle_has_no_hash(tmp_path: Path):
    with pytest.raises(weights.WeightsError, match=r"is no bundle, it lacks config\.json, genes\.tsv"):
        weights.resolve(tmp_path, known_hash=HASH)
