"""Fingerprints of counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from cellprior._compat import new_group
from cellprior.model.data._counts import refuse_vanished
from cellprior.model.data._fingerprint import digest, digest_of_counts

N_CELLS, N_GENES = 300, 40


@pytest.fixture
def counts() -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(0.5, (N_CELLS, N_GENES)).astype(np.float32))


def stored(counts: sp.csr_matrix, tmp_path: Any) -> Any:
    file = h5py.File(tmp_path / "x.h5", "w")
    ad.io.write_elem(file, "X", counts)
    return ad.io.sparse_dataset(file["X"])


def test_counts_on_disk_and_in_memory_and_of_other_types_are_the_same_counts(counts, tmp_path):
    expected = digest_of_counts(counts)
    assert digest_of_counts(stored(counts, tmp_path)) == expected
    assert digest_of_counts(counts.astype(np.int64)) == expected
    assert digest_of_counts(sp.csr_array(counts)) == expected


def one_more(x: sp.csr_matrix) -> sp.csr_matrix:
    x = x.copy()
    x.data[0] += 1
    return x


def normalised(x: sp.csr_matrix) -> sp.csr_matrix:
    x = x.copy()
    x.data = np.log1p(x.data)
    return x


def one_value_less(x: sp.csr_matrix) -> sp.csr_matrix:
    x = x.tolil()
    row = 1  # not one of the 64
    x[row, x[row].nonzero()[1][0]] = 0
    return x.tocsr()


CHANGES: dict[str, Callable[[sp.csr_matrix], Any]] = {
    "one count of the first cell": one_more,
    "all values": normalised,
    "one value less in a cell that is not looked at": one_value_less,
    "cells in another order": lambda x: x[::-1],
    "genes in another order": lambda x: x[:, ::-1],
    "one cell less": lambda x: x[:-1],
    "one gene less": lambda x: x[:, :-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(counts, change):
    assert digest_of_counts(CHANGES[change](counts).tocsr()) != digest_of_counts(counts)


def test_what_goes_unnoticed_is_what_the_documentation_says(counts):
    other = counts.copy()
    other.data[other.indptr[1]] += 1  # a value of a cell that is not one of the 64
    assert digest_of_counts(other) == digest_of_counts(counts)


def test_a_digest_tells_where_one_part_ends_and_the_next_begins():
    assert len({digest(["ab", "c"]), digest(["a", "bc"]), digest(["ab"], ["c"]), digest(["abc"])}) == 4
    assert digest(np.arange(3)) == digest(np.arange(6)[::2] // 2) != digest(np.arange(3.0))


def test_of_zarr_stores_only_folders_can_vanish_unnoticed(counts, tmp_path):
    root = new_group(tmp_path / "x.zarr")
    ad.io.write_elem(root, "X", counts)
    x = ad.io.sparse_dataset(root["X"])
    refuse_vanished(x)
    (tmp_path / "x.zarr").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"x\.zarr/X was there when it was opened, and is gone"):
        refuse_vanished(x)
    in_memory = new_group(zarr.storage.MemoryStore())
    ad.io.write_elem(in_memory, "X", counts)
    refuse_vanished(ad.io.sparse_dataset(in_memory["X"]))
    bucket = type("FsspecStore", (), {"path": "bucket/x.zarr"})()
    refuse_vanished(type("Array", (), {"store": bucket, "path": "X"})())
    refuse_vanished(counts)
