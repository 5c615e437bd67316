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


def test_the_fingerprint_of_a_bundle_is_that_of_its_tensors(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    (tmp_path / "README.md").write_bytes(b"anything")
    assert weights.sha256(tmp_path) == weights.sha256(tmp_path / "model.safetensors") == HASH
