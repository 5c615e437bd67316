"""What weights are known again by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from cellprior.weights._registry import WeightsError

if TYPE_CHECKING:
    import os

# of a bundle: all that can change a number, in the order of their names; README.md is for people
READ = ("config.json", "genes.tsv", "model.safetensors", "peaks.tsv")


def sha256(*paths: str | os.PathLike[str]) -> str:
    """SHA-256 in hexadecimal of a file, of a whole bundle, or of several files that belong together.

    That of a bundle covers its tensors, configuration, genes and peaks, and not its card. It is the hash of the list
    of their hashes, which can be had without Python::

        cd folder; sha256sum config.json genes.tsv model.safetensors | sha256sum

    (with ``peaks.tsv`` at the end if there is one). Several files are hashed in the same way, in the order of their
    names.

    Parameters
    ----------
    paths
        One file, one bundle folder, or several files.

    Raises
    ------
    WeightsError
        If a file is missing or cannot be read, or a folder is no bundle.
    """
    files = [Path(path) for path in paths]
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        files = [folder / name for name in READ if name != READ[-1] or (folder / name).exists()]
        if missing := [file.name for file in files if not file.is_file()]:
            msg = f"{folder} is no bundle, it lacks {', '.join(missing)}. Give the path of a file in it."
            raise WeightsError(msg)
    if len(files) == 1:
        return _of_file(files[0])
    listed = [f"{_of_file(file)}  {file.name}\n" for file in sorted(files, key=lambda file: file.name)]
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def _of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror or error})."
        raise WeightsError(msg) from error
