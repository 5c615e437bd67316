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
    adata: AnnData | MuData,
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
) -> AnnData | MuData | None:
    """Embed cells with pretrained weights.

    Parameters
    ----------
    adata
        Annotated data ``(cells, genes)`` with raw counts. For weights of MultiomeCLIP a MuData with RNA, ATAC or both,
        of which each cell is embedded by what it has, or an AnnData with genes or with peaks.
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
        Cells in memory at a time; never changes the result.
    min_coverage
        Least share of genes, and of peaks, that must match, see :func:`cellprior.genes.match` and
        :func:`cellprior.genes.match_peaks`.
    device
        ``"auto"`` is the first GPU if there is one, else the CPU.
    copy
        Return a copy with the embedding instead of writing into ``adata``.

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

    Examples
    --------
    >>> cp.tl.embed(adata, "cellplm-starter", layer="counts")
    >>> sc.pp.neighbors(adata, use_rep="X_cellplm")

    >>> cp.tl.embed(mdata, "folder/of/a/multiomeclip", layer={"rna": "counts", "atac": None})
    >>> sc.pp.neighbors(mdata, use_rep="X_multiomeclip")
    """
    from cellprior.model import model_class

    if copy:
        adata = _copy(adata)
    cls = model_class(weights)
    setup: dict[str, Any] = {
        "layer": layer,
        "gene_key": gene_key,
        "batch_key": batch_key,
        "modalities": modalities,
    }
    latent, origin = cls.embed_once(
        weights, adata, **setup, batch_size=batch_size, min_coverage=min_coverage, device=device
    )
    key = key_added or cls.obsm_key
    adata.obsm[key] = latent
    record = {**origin, "params": _stated(**setup, min_coverage=min_coverage)}
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
