from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from cellprior._compat import without_pulled_columns
from cellprior.pp import pad_modalities, recover_counts


def some_counts(n_cells: int = 60, n_genes: int = 200) -> np.ndarray:
    """Counts of cells of different depth, each with a single count somewhere; one cell is empty."""
    rng = np.random.default_rng(0)
    depth = rng.lognormal(0, 0.7, n_cells)[:, None]
    counts = rng.poisson(depth * rng.gamma(0.3, 3, n_genes)).astype(np.float64)
    counts[np.arange(n_cells), rng.integers(0, n_genes, n_cells)] = 1
    counts[5] = 0
    return counts


def normalised(counts: np.ndarray, target_sum: float | None = 1e4, base: float | None = None) -> np.ndarray:
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    scaled = counts / total * (np.median(total) if target_sum is None else target_sum)
    return np.log1p(scaled) / (1 if base is None else np.log(base))


def as_anndata(x: Any) -> AnnData:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])])
    return AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])]))


def assert_counts(found: sp.csr_matrix, counts: np.ndarray) -> None:
    assert isinstance(found, sp.csr_matrix)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), counts)


@pytest.mark.parametrize("base", [None, 2, 10])
@pytest.mark.parametrize("target_sum", [None, 1e4, 1e6])
def test_counts_come_back_exactly(target_sum, base):
    counts = some_counts()
    for dtype in (np.float32, np.float64):
        values = normalised(counts, target_sum, base).astype(dtype)
        for rounded in (values, values.round(5), values.round(4), values.round(3)):
            assert_counts(recover_counts(as_anndata(sp.csr_matrix(rounded)), base=base), counts)


def test_the_base_that_scanpy_noted_is_used_also_from_a_file(tmp_path):
    counts = np.delete(some_counts(), 5, axis=0)  # scanpy warns of empty cells
    adata = as_anndata(counts.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata, base=2)
    assert_counts(recover_counts(adata), counts)
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert_counts(recover_counts(ad.read_h5ad(tmp_path / "x.h5ad")), counts)
    natural = as_anndata(sp.csr_matrix(counts))
    sc.pp.normalize_total(natural)
    sc.pp.log1p(natural)
    natural.write_h5ad(tmp_path / "x.h5ad")
    assert_counts(recover_counts(ad.read_h5ad(tmp_path / "x.h5ad")), counts)


def lazy(x: Any) -> Any:
    return pytest.importorskip("dask.array").from_array(x, chunks=(25, 200))


@pytest.mark.parametrize(
    "convert",
    [sp.csc_matrix, sp.csr_array, np.asfortranarray, lazy, lambda x: lazy(sp.csr_matrix(x))],
    ids=["csc", "csr_array", "dense", "dask", "dask of csr"],
)
def test_any_format_of_the_matrix_will_do(convert):
    counts = some_counts()
    x = convert(normalised(counts).astype(np.float32))
    assert_counts(recover_counts(as_anndata(x)), counts)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_backed_file_will_do_and_so_will_its_raw(tmp_path, sparse):
    counts = some_counts()
    values = normalised(counts).astype(np.float32)
    adata = as_anndata(sp.csr_matrix(values) if sparse else values)
    adata.raw = adata.copy()
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    assert_counts(recover_counts(backed), counts)
    assert_counts(recover_counts(backed.raw), counts)
    assert_counts(recover_counts(backed[10:20]), counts[10:20])


def test_layers_raw_and_views_will_do_and_nothing_is_changed():
    counts = some_counts()
    values = sp.csr_matrix(normalised(counts))
    adata = as_anndata(values)
    adata.raw = adata.copy()
    adata.layers["log"] = values
    adata.X = np.random.default_rng(0).normal(size=counts.shape)
    before = values.copy()
    assert_counts(recover_counts(adata, layer="log"), counts)
    assert_counts(recover_counts(adata.raw), counts)
    assert_counts(recover_counts(adata[::2, :150], layer="log"), counts[::2, :150])
    assert (values != before).nnz == 0
    assert list(adata.uns) == []


def test_stored_zeros_and_repeated_entries_do_no_harm():
    counts = some_counts()
    values = sp.coo_matrix(normalised(counts))
    halves = sp.csr_matrix(
        (values.data, values.col, np.searchsorted(values.row, np.arange(61))), shape=counts.shape
    )
    halves = sp.csr_matrix(
        (np.repeat(halves.data / 2, 2), np.repeat(halves.indices, 2), halves.indptr * 2), shape=counts.shape
    )
    assert_counts(recover_counts(as_anndata(halves)), counts)
    assert halves.nnz == 2 * values.nnz
    zeros = sp.csr_matrix(normalised(counts))
    zeros.data[zeros.data == zeros.data.max()] = 0
    expected = np.where(normalised(counts) == normalised(counts).max(), 0, counts)
    assert_counts(recover_counts(as_anndata(zeros)), expected)


def test_data_without_any_count_give_zeros():
    assert_counts(recover_counts(as_anndata(sp.csr_matrix((4, 3)))), np.zeros((4, 3)))


def test_logarithms_of_counts_that_were_never_normalised_come_back_too():
    counts = some_counts()
    assert_counts(recover_counts(as_anndata(np.log1p(counts))), counts)


def test_a_cell_whose_counts_share_a_factor_comes_back_without_it():
    """Nothing in the values tells such a cell from one of a lower depth."""
    counts = some_counts()
    counts[3] *= 2
    counts[7] = 0
    counts[7, 11] = 4
    expected = counts.copy()
    expected[3] /= 2
    expected[7, 11] = 1
    assert_counts(recover_counts(as_anndata(normalised(counts))), expected)


def test_real_cells_come_back_with_the_counts_that_their_authors_noted():
    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    counts = recover_counts(adata)
    values = adata.X.toarray().astype(np.float64)
    # another way: one factor per cell takes all counts back to the values
    dense = counts.toarray().astype(np.float64)
    factor = (np.expm1(values) * dense).sum(1) / (dense**2).sum(1)
    np.testing.assert_allclose(np.log1p(factor[:, None] * dense), values, atol=1e-3)
    assert ((dense > 0) == (values > 0)).all()
    # the file has 765 genes of those that n_counts was added up from
    assert (dense.sum(1) <= adata.obs["n_counts"]).all()
    np.testing.assert_allclose(
        factor * adata.obs["n_counts"], np.median(factor * adata.obs["n_counts"]), rtol=2e-3
    )


def test_real_counts_survive_scanpy_and_back(shared_data: Path):
    adata = ad.read_h5ad(shared_data / "rna" / "pbmc3k_seurat.h5ad")[:500].copy()
    counts = adata.X.toarray()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    assert_counts(recover_counts(adata), counts)


# refusals


def refused(x: Any, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        recover_counts(as_anndata(x), **options)


def test_scaled_values_are_refused_and_raw_is_named():
    values = normalised(some_counts())
    refused(values - values.mean(0), r"^X holds negative values: it is scaled.*recover_counts\(adata\.raw\)")


def test_counts_are_refused_as_counts_already():
    refused(some_counts(), "^X holds integers: these are counts already")
    refused(sp.csr_matrix(some_counts().astype(np.int64)), "counts already")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    values = normalised(some_counts())
    values[2, 2] = value
    refused(values, "^X holds values that are not finite")


def test_values_normalised_per_gene_are_refused_with_the_first_cell_and_gene_named():
    counts = some_counts()
    factor = np.random.default_rng(1).uniform(0.5, 2, counts.shape[1])
    refused(
        normalised(counts) * factor,
        r"^X is not log\(1 \+ counts x factor\) .*: \d+ of 60 cells .* the first at cell 'c0', gene 'g\d+' \(",
    )


def test_a_cell_with_one_value_that_was_changed_is_found_and_named():
    counts = some_counts()
    values = normalised(counts)
    cell, gene = np.argwhere(counts == 2)[40]
    values[cell, gene] = np.log1p(np.expm1(values[cell, gene]) * 1.2)
    adata = as_anndata(values)
    adata.layers["log"] = values
    with pytest.raises(
        ValueError, match=rf"^layers\['log'\] .*: 1 of 60 cells .* cell 'c{cell}', gene 'g\d+' \("
    ):
        recover_counts(adata, layer="log")


def test_the_wrong_base_is_refused_and_not_mistaken():
    refused(normalised(some_counts(), base=2), "base=")
    refused(normalised(some_counts()), "base=", base=10)


def test_values_rounded_until_counts_run_together_are_refused():
    refused(normalised(some_counts()).round(1), "do not come out as integers")
    refused(normalised(some_counts()).astype(np.float16).astype(np.float32), "do not come out as integers")


def test_imputed_values_are_refused():
    values = normalised(some_counts())
    mixing = np.full((60, 60), 0.02) + 0.5 * np.eye(60)
    refused(mixing @ values, "corrected, imputed or normalised per gene")


# padding


def ragged() -> MuData:
    """Five cells, of which RNA lacks the last and ATAC the first, in another order."""
    rna = AnnData(
        sp.csr_matrix(np.arange(1, 9, dtype=np.int32).reshape(4, 2)), layers={"dense": np.ones((4, 2))}
    )
    rna.obs_names = ["a", "b", "c", "d"]
    rna.obs["n"] = [1, 2, 3, 4]
    atac = AnnData(np.arange(1, 13, dtype=np.float32).reshape(4, 3), uns={"source": "made up"})
    atac.obs_names = ["e", "d", "c", "b"]
    rna.var_names, atac.var_names = ["G1", "G2"], ["chr1:1-2", "chr1:3-4", "chr1:5-6"]
    with without_pulled_columns():
        return MuData({"rna": rna, "atac": atac})


def test_padding_gives_every_modality_all_cells_and_notes_which_rows_are_padding():
    mdata = ragged()
    before = [adata.shape for adata in mdata.mod.values()]
    padded = pad_modalities(mdata)
    assert list(padded.obs_names) == list(mdata.obs_names)
    for key, adata in padded.mod.items():
        assert list(adata.obs_names) == list(mdata.obs_names)
        has = padded.obs[f"has_{key}"]
        assert has.dtype == bool and set(padded.obs_names[~has]) == {"rna": {"e"}, "atac": {"a"}}[key]
        assert adata.obs[f"has_{key}"].dtype == bool and adata.obs[f"has_{key}"].equals(has)
        rows = padded.obs_names[has]
        np.testing.assert_array_equal(dense(adata[rows].X), dense(mdata.mod[key][rows].X))
        assert not dense(adata[~has.to_numpy()].X).any()
        assert adata.X.dtype == mdata.mod[key].X.dtype
    assert sp.issparse(padded["rna"].X) and not sp.issparse(padded["atac"].X)
    assert padded["rna"].layers["dense"].sum() == 8
    assert padded["rna"].obs["n"].isna().sum() == 1
    assert padded["atac"].uns == {"source": "made up"}
    assert [adata.shape for adata in mdata.mod.values()] == before and "has_rna" not in mdata.obs


def test_padding_again_does_not_forget_what_was_padded():
    padded = pad_modalities(ragged())
    again = pad_modalities(padded)
    for key in ("rna", "atac"):
        assert again.obs[f"has_{key}"].equals(padded.obs[f"has_{key}"])


def test_padded_data_are_what_scvi_tools_takes():
    from scvi.data._utils import _check_mudata_fully_paired

    with pytest.raises(ValueError, match="fully paired"):
        _check_mudata_fully_paired(ragged())
    _check_mudata_fully_paired(pad_modalities(ragged()))


def test_a_barcode_that_stands_for_two_cells_is_not_padded():
    mdata = ragged()
    mdata.mod["rna"].obs_names = ["a", "a", "c", "d"]
    with pytest.raises(ValueError, match="'a' stands for several cells"):
        pad_modalities(mdata)


def dense(x: Any) -> np.ndarray:
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def test_antibodies_that_were_normalised_otherwise_are_refused_with_the_line_for_the_genes():
    counts, (n_cells, n_genes) = some_counts(), some_counts().shape
    clr = np.random.default_rng(1).normal(size=(n_cells, 5))
    for added, message in ((clr, "negative values"), (np.abs(clr), "not log")):
        adata = as_anndata(np.hstack([normalised(counts), added]))
        adata.var["feature_types"] = ["Gene Expression"] * n_genes + ["Antibody Capture"] * 5
        with pytest.raises(ValueError, match=rf"{message}[\s\S]*5 antibodies.*== 'Gene Expression'\]"):
            recover_counts(adata)
        assert_counts(recover_counts(adata[:, adata.var["feature_types"] == "Gene Expression"]), counts)
    # normalised together, all come back
    adata = as_anndata(normalised(np.hstack([counts, counts[:, :5]])))
    adata.var["feature_types"] = ["Gene Expression"] * n_genes + ["Antibody Capture"] * 5
    assert_counts(recover_counts(adata), np.hstack([counts, counts[:, :5]]))
