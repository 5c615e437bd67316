"""What the contract is put to: matrices of every kind, and what may not happen."""

from __future__ import annotations

import hashlib
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline by setting, and an error for who tries all the same."""

    def connect(self: socket.socket, address: Any) -> None:
        pytest.fail(f"something connects to {address}")

    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", connect)


def backed(adata: AnnData, folder: Path, x: Any) -> AnnData:
    AnnData(x, obs=adata.obs, var=adata.var).write_h5ad(folder / "counts.h5ad")
    return ad.read_h5ad(folder / "counts.h5ad", backed="r")


def zarr_backed(adata: AnnData, folder: Path, x: Any) -> AnnData:
    zarr = pytest.importorskip("zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata announces other defaults of writing
        AnnData(x, obs=adata.obs, var=adata.var).write_zarr(folder / "counts.zarr")
    stored = zarr.open(folder / "counts.zarr", mode="r")["X"]
    return in_memory(adata, folder, ad.io.sparse_dataset(stored) if sp.issparse(x) else stored)


def in_memory(adata: AnnData, folder: Path, x: Any) -> AnnData:
    return AnnData(x, obs=adata.obs.copy(), var=adata.var.copy())


def view(adata: AnnData, folder: Path, x: Any) -> AnnData:
    return in_memory(adata, folder, x)[:, :]


def backed_view(adata: AnnData, folder: Path, x: Any) -> AnnData:
    return backed(adata, folder, x)[:, :]


def lazy(x: Any, columns: int) -> Any:
    return pytest.importorskip("dask.array").from_array(x, chunks=(150, columns))


def repeated_and_unsorted(x: sp.csr_matrix) -> sp.csr_matrix:
    """The same counts with every one of them stored as two addends, in no order."""
    coo = x.tocoo()
    row, column = np.tile(coo.row, 2), np.tile(coo.col, 2)
    data = np.concatenate([coo.data - 1, np.ones_like(coo.data)])
    order = np.random.default_rng(0).permutation(len(row))
    order = order[np.argsort(row[order], kind="stable")]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=x.shape[0]))])
    return sp.csr_matrix((data[order], column[order], indptr), shape=x.shape)


FORMATS: dict[str, tuple[Callable, Callable]] = {
    "csc": (in_memory, sp.csc_matrix),
    "csr_array": (in_memory, sp.csr_array),
    "csc_array": (in_memory, sp.csc_array),
    "csr of int64": (in_memory, lambda x: x.astype(np.int64)),
    "csr with repeated and unsorted indices": (in_memory, repeated_and_unsorted),
    "dense C float64": (in_memory, lambda x: x.toarray().astype(np.float64)),
    "dense F float32": (in_memory, lambda x: np.asfortranarray(x.toarray())),
    "dense C int32": (in_memory, lambda x: x.toarray().astype(np.int32)),
    "view": (view, lambda x: x),
    "backed csr": (backed, lambda x: x),
    "backed csc": (backed, sp.csc_matrix),
    "backed dense": (backed, lambda x: x.toarray()),
    "backed csr with repeated and unsorted indices": (backed, repeated_and_unsorted),
    "backed view": (backed_view, lambda x: x),
    "dask dense": (in_memory, lambda x: lazy(x.toarray().astype(np.float64), 300)),
    "dask csr": (in_memory, lambda x: lazy(x, x.shape[1])),
    "zarr csr": (zarr_backed, lambda x: x),
    "zarr dense": (zarr_backed, lambda x: x.toarray()),
}


def scaled(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[400, 10] = value  # behind the cells that are looked at before anything else
        return x

    return change


NOT_COUNTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "log-normalised": (lambda x: np.log1p(1e4 * x / x.sum(1, keepdims=True)), "not an integer"),
    "scaled": (scaled, "negative"),
    "negative": (with_value(-1), "negative"),
    "NaN": (with_value(np.nan), "not finite"),
    "infinite": (with_value(np.inf), "not finite"),
    "minus infinite": (with_value(-np.inf), "not finite"),
    "fractional": (with_value(2.5), "not an integer"),
}


def fingerprint(adata: AnnData) -> dict[str, Any]:
    """Everything in an AnnData but scvi-tools' own keys."""
    x = adata.X
    if adata.isbacked:
        parts = {"file": hashlib.sha256(Path(adata.filename).read_bytes()).hexdigest()}
    elif sp.issparse(x):
        parts = {
            name: hashlib.sha256(getattr(x, name).tobytes()).hexdigest()
            for name in ("data", "indices", "indptr")
        }
    else:
        parts = {"X": hashlib.sha256(x.tobytes(order="A")).hexdigest(), "order": x.flags.f_contiguous}
    return {
        **parts,
        "type": type(x),
        "view": adata.is_view,
        "obs": adata.obs[[name for name in adata.obs if not name.startswith("_scvi_")]].to_dict("list"),
        "obs types": adata.obs.dtypes[[not name.startswith("_scvi_") for name in adata.obs]].to_dict(),
        "var": adata.var.to_dict("list"),
        "names": (list(adata.obs_names), list(adata.var_names)),
        "uns": {name: value for name, value in adata.uns.items() if not name.startswith("_scvi_")},
        "keys": {name: list(getattr(adata, name)) for name in ("obsm", "varm", "obsp", "varp", "layers")},
    }


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)
