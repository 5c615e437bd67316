"""Peaks as intervals of a genome, and which of them overlap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

_CHROMOSOME = 1 << 33  # place of one chromosome on a common axis; no chromosome is as long
_PAIRS_AT_A_TIME = 20_000_000
# chrUn_KI270742v1_100_200 is a peak as well: the last two numbers are the interval
_PEAK = r"^(.+)[:_-]([\d,]+)[_-]([\d,]+)$"
# chr1:100-200-1 is the second chr1:100-200, as `var_names_make_unique` writes it
_MADE_UNIQUE = r"^(.+)[:_-]([\d,]+)[_-]([\d,]+)[-.]\d+$"
# names that can only be those of peaks, where peaks stand among other features
_PLACE = re.compile(
    r"(?:(?i:chr)[\w.*]+|\d{1,2}[LR]?|[XYMW]|MT|[A-Z]{2}_?\d{6}(?:\.\d+)?)[:_-][\d,]+[_-][\d,]+(?:[-.]\d+)?"
)
_NUMBERED = re.compile(r"(?:.*[-_.])?[Pp]eaks?[-_.]\d+[a-z]?|peak\d+")  # PEAK1 and Peak1 are genes
_SAMPLE = 1000
_FEWEST_BINS = 20
# Columns with the three parts of a place, whatever their upper and lower case, and columns with all in one.
_CHROMOSOMES = ("chrom", "chr", "chromosome", "seqnames", "seqname", "seqid", "chromosome_name")
_STARTS = ("start", "chromstart", "chrom_start", "chr_start", "start_position", "peak_start", "begin")
_ENDS = ("end", "chromend", "chrom_end", "chr_end", "end_position", "peak_end", "stop")
_WHOLE = tuple(
    "interval intervals peak peaks peak_name peak_id region regions locus coordinates coordinate coords location "
    "position name id gene_ids feature_id feature_name".split()
)


@dataclass(frozen=True, eq=False)
class Intervals:
    """Peaks by name and, where a name can be read, as intervals.

    There, ``chromosome`` is without "chr", "M" for the mitochondrion, ``start`` and ``end`` are in base pairs; else
    "" and -1. ``prefixed`` is the share of the intervals whose chromosome is written with "chr".
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

    def largest_starts(self) -> dict[str, int]:
        """Start of the last peak of each chromosome; the last bin of a genome may end behind it."""
        known = self.known
        starts = pd.Series(self.start[known]).groupby(self.chromosome[known]).max()
        return {str(name): int(start) for name, start in starts.items()}

    def grid(self) -> tuple[int, int] | None:
        """Step and offset of bins of one size, as a genome is cut into; None for peaks."""
        start, width = self.start[self.known], (self.end - self.start)[self.known]
        if len(start) < _FEWEST_BINS:
            return None
        step = int(np.gcd.reduce(start - start[0]))
        usual = float(np.median(width))
        if step <= 1 or not 0.9 * usual <= step or (np.abs(width - usual) <= 1).mean() < 0.8:
            return None
        return step, int(start[0] % step)


def read_peaks(
    peaks: Sequence[str] | pd.Index | pd.DataFrame, *, among: np.ndarray | None = None
) -> Intervals:
    """Read peak names such as `chr1:100-200`, `chr1-100-200`, `chr1_100_200` or `1:100-200`.

    The number that `var_names_make_unique` puts behind a name that stands twice (`chr1:100-200-1`) is passed over. Of
    a frame (`AnnData.var`) the index is read. If the names say nothing, columns with chromosome, start and end are
    read, or one with all of them ("interval", "peak", ...); a row without a number there is no interval. Raises
    ValueError if an interval ends before it starts.
    """
    names = pd.Series(peaks.index if isinstance(peaks, pd.DataFrame) else peaks, dtype=object).astype(str)
    rest = np.zeros(len(names), dtype=bool) if among is None else ~among
    parts = names.str.extract(_PEAK)
    parts.loc[rest] = np.nan
    if isinstance(peaks, pd.DataFrame) and parts[0][~rest].isna().mean() > 0.5:
        in_columns = _in_columns(peaks, fewest=int(parts[0].notna().sum()))
        parts = parts if in_columns is None else in_columns
        parts.loc[rest] = np.nan
    numbers = _numbers(parts)
    backwards = np.flatnonzero(numbers[1] < numbers[0])
    if len(backwards):
        unique = names.iloc[backwards].str.extract(_MADE_UNIQUE)
        better = unique[0].notna().to_numpy()
        parts.iloc[backwards[better]] = unique[better].to_numpy()
        numbers = _numbers(parts)
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


def _numbers(parts: pd.DataFrame) -> np.ndarray:
    """Starts and ends, NaN where there is none ``(2, n_peaks)``."""
    return np.stack(
        [
            pd.to_numeric(parts[i].astype(str).str.replace(",", ""), errors="coerce").to_numpy(np.float64)
            for i in (1, 2)
        ]
    )


def _in_columns(var: pd.DataFrame, *, fewest: int) -> pd.DataFrame | None:
    """Chromosome, start and end from columns of `var`; None unless they place more than `fewest` features."""
    columns = {str(label).lower().replace(" ", "_"): column for label, column in var.items()}
    three = [
        next((columns[n] for n in names if n in columns), None) for names in (_CHROMOSOMES, _STARTS, _ENDS)
    ]
    found = [pd.concat(three, axis=1)] if all(column is not None for column in three) else []
    found += [
        columns[name].astype(object).where(columns[name].notna(), "").astype(str).str.extract(_PEAK)
        for name in _WHOLE
        if name in columns and are_peaks(columns[name])
    ]
    for parts in found:
        parts = parts.astype(object).reset_index(drop=True).set_axis([0, 1, 2], axis=1)
        if (parts[0].notna() & np.isfinite(_numbers(parts)).all(axis=0)).sum() > fewest:
            return parts
    return None


def are_peaks(names: Iterable[str]) -> bool:
    """Whether most of some names are those of peaks; looks at 1,000 of them, evenly."""
    names = list(names)
    sample = pd.Series(names[:: _step(len(names))], dtype=object).astype(str)
    return len(sample) > 0 and bool(sample.str.match(_PEAK).mean() > 0.5)


def which_are_peaks(names: pd.Index) -> np.ndarray:
    """Which names are those of peaks, by place or number, if as few as 1 of 1,000 are, evenly drawn ``(n_names,)``."""
    sample = names[:: _step(len(names))]
    if any(map(_is_peak, sample)):
        return np.fromiter(map(_is_peak, names), dtype=bool, count=len(names))
    return np.zeros(len(names), dtype=bool)


def _is_peak(name: object) -> bool:
    text = str(name)
    return bool(_PLACE.fullmatch(text) or ("eak" in text and _NUMBERED.fullmatch(text)))


def _step(n: int) -> int:
    return max(1, -(-n // _SAMPLE))


class SortedIntervals:
    """Reference intervals on one axis, chromosome after chromosome.

    ``rows`` are those to use.
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
