from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from cellprior.genes import GeneMatchError, match

SYMBOLS = [f"GENE{i}" for i in range(60)]
IDS = [f"ENSG{i:011d}" for i in range(1000, 1060)]
BOTH = pd.DataFrame({"ensembl_id": IDS, "symbol": SYMBOLS})
MOUSE_SYMBOLS = [f"Gene{i}" for i in range(60)]
MOUSE_IDS = [f"ENSMUSG{i:011d}" for i in range(60)]


def named(*names: object, **columns: object) -> pd.DataFrame:
    """A `var` with these names."""
    return pd.DataFrame(columns, index=pd.Index(names))


# ---------------------------------------------------------------- the same name on both sides


@pytest.mark.parametrize(
    "vocabulary", [SYMBOLS, np.array(SYMBOLS), pd.Index(SYMBOLS), BOTH, BOTH[["symbol"]]]
)
def test_genes_in_any_order_find_their_row_of_the_vocabulary(
    vocabulary: object, no_tables: list[str]
) -> None:
    order = np.random.default_rng(0).permutation(60)
    result = match(named(*np.array(SYMBOLS)[order]), vocabulary)
    assert result.index.dtype == np.int64
    np.testing.assert_array_equal(result.index, order)
    assert (result.coverage, result.vocabulary_share, result.n_matched) == (1, 1, 60)
    assert result.routes == {"symbol": 60} and result.source == "index" and result.counts_share is None


def test_genes_that_the_vocabulary_lacks_get_no_row(no_tables: list[str]) -> None:
    result = match(named("gene_x", *SYMBOLS[:30], "gene_y"), SYMBOLS)
    np.testing.assert_array_equal(result.index, [-1, *range(30), -1])


@pytest.mark.parametrize("suffix", ["", ".7", ".7_PAR_Y"])
def test_ensembl_ids_match_with_and_without_version(suffix: str, no_tables: list[str]) -> None:
    result = match(named(*(name + suffix for name in IDS)), BOTH)
    np.testing.assert_array_equal(result.index, range(60))
    assert result.routes == {"ensembl_id": 60}
    np.testing.assert_array_equal(match(named(*IDS), [name + ".2" for name in IDS]).index, range(60))


def test_ids_among_the_symbols_of_either_side_match(no_tables: list[str]) -> None:
    mixed = SYMBOLS[:30] + IDS[30:]
    result = match(named(*mixed), BOTH)
    np.testing.assert_array_equal(result.index, range(60))
    assert result.routes == {"symbol": 30, "ensembl_id": 30}
    np.testing.assert_array_equal(match(named(*IDS[30:]), mixed).index, range(30, 60))


def test_spaces_around_a_name_do_not_matter(no_tables: list[str]) -> None:
    np.testing.assert_array_equal(match(named(*(f" {name}\t" for name in SYMBOLS)), SYMBOLS).index, range(60))


def test_a_gene_listed_twice_in_the_vocabulary_is_matched_to_its_first_row(no_tables: list[str]) -> None:
    np.testing.assert_array_equal(match(named(*SYMBOLS), SYMBOLS + SYMBOLS[:5]).index, range(60))


def test_a_symbol_that_two_genes_of_the_vocabulary_share_is_not_guessed(no_tables: list[str]) -> None:
    vocabulary = BOTH.assign(symbol=["GENE1", *SYMBOLS[1:]])
    result = match(named(*SYMBOLS[1:]), vocabulary)
    np.testing.assert_array_equal(result.index, [-1, *range(2, 60)])


# ---------------------------------------------------------------- where the names are


def test_the_place_that_matches_most_genes_is_found(no_tables: list[str]) -> None:
    var = named(*map(str, range(60)), feature_types="Gene Expression", some=SYMBOLS[:20] + ["gene_x"] * 40)
    result = match(var.assign(feature_name=pd.Categorical(SYMBOLS), gene_ids=IDS[:50] + [None] * 10), BOTH)
    assert result.source == "feature_name"
    np.testing.assert_array_equal(result.index, range(60))


def test_the_index_wins_when_a_column_matches_as_many_genes(no_tables: list[str]) -> None:
    result = match(named(*SYMBOLS, gene_ids=IDS), BOTH)
    assert result.source == "index" and result.routes == {"symbol": 60}


def test_gene_key_forces_a_column_or_the_index(no_tables: list[str]) -> None:
    var = named(*SYMBOLS, gene_ids=IDS[::-1], n_cells=range(60))
    assert match(var, BOTH, gene_key="gene_ids").source == "gene_ids"
    np.testing.assert_array_equal(match(var, BOTH, gene_key="gene_ids").index, range(59, -1, -1))
    assert match(var, BOTH, gene_key="index").source == "index"
    with pytest.raises(GeneMatchError, match="column 'n_cells'"):
        match(var, BOTH, gene_key="n_cells")


def test_an_unknown_gene_key_is_refused_and_the_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"no column 'ensembl'.*'gene_ids', 'n_cells'"):
        match(named(*SYMBOLS, gene_ids=IDS, n_cells=1), BOTH, gene_key="ensembl")


def test_missing_values_in_a_column_match_nothing_and_count_as_genes(no_tables: list[str]) -> None:
    var = named(*range(60), symbol=SYMBOLS[:40] + [None, np.nan, pd.NA, ""] * 5)
    result = match(var, SYMBOLS)
    np.testing.assert_array_equal(result.index, [*range(40), *[-1] * 20])
    assert result.coverage == 40 / 60


@pytest.mark.parametrize("names", [range(60), list(map(str, range(60)))])
def test_row_numbers_are_refused_as_such(names: list, no_tables: list[str]) -> None:
    with pytest.raises(GeneMatchError, match="numbers"):
        match(named(*names), SYMBOLS)


# ---------------------------------------------------------------- retired symbols and translation

VOCABULARY = pd.DataFrame(
    {
        "ensembl_id": IDS[:3],
        "symbol": ["CCN2", "ELOA", "NEWA"],
        "previous_symbols": ["CTGF", "TCEB3|SIII", ""],
    }
)


def test_retired_symbols_match_through_the_vocabulary_alone(no_tables: list[str]) -> None:
    result = match(named("NEWA", "SIII", "CTGF", "OTHER"), VOCABULARY)
    np.testing.assert_array_equal(result.index, [2, 1, 0, -1])
    assert result.routes == {"retired_symbol": 2, "symbol": 1}
    assert no_tables == [] and result.notes == ()


def test_a_retired_symbol_of_two_genes_matches_neither(no_tables: list[str]) -> None:
    vocabulary = VOCABULARY.assign(previous_symbols=["CTGF|OLD", "TCEB3|OLD", ""])
    np.testing.assert_array_equal(
        match(named("CTGF", "TCEB3", "OLD", "NEWA"), vocabulary).index, [0, 1, -1, 2]
    )


def test_a_current_symbol_is_preferred_to_the_same_name_retired(no_tables: list[str]) -> None:
    vocabulary = VOCABULARY.assign(previous_symbols=["ELOA", "", ""])
    np.testing.assert_array_equal(match(named("ELOA", "CCN2", "NEWA"), vocabulary).index, [1, 0, 2])


@pytest.mark.parametrize(("data", "vocabulary"), [("CTGF", "CCN2"), ("CCN2", "CTGF")])
def test_retired_symbols_match_through_the_tables_in_both_directions(
    data: str, vocabulary: str, tables: list[str]
) -> None:
    result = match(named("TP53", data), ["TP53", vocabulary])
    np.testing.assert_array_equal(result.index, [0, 1])
    assert result.routes == {"symbol": 1, "retired_symbol": 1}
    assert tables == ["gencode-human-48", "gencode-human-38"]


def test_symbols_match_a_vocabulary_of_ids(tables: list[str]) -> None:
    vocabulary = [f"ENSG{i:011d}" for i in (10, 6, 3, 2, 1)]
    result = match(named("TP53", "CTGF", "ELOA", "CD99", "GONE"), vocabulary)
    np.testing.assert_array_equal(result.index, [4, 3, 2, 1, 0])
    assert result.routes == {"symbol_to_id": 4, "retired_symbol": 1}


def test_ids_match_a_vocabulary_of_symbols_current_or_retired(tables: list[str]) -> None:
    result = match(named("ENSG00000000002.1", "ENSG00000000003.4"), ["TCEB3", "CCN2"])
    np.testing.assert_array_equal(result.index, [1, 0])
    assert result.routes == {"id_to_symbol": 2}


def test_a_symbol_that_two_ids_carry_is_not_guessed(tables: list[str]) -> None:
    vocabulary = [f"ENSG{i:011d}" for i in (1, 2, 3, 8)]
    with pytest.raises(GeneMatchError, match=r"3 of 4 genes"):
        match(named("TP53", "CCN2", "ELOA", "TWIN"), vocabulary)


def test_a_symbol_that_passed_to_another_gene_is_not_taken_for_its_old_one(tables: list[str]) -> None:
    names = named("TP53", "CCN2", "ELOA", "SWAP")  # SWAP was the gene 4, now it is the gene 5
    np.testing.assert_array_equal(match(names, [f"ENSG{i:011d}" for i in (1, 2, 3, 5)]).index, range(4))
    with pytest.raises(GeneMatchError, match=r"3 of 4 genes"):
        match(names, [f"ENSG{i:011d}" for i in (1, 2, 3, 4)])


@pytest.mark.parametrize(
    ("var", "vocabulary"),
    [
        pytest.param(named(*SYMBOLS, "MORE"), SYMBOLS, id="nothing of the vocabulary is missing"),
        pytest.param(named(*IDS[:30], IDS[0][:-4] + "9999"), BOTH, id="ids on both sides"),
        pytest.param(named(*SYMBOLS[:30], "gene_x"), SYMBOLS, id="the unmatched name looks like no symbol"),
        pytest.param(
            named(*SYMBOLS[:30], "MORE"), BOTH.assign(previous_symbols="X"), id="it knows its old names"
        ),
        pytest.param(named(*MOUSE_SYMBOLS[:30], "More"), MOUSE_SYMBOLS, id="mouse has one release"),
        pytest.param(
            named(*(f"g{i}" for i in range(30))), [f"g{i}" for i in range(40)], id="unknown species"
        ),
    ],
)
def test_no_table_is_asked_for_when_none_can_help(
    var: pd.DataFrame, vocabulary: object, no_tables: list[str]
) -> None:
    assert match(var, vocabulary).n_matched >= 30
    assert no_tables == []


def test_matching_goes_on_without_tables_and_says_so(no_tables: list[str]) -> None:
    result = match(named(*SYMBOLS[:50], "CTGF"), [*SYMBOLS[:50], "CCN2"])
    assert result.n_matched == 50
    (note,) = result.notes
    assert "cellprior is offline" in note and note in repr(result)


def test_too_little_coverage_without_tables_says_how_to_get_them(no_tables: list[str]) -> None:
    with pytest.raises(GeneMatchError) as caught:
        match(named(*SYMBOLS), IDS)
    message = str(caught.value)
    assert "0 of 60 genes match" in message and "needed: 20 genes and a coverage of 0.25" in message
    assert "'GENE0', 'GENE1'" in message and "'ENSG00000001000'" in message
    assert "`cellprior download gencode-human-48` and `cellprior download gencode-human-38`" in message


# ---------------------------------------------------------------- several columns of one gene


def test_columns_of_one_gene_get_the_same_row_so_that_their_counts_can_be_summed(
    no_tables: list[str],
) -> None:
    names = ["CTGF", "ELOA", "CCN2", "ELOA", "NEWA", "NEITHER"]
    counts = np.random.default_rng(1).poisson(3, (10, 6))
    result = match(named(*names), VOCABULARY)
    assert (result.n_matched, result.n_summed, sum(result.routes.values())) == (3, 2, 5)
    assert "2 of 6 columns, into the gene of an earlier column" in repr(result)

    summed = np.zeros((10, 3))
    np.add.at(summed, (slice(None), result.index[result.index >= 0]), counts[:, result.index >= 0])
    expected = pd.DataFrame(counts, columns=names).rename(columns={"CTGF": "CCN2"}).T.groupby(level=0).sum().T
    np.testing.assert_array_equal(summed, expected[["CCN2", "ELOA", "NEWA"]])


# ---------------------------------------------------------------- species


@pytest.mark.parametrize("names", [MOUSE_SYMBOLS, MOUSE_IDS])
@pytest.mark.parametrize("vocabulary", [SYMBOLS, IDS, BOTH])
def test_mouse_names_are_refused_by_a_human_vocabulary_and_never_upper_cased(
    names: list[str], vocabulary: object, no_tables: list[str]
) -> None:
    with pytest.raises(GeneMatchError, match=r"mouse.*vocabulary are human.*orthologues"):
        match(named(*names, feature_types="Gene Expression", chromosome="MT"), vocabulary)
    assert no_tables == []


def test_genes_of_another_species_are_refused_by_their_ids(no_tables: list[str]) -> None:
    with pytest.raises(GeneMatchError, match=r"another species' gene names \('ENSDARG00000000000'"):
        match(named(*(f"ENSDARG{i:011d}" for i in range(60))), BOTH)


def test_human_names_are_refused_by_a_mouse_vocabulary(no_tables: list[str]) -> None:
    with pytest.raises(GeneMatchError, match=r"human gene names.*vocabulary are mouse"):
        match(named(*SYMBOLS), MOUSE_SYMBOLS)


def test_mouse_data_match_a_mouse_vocabulary(no_tables: list[str]) -> None:
    vocabulary = pd.DataFrame({"ensembl_id": MOUSE_IDS, "symbol": MOUSE_SYMBOLS})
    np.testing.assert_array_equal(match(named(*MOUSE_SYMBOLS), vocabulary).index, range(60))
    np.testing.assert_array_equal(match(named(*MOUSE_IDS), vocabulary).index, range(60))


def test_mouse_symbols_match_mouse_ids_through_the_mouse_table(tables: list[str]) -> None:
    vocabulary = [f"ENSMUSG{i:011d}" for i in (3, 2, 1)]
    np.testing.assert_array_equal(match(named("Xkr4", "Sox17", "Mrpl15"), vocabulary).index, [2, 1, 0])
    assert tables == ["gencode-mouse-M37"]


def test_a_column_of_human_orthologues_makes_mouse_data_usable(no_tables: list[str]) -> None:
    result = match(named(*MOUSE_SYMBOLS, human=SYMBOLS), SYMBOLS)
    assert result.source == "human" and result.n_matched == 60


def test_lower_case_names_are_not_upper_cased_but_the_error_hints_at_it(no_tables: list[str]) -> None:
    with pytest.raises(GeneMatchError, match="0 of 60 genes.*(?s:.*)lower-case"):
        match(named(*map(str.lower, SYMBOLS)), SYMBOLS)


# ---------------------------------------------------------------- coverage


def test_a_small_panel_is_judged_by_its_own_size(no_tables: list[str]) -> None:
    vocabulary = [f"GENE{i}" for i in range(20_000)]
    result = match(named(*vocabulary[:300], *(f"gene_{i}" for i in range(100))), vocabulary)
    assert result.coverage == 300 / 400 and result.vocabulary_share == 300 / 20_000


def test_low_coverage_warns_and_lower_coverage_is_an_error(no_tables: list[str]) -> None:
    var = named(*SYMBOLS[:25], *(f"gene_{i}" for i in range(35)))
    with pytest.warns(UserWarning, match=r"Only 25 of 60 genes match.*0\.42.*lost_genes"):
        match(var, SYMBOLS)
    with pytest.raises(GeneMatchError, match=r"coverage 0\.417\); needed: 20 genes and a coverage of 0\.45"):
        match(var, SYMBOLS, min_coverage=0.45)


def test_fewer_than_twenty_genes_are_an_error_whatever_the_coverage(no_tables: list[str]) -> None:
    match(named(*SYMBOLS[:20]), SYMBOLS)
    with pytest.raises(GeneMatchError, match="19 of 19 genes"):
        match(named(*SYMBOLS[:19]), SYMBOLS)
    with pytest.raises(GeneMatchError, match="1 of 60 genes"):
        match(named("GENE7", *(f"gene_{i}" for i in range(70))), SYMBOLS, min_coverage=0)


def test_a_vocabulary_of_fewer_than_twenty_genes_has_to_be_found_whole(no_tables: list[str]) -> None:
    assert match(named(*SYMBOLS), SYMBOLS[:5]).n_matched == 5
    with pytest.raises(GeneMatchError, match="4 of 5 genes.*needed: 5 genes"):
        match(named(*SYMBOLS[:4], "gene_x"), SYMBOLS[:5])


def test_data_without_genes_are_an_error() -> None:
    with pytest.raises(GeneMatchError, match="0 of 0 genes"):
        match(pd.DataFrame(), SYMBOLS)


@pytest.mark.parametrize(
    "vocabulary", [[], BOTH.iloc[:0], BOTH.rename(columns={"symbol": "a", "ensembl_id": "b"})]
)
def test_a_vocabulary_without_genes_is_an_error(vocabulary: object) -> None:
    with pytest.raises(ValueError, match="at least one gene"):
        match(named(*SYMBOLS), vocabulary)


# ---------------------------------------------------------------- the report


def test_the_share_of_counts_and_the_biggest_lost_genes_are_reported(no_tables: list[str]) -> None:
    counts = np.array([1.0] * 60 + [5, 30, 5])
    result = match(named(*SYMBOLS, "ercc_a", "ercc_b", "ercc_c"), SYMBOLS, gene_counts=counts)
    assert result.counts_share == 0.6
    assert result.lost_genes().index.tolist() == ["ercc_b", "ercc_a", "ercc_c"]
    assert result.lost_genes(1)["counts"].tolist() == [30]
    assert "counts kept       0.600" in repr(result) and "ercc_b (30.00%)" in repr(result)


def test_counts_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="gene_counts has 3 values, var has 60 genes"):
        match(named(*SYMBOLS), SYMBOLS, gene_counts=np.ones(3))


@pytest.mark.parametrize("total", [0.0, np.nan])
def test_the_share_of_counts_is_unknown_when_there_are_none(total: float, no_tables: list[str]) -> None:
    assert match(named(*SYMBOLS), SYMBOLS, gene_counts=np.full(60, total)).counts_share is None


def test_the_frame_has_one_row_per_data_column(no_tables: list[str]) -> None:
    var = named("a", "b", "c", "d", symbol=["CTGF", "OTHER", "NEWA", "ELOA"])
    frame = match(var, VOCABULARY, gene_counts=np.arange(4)).to_frame()
    assert frame.loc["a"].tolist() == ["CTGF", 0, "CCN2", "retired_symbol", 0, "gene"]
    assert frame.loc["b"].tolist() == ["OTHER", -1, "", "", 1, "gene"]
    assert frame["vocabulary_index"].tolist() == [0, -1, 2, 1]


def test_names_are_escaped_in_the_notebook_table(no_tables: list[str]) -> None:
    html = match(named(*SYMBOLS, "<b>&"), SYMBOLS)._repr_html_()
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html
    assert html.startswith("<table") and "60 of 60" in html


def test_a_match_survives_pickling_and_copying(no_tables: list[str]) -> None:
    result = match(named(*SYMBOLS), SYMBOLS, gene_counts=np.ones(60))
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        np.testing.assert_array_equal(twin.index, result.index)
        assert repr(twin) == repr(result)


def test_the_data_and_the_vocabulary_are_left_as_they_were(no_tables: list[str]) -> None:
    var, vocabulary = named(*SYMBOLS, gene_ids=pd.Categorical(IDS)), BOTH.copy()
    before = var.copy()
    match(var, vocabulary)
    pd.testing.assert_frame_equal(var, before)
    pd.testing.assert_frame_equal(vocabulary, BOTH)


def test_matching_genes_imports_no_model_library() -> None:
    code = (
        "import sys, cellprior.genes as g, pandas as pd; n = [f'GENE{i}' for i in range(30)];"
        "g.match(pd.DataFrame(index=n), n);"
        "print(sorted({'torch', 'anndata', 'scanpy', 'scvi', 'pooch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- what a column is

TYPES = {"Antibody Capture": "antibody", "CRISPR Guide Capture": "guide", "Multiplexing Capture": "tag"}


@pytest.mark.parametrize("spelling", [str, str.lower, lambda text: text.replace(" ", "_")])
@pytest.mark.parametrize("value", [*TYPES, "Custom", "Peaks", "HTO"])
def test_antibody_rows_and_their_like_are_not_added_to_genes(
    value: str, spelling: object, no_tables: list[str]
) -> None:
    var = named(
        *SYMBOLS, *SYMBOLS[:5], feature_types=[spelling("Gene Expression")] * 60 + [spelling(value)] * 5
    )
    counts = np.r_[np.ones(60), np.full(5, 100.0)]
    for given in (var, var.assign(feature_types=pd.Categorical(var["feature_types"]))):
        result = match(given, SYMBOLS, gene_counts=counts)
        np.testing.assert_array_equal(result.index, [*range(60), *[-1] * 5])
        assert (result.n_summed, result.coverage, result.counts_share) == (0, 1, 1)
        assert list(result.not_genes.values()) == [5] and len(result.lost_genes()) == 0
    assert result.kind is not None and result.kind[-1] == TYPES.get(value, result.kind[-1]) != "gene"
    assert "not genes" in repr(result) and "(GENE0, GENE1, GENE2, ...)" in result._repr_html_()


def test_what_is_no_gene_is_shown_by_the_name_that_was_read_and_not_by_its_row(no_tables: list[str]) -> None:
    names = [*SYMBOLS, "CD3_TotalSeqB"]
    result = match(pd.DataFrame({"symbol": names}, index=[str(i) for i in range(len(names))]), SYMBOLS)
    assert result.source == "symbol" and "1 antibody (CD3_TotalSeqB): left out" in repr(result)


def test_a_column_of_types_may_have_gaps_or_mean_nothing(no_tables: list[str]) -> None:
    gaps = named(*SYMBOLS, "CD4_ADT", feature_types=["Gene Expression"] * 30 + [None] * 30 + [np.nan])
    result = match(gaps, SYMBOLS)
    assert result.n_matched == 60 and result.not_genes == {"antibody": 1}
    for nonsense in ("protein_coding", "x"):
        assert match(named(*SYMBOLS, feature_type=nonsense), SYMBOLS).n_matched == 60
    beside = named(*SYMBOLS, feature_types=["Gene Expression"] * 50 + ["Lipids"] * 10)
    assert match(beside, SYMBOLS).not_genes == {"other": 10}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GENE1_TotalSeqB", "antibody"),
        ("GENE1-TotalSeqC", "antibody"),
        ("ADT_GENE1", "antibody"),
        ("adt_GENE1", "antibody"),
        ("GENE1_ADT", "antibody"),
        ("GENE1_TSB", "antibody"),
        ("GENE1:SK3|GENE1|AHS0032|pAbO", "antibody"),
        ("sgRNA_GENE1", "guide"),
        ("sgGENE1-2", "guide"),
        ("GENE1_sgRNA1", "guide"),
        ("Non-Targeting-3", "guide"),
        ("HTO1", "tag"),
        ("Hashtag3", "tag"),
        ("CMO301", "tag"),
        ("ERCC-00002", "spike-in"),
        ("NegControlProbe_00012", "control"),
        ("BLANK_0012", "control"),
        (f"antisense_{IDS[1]}", "control"),
        (f"DEPRECATED_{IDS[1]}", "control"),
        ("chr1:1000-2000", "peak"),
        ("peak_17", "peak"),
    ],
)
def test_without_a_column_the_name_tells_what_is_no_gene(name: str, kind: str, no_tables: list[str]) -> None:
    # the column of symbols would match, as it does for antibodies named after their gene
    result = match(named(*SYMBOLS, name, symbol=[*SYMBOLS, "GENE1"]), BOTH)
    assert result.not_genes == {kind: 1} and result.index[-1] == -1 and result.coverage == 1
    result = match(named(*(f"row {i}" for i in range(60)), name, symbol=[*SYMBOLS, "GENE1"]), BOTH)
    assert result.source == "symbol" and result.index[-1] == -1


def test_a_symbol_of_the_vocabulary_is_a_gene_however_it_is_called(no_tables: list[str]) -> None:
    odd = ["ERCC1", "PEAK1", "HTO1", "sgK494", "NEGR1", "ADT_X", *SYMBOLS]
    assert match(named(*odd), odd).n_matched == len(odd)


def test_no_gene_of_gencode_is_taken_for_something_else(mirror_tables: object) -> None:
    from cellprior.genes._kinds import kinds_of
    from cellprior.genes._table import load

    for species in ("human", "mouse"):
        table = load(species)[0]
        assert table is not None and set(kinds_of(pd.DataFrame(index=[*table.id_of, *table.symbols_of]))) == {
            "gene"
        }


def test_columns_that_are_summed_are_named(no_tables: list[str]) -> None:
    result = match(named(*SYMBOLS, "GENE3"), SYMBOLS)
    assert result.summed_genes() == {"GENE3": ["GENE3", "GENE3"]} and "GENE3 + GENE3 into GENE3" in repr(
        result
    )


PLACES = [f"chr{1 + i % 22}:{1000 * i}-{1000 * i + 500}" for i in range(60)]


@pytest.mark.parametrize("index", [PLACES, [f"peak_{i}" for i in range(60)]])
def test_peaks_with_a_column_of_genes_are_refused_unless_the_column_is_named(
    index: list[str], no_tables: list[str]
) -> None:
    var = named(*index, nearest_gene=SYMBOLS)
    for given in (var, var.assign(feature_types="Peaks")):
        with pytest.raises(GeneMatchError, match=r"no gene: 60 peaks, such as[\s\S]*gene_key="):
            match(given, SYMBOLS)
        assert match(given, SYMBOLS, gene_key="nearest_gene").n_matched == 60
    mixed = named(*SYMBOLS, *PLACES, gene=SYMBOLS * 2)
    assert match(mixed, SYMBOLS, gene_key="gene").not_genes == {"peak": 60}


def test_data_that_are_no_genes_at_all_are_refused_with_the_line_that_helps(no_tables: list[str]) -> None:
    with pytest.raises(
        GeneMatchError, match=r'60 antibodies.*var\[.feature_types.\][\s\S]*= "Gene Expression"'
    ):
        match(named(*SYMBOLS, feature_types="Antibody Capture"), SYMBOLS)


# ---------------------------------------------------------------- other signs, genomes, capitals

SIGNED = ["HLA-DRA", "MT-ND1", "NKX2-1", "RP11-34P13.7", "7SK", "5S_rRNA", *SYMBOLS]


@pytest.mark.parametrize(
    "names",
    [
        ["HLA.DRA", "MT.ND1", "NKX2.1", "RP11.34P13.7", "X7SK", "X5S_rRNA"],
        ["HLA_DRA", "MT_ND1", "NKX2_1", "RP11_34P13.7", "7SK", "5S_rRNA"],
        ["HLA\u2011DRA", "MT\u2013ND1", "NKX2\u22121", "RP11\u201034P13.7", "7SK", "5S-rRNA"],
    ],
)
def test_names_with_other_signs_are_found_and_counted(names: list[str], no_tables: list[str]) -> None:
    result = match(named(*names, *SYMBOLS), SIGNED)
    np.testing.assert_array_equal(result.index, range(len(SIGNED)))
    assert result.routes["punctuation"] == sum(a != b for a, b in zip(names, SIGNED, strict=False))
    assert "punctuation" in repr(result)


def test_signs_are_never_guessed_between_two_genes_nor_put_before_the_same_name(no_tables: list[str]) -> None:
    vocabulary = ["A-B", "A.B", "C-D", *SYMBOLS]
    result = match(named("A_B", "A.B", "A-B", "C.D", "C-D", *SYMBOLS), vocabulary)
    assert result.index[:5].tolist() == [-1, 1, 0, 2, 2] and result.route[:5].tolist() == [
        "",
        "symbol",
        "symbol",
        "punctuation",
        "symbol",
    ]
    nameless = pd.DataFrame({"ensembl_id": IDS, "symbol": ["", *SYMBOLS[1:]]})
    assert match(named("X", *SYMBOLS[1:]), nameless).index[0] == -1
    retired = pd.DataFrame({"symbol": ["NEW1", *SYMBOLS], "previous_symbols": ["OLD-1", *[""] * 60]})
    assert match(named("OLD.1", *SYMBOLS), retired).index[0] == 0


@pytest.mark.parametrize("prefix", ["GRCh38_", "GRCh38______", "GRCh38---", "hg19_"])
def test_a_genome_in_front_of_the_names_is_named_with_the_line_that_takes_it_off(
    prefix: str, no_tables: list[str]
) -> None:
    with pytest.raises(GeneMatchError) as caught:
        match(named(*(prefix + name for name in SYMBOLS)), SYMBOLS)
    assert f"adata.var_names.str.removeprefix({prefix!r})" in str(caught.value)
    assert f"{prefix + 'GENE0'!r} is 'GENE0'" in str(caught.value) and "60 of 60 names" in str(caught.value)


def test_of_two_genomes_the_one_of_the_vocabulary_is_kept(no_tables: list[str]) -> None:
    names = [f"mm10_{name}" for name in MOUSE_SYMBOLS] + [f"hg19_{name}" for name in SYMBOLS]
    with pytest.raises(GeneMatchError, match=r"'mm10_'.*60 of them.*var_names.str.startswith\('hg19_'\)"):
        match(named(*names), SYMBOLS)


def test_mouse_genes_in_capitals_are_noticed(no_tables: list[str]) -> None:
    mouse = [*SYMBOLS, "GM1234", "GM5678", "0610005C13RIK", "A930006A01RIK"]
    with pytest.warns(UserWarning, match="4 names are those of mouse genes in capitals.*GM1234.*orthologues"):
        result = match(named(*mouse), SYMBOLS)
    assert "in capitals" in repr(result)
    match(named(*SYMBOLS, "GM2A", "GRIK1"), SYMBOLS)
    with pytest.raises(GeneMatchError, match="mouse in capitals gene names"):
        match(named(*mouse), MOUSE_SYMBOLS)
