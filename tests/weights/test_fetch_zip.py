from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from cellprior import settings, weights
from cellprior.weights._registry import FileEntry

from .files import BAD, GOOD, Register, contents, sha


def zip_of(path: Path, **members: bytes) -> bytes:
    """Write a zip with members such as `ckpt/a.bin`, and return its bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt/unrelated.bin", b"x" * 1000)
        for name, content in members.items():
            archive.writestr(f"ckpt/{name}.bin", content)
    return path.read_bytes()


def packed(url: str, *, good_a: bytes = GOOD, good_b: bytes = GOOD) -> list[FileEntry]:
    return [
        FileEntry("a.bin", url, sha(good_a), archive="all.zip", member="ckpt/a.bin"),
        FileEntry("b.bin", url, sha(good_b), archive="all.zip", member="ckpt/b.bin"),
    ]


def test_members_of_a_zip_are_taken_out_of_one_download_and_the_rest_is_dropped(
    server, register: Register, tmp_path: Path
):
    url = server.serve("/dl?dl=1", zip_of(tmp_path / "z.zip", a=GOOD, b=BAD))
    entry = register(*packed(url, good_b=BAD))
    weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {"a.bin": GOOD, "b.bin": BAD}
    assert server.asked == ["/dl?dl=1"]


def test_a_zip_in_the_mirror_is_used_and_a_loose_file_beside_it_comes_first(
    register: Register, mirror_folder: Path, tmp_path: Path
):
    settings.offline = True
    zip_of(mirror_folder / "all.zip", a=BAD, b=BAD)
    (mirror_folder / "a.bin").write_bytes(GOOD)
    entry = register(*packed("https://example.org/all.zip", good_b=BAD))
    weights.fetch("tiny")
    assert contents(entry.folder) == {"a.bin": GOOD, "b.bin": BAD}


def test_a_zip_behind_a_mirror_address_is_downloaded_once(server, register: Register, tmp_path: Path):
    settings.mirror = server.base
    server.serve("/all.zip", zip_of(tmp_path / "z.zip", a=GOOD, b=GOOD))
    register(*packed(f"{server.base}/never"))
    weights.fetch("tiny", progressbar=False)
    assert server.asked == ["/a.bin", "/all.zip"]


def test_a_member_with_a_wrong_hash_is_refused(server, register: Register, tmp_path: Path):
    entry = register(*packed(server.serve("/z", zip_of(tmp_path / "z.zip", a=GOOD, b=BAD))))
    with pytest.raises(weights.WeightsError, match=sha(BAD)):
        weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {"a.bin": GOOD}


def test_a_zip_without_the_member_is_an_error_that_names_the_member(
    server, register: Register, tmp_path: Path
):
    register(*packed(server.serve("/z", zip_of(tmp_path / "z.zip", b=GOOD))))
    with pytest.raises(weights.WeightsError, match=r"no member ckpt/a\.bin"):
        weights.fetch("tiny", progressbar=False)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_zip_is_refused_even_where_no_hash_is_known(
    server, register: Register, tmp_path: Path, damage: str
):
    whole = bytearray(zip_of(tmp_path / "z.zip", a=os.urandom(5000)))
    if damage == "truncated":
        del whole[-3000:]
    else:
        whole[2000] ^= 0xFF
    url = server.serve("/z", bytes(whole))
    entry = register(FileEntry("a.bin", url, archive="all.zip", member="ckpt/a.bin"))
    with pytest.raises(weights.WeightsError, match="damaged or truncated"):
        weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {}
