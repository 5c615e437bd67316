"""Peaks as intervals of a genome, and which of them overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

_CHROMOSOME = 1 << 33  # place of one chromosome on a common axis; no chromosome is as long
_PAIRS_AT_A_TIME = 20_000_000
# chrUn_KI270742v1_100_200 is a peak as well: the last two numbers are the interval
_PEAK = r"^(.+)[:_-]([\d,]+)[_-]([\d,]+)$"
_COLUMNS = (
    ("chrom", "start", "end"),
    ("chrom", "chromStart", "chromEnd"),
    ("chr", "start", "end"),
    ("seqnames", "start", "end"),
    ("Chromosome", "Start", "End"),
)


@dataclass(frozen=True, eq=False)
class Intervals:
    """Peaks as text and, where they can be read, as intervals.

    Attributes
    ----------
    names
        As given.
    chromosome
        Without "chr", "M" for the mitochondrion, "" where a name is no interval.
    start, end
        In base pairs, -1 where a name is no interval.
    prefixed
        Share of the intervals whose chromosome is written with "chr".
    """

    names: np.ndarray
    chromosome: np.ndarray
    start: np.ndarray
    end: np.ndarray
    prefixed: float

    @property
    def known(self) -> np.ndarray:
        """Which peaks are intervals."""
        return self.start >= 0

    def largest_ends(self) -> dict[str, int]:
        """End of the last peak of each chromosome."""
        known = self.known
        ends = pd.Series(self.end[known]).groupby(self.chromosome[known]).max()
        return {str(name): int(end) for name, end in ends.items()}


def read_peaks(peaks: Sequence[str] | pd.Index | pd.DataFrame) -> Intervals:
    """Read peak names such as `chr1:100-200`, `chr1-100-200`, `chr1_100_200` or `1:100-200`.

    Parameters
    ----------
    peaks
        Names, or a frame (`AnnData.var`) with the names as index. Columns with chromosome, start and end are read
        if the names say nothing; a row without a number there is no interval.

    Raises
    ------
    ValueError
        If an interval ends before it starts.
    """
    names = pd.Series(peaks.index if isinstance(peaks, pd.DataFrame) else peaks, dtype=object).astype(str)
    parts = names.str.extract(_PEAK)
    if isinstance(peaks, pd.DataFrame) and parts[0].isna().mean() > 0.5:
        columns = next((c for c in _COLUMNS if set(c) <= set(peaks.columns)), None)
        if columns is not None:
            parts = peaks[list(columns)].astype(object).reset_index(drop=True).set_axis([0, 1, 2], axis=1)
    numbers = [
        pd.to_numeric(parts[i].astype(str).str.replace(",", ""), errors="coerce").to_numpy(np.float64)
        for i in (1, 2)
    ]
    known = parts[0].notna().to_numpy() & np.isfinite(numbers).all(axis=0)
    # a few dozen chromosomes: their names are worked on once each
    codes, found = pd.factorize(parts[0][known])
    bare = [str(name)[3:] if str(name).lower().startswith("chr") else str(name) for name in found]
    prefixed = np.array([str(name).lower().startswith("chr") for name in found], dtype=bool)
    bare = ["M" if name in ("MT", "Mt", "mt") else name for name in bare]
    chromosome = np.full(len(names), "", dtype=object)
    chromosome[known] = np.asarray(bare, dtype=object)[codes]
    bounds = np.full((2, len(names)), -1, dtype=np.int64)
    for row, number in zip(bounds, numbers, strict=True):
        row[known] = number[known]
    if (bounds[1] < bounds[0]).any():
        name = names.iloc[int(np.argmax(bounds[1] < bounds[0]))]
        msg = f"The peak {name!r} ends before it starts; chromosome, start and end are needed, in this order."
        raise ValueError(msg)
    share = float(prefixed[codes].mean()) if known.any() else 0.0
    return Intervals(names.to_numpy(dtype=object), chromosome, bounds[0], bounds[1], share)


def are_peaks(names: Iterable[str]) -> bool:
    """Whether most of some names are those of peaks; looks at the first 1,000."""
    sample = pd.Series(list(names)[:1000], dtype=object).astype(str)
    return len(sample) > 0 and bool(sample.str.match(_PEAK).mean() > 0.5)


class SortedIntervals:
    """Reference intervals on one axis, chromosome after chromosome.

    Parameters
    ----------
    code
        Chromosome of each interval ``(n,)``.
    start, end
        Of each interval ``(n,)``.
    rows
        Those to use.
    """

    def __init__(self, code: np.ndarray, start: np.ndarray, end: np.ndarray, rows: np.ndarray) -> None:
        place = code[rows] * _CHROMOSOME
        order = np.argsort(place + start[rows], kind="stable")
        self.rows = rows[order]
        self.start = (place + start[rows])[order]
        self.end = (place + end[rows])[order]
        self.end_so_far = np.maximum.accumulate(self.end)  # increases, which ends of nested intervals do not

    def best(self, code: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of the interval that shares most with each query, -1 if none does, and the shared base pairs."""
        start = code * _CHROMOSOME + np.maximum(start, 0)
        end = code * _CHROMOSOME + np.maximum(end, 0)
        first = np.searchsorted(self.end_so_far, start, side="right")
        n = np.maximum(np.searchsorted(self.start, end, side="left") - first, 0)
        row = np.full(len(start), -1, dtype=np.int64)
        shared = np.zeros(len(start), dtype=np.int64)
        cuts = np.flatnonzero(np.diff(np.cumsum(n) // _PAIRS_AT_A_TIME)) + 1
        for queries in np.split(np.arange(len(start)), cuts):
            queries = queries[n[queries] > 0]
            if not len(queries):
                continue
            n_pairs = n[queries]
            begin = np.concatenate([[0], np.cumsum(n_pairs)[:-1]])  # of the pairs of each query
            of_query = np.repeat(np.arange(len(queries)), n_pairs)
            candidate = np.arange(n_pairs.sum()) - begin[of_query] + first[queries][of_query]
            common = np.minimum(self.end[candidate], end[queries][of_query]) - np.maximum(
                self.start[candidate], start[queries][of_query]
            )
            # an interval before another in the file is preferred, and the very same to a longer one around it
            length = self.end[candidate] - self.start[candidate]
            order = np.lexsort((self.rows[candidate], length, -common, of_query))
            chosen = order[begin]
            hit = common[chosen] > 0
            row[queries[hit]] = self.rows[candidate[chosen[hit]]]
            shared[queries[hit]] = common[chosen[hit]]
        return row, shared
