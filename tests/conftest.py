"""Fixtures that every room shares.

Tests must pass from a plain clone. The larger inputs (real data sets, numbers of the original models, a copy
of the registry's files) lie outside the repository and are found through two environment variables:

`CELLPRIOR_TEST_DATA`
    Folder with the data sets; its sibling `golden` holds the original models' numbers. `none` says that there
    is no such folder, on purpose.
`CELLPRIOR_MIRROR`
    Folder with a copy of the files that the weight registry points at; by default the sibling `mirror`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import cellprior

# Read once, here: `isolated_settings` hides CELLPRIOR_MIRROR from the tests.
_DATA = os.environ.get("CELLPRIOR_TEST_DATA")
_MIRROR = os.environ.get("CELLPRIOR_MIRROR")
_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


MAX_WORKERS = 8  # each holds 1 to 2 GB
# A worker has one thread: with more, workers wait for each other's. It keeps its memory instead of handing it back to
# the kernel after every array. numba would raise the number of threads again, for PyTorch too.
OF_WORKERS = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967295",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for `-n auto`: one per core for whole folders, none beside this one for files or tests by name."""
    named = [argument.partition("::")[0] for argument in config.args]
    if any(name.endswith(".py") for name in named):
        return 0  # a worker's imports take longer than most files do
    affinity = getattr(os, "sched_getaffinity", None)
    n_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return 0 if n_cores == 1 else min(n_cores, MAX_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """Workers are started after this, with the environment that this process has."""
    if getattr(config.option, "numprocesses", None):
        for name, value in OF_WORKERS.items():
            os.environ.setdefault(name, value)


def _outside(folder: Path, variable: str) -> Path:
    """A folder outside the repository: a variable that points nowhere is a mistake, not a reason to skip."""
    if not folder.is_dir():
        pytest.fail(f"{variable} leads to {folder}, which is not a folder. Correct or unset the variable.")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets."""
    if not _DATA and _CI:
        pytest.fail(
            "CI runs without CELLPRIOR_TEST_DATA, so this test would be skipped unnoticed. "
            "Set it to the folder with the test data, or to 'none' to skip on purpose."
        )
    if not _DATA or _DATA.lower() == "none":
        pytest.skip("needs the test data: set CELLPRIOR_TEST_DATA to its folder")
    return _outside(Path(_DATA).resolve(), "CELLPRIOR_TEST_DATA")


@pytest.fixture(scope="session")
def golden(shared_data: Path) -> Path:
    """Folder with numbers made by running the original models."""
    return _outside(shared_data.parent / "golden", "CELLPRIOR_TEST_DATA")


@pytest.fixture(scope="session")
def mirror(shared_data: Path) -> Path:
    """Folder with a copy of the files that the weight registry points at."""
    if _MIRROR:
        return _outside(Path(_MIRROR).resolve(), "CELLPRIOR_MIRROR")
    return _outside(shared_data.parent / "mirror", "CELLPRIOR_TEST_DATA")


@pytest.fixture(autouse=True)
def isolated_settings(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """An empty cache, no mirror and settings as new for every test, whatever the user's environment says."""
    monkeypatch.setenv("CELLPRIOR_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("CELLPRIOR_MIRROR", raising=False)
    for variable in ("OFFLINE", "VERBOSITY", "PROGRESS"):
        monkeypatch.delenv(f"CELLPRIOR_{variable}", raising=False)
    yield
    cellprior.settings.cache_dir = None
    cellprior.settings.offline = None
    cellprior.settings.mirror = None
    cellprior.settings.verbosity = None
    cellprior.settings.progress = None
