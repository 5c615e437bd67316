"""Match the peaks of a data set to those of a vocabulary, by name or by where they lie in the genome."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from cellprior.genes._genomes import possible_genomes
from cellprior.genes._intervals import Intervals, SortedIntervals, read_peaks
from cellprior.genes._kinds import PEAK, kinds_by_type
from cellprior.genes._report import Report

LOW_COVERAGE = 0.5
MIN_PEAKS = 20
# Peaks of two genomes lie on each other as often as by chance, which is often where the reference covers much.
MIN_ABOVE_CHANCE = 0.1
MIN_ENRICHMENT = 2.0
# The very same interval twice is no chance, unless genomes are cut into bins.
ENOUGH_IDENTICAL = 0.05
MOSTLY_IDENTICAL = 0.5
# Base pairs by which peaks are shifted: near enough to stay among as many peaks, as those of another build do, which
# lie 5,000 to some 100,000 away; far enough to leave the peak itself.
_NEAREST, _FARTHEST = 5_000, 150_000
_SHIFTED = 16_000  # peaks in all


class PeakMatchError(ValueError):
    """Too few peaks of the data belong to the vocabulary, or they are those of another genome."""


@dataclass(frozen=True, eq=False, repr=False)
class PeakMatch(Report):
    """Which peak of the data is which peak of a reference.

    Attributes
    ----------
    index
        Reference row of each peak of the data, -1 if it has none, shape `(n_peaks,)`. Where several carry the same
        row, their counts are to be summed.
    names
        Names of the data's peaks, shape `(n_peaks,)`.
    reference
        Names of the reference peaks.
    route
        How each peak was matched, shape `(n_peaks,)`: "interval" (the same one), "name" (the same text, which names
        no interval), "overlap", or "" if it was not.
    overlap
        Base pairs shared with the reference peak, 0 for none or by name, shape `(n_peaks,)`.
    peak_counts
        Counts per peak of the data, or None if they were not given.
    hits, chance
        Share of the data's intervals that overlap a reference peak, and share of the same intervals that do if shifted
        by 5,000 to 150,000 base pairs, the largest of several distances; None if there are no intervals on common
        chromosomes.
    notes
        Sentences on what is remarkable.
    bins
        Size of the bins that both genomes are cut into, in base pairs; None for peaks.
    is_peak
        Which features of the data are peaks, shape `(n_peaks,)`; None for all.
    """

    _label_width: ClassVar[int] = 18
    index: np.ndarray
    names: np.ndarray
    reference: np.ndarray
    route: np.ndarray
    overlap: np.ndarray
    peak_counts: np.ndarray | None = None
    hits: float | None = None
    chance: float | None = None
    notes: tuple[str, ...] = ()
    bins: int | None = None
    is_peak: np.ndarray | None = None

    @property
    def _peaks(self) -> np.ndarray:
        return np.ones(len(self.names), dtype=bool) if self.is_peak is None else self.is_peak

    @property
    def identical(self) -> float:
        """Share of the data's peaks that are the very same interval in the reference."""
        return float((self.route == "interval").sum() / max(self._peaks.sum(), 1))

    @property
    def n_smaller(self) -> int:
        """Length of the smaller list."""
        return min(int(self._peaks.sum()), len(self.reference))

    @property
    def vocabulary_share(self) -> float:
        """Share of the reference peaks that the data have."""
        return self.n_matched / len(self.reference)

    @property
    def counts_share(self) -> float | None:
        """Share of the data's accessibility in matched peaks; None if counts were not given, or hold none."""
        if self.peak_counts is None or not (total := self.peak_counts[self._peaks].sum()) > 0:
            return None
        return float(self.peak_counts[self.index >= 0].sum() / total)

    @property
    def is_chance(self) -> bool:
        """Whether hardly more peaks overlap than by chance, as those of two genome builds do."""
        if self.hits is None or self.chance is None or self.bins is not None:
            return False
        if self.identical >= ENOUGH_IDENTICAL:
            return False
        above = (self.hits - self.chance) / max(1 - self.chance, 1e-9)
        return above < MIN_ABOVE_CHANCE and self.hits < MIN_ENRICHMENT * self.chance

    def to_frame(self) -> pd.DataFrame:
        """One row per peak of the data: reference row and peak, route, shared base pairs, and counts if known."""
        matched = self.index >= 0
        columns = {
            "reference_index": self.index,
            "reference_peak": np.where(matched, self.reference[self.index], ""),
            "route": self.route,
            "overlap": self.overlap,
        }
        if self.peak_counts is not None:
            columns["counts"] = self.peak_counts
        return pd.DataFrame(columns, index=pd.Index(self.names))

    def lost_peaks(self, n: int = 10) -> pd.DataFrame:
        """Rows of `to_frame` without a reference peak, those with most counts first."""
        lost = self.to_frame()[(self.index < 0) & self._peaks]
        if self.peak_counts is not None:
            lost = lost.sort_values("counts", ascending=False, kind="stable")
        return lost.head(n)

    def _rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the report."""
        smaller = f"{self.n_matched:,} peaks of {self.n_smaller:,}, the smaller of the two lists"
        found = f"{self.vocabulary_share:.3f} ({self.n_matched:,} of {len(self.reference):,})"
        others = int((~self._peaks).sum())
        rows = [
            (
                "peaks",
                f"{int(self._peaks.sum()):,}" + (f"; {others:,} other features left out" if others else ""),
            ),
            ("coverage", f"{self.coverage:.3f} ({smaller})"),
            ("reference found", found),
        ]
        if self.counts_share is not None:
            rows.append(("accessibility kept", f"{self.counts_share:.3f}"))
        rows.append(("matched by", ", ".join(f"{name} {n:,}" for name, n in self.routes.items()) or "-"))
        if self.n_summed:
            rows.append(("summed", f"{self.n_summed:,} of {len(self.names):,}, into that of an earlier one"))
        if self.hits is not None:
            rows.append(("overlapping", f"{self.hits:.3f} of the peaks, {self.chance:.3f} if shifted"))
        lost = (self.index < 0) & self._peaks
        if lost.any():
            examples = ", ".join(map(str, self.lost_peaks(3).index))
            rows.append(("lost", f"{int(lost.sum()):,} of {len(self.names):,}, such as {examples}"))
        return rows + [("note", note) for note in self.notes]


def match_peaks(
    query_peaks: Sequence[str] | pd.Index | pd.DataFrame,
    reference_peaks: Sequence[str] | pd.Index | pd.DataFrame,
    *,
    peak_counts: np.ndarray | None = None,
    min_coverage: float = 0.25,
) -> PeakMatch:
    """Match the peaks of a data set to those of a reference.

    The same interval wins, however it is spelled (`chr1:100-200`, `chr1-100-200`, `chr1_100_200`, `1:100-200`);
    then the reference peak that shares most base pairs, the first if several share as many. Names that are no
    intervals match the same name. Where several peaks of the data lie on one reference peak, sum them.

    Parameters
    ----------
    query_peaks
        Names of the data's peaks, or `AnnData.var`.
    reference_peaks
        Names of the reference peaks, or a frame with them as index.
    peak_counts
        Counts per peak over all cells, shape `(n_peaks,)`, to report the share of accessibility that is kept.
    min_coverage
        Least share of the smaller list that has to match.

    Raises
    ------
    PeakMatchError
        Coverage below `min_coverage`, fewer than 20 peaks in common (or fewer than the whole of a smaller list), or
        an overlap that peaks of another genome build would have as well; or the last peaks of the chromosomes, which no
        one build has.
    ValueError
        No peaks, `peak_counts` of another length, or an interval that ends before it starts.

    Warns
    -----
    UserWarning
        Coverage below 0.5, peaks that are matched by a name without a place, or what looks like two genome builds in
        spite of intervals that are the same.
    """
    is_peak = _which_are_peaks(query_peaks)
    query, reference = read_peaks(query_peaks, among=is_peak), read_peaks(reference_peaks)
    if not len(query.names) or not len(reference.names):
        msg = (
            f"{len(query.names)} peaks of the data, {len(reference.names)} of the reference; both are needed."
        )
        raise ValueError(msg)
    counts = None if peak_counts is None else np.asarray(peak_counts, dtype=np.float64).ravel()
    if counts is not None and len(counts) != len(query.names):
        msg = f"peak_counts has {len(counts)} values for {len(query.names)} peaks. Pass one total per peak."
        raise ValueError(msg)
    grids = query.grid(), reference.grid()
    bins = grids[0][0] if grids[0] is not None and grids[0] == grids[1] else None
    index, overlap, hits, chance = _by_overlap(query, reference)
    route = np.where(index >= 0, "overlap", "").astype(object)
    same = index >= 0
    same[same] = (query.start[same] == reference.start[index[same]]) & (
        query.end[same] == reference.end[index[same]]
    )
    route[same] = "interval"
    texts = ~query.known
    if texts.any() and (~reference.known).any():
        rows = pd.Series(np.arange(len(reference.names)), index=reference.names)[~reference.known]
        found = rows[~rows.index.duplicated()].reindex(query.names[texts], fill_value=-1).to_numpy()
        index[texts] = found
        route[texts] = np.where(found >= 0, "name", "")
    if is_peak is not None:
        index[~is_peak], overlap[~is_peak], route[~is_peak] = -1, 0, ""
    builds = _two_builds(query, reference)
    result = PeakMatch(
        index=index,
        names=query.names,
        reference=reference.names,
        route=route,
        overlap=overlap,
        peak_counts=counts,
        hits=hits,
        chance=chance,
        notes=_notes(query, reference, bins, builds),
        bins=bins,
        is_peak=is_peak,
    )
    _refuse(result, query, reference, min_coverage, builds)
    _warn(result, query, builds)
    return result


def _which_are_peaks(peaks: Sequence[str] | pd.Index | pd.DataFrame) -> np.ndarray | None:
    """Features that `var` does not call something else; None for all."""
    if not isinstance(peaks, pd.DataFrame):
        return None
    kinds, _ = kinds_by_type(peaks)
    is_peak = (kinds == "") | (kinds == PEAK)
    return None if is_peak.all() or not is_peak.any() else is_peak


def _warn(result: PeakMatch, query: Intervals, builds: str) -> None:
    """Say aloud what may be wrong."""
    if by_name := int((result.route == "name").sum()):
        msg = (
            f"{by_name:,} of {result.n_smaller:,} peaks are matched by their name alone, such as "
            f"{_examples(query.names[result.route == 'name'])}, which does not say where they lie: another file may "
            "call other peaks the same. Put names such as chr1:100-200 into var_names, or the columns chrom, "
            "start and end into var, of the data and of what the model is made from."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
    if builds and result.coverage >= LOW_COVERAGE:
        msg = f"{builds} As {result.identical:.0%} are the very same intervals, they are taken for one all the same."
        warnings.warn(msg, UserWarning, stacklevel=3)
    if result.coverage < LOW_COVERAGE:
        msg = (
            f"Only {result.n_matched:,} of {result.n_smaller:,} peaks match the reference (coverage "
            f"{result.coverage:.2f}). Look at what is lost with `lost_peaks()` before relying on the result."
        )
        warnings.warn(" ".join([msg, *result.notes]), UserWarning, stacklevel=3)


def _by_overlap(
    query: Intervals, reference: Intervals
) -> tuple[np.ndarray, np.ndarray, float | None, float | None]:
    """Reference row and shared base pairs of each peak; share of the intervals that hit, and if shifted."""
    index = np.full(len(query.names), -1, dtype=np.int64)
    overlap = np.zeros(len(query.names), dtype=np.int64)
    chromosomes = pd.Index(pd.unique(reference.chromosome[reference.known]))
    code = chromosomes.get_indexer(pd.Index(query.chromosome, dtype=object))
    rows = np.flatnonzero(query.known & (code >= 0))
    if not len(rows):
        return index, overlap, None, None
    sorted_reference = SortedIntervals(
        chromosomes.get_indexer(pd.Index(reference.chromosome, dtype=object)),
        reference.start,
        reference.end,
        np.flatnonzero(reference.known),
    )
    start, end = query.start[rows], query.end[rows]
    index[rows], overlap[rows] = sorted_reference.best(code[rows], start, end)
    width = float(np.median(end - start)) + float(
        np.median((reference.end - reference.start)[reference.known])
    )
    nearest = max(_NEAREST, round(1.5 * width))
    distances = sorted({nearest, 2 * nearest, 4 * nearest, 10 * nearest, max(_FARTHEST, 30 * nearest)})
    sample = rows[:: max(1, len(rows) * 2 * len(distances) // _SHIFTED)]

    def shifted(by: int) -> float:
        at = query.start[sample] + by, query.end[sample] + by
        return float((sorted_reference.best(code[sample], *at)[0] >= 0).mean())

    chance = max((shifted(distance) + shifted(-distance)) / 2 for distance in distances)
    return index, overlap, float((index[rows] >= 0).mean()), chance


def _two_builds(query: Intervals, reference: Intervals) -> str:
    """What to say if the last peaks of the chromosomes are of two genome builds; empty if they can be of one."""
    genomes = [possible_genomes(peaks.largest_starts()) for peaks in (query, reference)]
    if not all(genomes) or set(genomes[0]) & set(genomes[1]):
        return ""
    return (
        f"The last peaks of the chromosomes fit {' or '.join(genomes[0])} in the data and "
        f"{' or '.join(genomes[1])} in the reference: these are two genome builds."
    )


def _notes(query: Intervals, reference: Intervals, bins: int | None, builds: str) -> tuple[str, ...]:
    notes = []
    if query.known.any() and reference.known.any() and (query.prefixed > 0.5) != (reference.prefixed > 0.5):
        with_, without = ("data", "reference") if query.prefixed > 0.5 else ("reference", "data")
        notes.append(
            f'Chromosomes are written "chr1" in the {with_} and "1" in the {without}: taken as the same.'
        )
    if builds:
        notes.append(builds)
    elif bins is not None:
        notes.append(
            f"Bins of {bins:,} base pairs have the same names in every genome build: make sure that both are of one."
        )
    return tuple(notes)


def _refuse(
    result: PeakMatch, query: Intervals, reference: Intervals, min_coverage: float, builds: str
) -> None:
    """Raise if too little matches, what matches does so by chance, or the genomes are two."""
    needed = min(MIN_PEAKS, result.n_smaller)
    other_build = bool(builds) and (result.bins is not None or result.identical < MOSTLY_IDENTICAL)
    enough = result.n_matched >= needed and result.coverage >= min_coverage
    if enough and not result.is_chance and not other_build:
        return
    lines = [
        f"{result.n_matched:,} of {result.n_smaller:,} peaks match the reference (coverage "
        f"{result.coverage:.3f}); needed: {needed} peaks and a coverage of {min_coverage}.",
        f"The data have {_examples(query.names)}; the reference has {_examples(reference.names)}.",
    ]
    if not query.known.any():
        lines.append(
            "No name of the data is an interval: put names such as chr1:100-200 into var_names, or the columns chrom, "
            "start and end into var. Are these the peaks, and not the genes?"
        )
    elif not set(query.chromosome[query.known]) & set(reference.chromosome[reference.known]):
        lines.append("They have no chromosome in common; is it the same species?")
    elif other_build:
        lines.append(
            "A place of one genome build is another place in the other. Lift the peaks over to the reference's build "
            "(liftOver), or count fragments in the reference's peaks."
        )
    elif result.is_chance:
        lines.append(
            f"A share of {result.hits:.3f} overlaps the reference, and as much, {result.chance:.3f}, if all are "
            f"shifted by {_NEAREST:,} to {_FARTHEST:,} base pairs: this is chance. Probably it is another "
            "genome build (hg19 and hg38, mm9 and mm10) or another species. "
            "Lift the peaks over to the reference's build (liftOver), or "
            "count fragments in the reference's peaks."
        )
    else:
        lines.append("Count fragments in the reference's peaks, which loses none, or lower min_coverage.")
    raise PeakMatchError("\n".join([*lines, *result.notes]))


def _examples(names: np.ndarray) -> str:
    return ", ".join(repr(name) for name in names[:3])
