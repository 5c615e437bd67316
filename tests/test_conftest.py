from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import conftest


@pytest.mark.parametrize(
    ("ci", "folder", "outcome"),
    [
        ("", None, "1 skipped"),
        ("", "none", "1 skipped"),
        ("", "data", "1 passed"),
        ("", "elsewhere", "1 error"),
        ("true", None, "1 error"),
        ("true", "none", "1 skipped"),
        ("true", "data", "1 passed"),
    ],
)
def test_a_test_with_real_data_is_skipped_only_where_that_is_no_oversight(tmp_path, ci, folder, outcome):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text("def test_it(shared_data):\n    assert shared_data.is_dir()\n")
    (tmp_path / "data").mkdir()
    # in the place of the package, whose imports take seconds
    (tmp_path / "cellprior.py").write_text("class settings:\n    cache_dir = offline = mirror = None\n")

    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("CELLPRIOR_TEST_DATA", None)
    if folder is not None:
        environment["CELLPRIOR_TEST_DATA"] = folder if folder == "none" else str(tmp_path / folder)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        "test_it.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert outcome in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "cores", "workers"),
    [
        ([], 4, 4),
        (["tests/model"], 2, 2),
        (["tests/model"], 64, 8),
        (["tests/model"], 1, 0),
        (["tests/test_pl.py"], 4, 0),
        (["tests/model", "tests/test_pl.py::test_it"], 4, 0),
    ],
)
def test_whole_folders_are_tested_by_a_process_per_core_and_single_files_by_this_one(
    monkeypatch, arguments, cores, workers
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert conftest.pytest_xdist_auto_num_workers(SimpleNamespace(args=arguments)) == workers


def test_workers_have_one_thread_each_unless_the_environment_says_otherwise(monkeypatch):
    for name in conftest.OF_WORKERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(numprocesses=None)))
    assert "OMP_NUM_THREADS" not in os.environ
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(numprocesses=2)))
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["NUMBA_NUM_THREADS"] == "3"
    for name in conftest.OF_WORKERS:  # those that were set here
        monkeypatch.delenv(name)
