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
    monkeypatch.delenv("CELLPRIOR_OFFLINE", raising=False)
    yield
    cellprior.settings.cache_dir = None
    cellprior.settings.offline = None
    cellprior.settings.mirror = None
