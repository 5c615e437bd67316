"""CellPLM: cells as tokens."""

from __future__ import annotations

from cellprior.model.cellplm._model import CellPLM

__all__ = ["CellPLM"]
