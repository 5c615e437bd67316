from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cellprior.model
from cellprior._plugins import plugins
from cellprior.weights._registry import entries

from .install import HERE, install


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages installed, the plug-in with the weights that its recipe makes."""
    folder = tmp_path_factory.mktemp("site")
    install("plugin", folder)
    install("client", folder)
    recipe = [sys.executable, HERE / "plugin" / "make_weights.py", folder / "reference_pca" / "weights"]
    subprocess.run(recipe, check=True, env=environment(folder), capture_output=True, timeout=300)
    return folder


def environment(site: Path) -> dict[str, str]:
    """Environment variables with which a new Python finds what is installed in a folder, and no network."""
    import os

    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CELLPRIOR_OFFLINE": "1"}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes what is installed in a folder known to this Python, for the length of a test."""
    before = set(sys.modules)

    def forget() -> None:
        for remembered in (plugins, entries, cellprior.model._added):
            remembered.cache_clear()

    def add(folder: Path) -> None:
        monkeypatch.syspath_prepend(folder)
        forget()

    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    yield add
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("reference_pca", "methods_note", "broken"):
            del sys.modules[name]
    forget()
