from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS

from cellprior.model import CellPLM, NotCountsError
from cellprior.model.data._counts import check_counts, csr_tensor, read_rows, select_columns
from cellprior.model.data._fields import CountsField
from cellprior.model.data._minibatches import ToVocabulary, VocabularyLoader

N_CELLS, N_GENES = 23, 11


@pytest.fixture
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.poisson(0.8, (N_CELLS, N_GENES)).astype(np.float32)
    x[4] = 0
    return x


def as_anndata(x: Any) -> AnnData:
    obs = pd.DataFrame(
        {"batch": [f"b{i % 2}" for i in range(x.shape[0])]}, index=[f"c{i}" for i in range(x.shape[0])]
    )
    return AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])]))


def two_addends(x: np.ndarray) -> sp.csr_matrix:
    """Each count stored as two addends, the columns from right to left."""
    row, column = np.nonzero(x)
    order = np.lexsort((-column, row)).repeat(2)
    data = np.where(np.arange(len(order)) % 2, x[row, column][order] - 1, 1)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(x)) * 2)])
    return sp.csr_matrix((data, column[order], indptr), shape=x.shape)


def backed(x: Any, folder: Path) -> Any:
    as_anndata(x).write_h5ad(folder / "x.h5ad")
    return ad.read_h5ad(folder / "x.h5ad", backed="r").X


def h5py_dataset(x: np.ndarray, folder: Path) -> h5py.Dataset:
    file = h5py.File(folder / "x.h5", "w")
    file["x"] = x
    return file["x"]


def lazy(x: Any) -> Any:
    return pytest.importorskip("dask.array").from_array(x, chunks=(5, N_GENES))


MATRICES: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "array": lambda x, folder: x,
    "array of int32": lambda x, folder: x.astype(np.int32),
    "array in Fortran order": lambda x, folder: np.asfortranarray(x.astype(np.float64)),
    "csr": lambda x, folder: sp.csr_matrix(x),
    "csr_array": lambda x, folder: sp.csr_array(x.astype(np.int64)),
    "csc": lambda x, folder: sp.csc_matrix(x),
    "two addends": lambda x, folder: two_addends(x),
    "view of an array": lambda x, folder: as_anndata(x)[:, :].X,
    "view of csr": lambda x, folder: as_anndata(sp.csr_matrix(x))[:, :].X,
    "h5py": h5py_dataset,
    "backed csr": lambda x, folder: backed(sp.csr_matrix(x), folder),
    "backed two addends": lambda x, folder: backed(two_addends(x), folder),
    "backed csc": lambda x, folder: backed(sp.csc_matrix(x), folder),
    "dask": lambda x, folder: lazy(x),
    "dask of csr": lambda x, folder: lazy(sp.csr_matrix(x)),
    "dask of csc": lambda x, folder: lazy(sp.csc_array(x)),
}
ROWS = {
    "one": [22],
    "a run": [3, 4, 5, 6],
    "all": range(N_CELLS),
    "backwards": [6, 5, 4, 3],
    "out of order and repeated": [7, 2, 22, 2, 2, 0],
    "with the ends of a run": [3, 9, 4, 6],
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_rows_of_any_matrix_come_in_the_order_asked_for(counts, tmp_path, matrix):
    x = MATRICES[matrix](counts, tmp_path)
    for which, rows in ROWS.items():
        block = read_rows(x, np.array(rows))
        assert isinstance(block, sp.csr_matrix), which
        assert block.dtype == np.float32, which
        assert block.has_canonical_format, which
        np.testing.assert_array_equal(block.toarray(), counts[np.array(rows)], err_msg=which)


def test_reading_all_rows_leaves_a_matrix_with_repeated_entries_as_it_was(counts):
    x = two_addends(counts)
    before = x.data.copy(), x.indices.copy(), x.indptr.copy()
    read_rows(x, np.arange(N_CELLS))
    for part, old in zip((x.data, x.indices, x.indptr), before, strict=True):
        np.testing.assert_array_equal(part, old)


def test_columns_are_moved_dropped_and_added_up(counts):
    column = np.array([4, -1, 0, 4, 7, -1, 2, 0, 0, 6, 1])
    x = sp.csr_matrix(counts)
    x.data[::5] = 0  # stored zeros
    dense = x.toarray()
    expected = np.zeros((N_CELLS, 9), dtype=np.float32)
    for j, target in enumerate(column):
        if target >= 0:
            expected[:, target] += dense[:, j]
    moved = select_columns(x, column, 9)
    assert moved.has_canonical_format
    np.testing.assert_array_equal(moved.toarray(), expected)
    np.testing.assert_array_equal(x.toarray(), dense)


def test_columns_that_are_in_order_are_left_as_they_are(counts):
    x = sp.csr_matrix(counts)
    assert select_columns(x, np.arange(N_GENES), N_GENES) is x
    one_more = select_columns(x, np.arange(N_GENES), N_GENES + 1)
    assert one_more.shape == (N_CELLS, N_GENES + 1)
    doubled = sp.csr_matrix((np.ones(2), np.zeros(2, dtype=int), [0, 2]), shape=(1, N_GENES))
    assert select_columns(doubled, np.arange(N_GENES), N_GENES).data.tolist() == [2.0]


def test_without_a_matching_gene_the_columns_are_empty(counts):
    moved = select_columns(sp.csr_matrix(counts), np.full(N_GENES, -1), 5)
    assert moved.shape == (N_CELLS, 5)
    assert moved.nnz == 0


@pytest.mark.parametrize("dense", [False, True])
def test_a_minibatch_becomes_tensors(counts, dense):
    column = np.arange(N_GENES)[::-1].copy()
    batch = ToVocabulary(column, N_GENES, dense)(
        {"X": sp.csr_matrix(counts), "batch": np.arange(N_CELLS)[:, None]}
    )
    assert batch["X"].layout == (torch.strided if dense else torch.sparse_csr)
    np.testing.assert_array_equal(batch["X"].to_dense(), counts[:, ::-1])
    assert batch["batch"].tolist() == np.arange(N_CELLS)[:, None].tolist()


def test_a_sparse_tensor_shares_the_memory_of_the_matrix(counts):
    x = sp.csr_matrix(counts)
    tensor = csr_tensor(x)
    x.data[0] = 77
    assert tensor.values()[0] == 77


# counts


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0.5, "0.5, which is not an integer"),
        (-3, "-3, which is negative"),
        (-0.5, "-0.5, which is negative"),
        (np.nan, "nan, which is not finite"),
        (np.inf, "inf, which is not finite"),
        (-np.inf, "-inf, which is not finite"),
    ],
)
def test_the_first_bad_value_is_named_with_its_cell_and_gene(counts, value, reason):
    rows = np.array([9, 3, 17])  # what was read
    x = counts.copy()
    x[3, 6] = value
    x[17, 0] = 0.25
    with pytest.raises(NotCountsError) as error:
        check_counts(sp.csr_matrix(x[rows]), rows, as_anndata(counts), None)
    assert str(error.value).startswith(f"X does not hold raw counts: cell 'c3', gene 'g6' is {reason}.")
    assert "cellprior.pp.recover_counts(adata)" in str(error.value)
    assert "(layers here: none)" in str(error.value)


def test_another_layer_is_offered_by_name(counts):
    adata = as_anndata(counts)
    adata.layers["scaled"], adata.layers["counts"] = counts - 0.5, counts
    with pytest.raises(NotCountsError, match=r"^layers\['scaled'\] does not .* name it: layer='counts' "):
        check_counts(sp.csr_matrix(adata.layers["scaled"]), np.arange(N_CELLS), adata, "scaled")


@pytest.mark.parametrize("x", [np.zeros((3, 2)), np.array([[0, 2**24, 1]])], ids=["zeros", "a large count"])
def test_counts_pass(x):
    check_counts(sp.csr_matrix(x.astype(np.float32)), np.arange(len(x)), as_anndata(x), None)
    stored = sp.csr_matrix(np.ones_like(x, dtype=np.float32))
    stored.data[:] = x.ravel()  # zeros among them, which are stored
    check_counts(stored, np.arange(len(x)), as_anndata(x), None)


def test_only_the_first_cells_are_looked_at_in_setup_and_all_others_when_they_are_read(counts):
    x = np.tile(counts, (20, 1))
    x[300, 2] = 0.5
    adata = as_anndata(sp.csr_matrix(x))
    CellPLM.setup_anndata(adata)
    loader = loader_of(adata, indices=np.arange(len(x)), batch_size=100)
    with pytest.raises(NotCountsError, match=r"cell 'c300', gene 'g2' is 0\.5"):
        list(loader)
    x[100, 2] = 0.5
    with pytest.raises(NotCountsError, match=r"cell 'c100', gene 'g2' is 0\.5"):
        CellPLM.setup_anndata(as_anndata(x))


# fields and loaders


def loader_of(adata: AnnData, **options: Any) -> VocabularyLoader:
    manager = CellPLM._get_most_recent_anndata_manager(adata)
    return VocabularyLoader(manager, column=np.arange(adata.n_vars), n_columns=adata.n_vars, **options)


@pytest.mark.parametrize("layer", [None, "counts"])
def test_a_field_takes_other_data_with_any_number_of_genes(counts, layer):
    adata, other = as_anndata(counts), as_anndata(counts[:5, :3])
    for data in (adata, other):
        data.layers["counts"] = data.X
    field = CountsField("X", layer)
    state = field.register_field(adata)
    transferred = field.transfer_field(state, other)
    assert list(transferred["column_names"]) == ["g0", "g1", "g2"]
    assert field.get_summary_stats(transferred) == {"n_vars": 3, "n_cells": 5}


def test_a_layer_that_does_not_exist_is_named(counts):
    with pytest.raises(ValueError, match="There is no layer 'nope' in the AnnData; its layers are none"):
        CellPLM.setup_anndata(as_anndata(counts), layer="nope")


def test_a_loader_gives_every_field_of_the_same_cells(counts):
    adata = as_anndata(sp.csc_array(counts))
    CellPLM.setup_anndata(adata, batch_key="batch")
    rows = np.array([8, 1, 5, 5, 20, 19, 18])
    batches = list(loader_of(adata, indices=rows, batch_size=3))
    assert [len(batch["X"]) <= 3 for batch in batches] == [True] * 3
    np.testing.assert_array_equal(np.concatenate([batch["X"].to_dense() for batch in batches]), counts[rows])
    codes = np.concatenate([batch[REGISTRY_KEYS.BATCH_KEY] for batch in batches])
    np.testing.assert_array_equal(codes.ravel(), rows % 2)


def test_a_csc_matrix_is_turned_once_and_not_for_every_minibatch(counts, monkeypatch):
    adata = as_anndata(sp.csc_matrix(counts))
    CellPLM.setup_anndata(adata)
    loader = loader_of(adata, indices=np.arange(N_CELLS), batch_size=2)
    monkeypatch.setattr(sp.csc_matrix, "tocsr", lambda *args, **kwargs: pytest.fail("turned again"))
    assert len(list(loader)) == 12


def test_a_file_that_cannot_be_read_any_more_is_an_error_that_names_the_cells():
    class Broken:
        shape = (9, 3)

        def __getitem__(self, rows: slice) -> None:
            msg = "Can't synchronously read data (wrong checksum)"
            raise OSError(msg)

    with pytest.raises(
        OSError, match="counts of cells 4 to 6 cannot be read from the file: .*wrong checksum"
    ):
        read_rows(Broken(), np.array([5, 4, 6]))
