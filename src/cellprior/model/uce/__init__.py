"""UCE: cells of any species as sentences of their genes, known by their proteins."""

from __future__ import annotations

from cellprior.model.uce._model import UCE

__all__ = ["UCE"]
