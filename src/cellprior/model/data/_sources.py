"""Files that counts are read from while something else is written: where they are, and who writes to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py

from cellprior.model.data._counts import FOLDERS
from cellprior.model.data._fingerprint import digest

METADATA = (".zarray", ".zgroup", ".zattrs", "zarr.json")
MATRICES = (
    "X",
    "raw/X",
    "layers/*",
    "mod/*/X",
    "mod/*/raw/X",
    "mod/*/layers/*",
)  # in a folder of AnnData or MuData


class Sources:
    """Files behind matrices of counts, as they were at the beginning.

    Numbers that are read while somebody writes a file anew are of the old and the new. HDF5 and zarr do not notice.
    ``given`` is the file or folder that was asked for by its path, which a dask array does not tell.
    """

    def __init__(self, matrices: Iterable[Any], given: Path | None = None) -> None:
        matrices = list(matrices)
        places = {place for x in matrices if (place := place_of(x)) is not None}
        self.root = given
        if not places and self.root is not None:
            places = set(_matrices_of(self.root))
        self.places = sorted(places)
        self.roots = {root for x in matrices if (root := root_of(x)) is not None}
        self.roots |= set() if self.root is None else {self.root}
        self._stamp = {every: self._look(every=every) for every in (False, True)}

    def _look(self, *, every: bool) -> str:
        return digest(*(_stamps(place, every=every) for place in self.places))

    def changed(self, *, every: bool = False) -> bool:
        """Whether a file has been written to since.

        Parameters
        ----------
        every
            Look at every chunk of a zarr folder, not only at what says how many there are.
        """
        return self._look(every=every) != self._stamp[every]

    @property
    def names(self) -> str:
        """For a message."""
        return ", ".join(map(str, [self.root] if self.root else self.places)) or "the input"

    def refuse_inside(self, *outputs: Path) -> None:
        """Refuse to write into, or over, what is read.

        Raises ValueError, with both.
        """
        for place in self.roots:
            for output in outputs:
                read, written = place.resolve(), output.resolve()
                if read == written or read in written.parents or written in read.parents:
                    msg = f"{output} and {place}, which is read, are one or lie in each other: choose another folder."
                    raise ValueError(msg)


def place_of(x: Any) -> Path | None:
    """File or folder that a matrix on disk is read from; None where there is none, or none of this machine."""
    root, stored = root_of(x), getattr(x, "group", x)
    if root is None or isinstance(stored, h5py.Dataset | h5py.Group):
        return root
    return root / stored.path.lstrip("/")


def root_of(x: Any) -> Path | None:
    """The file, or the folder that is a zarr store, around a matrix; None as of :func:`place_of`."""
    stored = getattr(x, "group", x)
    if isinstance(stored, h5py.Dataset | h5py.Group):
        return Path(stored.file.filename)
    store = getattr(stored, "store", None)
    attribute = FOLDERS.get(type(store).__name__)
    return Path(getattr(store, attribute)) if attribute else None


def _matrices_of(root: Path) -> Iterator[Path]:
    if root.is_dir():
        for pattern in MATRICES:
            yield from root.glob(pattern)
    else:
        yield root


def _stamps(place: Path, *, every: bool) -> Iterator[str]:
    """Which file each is, how long it is and when it was last written to."""
    files: Iterable[Path] = [place]
    if place.is_dir():
        folders = [place, *(place / name for name in ("data", "indices", "indptr"))]
        files = sorted(place.rglob("*")) if every else [f / name for f in folders for name in METADATA]
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError:
            continue
        yield f"{file} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
