"""Files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file under another name, and rename it: who reads it finds all of it, whenever the writer is killed.

    Raises
    ------
    OSError
        With the name of the file, which the system leaves out where a disk is full.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
