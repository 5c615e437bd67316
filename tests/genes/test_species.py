"""Vocabularies with genes of several species."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellprior.genes import GeneMatchError, match
from cellprior.genes._table import GeneTable

HUMAN = [f"{stem}{i}" for stem in ("CD", "RPL", "KRT", "ACT") for i in range(2, 32)]
MOUSE = [name.capitalize() for name in HUMAN[:90]] + [f"Gm{i}" for i in range(1000, 1030)]
FISH = [name.lower() for name in HUMAN[:60]] + [f"zgc:{i}" for i in range(60)]


def vocabulary(**names: list[str]) -> pd.DataFrame:
    parts = [pd.DataFrame({"symbol": of, "species": species}) for species, of in names.items()]
    return pd.concat(parts, ignore_index=True)


BOTH = vocabulary(human=HUMAN, mouse=MOUSE)
IN_CAPITALS = BOTH.assign(symbol=BOTH["symbol"].str.upper())


def var(*names: str, **columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(columns, index=list(names))


@pytest.fixture(autouse=True)
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up genes are in no table."""
    monkeypatch.setattr("cellprior.genes._match.load", lambda species: (None, ()))


@pytest.mark.parametrize("genes", [BOTH, IN_CAPITALS], ids=["as written", "in capitals"])
def test_the_species_is_found_by_how_symbols_are_written(genes):
    for species, names, start in (("human", HUMAN, 0), ("mouse", MOUSE, len(HUMAN))):
        found = match(var(*names), genes)
        np.testing.assert_array_equal(found.index, start + np.arange(len(names)))
        assert found.species == {species: len(names)}
        assert found.coverage == found.vocabulary_share == 1
        assert species in repr(found)


def test_genes_of_two_species_in_one_file_are_matched_within_their_own():
    names = [*MOUSE, *HUMAN]
    for genes in (BOTH, IN_CAPITALS):
        found = match(var(*names), genes)
        expected = np.concatenate([len(HUMAN) + np.arange(len(MOUSE)), np.arange(len(HUMAN))])
        np.testing.assert_array_equal(found.index, expected)
        assert set(found.species) == {"human", "mouse"}
        assert any("told apart by how" in note for note in found.notes)


def test_a_name_that_is_written_alike_in_two_species_of_a_file_is_left_out_and_said_to_be():
    genes = vocabulary(human=[*HUMAN, "F10"], mouse=[*MOUSE, "F10"])
    found = match(var(*HUMAN, *MOUSE, "F10"), genes)
    assert found.index[-1] == -1
    assert any("F10: left out" in note for note in found.notes)
    assert match(var(*HUMAN, "F10"), genes).index[-1] == len(HUMAN)


def test_a_gene_in_capitals_that_only_mouse_has_is_of_mouse_where_the_vocabulary_writes_so():
    genes = vocabulary(human=HUMAN, mouse=[*MOUSE, "H2-K1"])
    assert match(var(*HUMAN, *MOUSE, "H2-K1"), genes).index[-1] == len(genes) - 1


def test_letters_in_lower_case_of_a_human_name_and_an_orf_of_a_mouse_name_mislead_nobody():
    genes = vocabulary(human=[*HUMAN, "C1ORF112", "MORF4L1"], mouse=[*MOUSE, "MORF4L1", "H2AFZ"])
    found = match(var(*HUMAN, *MOUSE, "C1orf112", "MORF4L1", "Morf4l1", "H2afz"), genes)
    n, m = len(HUMAN), len(HUMAN) + 2 + len(MOUSE)
    assert found.index[-4:].tolist() == [n, n + 1, m, m + 1]


def test_a_human_gene_that_the_vocabulary_lacks_is_not_taken_for_that_of_mouse():
    genes = vocabulary(human=HUMAN[1:], mouse=[name.upper() for name in MOUSE])
    found = match(var(*HUMAN, *MOUSE), genes)
    assert HUMAN[0] == MOUSE[0].upper()
    assert found.index[0] == -1


def test_a_column_of_var_or_a_genome_in_front_of_the_names_says_the_species():
    names = [*HUMAN, *HUMAN]  # all in capitals: nothing else tells
    index = np.concatenate([np.arange(len(HUMAN)), len(HUMAN) + np.arange(90), np.full(30, -1)])
    genome = ["GRCh38"] * len(HUMAN) + ["mm10"] * len(HUMAN)
    np.testing.assert_array_equal(match(var(*names, genome=genome), BOTH).index, index)
    np.testing.assert_array_equal(match(var(*names, origin=genome), BOTH, species="origin").index, index)
    prefixed = [f"{word}_{name}" for word, name in zip(genome, names, strict=True)]
    np.testing.assert_array_equal(match(var(*prefixed), BOTH).index, index)


def test_ensembl_ids_say_the_species():
    ids = [f"ENSMUSG{i:011d}" for i in range(len(MOUSE))]
    genes = BOTH.assign(ensembl_id=[""] * len(HUMAN) + ids)
    assert match(var(*ids), genes).species == {"mouse": len(MOUSE)}
    # symbols that could be of anything, beside ids
    found = match(var(*(f"X{i}" for i in range(len(ids))), gene_ids=ids), genes)
    assert found.source == "gene_ids"
    assert found.n_matched == len(MOUSE)


def test_ids_are_found_in_a_vocabulary_of_symbols_in_capitals_by_the_table_of_the_species(monkeypatch):
    ids = [f"ENSMUSG{i:011d}" for i in range(len(MOUSE))]
    table = GeneTable(
        dict(zip(MOUSE, ids, strict=True)), {i: [name] for i, name in zip(ids, MOUSE, strict=True)}
    )
    monkeypatch.setattr(
        "cellprior.genes._match.load", lambda species: (table if species == "mouse" else None, ())
    )
    found = match(var(*ids), IN_CAPITALS)
    np.testing.assert_array_equal(found.index, len(HUMAN) + np.arange(len(MOUSE)))
    assert found.routes == {"id_to_symbol": len(MOUSE)}


def test_mouse_in_capitals_is_mouse_and_never_human():
    capitals = [name.upper() for name in MOUSE]
    found = match(var(*capitals), BOTH)
    assert found.species == {"mouse": len(MOUSE)}
    assert set(found.routes) == {"capitals"}
    with pytest.raises(GeneMatchError, match="mouse genes in capitals.*The weights know human"):
        match(var(*capitals), vocabulary(human=HUMAN))


def test_species_that_are_written_alike_are_told_by_what_most_names_are_in_and_that_is_said():
    genes = vocabulary(human=HUMAN, pig=[*HUMAN[:60], *(f"LOC{i}" for i in range(60))])
    found = match(var(*HUMAN), genes)
    assert found.species == {"human": len(HUMAN)}
    assert any('species="pig"' in note for note in found.notes)
    assert match(var(*HUMAN), genes, species="pig").species == {"pig": 120}


@pytest.mark.parametrize(
    ("data", "known", "message"),
    [
        (var(*MOUSE), {"human": HUMAN}, "mouse .or rat. gene names.*The weights know human"),
        (var(*HUMAN), {"mouse": MOUSE}, "human .*The weights know mouse"),
        (var(*FISH), {"human": HUMAN, "mouse": MOUSE}, "zebrafish .*The weights know human and mouse"),
        (var(*(f"ENSDARG{i:011d}" for i in range(50))), {"human": HUMAN}, "zebrafish genes.*know human"),
        (var(*(f"ENSXYZG{i:011d}" for i in range(50))), {"human": HUMAN}, "ENSXYZG genes.*know human"),
        (var(*HUMAN, genome=["mm10"] * 120), {"human": HUMAN}, "mouse genes, by var.'genome'.*know human"),
    ],
)
def test_a_species_that_the_vocabulary_lacks_is_refused_by_name(data, known, message):
    with pytest.raises(GeneMatchError, match=message):
        match(data, vocabulary(**known))


def test_a_species_that_is_asked_for_and_not_there_is_refused():
    with pytest.raises(GeneMatchError, match=r"species='rat'.*human and mouse"):
        match(var(*HUMAN), BOTH, species="rat")
    with pytest.raises(GeneMatchError, match=r"species='mouse'.*know human"):
        match(var(*HUMAN), HUMAN, species="mouse")
    with pytest.raises(GeneMatchError, match="mouse .or rat. gene names"):
        match(var(*MOUSE), BOTH, species="human")


def test_a_species_of_which_too_few_genes_are_known_is_an_error_although_the_other_is_found():
    names = [*HUMAN, *MOUSE[:25], *(f"Xyz{i}" for i in range(200))]
    with pytest.raises(GeneMatchError, match="25 of 120 genes match"):
        match(var(*names), BOTH, min_coverage=0.5)


def test_antibodies_beside_genes_of_two_species_stay_what_they_are():
    names = [*HUMAN, *MOUSE, "CD3_TotalSeqB"]
    found = match(var(*names), BOTH)
    assert found.index[-1] == -1
    assert found.not_genes == {"antibody": 1}
