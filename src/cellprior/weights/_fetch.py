"""From a registry entry to a folder with its files: cache, mirror, network, zip members; all verified."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from cellprior.settings import settings
from cellprior.weights._digest import sha256
from cellprior.weights._download import download
from cellprior.weights._registry import Entry, FileEntry, WeightsError, entries, get_entry, is_sha256, suggest

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

log = logging.getLogger(__name__)

SLACK = 2**26  # bytes that a file may have besides twice its stated size
_STAGE = ".part-"
_DAY = 86_400  # seconds


def fetch(name: str, *, progressbar: bool | None = None) -> Path:
    """Get the files of a registry entry, from the cache, the mirror or the network, in this order.

    The sha256 of every file is verified at every call, also in the cache. Where no hash is published, that of
    the first download is recorded beside the file, as `<file>.sha256`, and holds from then on. The licence is
    logged once, at the first download.

    Parameters
    ----------
    name
        Entry name, as listed by `available`.
    progressbar
        Whether downloads show a bar, by default as ``cellprior.settings.progress`` says.

    Returns
    -------
    Folder with the entry's files, under their registry names.

    Raises
    ------
    WeightsError
        If the name is unknown, no source has the right file, or the cache folder cannot be written.
    """
    entry = get_entry(name)
    if entry.packaged:
        missing = [file.name for file in entry.files if not (entry.folder / file.name).is_file()]
        if missing:
            ours = entry.folder.is_relative_to(Path(__file__).parent)
            owner = "cellprior" if ours else "the package that brings these weights"
            msg = f"{entry.folder}, a part of {owner}, lacks {', '.join(missing)}. Install {owner} again."
            raise WeightsError(msg)
    elif _complete(entry, progressbar=progressbar):
        log.warning("%s: licence: %s. Please cite: %s.", entry.name, entry.licence, entry.citation)
    return entry.folder


def resolve(
    weights: str | os.PathLike[str], *, known_hash: str | None = None, progressbar: bool | None = None
) -> Path:
    """Path of weights that the user named in any of the ways that `from_pretrained` takes.

    Parameters
    ----------
    weights
        Registry name (which wins over a local folder of that name), path of a bundle or a checkpoint file, or
        http(s) address of a file.
    known_hash
        sha256 that the file must have; of a bundle: that of all of it, see `sha256`. Needed with an address.
    progressbar
        Whether downloads show a bar, by default as ``cellprior.settings.progress`` says.

    Raises
    ------
    WeightsError
        If nothing of that name exists, the hash differs, or the download fails.
    """
    if known_hash is not None:
        known_hash = known_hash.removeprefix("sha256:").lower()
        if not is_sha256(known_hash):
            msg = f"known_hash is {known_hash!r}; needed: a SHA-256 hash, which has 64 hex digits."
            raise WeightsError(msg)
    name = str(weights)
    if name in entries() and isinstance(weights, str):
        if known_hash is not None:
            msg = f"{name!r} is a registry name, and the registry has its hashes: leave known_hash out."
            raise WeightsError(msg)
        return fetch(name, progressbar=progressbar)
    if _is_url(name):
        return _fetch_url(name, known_hash, progressbar=progressbar)
    path = Path(weights).expanduser()
    if not path.exists():
        msg = f"{name!r} is neither a registry name nor an existing file or folder. {suggest(name)}"
        raise WeightsError(msg)
    if problem := _hash_problem(path, known_hash):
        what = "folder" if path.is_dir() else "file"
        msg = f"{path} is another {what} than expected, or a damaged one: {problem}."
        if path.is_dir() and sha256(path / "model.safetensors") == known_hash:
            msg += (
                " What is given is the hash of model.safetensors alone. That of a folder covers its configuration and "
                f"genes as well: cellprior.weights.sha256({str(path)!r})."
            )
        raise WeightsError(msg)
    return path


def fetch_beside(url: str, path: Path, names: Sequence[str], *, progressbar: bool | None = None) -> list[str]:
    """Get what belongs beside a file that came from an address: from the same place there, into the same folder here.

    Nothing is known of these files: the hash of the first download is recorded, and holds from then on.

    Parameters
    ----------
    url
        Address of the file.
    path
        The file, as `resolve` has put it.
    names
        Names of the others.

    Returns
    -------
    Of each that cannot be had, its address and the reason.
    """
    place, problems = urlsplit(url), []
    for name in names:
        there = urlunsplit(place._replace(path=f"{place.path.rpartition('/')[0]}/{quote(name)}"))
        try:
            _complete(_entry_of(there, path.parent.name, FileEntry(name, url=there)), progressbar=progressbar)
        except WeightsError as error:
            reason = next((line for line in str(error).split("\n") if there in line), str(error))
            problems.append(reason.strip(" -"))
    return problems


def _fetch_url(url: str, known_hash: str | None, *, progressbar: bool | None) -> Path:
    if known_hash is None:
        msg = f"An address needs known_hash=, the sha256 of the file; {url} came without one."
        raise WeightsError(msg)
    file = FileEntry(name=Path(unquote(urlsplit(url).path)).name or "weights", url=url, sha256=known_hash)
    entry = _entry_of(url, f"url-{known_hash[:16]}", file)
    _complete(entry, progressbar=progressbar)
    return entry.folder / file.name


def _entry_of(url: str, name: str, file: FileEntry) -> Entry:
    """What the registry would say of an address."""
    unknown = dict.fromkeys(("licence", "citation", "genes"), "unknown")
    return Entry(name, "model", files=(file,), size=0, page=url, support="untested", **unknown)


def _complete(entry: Entry, *, progressbar: bool | None) -> bool:
    """Bring every file of an entry into its cache folder; whether this was the first time."""
    problems = {file: _cache_problem(entry.folder / file.name, file) for file in entry.files}
    wanted = {file: problem for file, problem in problems.items() if problem is not None}
    if not wanted:
        return False
    with _stage(entry.folder) as stage:
        for file, problem in wanted.items():
            path = entry.folder / file.name
            staged = _obtain(entry, file, stage, [f"{path}: {problem}"] if problem else [], progressbar)
            with _writing(entry.folder):
                staged.replace(path)
            _record(path, file)
    return all(problem == "" for problem in problems.values())


def _cache_problem(path: Path, file: FileEntry) -> str | None:
    """`None` if the cached file is good, "" if there is none, else what is wrong with it."""
    if not path.is_file():
        return ""
    _record(path, file)
    return _hash_problem(path, _known_hash(path, file))


def _known_hash(path: Path, file: FileEntry) -> str | None:
    """Hash that the file at `path` must have: the published one, else the one recorded beside it."""
    record = _record_of(path)
    if file.sha256 is not None or not record.is_file():
        return file.sha256
    return record.read_text(encoding="utf-8").partition(" ")[0]


def _hash_problem(path: Path, known: str | None) -> str | None:
    if known is None or (found := sha256(path)) == known:
        return None
    return f"it has sha256 {found}, needed is {known}"


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _record(path: Path, file: FileEntry) -> None:
    """Where no hash is known, record that of the file at `path`, in a form that `sha256sum -c` reads."""
    if _known_hash(path, file) is not None:
        return
    record, found = _record_of(path), sha256(path)
    try:
        with _stage(path.parent) as stage, _writing(path.parent):
            (stage / record.name).write_text(f"{found}  {path.name}\n", encoding="utf-8")
            (stage / record.name).replace(record)
    except WeightsError as error:
        log.warning("No hash is known for %s, so it is used unverified. %s", path, error)
    else:
        log.warning("No hash is published for %s: %s is recorded and verified from now on.", path, found)


def _obtain(entry: Entry, file: FileEntry, stage: Path, tried: list[str], progressbar: bool | None) -> Path:
    """Put one verified file into the stage, from the first source that has it."""
    path = entry.folder / file.name
    known = _known_hash(path, file)
    for place, packed in _sources(entry, file, stage):
        try:
            staged = _take(entry, place, packed, file, stage, progressbar)
            problem = _hash_problem(staged, known)
        except (OSError, WeightsError) as error:  # requests raises OSErrors
            problem = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        if problem is None:
            return staged
        tried.append(f"{place}: {problem}")
    if settings.offline:
        tried.append("the network: not tried, CELLPRIOR_OFFLINE (cellprior.settings.offline) is on")
    if known != file.sha256:
        record = _record_of(path)
        tried.append(f"the hash needed is that of the first download; to accept a new file, delete {record}")
    raise WeightsError(_nowhere(entry, file, tried))


def _nowhere(entry: Entry, file: FileEntry, tried: list[str]) -> str:
    """Error message for a file that no source has: what was tried, where it lives, what to do."""
    archive = f" (or {file.archive})" if file.archive else ""
    lines = [
        f"{file.name} of {entry.name!r} is not in {entry.folder}, and no source has it:",
        *(f"  - {line}" for line in tried),
        f"Its address is {file.url}",
        f"If the host asks for a login, or there is no network here: visit {entry.page} and put",
        f"{_in_mirror(entry, file)}{archive} into the folder that CELLPRIOR_MIRROR (cellprior.settings.mirror) names.",
    ]
    if entry.type == "model":
        lines.append(f'Or pass its path: from_pretrained("path/to/{file.name}").')
    return "\n".join(lines)


def _in_mirror(entry: Entry, file: FileEntry) -> str:
    """Where a mirror has a file: by its name, or in a folder of the entry if another entry's has the same name."""
    others = {
        other for e in entries().values() if e.name != entry.name and not e.packaged for other in e.files
    }
    taken = any(other.name == file.name and other.sha256 != file.sha256 for other in others)
    return f"{entry.name}/{file.name}" if taken else file.name


def _sources(entry: Entry, file: FileEntry, stage: Path) -> Iterator[tuple[Path | str, bool]]:
    """Places that may have the file, best first, each with whether it is the archive around the file."""
    names = [(_in_mirror(entry, file), False)] + ([(file.archive, True)] if file.archive else [])
    if file.archive and (stage / file.archive).is_file():
        # Downloaded a moment ago, for the file before this one.
        yield stage / file.archive, True
    mirror = settings.mirror
    if mirror is not None and not _is_url(mirror):
        yield from ((Path(mirror).expanduser() / name, packed) for name, packed in names)
    if settings.offline:
        return
    if mirror is not None and _is_url(mirror):
        yield from ((f"{mirror.rstrip('/')}/{quote(name)}", packed) for name, packed in names)
    if file.url is not None:
        yield file.url, file.archive is not None


def _is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _take(
    entry: Entry, place: Path | str, packed: bool, file: FileEntry, stage: Path, progressbar: bool | None
) -> Path:
    """Copy, download or unpack one file into the stage, unverified."""
    staged = stage / file.name
    if packed and file.archive and file.member:
        archive = stage / file.archive
        if isinstance(place, Path):
            archive = place
        else:
            download(place, archive, most=_most(file.archive_size), progressbar=progressbar)
        _extract(archive, file.member, staged, most=_most(entry.size))
    elif isinstance(place, Path):
        shutil.copyfile(place, staged)
    else:
        download(place, staged, most=_most(entry.size), progressbar=progressbar)
    return staged


def _most(stated: int | None) -> int | None:
    """Bytes that a file may have at most, whose approximate size the registry states."""
    return 2 * stated + SLACK if stated else None


def _extract(archive: Path, member: str, target: Path, *, most: int | None) -> None:
    """Stream one member of a zip archive into a file that we name; zipfile verifies its checksum."""
    try:
        with zipfile.ZipFile(archive) as zipped, zipped.open(member) as source, target.open("wb") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
                if most is not None and copy.tell() > most:
                    msg = f"{member} in the archive has more than the {most / 1e6:,.0f} MB that it should have at most"
                    raise WeightsError(msg)
    except KeyError as error:
        msg = f"the archive has no member {member}"
        raise WeightsError(msg) from error
    except WeightsError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        msg = f"the archive is damaged or truncated ({error})"
        raise WeightsError(msg) from error


@contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """Temporary folder inside `folder`: the same file system, so that moving a file out of it is atomic."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{_STAGE}*"):
            with suppress(FileNotFoundError):  # its owner has just finished
                if time.time() - old.stat().st_mtime > _DAY:  # its owner was killed
                    shutil.rmtree(old, ignore_errors=True)
        stage = tempfile.TemporaryDirectory(prefix=_STAGE, dir=folder, ignore_cleanup_errors=True)
    with stage as path:
        yield Path(path)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Name the setting to change if the cache folder cannot be written."""
    try:
        yield
    except OSError as error:
        msg = (
            f"The cache folder {folder} cannot be written ({error}). Name a folder that can be in "
            "CELLPRIOR_CACHE (cellprior.settings.cache_dir)."
        )
        raise WeightsError(msg) from error
