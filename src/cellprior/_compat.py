"""What differs between the supported versions of other packages."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


def without_pulled_columns() -> AbstractContextManager[Any]:
    """For a while, a new MuData does not copy the columns of its modalities; mudata 0.4 does not by default."""
    import mudata

    if hasattr(mudata, "set_options"):  # until mudata 0.3
        return mudata.set_options(pull_on_update=False)
    return mudata.settings.override(pull_on_update=False)


def with_nullable_strings() -> AbstractContextManager[Any]:
    """For a while, anndata writes strings that may be missing, those of pandas 3, as it reads them."""
    import anndata

    if hasattr(anndata.settings, "allow_write_nullable_strings"):
        return anndata.settings.override(allow_write_nullable_strings=True)
    return nullcontext()


def new_group(path: Path) -> Any:
    """An empty zarr group at a path, in the second format, which all versions of zarr and anndata read."""
    import zarr

    if hasattr(zarr, "create_group"):  # since zarr 3
        return zarr.open_group(path, mode="w", zarr_format=2)
    return zarr.open_group(path, mode="w")


def new_array(group: Any, name: str, *, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    """A float32 array of NaN in a zarr group, as AnnData knows arrays."""
    create = group.create_array if hasattr(group, "create_array") else group.create_dataset
    array = create(name, shape=shape, chunks=chunks, dtype="float32", fill_value=float("nan"))
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
