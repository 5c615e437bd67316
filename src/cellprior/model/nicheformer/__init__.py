"""Nicheformer: ranked genes behind the context of a cell, for dissociated and spatial assays."""

from __future__ import annotations

from cellprior.model.nicheformer._model import Nicheformer

__all__ = ["Nicheformer"]
