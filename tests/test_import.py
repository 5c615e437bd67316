from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import pytest

import cellprior as cp

HEAVY = ("torch", "lightning", "scvi", "scanpy", "anndata", "mudata")


def heavy_modules_after(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has imported after the statement."""
    code = f"import sys\n{statement}\nprint(*set({HEAVY!r}).intersection(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_importing_cellprior_imports_none_of_the_heavy_packages():
    assert heavy_modules_after("import cellprior") == set()


def test_the_measurement_would_notice_a_heavy_import():
    assert "anndata" in heavy_modules_after("import cellprior, anndata")


@pytest.mark.parametrize("room", ["genes", "weights"])
def test_rooms_without_a_network_do_not_import_torch(room):
    assert heavy_modules_after(f"import cellprior; cellprior.{room}").isdisjoint(
        {"torch", "lightning", "scvi"}
    )


def test_every_public_room_can_be_reached_and_is_listed():
    for room in cp.__all__:
        assert getattr(cp, room) is not None
        assert room in dir(cp)


@pytest.mark.parametrize("room", ["evaluate", "genes", "model", "pl", "pp", "tl", "weights"])
def test_a_room_shows_its_public_names_and_nothing_else(room):
    assert dir(getattr(cp, room)) == sorted(getattr(cp, room).__all__)


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="'cellprior' has no attribute 'modell'"):
        _ = cp.modell


def test_the_version_is_that_of_the_installed_distribution():
    assert cp.__version__ == metadata.version("cellprior")


def test_the_package_says_that_it_is_typed():
    assert resources.files("cellprior").joinpath("py.typed").is_file()
