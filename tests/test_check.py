from __future__ import annotations

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellprior as cp
from cellprior.cli import main
from tests.contract.models import blood_cells


def own_data() -> ad.AnnData:
    """Counts in raw, logarithms in X, symbols in a column, antibodies among the genes, two samples."""
    cells = blood_cells()[:60]
    antibodies = [f"{name}_TotalSeqB" for name in ("CD3", "CD4", "CD14")]
    counts = sp.hstack([sp.csr_matrix(cells.X), np.full((60, 3), 30.0)], format="csr").astype(np.float32)
    symbols = [*cells.var_names, *antibodies]
    var = pd.DataFrame({"symbol": symbols}, index=[f"row{i}" for i in range(len(symbols))])
    obs = pd.DataFrame({"sample": ["a", "b"] * 30, "n": range(60)}, index=cells.obs_names)
    adata = ad.AnnData(counts, obs=obs, var=var)
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()
    return adata


def lines_of(check: object) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in str(check).split("\n\n")[0].splitlines())


def test_a_check_finds_counts_genes_antibodies_batches_and_the_call_to_make():
    adata = own_data()
    check = cp.tl.check(adata)
    lines = lines_of(check)
    assert (check.layer, check.has_counts) == ("raw", True)
    assert lines["counts"] == "in raw. X: log-normalised values"
    assert lines["genes"] == f"{adata.n_vars - 3} genes, named by symbols in var['symbol'], of species: human"
    assert lines["not genes"] == "3 antibodies: left out"
    assert lines["batches"] == "obs['sample'] (2)"
    totals = np.asarray(blood_cells()[:60].X.sum(axis=1)).ravel()
    assert lines["depth"].startswith(f"{np.median(totals):,.0f} counts (5 to 95 %: ")
    assert check.call == 'cp.tl.embed(adata, "cellplm-starter", layer="raw", batch_key="sample")'
    eval(check.call, {"cp": cp, "adata": adata})  # the call that is named is one that works
    record = adata.uns["cellprior"]["X_cellplm"]
    assert check.weights.loc["cellplm-starter", "genes"] == pytest.approx(record["coverage"])
    assert check.weights.loc["cellplm-starter", "counts"] == pytest.approx(record["counts_share"])


def test_the_command_line_checks_a_file_and_changes_nothing(tmp_path: Path, capsys):
    path = tmp_path / "cells.h5ad"
    own_data().write_h5ad(path)
    before = path.read_bytes()
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    command = f"cellprior embed {path} embedded.h5ad --weights cellplm-starter --layer raw --batch-key sample"
    assert said.splitlines()[-1].strip() == command
    assert path.read_bytes() == before


def test_where_only_logarithms_are_left_the_way_back_is_named():
    adata = own_data()
    del adata.raw
    check = cp.tl.check(adata)
    assert lines_of(check)["counts"] == "none found. X: log-normalised values"
    assert check.call == 'adata.layers["counts"] = cp.pp.recover_counts(adata)'


def test_logarithms_in_raw_are_turned_into_data_that_can_be_checked_again():
    adata = own_data()
    counts = adata.raw.X
    adata.raw = ad.AnnData(adata.X, obs=adata.obs, var=adata.var)
    adata.X = adata.X.toarray() - 1.0
    check = cp.tl.check(adata)
    there = {"cp": cp, "adata": adata, "anndata": ad}
    exec(check.call, there)
    assert cp.tl.check(there["adata"]).has_counts
    np.testing.assert_array_equal(there["adata"].X.toarray(), counts.toarray())


def test_a_column_of_types_is_named_with_the_cells_that_lack_one_and_a_batch_that_is_missing_is_not_proposed():
    adata = own_data()
    adata.obs["cell_type"] = np.where(np.arange(60) < 7, None, adata.obs["sample"])
    adata.obs["sample"] = adata.obs["sample"].where(np.arange(60) > 0)
    check = cp.tl.check(adata)
    assert lines_of(check)["labels"] == "obs['cell_type'] (2; missing in 7 cells)"
    assert "batch_key" not in check.call


def test_weights_that_read_few_of_the_counts_are_not_proposed():
    vocabulary = cp.weights.read_bundle(cp.weights.fetch("multiomeclip-starter")).genes["symbol"]
    names = [*vocabulary[:600], *(f"Gm{i}x" for i in range(600))]
    counts = np.concatenate([np.full((20, 600), 1.0), np.full((20, 600), 9.0)], axis=1)
    check = cp.tl.check(ad.AnnData(counts, var=pd.DataFrame(index=names)))
    row = check.weights.loc["multiomeclip-starter"]
    assert row["counts"] == pytest.approx(0.1) and row["problem"] == "reads less than 50% of the counts"
    assert "multiomeclip" not in check.call


def test_weights_that_would_refuse_the_genes_are_shown_with_the_reason():
    adata = own_data().raw.to_adata()
    adata.var["symbol"] = [name.capitalize() for name in adata.var["symbol"]]
    check = cp.tl.check(adata)
    assert "mouse" in check.weights.loc["cellplm-starter", "problem"]
    assert "cellplm-starter" not in check.call


def test_a_genome_in_front_of_the_names_is_told_with_the_line_that_takes_it_off():
    adata = blood_cells()[:60].copy()
    adata.var_names = "hg19_" + adata.var_names
    check = cp.tl.check(adata)
    assert lines_of(check)["genome"] == "the names in var_names begin with 'hg19_', a genome: take it off"
    exec(check.call, {"adata": adata})
    assert cp.tl.check(adata).call.startswith('cp.tl.embed(adata, "cellplm-starter"')


def test_data_without_cells_are_refused():
    with pytest.raises(ValueError, match="0 cells and 3 features"):
        cp.tl.check(ad.AnnData(np.zeros((0, 3))))
