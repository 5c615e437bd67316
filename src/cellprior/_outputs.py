"""Files that are either whole or not there, and places where they can be."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path


def partial_name(path: Path) -> Path:
    """Where a file stands until it is whole: beside its place, under a name that no other writer has."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file under another name, and rename it: who reads it finds all of it, whenever the writer is killed.

    Raises OSError, with the name of the file, which the system leaves out where a disk is full.
    """
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def target(path: Path) -> Path:
    """Where something that is written to a path will be: where it leads, if it is a link.

    Raises FileNotFoundError if there is no folder to write into.
    """
    found = Path(os.path.realpath(path)) if path.is_symlink() else path
    where = f"{path}, a link to {found}," if found is not path else str(path)
    if found.is_symlink():
        msg = f"{path} is a link that leads in a circle: remove it, or choose another name."
        raise FileNotFoundError(msg)
    if not found.parent.is_dir():
        msg = f"There is no folder {found.parent} to write {path.name} into."
        if found is not path:
            msg = f"{where} cannot be written: there is no folder {found.parent}."
        raise FileNotFoundError(msg)
    return found


def refuse_unwritable(folder: Path) -> None:
    """Try to write a file, since no other question is answered truly: of rights, quotas, read-only disks.

    Raises OSError, with the folder and the reason.
    """
    probe = partial_name(folder / "cellprior")
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        msg = f"{folder} cannot be written to: {error.strerror}. Nothing has been computed."
        raise OSError(error.errno, msg) from error
    finally:
        probe.unlink(missing_ok=True)


def refuse_full(folder: Path, n_bytes: int) -> None:
    """Refuse to begin what will not fit.

    Raises OSError, with what is needed and what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        msg = f"{folder} has {free / 1e9:.1f} GB free, and {n_bytes / 1e9:.1f} GB are needed."
        raise OSError(errno.ENOSPC, msg)
