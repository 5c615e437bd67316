"""Tools in scanpy's manner: AnnData in, a key in AnnData out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["embed"]


def embed(
    adata: AnnData,
    weights: str | os.PathLike[str],
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    key_added: str | None = None,
    batch_size: int | None = None,
    min_coverage: float = 0.25,
    device: str | int = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Embed cells with pretrained weights.

    Parameters
    ----------
    adata
        Annotated data ``(cells, genes)`` with raw counts.
    weights
        Registry name (see :func:`cellprior.weights.available`), folder written by ``save_pretrained``, or official
        checkpoint file.
    layer
        Layer with raw counts; ``None`` for ``X``.
    gene_key
        Column of ``var`` with gene symbols or Ensembl ids; by default the place that matches best.
    batch_key
        Column of ``obs`` with the batch of each cell. For CellPLM: which cells see each other.
    key_added
        Key in ``obsm``; by default the model's own, such as ``X_cellplm``.
    batch_size
        Cells in memory at a time; never changes the result.
    min_coverage
        Least share of genes that must match, see :func:`cellprior.genes.match`.
    device
        ``"auto"`` is the first GPU if there is one, else the CPU.
    copy
        Return a copy with the embedding instead of writing into ``adata``.

    Returns
    -------
    ``None``, or with ``copy`` the copy. Written are ``obsm[key_added]``, float32 ``(cells, n_latent)``, and
    ``uns["cellprior"][key_added]``: weights, their sha256, share of genes and counts used, package version and
    parameters.

    Raises
    ------
    WeightsError
        If the weights are not found, damaged, or of no known model.
    NotCountsError, GeneMatchError
        If the data are not raw counts, or too few of their genes are known.

    Examples
    --------
    >>> cp.tl.embed(adata, "cellplm-starter", layer="counts")
    >>> sc.pp.neighbors(adata, use_rep="X_cellplm")
    """
    from cellprior.model import model_class
    from cellprior.model._data import without_view

    if copy:
        adata = adata.to_memory() if adata.isbacked else adata.copy()
    cls = model_class(weights)
    data = without_view(adata)
    cls.setup_anndata(data, layer=layer, gene_key=gene_key, batch_key=batch_key)
    model = cls.from_pretrained(weights, data, min_coverage=min_coverage, device=device)
    try:
        latent = model.get_latent_representation(batch_size=batch_size)
    finally:
        model.release()
    key = key_added or cls.obsm_key
    adata.obsm[key] = latent
    record = {
        **model.provenance(),
        "params": _stated(layer=layer, gene_key=gene_key, batch_key=batch_key, min_coverage=min_coverage),
    }
    others = {name: other for name, other in adata.uns.get("cellprior", {}).items() if name != key}
    adata.uns["cellprior"] = {**others, key: _stated(**record)}  # the latest comes last
    return adata if copy else None


def _stated(**values: Any) -> dict[str, Any]:
    """Without ``None``, which an h5ad file does not hold."""
    return {name: value for name, value in values.items() if value is not None}
