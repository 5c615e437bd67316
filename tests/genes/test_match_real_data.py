from __future__ import annotations

import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata.io import read_elem

from cellprior.genes import GeneMatchError, _table, match


def var_of(path: Path) -> pd.DataFrame:
    with h5py.File(path) as file:
        return read_elem(file["var"])


@pytest.mark.parametrize(
    ("name", "n_same", "n_least"),
    [("pbmc3k_seurat", 11_147, 11_147), ("celllines_sc_mixology", 13_662, 13_750)],
)
def test_real_symbols_match_the_symbols_of_scbert(
    shared_data: Path, mirror_tables: Path, scbert_symbols: list[str], name: str, n_same: int, n_least: int
) -> None:
    var = var_of(shared_data / "rna" / f"{name}.h5ad")
    result = match(var, scbert_symbols)
    assert result.routes["symbol"] == n_same == var.index.isin(scbert_symbols).sum()
    assert result.n_matched >= n_least
    same = result.route == "symbol"
    assert (np.array(scbert_symbols)[result.index[same]] == var.index[same]).all()


def test_real_ids_in_a_column_match_the_ids_of_cellplm(
    shared_data: Path, mirror_tables: Path, cellplm_ids: list[str]
) -> None:
    var = var_of(shared_data / "rna" / "pbmc_facs_zheng2017.h5ad")
    result = match(var, cellplm_ids)
    assert result.source == "ensembl_id"
    assert result.n_matched == len(set(var["ensembl_id"]) & set(cellplm_ids))


def test_real_symbols_find_the_same_genes_of_cellplm_as_their_ids(
    shared_data: Path, mirror_tables: Path, cellplm_ids: list[str]
) -> None:
    var = var_of(shared_data / "rna" / "celllines_sc_mixology.h5ad")
    by_symbol, by_id = (match(var, cellplm_ids, gene_key=key).index for key in ("index", "ensembl_id"))
    both = (by_symbol >= 0) & (by_id >= 0)
    assert both.sum() > 14_500
    assert (by_symbol[both] == by_id[both]).mean() > 0.9995


def test_a_vocabulary_that_knows_its_names_finds_the_same_genes_without_tables(
    shared_data: Path, mirror_tables: Path, cellplm_ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    var = var_of(shared_data / "rna" / "pbmc3k_seurat.h5ad")
    with_tables = match(var, cellplm_ids)
    table, _ = _table.load("human")
    assert table is not None
    vocabulary = table.complete(_table.read_vocabulary(cellplm_ids))
    monkeypatch.setattr("cellprior.weights.fetch", None)
    np.testing.assert_array_equal(match(var, vocabulary).index, with_tables.index)


def test_real_mouse_data_are_refused_by_human_models_and_match_themselves(
    shared_data: Path, mirror_tables: Path, scbert_symbols: list[str], cellplm_ids: list[str]
) -> None:
    var = var_of(shared_data / "rna" / "mouse_pancreas_endocrinogenesis.h5ad")
    for vocabulary in (scbert_symbols, cellplm_ids):
        with pytest.raises(GeneMatchError, match=r"mouse.*'Mrpl15'.*human"):
            match(var, vocabulary)
    np.testing.assert_array_equal(match(var, var.index).index, range(len(var)))


def test_twenty_thousand_names_are_matched_well_under_a_second(
    mirror_tables: Path, cellplm_ids: list[str], scbert_symbols: list[str]
) -> None:
    names = [*scbert_symbols, *(f"RP11-{i}" for i in range(20_000 - len(scbert_symbols)))]
    ids = [f"ENSG{i:011d}" for i in range(20_000)]
    var = pd.DataFrame({"gene_ids": ids, "feature_types": "Gene Expression"}, index=names)
    match(var, cellplm_ids)  # the tables are read once per process
    start = time.process_time()
    match(var, cellplm_ids)
    assert time.process_time() - start < 1
