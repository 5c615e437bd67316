"""Counts that stay in their file: opening them, knowing them again, and noticing that they have gone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from mudata import MuData

from cellprior._compat import without_pulled_columns
from cellprior._matrix import RAW, refuse_indices, refuse_pointers
from cellprior.model.data._counts import place_of

N_INDICES = 2**22  # that are looked at in one go


def open_counts(
    path: str | os.PathLike[str], layer: str | Mapping[str, str | None] | None, *, as_dask: bool = False
) -> ad.AnnData | MuData:
    """Open a file of AnnData or MuData; of its matrices only those with the counts are there, and stay on disk.

    Of a MuData, ``layer`` has that of each modality that is wanted. Dask arrays are read by workers by themselves.
    Raises ValueError if it cannot be read, is neither of them, or has no such matrix; FileNotFoundError if it is not
    there.
    """
    path = Path(path)
    refuse_foreign(path)
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
    if isinstance(root.get("obs"), h5py.Dataset):
        msg = (
            f"{path} was written by an anndata older than 0.7, whose files cannot be read part by part. Write it anew "
            "once: anndata.read_h5ad(path).write_h5ad(path)."
        )
        raise ValueError(msg)
    layers: Any = root["layers"] if "layers" in root else {}
    raw = layer == RAW and RAW not in layers
    where, var = ("raw/X", "raw/var") if raw else ("X" if layer is None else f"layers/{layer}", "var")
    if missing := [name for name in ("obs", var, where) if not _holds(root, name)]:
        msg = f"{path} has no {' and no '.join(missing)}; it holds {', '.join(sorted(root))}."
        if "layers" in root:
            msg += f" Its layers are {', '.join(sorted(layers)) or 'none'}."
        if names := sorted(layers):
            msg += f" Name the one with raw counts, such as layer={names[0]!r}."
        if layer != RAW and _holds(root, "raw/X"):
            msg += ' Its raw is named as layer="raw".'
        raise ValueError(msg)
    x = _open_matrix(root[where], as_dask)
    obs = ad.io.read_elem(root["obs"])
    if raw:  # as a layer of that name, with the genes of raw
        return ad.AnnData(obs=obs, var=ad.io.read_elem(root[var]), layers={RAW: x})
    stored = {name: _on_disk(layers[name]) for name in layers if name != layer and _is_matrix(layers[name])}
    others = {name: each for name, each in stored.items() if each.shape == x.shape}
    # the others, and raw, are for an error that finds the counts there
    data: dict[str, Any] = {"X": x, "layers": others} if layer is None else {"layers": {**others, layer: x}}
    if _holds(root, "raw/X") and _holds(root, "raw/var"):
        data["raw"] = {"X": _open_matrix(root["raw/X"], as_dask), "var": ad.io.read_elem(root["raw/var"])}
    return ad.AnnData(obs=obs, var=ad.io.read_elem(root["var"]), **data)


def _holds(root: Any, name: str) -> bool:
    """Whether a part of a file is there; "null" is how anndata 0.12 writes that there is no X."""
    return name in root and root[name].attrs.get("encoding-type") != "null"


def _on_disk(stored: Any) -> Any:
    """A matrix as it lies there, of which nothing is read."""
    return stored if hasattr(stored, "shape") else ad.io.sparse_dataset(stored)


def _is_matrix(stored: Any) -> bool:
    return hasattr(stored, "shape") or "indptr" in stored


def _open_matrix(stored: Any, as_dask: bool) -> Any:
    """A matrix that stays on disk; of a sparse one, where its rows begin is read and checked.

    Raises ValueError if they begin where no values are.
    """
    x = _on_disk(stored)
    if x is not stored:
        where = f"{stored.name} of {place_of(stored)}"
        pointers, indices = np.asarray(stored["indptr"][...]), stored["indices"]
        refuse_pointers(pointers[:-1], pointers[1:], min(indices.shape[0], stored["data"].shape[0]), where)
        if as_dask and x.format == "csc":  # which Dask cuts by cell before anybody sees it
            for start in range(0, indices.shape[0], N_INDICES):
                refuse_indices(np.asarray(indices[start : start + N_INDICES]), x.shape[0], where)
    return ad.experimental.read_elem_lazy(stored) if as_dask else x


def refuse_foreign(path: Path) -> None:
    """Refuse files of other formats with counts, and say how to make an h5ad file of them.

    Raises ValueError, with the line of code; FileNotFoundError if there is no such file or folder.
    """
    if not path.exists():
        near = [other.name for other in path.parent.glob("*.h5*")][:5] if path.parent.is_dir() else []
        beside = f" The folder has {', '.join(sorted(near))}." if near else ""
        msg = f"{path} is not there.{beside}"
        raise FileNotFoundError(msg)
    name = path.name.lower().removesuffix(".gz")
    made = "sc.read_10x_mtx({!r})"
    found = None
    if name.endswith(".mtx"):
        found = "a matrix of 10x Genomics (mtx)", made.format(str(path.parent))
    elif path.is_dir() and any((path / f"matrix.mtx{end}").exists() for end in ("", ".gz")):
        found = "a folder of 10x Genomics (mtx)", made.format(str(path))
    elif name.endswith((".csv", ".tsv", ".txt")):
        found = (
            "a table of text",
            f"sc.read_text({str(path)!r}).T if genes are rows, without .T if cells are,",
        )
    elif name.endswith((".rds", ".rdata", ".h5seurat")):
        found = "a file of R", "a conversion in R, such as zellkonverter::writeH5AD,"
    elif path.is_file() and h5py.is_hdf5(path):
        with h5py.File(path) as file:
            if "row_attrs" in file and "col_attrs" in file:
                found = "a loom file", f"sc.read_loom({str(path)!r})"
            elif any("barcodes" in file[key] for key in file if isinstance(file[key], h5py.Group)):
                found = "a 10x file of Cell Ranger", f"sc.read_10x_h5({str(path)!r})"
    if found is not None:
        kind, read = found
        msg = (
            f"{path} is {kind}, not an h5ad file. Make one of it once, with scanpy (import scanpy as sc): {read} gives "
            'adata; then adata.var_names_make_unique() and adata.write_h5ad("counts.h5ad").'
        )
        raise ValueError(msg)


def with_frames(adata: ad.AnnData) -> ad.AnnData:
    """An AnnData whose ``obs`` and ``var`` are read, where anndata's ``read_lazy`` has left them in the file too."""
    if isinstance(adata.obs, pd.DataFrame) and isinstance(adata.var, pd.DataFrame):
        return adata
    raw = adata.raw
    return ad.AnnData(
        adata.X,
        obs=_in_memory(adata.obs),
        var=_in_memory(adata.var),
        layers=dict(adata.layers),
        raw=None if raw is None else {"X": raw.X, "var": _in_memory(raw.var)},
    )


def _in_memory(frame: Any) -> pd.DataFrame:
    return frame if isinstance(frame, pd.DataFrame) else frame.to_memory()


def _open_zarr(path: Path) -> Any:
    import zarr

    return zarr.open_group(path, mode="r")
