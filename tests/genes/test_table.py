from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from cellprior.genes import _table


def test_an_ensembl_id_is_found_in_a_name_without_its_version() -> None:
    expected = {
        "ENSG00000182378": "ENSG00000182378",
        "ENSG00000182378.13": "ENSG00000182378",
        "ENSG00000182378.13_PAR_Y": "ENSG00000182378",
        "ENSMUSG00000051951.6": "ENSMUSG00000051951",
        "CLN3_ENSG00000188603": "ENSG00000188603",
        "ENSG00000000003.15_TSPAN6": "ENSG00000000003",
        "AL627309.1": "",
        "ENST00000456328.2": "",
        "ENSG000001823": "",
        "ENSA": "",
        "": "",
    }
    assert {name: _table.ensembl_id(name) for name in expected} == expected


def test_the_spelling_of_a_name_suggests_a_species() -> None:
    expected = {
        "TP53": "human",
        "C1orf112": "human",
        "RP11-206L10.2": "human",
        "ENSG00000000003": "human",
        "Xkr4": "mouse",
        "4933401J01Rik": "mouse",
        "A530053M12Rik": "mouse",
        "mt-Co1": "mouse",
        "ENSMUSG00000051951": "mouse",
        "ENSRNOG00000000001": "other",
        "12": None,
        "gene_1": None,
        "Gene Expression": None,
        "": None,
    }
    assert {name: _table.species_of(name) for name in expected} == expected


def test_a_column_with_few_values_for_many_rows_names_no_genes() -> None:
    names = np.array(["Neuron", "Astro"], dtype=object)
    assert _table.species_of_most(names, n_rows=2) == "mouse"
    assert _table.species_of_most(names, n_rows=100) is None


@pytest.mark.usefixtures("tables")
def test_a_symbol_means_the_gene_that_carries_it_now_or_else_carried_it_before() -> None:
    expected = {
        "TP53": "ENSG00000000001",
        "CCN2": "ENSG00000000002",
        "CTGF": "ENSG00000000002",
        "GONE": "ENSG00000000010",
        "CD99": "ENSG00000000006",  # two ids now, one of them before
        "SWAP": "ENSG00000000005",  # another gene's retired symbol: the gene that carries it now
        "TWIN": None,  # two ids in both releases
        "ENSG00000000010": None,  # an id in the place of a symbol
    }
    table, notes = _table.load("human")
    assert table is not None
    assert {symbol: table.id_of.get(symbol) for symbol in expected} == expected
    assert notes == ()


@pytest.mark.usefixtures("tables")
def test_a_vocabulary_is_completed_with_what_it_lacks_and_keeps_what_it_has() -> None:
    table, _ = _table.load("human")
    assert table is not None
    genes = _table.read_vocabulary(["ENSG00000000002.7", "TCEB3", "TWIN", "SWAP"])
    assert table.complete(genes).to_numpy().tolist() == [
        ["ENSG00000000002", "CCN2", "CTGF"],
        ["ENSG00000000003", "TCEB3", "ELOA"],
        ["", "TWIN", ""],
        ["ENSG00000000005", "SWAP", "OLDB"],
    ]


def test_the_older_release_alone_is_used_and_the_missing_one_is_noted(
    tables: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellprior import weights

    can_be_had = weights.fetch

    def fetch(name: str, *, progressbar: bool = True) -> Path:
        if name == "gencode-human-48":
            raise OSError("disk full")
        return can_be_had(name, progressbar=progressbar)

    monkeypatch.setattr("cellprior.weights.fetch", fetch)
    table, (note,) = _table.load("human")
    assert table is not None and table.id_of["CTGF"] == "ENSG00000000002" and "CCN2" not in table.id_of
    assert "disk full" in note and "`cellprior download gencode-human-48`" in note
    assert "gencode-human-38" not in note


@pytest.mark.usefixtures("no_tables")
def test_tables_that_cannot_be_had_are_noted_with_the_reason_and_the_command() -> None:
    table, (note,) = _table.load("human")
    assert table is None
    assert "cellprior is offline" in note and "More advice" not in note
    assert "`cellprior download gencode-human-48` and `cellprior download gencode-human-38`" in note


def test_a_table_is_read_once(tables: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = _table.load("human")
    monkeypatch.setattr("pandas.read_csv", None)
    second, _ = _table.load("human")
    assert second is first


def _releases(folder: Path) -> list[list[list[str]]]:
    releases = []
    for file in _table.TABLES["human"].values():
        with gzip.open(folder / file, "rt") as stream:
            releases.append([row[:2] for row in csv.reader(stream)])
    return releases


def test_both_releases_know_nearly_all_genes_of_the_published_vocabularies(
    mirror_tables: Path, scbert_symbols: list[str], cellplm_ids: list[str]
) -> None:
    releases = _releases(mirror_tables)
    genes_of = defaultdict(set)
    for identifier, symbol in releases[0] + releases[1]:
        genes_of[symbol].add(identifier)
    known = [symbol for symbol in scbert_symbols if symbol in genes_of]
    assert len(known) == 16_895
    newest_ids, older_ids = ({identifier for identifier, _ in release} for release in releases)
    assert len(newest_ids.intersection(cellplm_ids)) == 19_370
    assert (newest_ids | older_ids).issuperset(cellplm_ids)

    table, _ = _table.load("human")
    assert table is not None
    assert all(table.id_of[symbol] in genes_of[symbol] for symbol in known if symbol in table.id_of)
    unresolved = [symbol for symbol in known if symbol not in table.id_of]
    assert all(len(genes_of[symbol]) > 1 for symbol in unresolved)
    assert len(unresolved) <= 15
    completed = table.complete(_table.read_vocabulary(cellplm_ids))
    assert (completed["symbol"] != "").sum() >= 19_355


def test_pseudo_autosomal_blood_genes_are_not_lost_to_their_second_id(mirror_tables: Path) -> None:
    table, _ = _table.load("human")
    assert table is not None
    assert table.id_of["CD99"] == "ENSG00000002586"
    assert table.id_of["IL3RA"] == "ENSG00000185291"
