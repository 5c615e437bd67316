from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellprior.genes import PeakMatchError, match_peaks
from cellprior.genes._genomes import GENOMES, possible_genomes
from cellprior.genes._intervals import are_peaks, read_peaks

Interval = tuple[str, int, int]


def intervals(n: int, *, seed: int = 0, chromosomes: int = 5, length: int = 400) -> list[Interval]:
    """Intervals at random places of some chromosomes of 50 million base pairs."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 50_000_000, n)
    code = rng.integers(1, chromosomes + 1, n)
    width = rng.integers(length // 2, length * 2, n)
    return [(str(c), int(s), int(s + w)) for c, s, w in zip(code, start, width, strict=True)]


def spell(peaks: list[Interval], form: str = "chr{}:{}-{}") -> list[str]:
    return [form.format(*peak) for peak in peaks]


@pytest.mark.parametrize("form", ["chr{}:{}-{}", "chr{}-{}-{}", "chr{}_{}_{}", "{}:{}-{}", "Chr{}:{:,}-{:,}"])
def test_a_peak_is_the_same_however_it_is_spelled(form):
    reference = intervals(60)
    order = np.random.default_rng(1).permutation(60)
    found = match_peaks(spell([reference[i] for i in order], form), spell(reference))
    np.testing.assert_array_equal(found.index, order)
    assert found.routes == {"interval": 60}
    assert found.coverage == found.vocabulary_share == 1.0
    assert any("taken as the same" in note for note in found.notes) == form.startswith("{}")


def test_contigs_with_underscores_and_the_mitochondrion_are_read():
    found = read_peaks(["chrUn_KI270742v1_100_200", "GL000009.2:5-9", "chrM:1-2", "MT:1-2", "chr1-7-8"])
    assert found.chromosome.tolist() == ["Un_KI270742v1", "GL000009.2", "M", "M", "1"]
    assert found.start.tolist() == [100, 5, 1, 1, 7]
    assert found.end.tolist() == [200, 9, 2, 2, 8]


def test_places_in_columns_may_be_decimal_numbers_and_some_may_be_missing():
    var = pd.DataFrame(
        {"chrom": ["chr1", "chr2", None, "chr4"], "start": [100.0, np.nan, 5, 7], "end": [200.0, 9, 9, 9]},
        index=["a", "b", "c", "d"],
    )
    found = read_peaks(var)
    assert found.known.tolist() == [True, False, False, True]
    assert found.start.tolist() == [100, -1, -1, 7] and found.end.tolist() == [200, -1, -1, 9]
    assert found.chromosome.tolist() == ["1", "", "", "4"]


def best_by_comparing_all(query: list[Interval], reference: list[Interval]) -> list[int]:
    """Row of the reference peak with most shared base pairs; the shorter, then the first, of equals."""
    found = []
    for chromosome, start, end in query:
        shared = [
            (min(end, e) - max(start, s) if c == chromosome else 0, s - e, -row)
            for row, (c, s, e) in enumerate(reference)
        ]
        best = max(shared)
        found.append(-best[2] if best[0] > 0 else -1)
    return found


def test_overlapping_peaks_go_to_the_reference_peak_that_shares_most():
    rng = np.random.default_rng(2)
    # short chromosomes, long and nested peaks: many candidates for each
    reference = [(str(rng.integers(1, 3)), int(s), int(s + w)) for s, w in rng.integers(1, 4000, (300, 2))]
    query = [(str(rng.integers(1, 4)), int(s), int(s + w)) for s, w in rng.integers(1, 800, (200, 2))]
    query += [("1", s * 900, s * 900 + 300) for s in range(20)]
    with pytest.warns(UserWarning, match="peaks match the reference"):
        found = match_peaks(spell(query), spell(reference), min_coverage=0.0)
    assert found.index.tolist() == best_by_comparing_all(query, reference)
    for i, row in enumerate(found.index):
        if row >= 0:
            common = min(query[i][2], reference[row][2]) - max(query[i][1], reference[row][1])
            assert found.overlap[i] == common > 0
            assert found.route[i] == ("interval" if query[i] == reference[row] else "overlap")
        else:
            assert found.overlap[i] == 0 and found.route[i] == ""


def test_peaks_that_only_touch_do_not_overlap():
    reference = intervals(40)
    ends = [(c, e, e + 100) for c, _, e in reference[:5]]
    found = match_peaks(spell(ends + reference[5:]), spell(reference))
    assert (found.index[:5] == -1).all() and (found.index[5:] >= 0).all()


def test_the_report_says_how_much_accessibility_is_kept_and_what_is_lost():
    reference = intervals(100)
    moved = [(c, s + 10, e + 10) for c, s, e in reference[:50]]
    foreign = [("21", 1000 * i, 1000 * i + 100) for i in range(1, 11)]
    counts = np.array([1.0] * 50 + [5.0] * 10)
    found = match_peaks(spell(moved + foreign), spell(reference), peak_counts=counts)
    assert (found.n_matched, found.n_summed) == (50, 0)
    assert found.coverage == pytest.approx(50 / 60)
    assert found.vocabulary_share == 0.5
    assert found.counts_share == 0.5
    assert found.lost_peaks(3)["counts"].tolist() == [5.0] * 3
    frame = found.to_frame()
    assert frame.loc[frame.index[0], "reference_peak"] == spell(reference)[0]
    assert frame["counts"].sum() == 100
    for text in ("0.833", "accessibility kept", "0.500", "chr21:1000-1100", "overlap 50"):
        assert text in repr(found)
    assert "<table>" in found._repr_html_() and "accessibility kept" in found._repr_html_()


def test_peaks_on_one_reference_peak_are_to_be_summed():
    reference = intervals(40)
    halves = [(c, s, s + 50) for c, s, _ in reference] + [(c, e - 50, e) for c, _, e in reference]
    found = match_peaks(spell(halves), spell(reference))
    np.testing.assert_array_equal(found.index, np.tile(np.arange(40), 2))
    assert (found.n_matched, found.n_summed) == (40, 40)


def test_names_that_are_no_intervals_match_the_same_name_and_a_warning_says_so():
    names = [f"peak_{i}a" for i in range(50)]
    with pytest.warns(
        UserWarning, match="by their name alone, such as 'peak_10a'.*does not say where they lie"
    ):
        found = match_peaks([*names[10:], "other"], names)
    assert found.index.tolist() == [*range(10, 50), -1]
    assert found.routes == {"name": 40}


@pytest.mark.parametrize(
    "columns",
    [
        ("chrom", "start", "end"),
        ("chrom", "chromStart", "chromEnd"),
        ("chromosome", "start", "end"),
        ("Chr", "Start", "End"),
    ],
)
def test_intervals_are_read_from_columns_if_the_names_say_nothing(columns):
    reference = intervals(30)
    var = pd.DataFrame(reference, columns=list(columns), index=[f"peak{i}" for i in range(30)])
    found = match_peaks(var, spell(reference))
    np.testing.assert_array_equal(found.index, np.arange(30))
    assert found.names[0] == "peak0"


def test_below_the_floor_the_error_says_what_was_found_and_needed_and_what_to_do():
    reference = intervals(200)
    query = reference[:30] + [(c, s + 25_000_000, e + 25_000_000) for c, s, e in intervals(170, seed=3)]
    with pytest.raises(PeakMatchError, match=r"coverage 0\.1[\s\S]*coverage of 0\.25[\s\S]*min_coverage"):
        match_peaks(spell(query), spell(reference))
    with pytest.warns(UserWarning, match="30 of 200 peaks"):
        assert match_peaks(spell(query), spell(reference), min_coverage=0.1).n_matched == 30


def test_peaks_of_another_build_are_refused_even_where_the_reference_covers_half_the_genome():
    reference = intervals(100_000, length=1200)
    query = [(c, s + 60_000, e + 60_000) for c, s, e in reference[::20]]
    with pytest.raises(PeakMatchError, match=r"this is chance\. Probably it is another genome build"):
        match_peaks(spell(query), spell(reference))
    near = [(c, s + 100, e + 100) for c, s, e in reference[::20]]
    assert match_peaks(spell(near), spell(reference)).hits == 1.0


def at_the_ends(genome: str) -> list[Interval]:
    return [
        (name, length - 1000 * i, length - 1000 * i + 500)
        for name, length in GENOMES[genome].items()
        for i in range(1, 30)
    ]


@pytest.mark.parametrize(("first", "second"), [("hg19", "hg38"), ("mm9", "mm10"), ("hg38", "mm10")])
def test_two_builds_are_told_apart_by_the_ends_of_their_chromosomes(first, second):
    with pytest.raises(PeakMatchError, match=f"fit {first} in the data and {second} in the reference"):
        match_peaks(spell(at_the_ends(first)), spell(at_the_ends(second)))


def test_positions_that_fit_several_builds_say_nothing():
    assert set(possible_genomes({"1": 1000, "X": 5000})) == {"hg19", "hg38", "mm9", "mm10"}
    assert possible_genomes({"22": 1000}) == ["hg19", "hg38"]
    assert possible_genomes({"1": 249_000_000}) == ["hg19"]
    assert possible_genomes({"1": 10**9}) == []
    assert possible_genomes({"Un_KI270742v1": 10**9}) == []


def test_genes_in_place_of_peaks_are_refused():
    with pytest.raises(PeakMatchError, match="and not the genes"):
        match_peaks([f"GENE{i}" for i in range(50)], spell(intervals(50)))
    assert are_peaks(spell(intervals(5)))
    assert not are_peaks(["CD8A", "HLA-A", "MS4A1"]) and not are_peaks([])


def test_other_chromosomes_are_another_species():
    with pytest.raises(PeakMatchError, match="no chromosome in common"):
        match_peaks(spell(intervals(50), "chr2L{}:{}-{}"), spell(intervals(50)))


@pytest.mark.parametrize(("query", "reference"), [([], ["chr1:1-2"]), (["chr1:1-2"], [])])
def test_no_peaks_are_refused(query, reference):
    with pytest.raises(ValueError, match="both are needed"):
        match_peaks(query, reference)


def test_totals_of_another_length_are_refused():
    with pytest.raises(ValueError, match="2 values for 3 peaks"):
        match_peaks(["a", "b", "c"], ["a"], peak_counts=np.ones(2))


def test_an_interval_that_ends_before_it_starts_is_refused_by_name():
    with pytest.raises(ValueError, match="'chr1:20-10' ends before it starts"):
        match_peaks(["chr1:5-9", "chr1:20-10"], ["chr1:5-9"])


@pytest.mark.parametrize("column", ["interval", "gene_ids"])
def test_intervals_are_read_from_one_column(column):
    reference = intervals(30)
    order = np.random.default_rng(0).permutation(30)
    var = pd.DataFrame({column: np.array(spell(reference))[order]}, index=[f"peak_{i}" for i in range(30)])
    found = match_peaks(var, spell(reference))
    assert found.index.tolist() == order.tolist() and found.routes == {"interval": 30}


@pytest.mark.parametrize("form", ["chr{}:{}-{}", "chr{}-{}-{}", "chr{}_{}_{}"])
def test_a_peak_that_was_made_unique_is_the_same_peak(form):
    reference = intervals(30)
    names = [*spell(reference, form), *(f"{name}-1" for name in spell(reference[:3], form))]
    found = match_peaks(names, spell(reference))
    assert found.index.tolist() == [*range(30), 0, 1, 2] and found.routes == {"interval": 33}
    assert read_peaks(["scaffold_12_34_5-9"]).chromosome.tolist() == ["scaffold_12_34"]


def bins(genome: str, size: int, keep: float = 1.0, seed: int = 0) -> list[Interval]:
    rng = np.random.default_rng(seed)
    return [
        (name, start, min(start + size, length))
        for name, length in GENOMES[genome].items()
        for start in range(0, length, size)
        if rng.random() < keep
    ]


@pytest.mark.parametrize(("query", "reference"), [("hg19", "hg38"), ("hg38", "hg19"), ("mm9", "mm10")])
def test_bins_of_another_build_are_refused_though_their_names_are_the_same(query, reference):
    with pytest.raises(
        PeakMatchError, match=f"liftOver[\\s\\S]*fit {query} in the data and {reference} in the reference"
    ):
        match_peaks(spell(bins(query, 200_000)), spell(bins(reference, 200_000)))


@pytest.mark.parametrize(("size", "keep"), [(1_000_000, 1.0), (200_000, 0.6)])
def test_bins_of_one_build_are_matched_by_name_and_the_report_says_what_it_cannot_know(size, keep):
    one, other = bins("hg38", size, keep), bins("hg38", size, keep, seed=1)
    found = match_peaks(spell(one), spell(other))
    assert found.bins == size and found.routes == {"interval": len(set(one) & set(other))}
    assert any("same names in every genome build" in note for note in found.notes)


@pytest.mark.parametrize("moved", [5_000, 20_000, 60_000])
def test_peaks_moved_as_in_another_build_are_refused_even_where_peaks_lie_in_clusters(moved):
    rng = np.random.default_rng(4)
    centres = np.sort(rng.integers(10**6, 10**8, 300))
    starts = np.unique((centres[:, None] + rng.integers(-150_000, 150_000, (300, 100))).ravel())
    reference = [("1", int(s), int(s) + 900) for s in starts]
    query = [("1", s + moved, e + moved) for _, s, e in reference]
    with pytest.raises(PeakMatchError, match="this is chance"):
        match_peaks(spell(query), spell(reference))
    near = [("1", s + 300, e + 300) for _, s, e in reference]
    assert match_peaks(spell(near), spell(reference)).hits == 1.0


def test_a_few_identical_intervals_prove_one_build_though_the_reference_covers_much():
    reference = intervals(100_000, length=1200)
    far = [(c, s + 60_000, e + 60_000) for c, s, e in reference[::20]]
    found = match_peaks(spell(far + reference[::100]), spell(reference))
    assert found.identical >= 0.05 and not found.is_chance


def test_features_that_var_calls_no_peaks_are_left_out():
    reference = intervals(40)
    var = pd.DataFrame(
        {"feature_types": ["Gene Expression"] * 20 + ["Peaks"] * 40},
        index=[f"GENE{i}" for i in range(20)] + spell(reference),
    )
    found = match_peaks(var, spell(reference), peak_counts=np.ones(60))
    assert found.index.tolist() == [-1] * 20 + list(range(40))
    assert (found.coverage, found.counts_share) == (1.0, 1.0) and "20 other features left out" in repr(found)
