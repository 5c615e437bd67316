"""Geneformer: ranked genes as tokens."""

from __future__ import annotations

from cellprior.model.geneformer._model import Geneformer

__all__ = ["Geneformer"]
