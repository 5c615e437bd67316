"""Embeds cells and writes the sentence for the methods section: a package that uses cellprior from outside."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from anndata import AnnData

import cellprior as cp

__all__ = ["embed_with_bundle", "embed_with_note", "note", "public_weights"]


def public_weights() -> list[str]:
    """Names of the weights that need no download."""
    table = cp.weights.available()
    return table.index[(table["kind"] == "model") & (table["status"] == "packaged")].tolist()


def embed_with_note(adata: AnnData, weights: str, *, layer: str | None = None) -> str:
    """Embed cells into ``obsm`` and say how it was done."""
    if weights not in cp.weights.available().index:
        msg = f"No such weights: {weights}."
        raise cp.weights.WeightsError(msg)
    cp.tl.embed(adata, weights, layer=layer)
    return note(adata, next(reversed(adata.uns["cellprior"])))


def note(adata: AnnData, key: str) -> str:
    """The sentence about one embedding, from its record in ``uns``; also for a file that somebody else wrote."""
    record = adata.uns["cellprior"][key]
    return (
        f"Cells were embedded with {record['model']} (weights {record['weights']}, sha256 {record['sha256'][:8]}) "
        f"by cellprior {record['cellprior_version']}, from {record['counts_share']:.0%} of their counts."
    )


def embed_with_bundle(
    adata: AnnData, folder: str | os.PathLike[str], *, layer: str | None = None
) -> np.ndarray:
    """Embed cells with somebody's own weights, of whatever model."""
    model = cp.model.model_class(folder)
    model.setup_anndata(adata, layer=layer)
    return model.from_pretrained(Path(folder), adata).get_latent_representation()
