"""ScBERT: genes as tokens."""

from __future__ import annotations

from cellprior.model.scbert._model import ScBERT

__all__ = ["ScBERT"]
