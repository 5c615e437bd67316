from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cellprior import settings, weights
from cellprior.weights._registry import FileEntry

from .files import GOOD, Register, contents, sha


def test_a_cache_that_cannot_be_made_is_an_error_that_names_it_and_the_setting(
    server, register: Register, tmp_path
):
    (tmp_path / "file").touch()
    settings.cache_dir = tmp_path / "file" / "cache"
    register(server.file("a.bin", GOOD))
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch("tiny", progressbar=False)
    assert str(settings.cache_dir) in str(error.value)
    assert "CELLPRIOR_CACHE" in str(error.value)
    assert server.asked == []


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the cache refuse new files, also for root, who is refused nothing by permissions."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)


def test_what_is_cached_loads_from_a_read_only_cache(server, register: Register, monkeypatch):
    register(server.file("a.bin", GOOD))
    folder = weights.fetch("tiny", progressbar=False)
    read_only(monkeypatch)
    assert weights.fetch("tiny") == folder


def test_a_missing_file_of_a_read_only_cache_is_an_error_that_names_the_setting(
    server, register, monkeypatch
):
    register(server.file("a.bin", GOOD))
    read_only(monkeypatch)
    with pytest.raises(weights.WeightsError, match=r"Read-only file system.*CELLPRIOR_CACHE"):
        weights.fetch("tiny", progressbar=False)


def test_a_read_only_cache_without_a_known_hash_is_used_and_this_is_said(
    register: Register, monkeypatch, caplog
):
    entry = register(FileEntry("a.bin", "https://example.org/a.bin"))
    entry.folder.mkdir(parents=True)
    (entry.folder / "a.bin").write_bytes(GOOD)
    read_only(monkeypatch)
    assert contents(weights.fetch("tiny")) == {"a.bin": GOOD}
    assert "used unverified" in caplog.text


FETCH = (
    "import sys; from cellprior import weights; print(weights.resolve(sys.argv[1], known_hash=sys.argv[2]))"
)


def start(url: str) -> subprocess.Popen:
    """Fetch an address in a process of its own."""
    command = [sys.executable, "-c", FETCH, url, sha(GOOD)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_may_fetch_the_same_file_at_once(server):
    # The server goes on only when both are in the middle of their download.
    both = threading.Barrier(2)
    url = server.serve("/a.bin", server.answer(GOOD, midway=lambda: both.wait(timeout=60)))
    pair = [start(url), start(url)]
    answers = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], answers
    (path,) = {Path(out.strip()) for out, _ in answers}
    assert contents(path.parent) == {"a.bin": GOOD}


def test_a_killed_download_leaves_the_cache_whole_and_its_rest_is_swept_up_later(server):
    midway, killed = threading.Event(), threading.Event()
    stuck = server.answer(GOOD, midway=lambda: (midway.set(), killed.wait(timeout=60)))
    url = server.serve("/a.bin", stuck, GOOD)
    process = start(url)
    assert midway.wait(timeout=60)
    process.kill()
    process.communicate(timeout=60)
    killed.set()
    (folder,) = settings.cache_dir.iterdir()
    (leftover,) = folder.iterdir()
    assert leftover.is_dir()

    path = weights.resolve(url, known_hash=sha(GOOD), progressbar=False)
    assert path.read_bytes() == GOOD
    # It might have belonged to a process that is still at work: it goes once it is two days old.
    assert leftover.exists()
    long_ago = time.time() - 2 * 86_400
    os.utime(leftover, (long_ago, long_ago))
    path.unlink()
    weights.resolve(url, known_hash=sha(GOOD), progressbar=False)
    assert contents(folder) == {"a.bin": GOOD}


def test_an_interrupted_download_leaves_nothing_behind(server, register: Register, monkeypatch):
    entry = register(server.file("a.bin", GOOD))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cellprior.weights._download._receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.fetch("tiny", progressbar=False)
    assert contents(entry.folder) == {}
