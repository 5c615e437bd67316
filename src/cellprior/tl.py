"""Tools in scanpy's manner: AnnData or MuData in, a key in it out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["embed"]


def embed(
    adata: AnnData | MuData | str | os.PathLike[str],
    weights: str | os.PathLike[str],
    *,
    layer: str | Mapping[str, str | None] | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    modalities: Mapping[str, str] | None = None,
    key_added: str | None = None,
    batch_size: int | None = None,
    min_coverage: float = 0.25,
    device: str | int = "auto",
    copy: bool = False,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    hidden: str | os.PathLike[str] = "memory",
    progress: bool = True,
    client: Any = None,
) -> AnnData | MuData | None:
    """Embed cells with pretrained weights.

    Parameters
    ----------
    adata
        Annotated data ``(cells, genes)`` with raw counts. For weights of MultiomeCLIP a MuData with RNA, ATAC or both,
        of which each cell is embedded by what it has, or an AnnData with genes or with peaks. With ``out``, also the
        path of an h5ad or h5mu file or a zarr folder, whose counts stay on disk.
    weights
        Registry name (see :func:`cellprior.weights.available`), folder written by ``save_pretrained``, or official
        checkpoint file.
    layer
        Layer with raw counts; ``None`` for ``X``. For a MuData the same in both modalities, or one of each:
        ``{"rna": "counts", "atac": None}``.
    gene_key
        Column of ``var`` with gene symbols or Ensembl ids; by default the place that matches best.
    batch_key
        Column of ``obs`` with the batch of each cell. For CellPLM: which cells see each other.
    modalities
        Names that RNA and ATAC have in a MuData, by default ``{"rna": "rna", "atac": "atac"}``.
    key_added
        Key in ``obsm``; by default the model's own, such as ``X_cellplm``.
    batch_size
        Cells in memory at a time, by default what fits; never changes the result.
    min_coverage
        Least share of genes, and of peaks, that must match, see :func:`cellprior.genes.match` and
        :func:`cellprior.genes.match_peaks`.
    device
        ``"auto"`` is the first GPU if there is one, else the CPU.
    copy
        Return a copy with the embedding instead of writing into ``adata``.
    out
        Zarr folder to write to as the cells are embedded, and nothing into ``adata``; see :doc:`/user_guide/scale`.
        Until it is complete it is called ``<out>.part``; the same call then goes on where it was cut short.
    overwrite
        Replace what is at ``out``, or its beginning, of other data, weights or parameters.
    hidden
        With ``out``, for CellPLM: ``"memory"``, or a folder for the hidden states of the cells of a sentence.
    progress
        With ``out``: draw a bar.
    client
        ``distributed.Client`` of a Dask cluster that embeds; the counts are then dask arrays, or in a path that the
        workers can read.

    Returns
    -------
    ``None``, or with ``copy`` the copy. Written are ``obsm[key_added]``, float32 ``(cells, n_latent)``, and
    ``uns["cellprior"][key_added]``: weights, their sha256, share of genes (and of peaks) and counts used, package
    version and parameters.

    Raises
    ------
    WeightsError
        If the weights are not found, damaged, or of no known model.
    NotCountsError, GeneMatchError, PeakMatchError
        If the data are not raw counts, or too few of their genes or peaks are known.
    ValueError
        If the weights are of a model that reads other data: an AnnData, or RNA and ATAC.
    FileExistsError
        If ``out`` or its beginning is of something else.
    OSError
        If ``out`` cannot be written, or the counts cannot be read any more.

    Examples
    --------
    >>> cp.tl.embed(adata, "cellplm-starter", layer="counts")
    >>> sc.pp.neighbors(adata, use_rep="X_cellplm")

    >>> cp.tl.embed(mdata, "folder/of/a/multiomeclip", layer={"rna": "counts", "atac": None})
    >>> sc.pp.neighbors(mdata, use_rep="X_multiomeclip")

    >>> cp.tl.embed("atlas.h5ad", "cellplm-starter", batch_key="donor", out="latent.zarr")
    >>> anndata.read_zarr("latent.zarr").obsm["X_cellplm"]
    """
    from cellprior.model import model_class
    from cellprior.model._embedding import in_memory
    from cellprior.model._streaming import stream

    cls = model_class(weights)
    if isinstance(adata, str | os.PathLike):
        if out is None:
            msg = f"{os.fspath(adata)!r} is a path: name a folder to write to, out=, or read the data first."
            raise ValueError(msg)
        adata = cls._open_counts(adata, layer, modalities, as_dask=client is not None)
    if out is not None and copy:
        msg = "out= writes to a folder, and copy= returns a copy: choose one of them."
        raise ValueError(msg)
    if copy:
        adata = _copy(adata)
    key = key_added or cls.obsm_key
    setup: dict[str, Any] = {
        "layer": layer,
        "gene_key": gene_key,
        "batch_key": batch_key,
        "modalities": modalities,
    }
    params = _stated(**setup, min_coverage=min_coverage)
    with cls.opened(weights, adata, **setup, min_coverage=min_coverage, device=device) as model:
        if out is not None:
            options: dict[str, Any] = {"hidden": hidden, "overwrite": overwrite, "progress": progress}
            stream(model, out, key=key, params=params, batch_size=batch_size, client=client, **options)
            return None
        if client is None:
            latent = model.get_latent_representation(batch_size=batch_size)
        else:
            latent = in_memory(model._embedding(batch_size=batch_size, client=client))
        record = {**model.provenance(), "params": params}
    adata.obsm[key] = latent
    others = {name: other for name, other in adata.uns.get("cellprior", {}).items() if name != key}
    adata.uns["cellprior"] = {**others, key: _stated(**record)}  # the latest comes last
    return adata if copy else None


def _copy(data: AnnData | MuData) -> AnnData | MuData:
    from mudata import MuData

    from cellprior._compat import without_pulled_columns

    if not isinstance(data, MuData):
        return data.to_memory() if data.isbacked else data.copy()
    if data.isbacked:
        msg = f"A MuData in a file ({data.filename}) cannot be copied: read it without backed=, or leave out copy=True."
        raise ValueError(msg)
    with without_pulled_columns():
        return data.copy()


def _stated(**values: Any) -> dict[str, Any]:
    """Without ``None``, which an h5ad file does not hold."""
    return {
        name: _stated(**value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }
