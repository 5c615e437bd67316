"""Counts that stay in their file: opening them, knowing them again, and noticing that they have gone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from mudata import MuData

from cellprior._compat import without_pulled_columns

# stores of zarr 3 and of zarr 2 that are folders, and which of their attributes leads there
FOLDERS = {"LocalStore": "root", "DirectoryStore": "path", "NestedDirectoryStore": "path"}
N_SAMPLED = 64  # cells of which every count goes into a fingerprint


def open_counts(
    path: str | os.PathLike[str], layer: str | Mapping[str, str | None] | None, *, as_dask: bool = False
) -> ad.AnnData | MuData:
    """Open a file of AnnData or MuData; of its matrices only those with the counts are there, and stay on disk.

    Parameters
    ----------
    path
        h5ad or h5mu file, or zarr folder.
    layer
        Layer with the counts, ``None`` for ``X``; of a MuData, that of each modality that is wanted.
    as_dask
        Give them as dask arrays, which workers read by themselves.

    Raises
    ------
    ValueError
        If it cannot be read, is neither of them, or has no such matrix.
    """
    path = Path(path)
    try:
        root = _open_zarr(path) if path.is_dir() else h5py.File(path)
    except (OSError, ValueError) as error:  # HDF5 does not say which file
        kind = "a zarr folder" if path.is_dir() else f"an {'h5mu' if path.suffix == '.h5mu' else 'h5ad'} file"
        msg = f"{path} cannot be read as {kind}: {error}"
        raise ValueError(msg) from error
    if "mod" not in root:
        layers = set(layer.values()) if isinstance(layer, Mapping) else {layer}
        if len(layers) > 1:
            msg = f"{path} is an AnnData, which has one matrix of counts: name one layer, not several."
            raise ValueError(msg)
        return _open_anndata(path, root, layers.pop(), as_dask)
    if not isinstance(layer, Mapping):
        msg = f"{path} is a MuData, which MultiomeCLIP reads. Of other models, embed the modality with the genes."
        raise ValueError(msg)
    modalities = {
        name: _open_anndata(path / name, root["mod"][name], of_modality, as_dask)
        for name, of_modality in layer.items()
        if name in root["mod"]
    }
    if not modalities:
        needed = " or ".join(map(repr, layer))
        msg = f"{path} has the modalities {list(root['mod'])}; needed: {needed}. Name them: modalities=."
        raise ValueError(msg)
    obs, obsmap = (ad.io.read_elem(root[name]) for name in ("obs", "obsmap"))
    with without_pulled_columns():
        return MuData(modalities, obs=obs, obsmap={name: obsmap[name] for name in modalities})


def _open_anndata(path: Path, root: Any, layer: str | None, as_dask: bool) -> ad.AnnData:
    where = "X" if layer is None else f"layers/{layer}"
    names = ("obs", "var", where)
    # "null" is how anndata 0.12 writes that there is no X
    if missing := [n for n in names if n not in root or root[n].attrs.get("encoding-type") == "null"]:
        msg = f"{path} has no {' and no '.join(missing)}; it holds {', '.join(sorted(root))}."
        if layer is not None and "layers" in root:
            msg += f" Its layers are {', '.join(sorted(root['layers'])) or 'none'}."
        raise ValueError(msg)
    x = stored = root[where]
    if as_dask:
        x = ad.experimental.read_elem_lazy(stored)
    elif not hasattr(stored, "shape"):
        x = ad.io.sparse_dataset(stored)
    data: dict[str, Any] = {"X": x} if layer is None else {"layers": {layer: x}}
    return ad.AnnData(obs=ad.io.read_elem(root["obs"]), var=ad.io.read_elem(root["var"]), **data)


def with_frames(adata: ad.AnnData) -> ad.AnnData:
    """An AnnData whose ``obs`` and ``var`` are read, where anndata's ``read_lazy`` has left them in the file too."""
    if isinstance(adata.obs, pd.DataFrame) and isinstance(adata.var, pd.DataFrame):
        return adata
    return ad.AnnData(
        adata.X, obs=adata.obs.to_memory(), var=adata.var.to_memory(), layers=dict(adata.layers)
    )


def _open_zarr(path: Path) -> Any:
    import zarr

    return zarr.open_group(path, mode="r")


def refuse_by_gene(x: Any) -> None:
    """Refuse a matrix on disk that is stored gene by gene: its cells cannot be read without reading all of it.

    Raises
    ------
    ValueError
        With the way out.
    """
    if isinstance(x, ad.abc.CSCDataset):
        msg = (
            "The counts are stored gene by gene (CSC), so that every read of some cells would read the whole matrix. "
            "Store them cell by cell once: adata = anndata.read_h5ad(path); adata.X = adata.X.tocsr(); "
            "adata.write_h5ad(path)."
        )
        raise ValueError(msg)


def refuse_vanished(x: Any) -> None:
    """Refuse a matrix in a zarr folder that is no longer there: zarr would go on reading, zeros.

    Raises
    ------
    OSError
        With the folder.
    """
    array = getattr(x, "group", x)
    store = getattr(array, "store", None)
    attribute = FOLDERS.get(type(store).__name__)  # of a bucket, the question would cost as much as a read
    if attribute and not (folder := Path(getattr(store, attribute)) / array.path.lstrip("/")).exists():
        msg = f"{folder} was there when it was opened, and is gone."
        raise FileNotFoundError(msg)


def digest(*parts: np.ndarray | Iterable[object]) -> str:
    """Short sha256 of arrays of numbers and of names."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray) and part.dtype.kind in "iufb":
            found.update(np.ascontiguousarray(part).tobytes())
        else:
            for name in part:
                found.update(str(name).encode() + b"\0")
        found.update(b"\1")
    return found.hexdigest()[:16]


def digest_of_counts(x: Any) -> str:
    """Fingerprint of a matrix ``(cells, genes)`` that does not read all of it.

    Its shape; how many values each cell has, where it is sparse and on disk or in memory cell by cell; and all values
    of 64 cells, evenly spaced. A change in other cells that leaves the number of values of each as it was goes
    unnoticed.
    """
    from cellprior.model._data import read_rows

    parts = [np.asarray(x.shape, dtype=np.int64)]
    if isinstance(x, ad.abc.CSRDataset):
        parts.append(np.asarray(x.group["indptr"][:], dtype=np.int64))
    elif sp.issparse(x) and x.format == "csr":
        parts.append(x.indptr.astype(np.int64))
    rows = np.unique(np.linspace(0, x.shape[0] - 1, N_SAMPLED).astype(np.int64))
    cells = read_rows(x, rows)
    cells.eliminate_zeros()
    return digest(*parts, *(part.astype(np.int64) for part in (cells.indptr, cells.indices)), cells.data)
