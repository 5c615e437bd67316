"""Names to a vocabulary: which column of the data is which gene of a model."""

from __future__ import annotations

from cellprior.genes._match import GeneMatch, GeneMatchError, match

__all__ = ["GeneMatch", "GeneMatchError", "match"]
