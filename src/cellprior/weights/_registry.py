"""Typed registry entries, read from registry.yaml. Plain data: nothing is fetched here."""

from __future__ import annotations

import difflib
import re
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from cellprior._plugins import plugins, registry_file, warn_broken
from cellprior.settings import settings

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

HERE = Path(__file__).parent
TYPES = ("model", "gene table")
SUPPORT = ("ready", "untested", "files only")


class WeightsError(RuntimeError):
    """Weights could not be found, fetched, verified, read or written."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an entry."""

    name: str
    """Name on disk, in the cache and in a mirror."""

    url: str | None = None
    """Public address of the file, or of the archive that holds it."""

    sha256: str | None = None
    """64 lower-case hex digits; `None` where nobody has published one."""

    archive: str | None = None
    """Name of the zip archive that holds the file, in a mirror."""

    member: str | None = None
    """Path of the file inside the archive."""

    archive_size: int | None = None
    """Approximate size of the archive, in bytes."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            msg = f"File name {self.name!r} is not a plain name: no folders."
            raise WeightsError(msg)
        if self.sha256 is not None and not is_sha256(self.sha256):
            msg = f"sha256 of {self.name!r} is {self.sha256!r}; needed: 64 hex digits in lower case."
            raise WeightsError(msg)
        if (self.archive is None) != (self.member is None):
            msg = f"File {self.name!r} needs both `archive` and `member`, or neither."
            raise WeightsError(msg)


@dataclass(frozen=True, slots=True)
class Entry:
    """Weights, or a gene table, that cellprior knows by name."""

    name: str
    type: str
    """One of `TYPES`."""

    files: tuple[FileEntry, ...]
    size: int
    """Approximate size on disk, in bytes."""

    licence: str
    citation: str
    genes: str
    """The gene list, in words."""

    page: str
    """Web page for humans, named when the host does not hand out the file."""

    support: str
    """One of `SUPPORT`; registry.yaml says what each means."""

    model: str | None = None
    """Model class; `None` for a gene table."""

    trained_on: str | None = None
    packaged: str | None = None
    """Folder beside the registry file, for entries that need no download."""

    notes: str | None = None

    def __post_init__(self) -> None:
        for value, allowed in ((self.type, TYPES), (self.support, SUPPORT)):
            if value not in allowed:
                msg = f"Registry entry {self.name!r}: {value!r} is none of {', '.join(allowed)}."
                raise WeightsError(msg)
        for file in self.files:
            if file.url is None and self.packaged is None:
                msg = f"Registry entry {self.name!r}: file {file.name!r} has no `url`."
                raise WeightsError(msg)

    @property
    def folder(self) -> Path:
        """Folder that holds the files, or will once they are fetched."""
        return Path(self.packaged) if self.packaged else settings.cache_dir / self.name

    @property
    def download(self) -> int:
        """Bytes that a download takes: of an archive all, whatever is kept of it; 0 of what comes with a package."""
        if self.packaged:
            return 0
        archives = {file.archive: file.archive_size for file in self.files if file.archive}
        return max(self.size, sum(size or 0 for size in archives.values()))

    @property
    def status(self) -> str:
        """Whether the files are on this machine: packaged, cached or not downloaded (hashes unchecked)."""
        if self.packaged:
            return "packaged"
        here = all((self.folder / file.name).is_file() for file in self.files)
        return "cached" if here else "not downloaded"


def is_sha256(text: str) -> bool:
    """Whether `text` is a SHA-256 hash in lower-case hexadecimal."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def parse_registry(path: Path) -> dict[str, Entry]:
    """Read a registry in YAML: `datasets`, then name -> keys of `Entry`, then `files`, with the keys of `FileEntry`.

    Raises WeightsError if a key is unknown or missing, or a value has the wrong type.
    """
    entries = {}
    for name, given in yaml.safe_load(path.read_text(encoding="utf-8"))["datasets"].items():
        where = f"Registry entry {name!r}"
        files = given.get("files", [])
        if "packaged" in given:
            given = {**given, "packaged": str(path.parent / given["packaged"])}
        typed = tuple(_typed(FileEntry, file, f"{where}, file {number}") for number, file in enumerate(files))
        entries[name] = _typed(Entry, {**given, "name": name, "files": typed}, where)
    return entries


def _typed(kind: type[T], given: dict[str, Any], where: str) -> T:
    """Build a dataclass from a mapping that has all of the needed keys and none that it does not know."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(given.keys() - known.keys())
    missing = [key for key, field in known.items() if field.default is MISSING and key not in given]
    # YAML reads an unquoted date or number as something else than text.
    wrong = [
        key
        for key in given
        if key not in {"size", "files", "archive_size"} and not isinstance(given[key], str)
    ]
    if unknown or missing or wrong:
        msg = (
            f"{where}: unknown keys {unknown}, missing keys {missing}, keys whose value is not text {wrong}."
        )
        raise WeightsError(msg)
    return kind(**given)


@cache
def entries() -> dict[str, Entry]:
    """All entries by name: those of cellprior's own registry, then those of plug-ins."""
    found = parse_registry(HERE / "registry.yaml")
    for plugin in plugins():
        try:
            path = registry_file(plugin)
            added = parse_registry(path) if path else {}
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the others are usable
            warn_broken(plugin, f"its registry.yaml cannot be read ({error!r}).")
            continue
        if taken := sorted(found.keys() & added.keys()):
            warn_broken(plugin, f"weights called {', '.join(taken)} are there already.")
        else:
            found |= added
    return found


def get_entry(name: str) -> Entry:
    """Entry of this name.

    Raises WeightsError if there is none; the message names what comes close.
    """
    if name in entries():
        return entries()[name]
    msg = f"There are no weights called {name!r}. {suggest(name)}"
    raise WeightsError(msg)


def suggest(name: str) -> str:
    """Sentence that names the registry entries closest to `name`, or all of them."""
    close = difflib.get_close_matches(name, entries(), n=3)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}? cellprior.weights.available() lists all."
    return f"The registry knows {', '.join(entries())}."


def available() -> pd.DataFrame:
    """What can be fetched by name.

    Returns
    -------
    One row per entry, indexed by name: kind, model class, licence, size on disk, size of the download (of an archive
    all of it), status (packaged, cached or not downloaded) and support (ready; untested: our tests have not loaded this
    file; files only: no model class reads it yet).

    Examples
    --------
    >>> import cellprior as cp
    >>> cp.weights.available()
    """
    import pandas as pd

    rows = {
        entry.name: {
            "kind": entry.type,
            "model": entry.model or "",
            "licence": entry.licence,
            "size": human_size(entry.size),
            "download": human_size(entry.download) if entry.download else "none",
            "status": entry.status,
            "support": entry.support,
        }
        for entry in entries().values()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def human_size(n_bytes: int) -> str:
    """Bytes in words, such as `330 MB` or `2.4 GB`."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:.1f} MB"
