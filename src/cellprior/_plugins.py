"""Models that other packages add: entry points of the group ``cellprior.models``."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

GROUP = "cellprior.models"


@cache
def plugins() -> tuple[EntryPoint, ...]:
    """Entry points of the installed packages, by name; nothing of theirs is imported."""
    return tuple(sorted(entry_points(group=GROUP), key=lambda plugin: plugin.name))


def registry_file(plugin: EntryPoint) -> Path | None:
    """``registry.yaml`` of the package that an entry point names, if it has one; the package is not imported."""
    spec = find_spec(plugin.module.partition(".")[0])
    folders = spec.submodule_search_locations or () if spec else ()
    return next((path for folder in folders if (path := Path(folder) / "registry.yaml").is_file()), None)


def warn_broken(plugin: EntryPoint, problem: object) -> None:
    """Say which plug-in is left out, and why."""
    package = f" of {plugin.dist.name} {plugin.dist.version}" if plugin.dist else ""
    msg = f"The plug-in {plugin.name!r} ({plugin.value}{package}) is left out: {problem}"
    warnings.warn(msg, UserWarning, stacklevel=3)
