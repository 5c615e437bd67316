"""Names to a vocabulary: which column of the data is which gene, or which peak, of a model."""

from __future__ import annotations

from cellprior.genes._match import GeneMatchError, match
from cellprior.genes._peaks import PeakMatch, PeakMatchError, match_peaks
from cellprior.genes._positions import read_positions
from cellprior.genes._report import GeneMatch

__all__ = [
    "GeneMatch",
    "GeneMatchError",
    "PeakMatch",
    "PeakMatchError",
    "match",
    "match_peaks",
    "read_positions",
]


def __dir__() -> list[str]:
    return list(__all__)
