"""Installs a pure Python project the way pip does, without pip, a build or the network."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def install(project: str, target: Path) -> None:
    """Copy the packages of a project beside this file into a folder and write what an installer writes of it."""
    about = tomllib.loads((HERE / project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.copytree(HERE / project / "src", target, dirs_exist_ok=True)
    info = target / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {about['name']}\nVersion: {about['version']}\n"
    )
    lines = []
    for group, points in about.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
