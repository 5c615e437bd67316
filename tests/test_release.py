"""What goes out with a release: the wheel, the listing, the files that scverse's checklist asks for.

.ci/run builds the wheel and names it in CELLPRIOR_WHEEL; elsewhere it is built here, if hatchling is there.
"""

from __future__ import annotations

import configparser
import os
import re
import tomllib
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from cellprior.weights._registry import parse_registry

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    built = os.environ.get("CELLPRIOR_WHEEL")
    if not built:
        builder = pytest.importorskip(
            "hatchling.builders.wheel", reason="no CELLPRIOR_WHEEL and no hatchling"
        )
        folder = tmp_path_factory.mktemp("dist")
        built = next(builder.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    return ZipFile(built)


@pytest.fixture(scope="module")
def info(wheel: ZipFile) -> str:
    return f"cellprior-{PROJECT['version']}.dist-info"


def test_the_wheel_holds_every_file_of_the_package_bit_by_bit_and_no_other(wheel, info):
    source = ROOT / "src"
    files = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(source).as_posix(): path for path in files}
    packed = {name for name in wheel.namelist() if not name.startswith(info)}
    assert packed == set(expected)
    for name, path in expected.items():
        assert wheel.read(name) == path.read_bytes()


def test_the_wheel_holds_the_weights_of_every_packaged_entry_the_types_and_the_licence(wheel, info):
    names = set(wheel.namelist())
    assert {"cellprior/py.typed", "cellprior/weights/registry.yaml", f"{info}/licenses/LICENSE"} <= names
    registry = parse_registry(ROOT / "src" / "cellprior" / "weights" / "registry.yaml")
    packaged = [entry for entry in registry.values() if entry.packaged]
    assert {entry.name for entry in packaged} >= {"cellplm-starter", "multiomeclip-starter", "scbert-starter"}
    for entry in packaged:
        folder = entry.folder.relative_to(ROOT / "src").as_posix()
        assert {f"{folder}/{file.name}" for file in entry.files} <= names
    assert sum(item.compress_size for item in wheel.infolist()) < 22e6  # three starters take 20 of them


def test_the_wheel_says_its_version_its_licence_and_its_command(wheel, info):
    about = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert about["Version"] == PROJECT["version"]
    assert about["License-Expression"] == "BSD-3-Clause"
    assert about["Requires-Python"] == ">=3.11"
    commands = configparser.ConfigParser()
    commands.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(commands["console_scripts"]) == {"cellprior": "cellprior.cli:main"}
    assert b"Root-Is-Purelib: true" in wheel.read(f"{info}/WHEEL")


def test_the_version_stands_in_one_place():
    text = PROJECT["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", text)
    others = [ROOT / "CITATION.cff", ROOT / "docs" / "conf.py", ROOT / "docs" / "meta.yaml"]
    for path in [*others, *(ROOT / "src" / "cellprior").rglob("*.py")]:
        assert f'"{text}"' not in path.read_text(encoding="utf-8"), path


def test_the_draft_of_the_listing_agrees_with_the_project():
    listing = yaml.safe_load((ROOT / "docs" / "meta.yaml").read_text(encoding="utf-8"))
    assert listing["name"] == listing["install"]["pypi"] == PROJECT["name"]
    assert listing["license"] == PROJECT["license"]
    assert listing["project_home"] == PROJECT["urls"]["Source"]
    assert listing["documentation_home"] == PROJECT["urls"]["Documentation"]
    assert listing["test_command"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "version" not in listing  # read from the registry of packages


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CODE_OF_CONDUCT.md",
        "SECURITY.md",
        "CITATION.cff",
        ".readthedocs.yaml",
        ".github/workflows/test.yaml",
        ".github/workflows/release.yaml",
        ".github/ISSUE_TEMPLATE/bug_report.yml",
    ],
)
def test_a_file_that_the_checklist_asks_for_is_there_and_yaml_can_be_read(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.strip()
    if name.endswith((".yaml", ".yml", ".cff")):
        assert isinstance(yaml.safe_load(text), dict)


def test_every_action_of_the_workflows_is_pinned_by_a_commit():
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yaml")):
        for action in re.findall(r"uses: (\S+)", path.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{path.name}: {action}"


def test_the_recipe_for_conda_asks_for_what_the_package_asks_for():
    recipe = yaml.safe_load((ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8"))
    names = {"matplotlib-base": "matplotlib", "pytorch": "torch"}
    asked = [line.partition(" ")[::2] for line in recipe["requirements"]["run"]]
    found = {names.get(name, name): set(versions.split(",")) for name, versions in asked}
    needed = {}
    for requirement in PROJECT["dependencies"]:
        name, versions = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        needed[name] = set(versions.split(","))
    assert found == {"python": {PROJECT["requires-python"]}, **needed}
    assert recipe["package"]["version"] == PROJECT["version"]
