from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from cellprior import settings, weights
from cellprior.weights._registry import FileEntry

from .files import BAD, GOOD, Register, contents, sha


def test_a_file_is_downloaded_once_and_then_comes_from_the_cache(server, register: Register):
    register(server.file("a.bin", GOOD))
    folder = weights.fetch("tiny", progressbar=False)
    assert folder == settings.cache_dir / "tiny"
    assert contents(folder) == {"a.bin": GOOD}
    assert weights.fetch("tiny") == folder
    assert server.asked == ["/a.bin"]


def test_a_file_of_a_shared_cache_has_the_usual_rights(server, register: Register, tmp_path: Path):
    register(server.file("a.bin", GOOD))
    (tmp_path / "usual").touch()
    cached = weights.fetch("tiny", progressbar=False) / "a.bin"
    assert cached.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_download_shows_its_progress_unless_told_not_to(server, register: Register, capsys):
    register(server.file("a.bin", GOOD))
    weights.fetch("tiny", progressbar=True)  # unless it is asked for, a download of a moment draws none
    assert "100%" in capsys.readouterr().err
    register(server.file("b.bin", GOOD), name="other")
    weights.fetch("other", progressbar=False)
    assert "100%" not in capsys.readouterr().err


def test_the_licence_is_shown_at_the_first_download_and_never_again(server, register: Register, caplog):
    register(server.file("a.bin", GOOD), licence="GPL-3.0", citation="B. 1999")
    folder = weights.fetch("tiny", progressbar=False)
    shown = [record for record in caplog.records if record.name.startswith("cellprior")]
    assert [record.levelno for record in shown] == [logging.WARNING]
    assert "GPL-3.0" in shown[0].getMessage()
    assert "B. 1999" in shown[0].getMessage()
    caplog.clear()
    weights.fetch("tiny", progressbar=False)
    (folder / "a.bin").write_bytes(BAD)
    weights.fetch("tiny", progressbar=False)
    assert "licence" not in caplog.text


# Hashes


def test_a_wrong_hash_is_refused_and_nothing_is_kept(server, register: Register):
    url = server.serve("/a.bin", BAD)
    entry = register(FileEntry("a.bin", url, sha(GOOD)))
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch("tiny", progressbar=False)
    for part in (url, sha(BAD), sha(GOOD)):
        assert part in str(error.value)
    assert contents(entry.folder) == {}


def test_a_wrong_hash_of_one_file_leaves_the_good_copies_of_the_others(server, register: Register):
    good = server.file("a.bin", GOOD)
    entry = register(good, FileEntry("b.bin", server.serve("/b.bin", BAD), sha(GOOD)))
    with pytest.raises(weights.WeightsError, match=r"b\.bin"):
        weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {"a.bin": GOOD}
    server.serve("/b.bin", GOOD)
    weights.fetch("tiny", progressbar=False)
    assert server.asked == ["/a.bin", "/b.bin", "/b.bin"]


def test_a_damaged_cached_file_is_fetched_again(server, register: Register):
    entry = register(server.file("a.bin", GOOD))
    weights.fetch("tiny", progressbar=False)
    (entry.folder / "a.bin").write_bytes(GOOD[:-1])
    weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {"a.bin": GOOD}


def test_a_damaged_cached_file_is_refused_when_offline(server, register: Register, monkeypatch):
    entry = register(server.file("a.bin", GOOD))
    weights.fetch("tiny", progressbar=False)
    (entry.folder / "a.bin").write_bytes(BAD)
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch("tiny")
    assert f"{entry.folder / 'a.bin'}: it has sha256 {sha(BAD)}" in str(error.value)
    assert "CELLPRIOR_OFFLINE" in str(error.value)


def test_an_unpublished_hash_is_recorded_at_the_first_download_and_said(server, register: Register, caplog):
    register(FileEntry("a.bin", server.serve("/a.bin", GOOD)))
    folder = weights.fetch("tiny", progressbar=False)
    assert (folder / "a.bin.sha256").read_text() == f"{sha(GOOD)}  a.bin\n"
    assert f"{sha(GOOD)} is recorded and verified from now on" in caplog.text
    caplog.clear()
    weights.fetch("tiny")
    assert caplog.text == ""


def test_a_recorded_hash_is_verified_ever_after(server, register: Register):
    entry = register(FileEntry("a.bin", server.serve("/a.bin", GOOD, BAD)))
    weights.fetch("tiny", progressbar=False)
    (entry.folder / "a.bin").unlink()
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch("tiny", progressbar=False)
    record = entry.folder / "a.bin.sha256"
    assert sha(GOOD) in str(error.value)
    assert f"to accept a new file, delete {record}" in str(error.value)
    record.unlink()
    weights.fetch("tiny", progressbar=False)
    assert (entry.folder / "a.bin").read_bytes() == BAD


# What hosts do


@pytest.mark.parametrize("status", [401, 403])
def test_a_host_that_asks_for_a_login_is_asked_once_and_the_error_says_what_to_do(
    server, register: Register, status: int
):
    register(FileEntry("a.bin", server.serve("/a.bin", server.answer(status=status)), sha(GOOD)))
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch("tiny", progressbar=False)
    message = str(error.value)
    assert f"asks for a login (HTTP {status})" in message
    assert "https://example.org/login-here" in message
    assert 'from_pretrained("path/to/a.bin")' in message
    assert "CELLPRIOR_MIRROR" in message
    assert server.asked == ["/a.bin"]


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><html>Sign in</html>", b"\xef\xbb\xbf \n<html><body>Confirm</body>"]
)
def test_a_web_page_is_not_taken_for_the_file_even_where_no_hash_is_known(
    server, register: Register, page: bytes
):
    entry = register(FileEntry("a.bin", server.serve("/a.bin", page)))
    with pytest.raises(weights.WeightsError, match="web page instead of the file") as error:
        weights.fetch("tiny", progressbar=False)
    assert "https://example.org/login-here" in str(error.value)
    assert contents(entry.folder) == {}


def test_an_address_that_is_gone_is_asked_once(server, register: Register):
    register(FileEntry("a.bin", f"{server.base}/gone.bin", sha(GOOD)), type="gene table")
    with pytest.raises(weights.WeightsError, match=r"does not have the file \(HTTP 404\)") as error:
        weights.fetch("tiny", progressbar=False)
    assert "from_pretrained" not in str(error.value)
    assert server.asked == ["/gone.bin"]


def test_a_busy_host_and_a_broken_connection_are_tried_again(server, register: Register, no_waiting):
    cut = server.answer(GOOD[:50], claimed=len(GOOD))
    url = server.serve("/a.bin", server.answer(status=503), server.answer(status=429), cut, GOOD)
    entry = register(FileEntry("a.bin", url))
    weights.fetch("tiny", progressbar=False)
    assert (entry.folder / "a.bin").read_bytes() == GOOD
    assert len(server.asked) == 4


def test_a_host_that_stays_busy_is_given_up(server, register: Register, no_waiting):
    register(FileEntry("a.bin", server.serve("/a.bin", server.answer(status=503)), sha(GOOD)))
    with pytest.raises(weights.WeightsError, match="503"):
        weights.fetch("tiny", progressbar=False)
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("status", "headers"),
    [(200, {"Content-Length": "abc"}), (200, {"Content-Length": "-1"}), (302, {"Location": "http://[::1"})],
    ids=["length in letters", "length below 0", "redirection to nowhere"],
)
def test_a_malformed_answer_is_named_and_the_next_address_is_tried(
    server, register: Register, no_waiting, status: int, headers: dict
):
    settings.mirror = server.base + "/mirror"
    server.serve("/mirror/a.bin", server.answer(GOOD, status=status, headers=headers))
    entry = register(FileEntry("a.bin", f"{server.base}/gone.bin", sha(GOOD)))
    with pytest.raises(weights.WeightsError, match=r"mirror/a\.bin: the host's answer is malformed") as error:
        weights.fetch("tiny", progressbar=False)
    assert "gone.bin: the host does not have the file" in str(error.value)
    server.serve("/gone.bin", GOOD)
    weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {"a.bin": GOOD}


def test_a_host_that_announces_more_than_the_file_can_have_is_not_listened_to(server, register: Register):
    answer = server.answer(GOOD, claimed=10**9)
    register(FileEntry("a.bin", server.serve("/a.bin", answer), sha(GOOD)))
    with pytest.raises(weights.WeightsError, match="announces 1.0 GB; the file should have 67 MB at most"):
        weights.fetch("tiny", progressbar=False)
    assert server.asked == ["/a.bin"]


def test_a_host_that_sends_without_end_is_stopped_and_nothing_is_kept(
    server, register: Register, monkeypatch
):
    monkeypatch.setattr("cellprior.weights._fetch.SLACK", 100)
    answer = server.answer(GOOD, headers={})
    entry = register(FileEntry("a.bin", server.serve("/a.bin", answer), sha(GOOD)))
    with pytest.raises(weights.WeightsError, match="sends more than"):
        weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {} and server.asked == ["/a.bin"]
    monkeypatch.setattr("cellprior.weights._download.UNSTATED", 100)
    with pytest.raises(weights.WeightsError, match="sends more than"):
        weights.resolve(f"{server.base}/a.bin", known_hash=sha(GOOD), progressbar=False)


@pytest.mark.parametrize(("name", "value"), [("PATIENCE", 0.02), ("LONGEST", 0.02)])
def test_a_host_that_trickles_is_given_up_at_once(
    server, register: Register, monkeypatch, name: str, value: float
):
    monkeypatch.setattr("cellprior.weights._download.SLOWEST", 1e9)
    monkeypatch.setattr(f"cellprior.weights._download.{name}", value)
    answer = server.answer(GOOD, midway=lambda: time.sleep(0.1))
    register(FileEntry("a.bin", server.serve("/a.bin", answer), sha(GOOD)))
    with pytest.raises(weights.WeightsError, match="too slow: |has not ended in"):
        weights.fetch("tiny", progressbar=False)
    assert server.asked == ["/a.bin"]


# Offline and mirrors


def test_offline_with_an_empty_cache_the_error_names_the_file_its_address_and_the_settings(
    server, register: Register, monkeypatch
):
    url = server.serve("/a.bin", GOOD)
    entry = register(FileEntry("a.bin", url, sha(GOOD)))
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch("tiny")
    for part in ("a.bin of 'tiny'", str(entry.folder), url, "CELLPRIOR_OFFLINE", "CELLPRIOR_MIRROR"):
        assert part in str(error.value)
    assert server.asked == []


def test_what_is_cached_is_there_offline(server, register: Register, monkeypatch):
    entry = register(server.file("a.bin", GOOD))
    weights.fetch("tiny", progressbar=False)
    settings.offline = True
    assert contents(weights.fetch("tiny")) == contents(entry.folder)
    assert server.asked == ["/a.bin"]


def test_a_mirror_folder_is_asked_before_the_network_and_also_offline(
    server, register: Register, mirror_folder: Path, monkeypatch
):
    (mirror_folder / "a.bin").write_bytes(GOOD)
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    entry = register(FileEntry("a.bin", server.serve("/other-name", GOOD), sha(GOOD)))
    weights.fetch("tiny")
    assert contents(entry.folder) == {"a.bin": GOOD}
    assert server.asked == []


def test_a_mirror_address_is_asked_before_the_public_one(server, register: Register):
    settings.mirror = f"{server.base}/mirror/"
    server.serve("/mirror/a.bin", GOOD)
    register(FileEntry("a.bin", server.serve("/public/a.bin", GOOD), sha(GOOD)))
    weights.fetch("tiny", progressbar=False)
    assert server.asked == ["/mirror/a.bin"]


def test_offline_means_that_a_mirror_address_is_not_asked_either(server, register: Register):
    settings.mirror = server.base
    settings.offline = True
    register(server.file("a.bin", GOOD))
    with pytest.raises(weights.WeightsError, match="the network: not tried"):
        weights.fetch("tiny", progressbar=False)
    assert server.asked == []


@pytest.mark.parametrize("copy", [BAD, None], ids=["wrong copy", "no copy"])
def test_where_the_mirror_has_no_good_copy_the_network_is_asked(
    server, register: Register, mirror_folder: Path, copy: bytes | None
):
    if copy is not None:
        (mirror_folder / "a.bin").write_bytes(copy)
    entry = register(server.file("a.bin", GOOD))
    weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {"a.bin": GOOD}


def test_every_source_that_failed_is_listed(server, register: Register, mirror_folder: Path):
    url = f"{server.base}/gone.bin"
    register(FileEntry("a.bin", url, sha(GOOD)))
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch("tiny", progressbar=False)
    assert f"- {mirror_folder / 'a.bin'}: no such file\n" in str(error.value)
    assert f"- {url}: the host does not have the file (HTTP 404)\n" in str(error.value)


def test_the_gene_tables_come_out_of_a_mirror(mirror: Path, monkeypatch):
    monkeypatch.setenv("CELLPRIOR_MIRROR", str(mirror))
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    for name in ("gencode-human-48", "gencode-human-38", "gencode-mouse-M37"):
        (file,) = weights.fetch(name).iterdir()
        assert file.read_bytes() == (mirror / file.name).read_bytes()
