"""Numbers by which weights know the cells that they were trained on."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from cellprior import weights

from .test_bundle import write

rng = np.random.default_rng(0)
COUNTS = sp.csr_matrix(rng.poisson(rng.gamma(0.5, 2, (1, 80)), (200, 80)).astype(np.float32))
GENES = np.arange(80)


def test_a_cell_is_known_again_and_another_is_not():
    cells = weights.fingerprints(COUNTS, GENES)
    assert cells.dtype == np.uint32 and len(np.unique(cells)) == 200 and cells.all()
    other = COUNTS.copy()
    other.data[other.data == 2] = 3  # one count more in each cell
    assert not np.isin(weights.fingerprints(other, GENES), cells).any()


def test_a_cell_is_known_again_with_genes_in_another_order_in_parts_without_rare_ones_and_with_strangers():
    cells = weights.fingerprints(COUNTS, GENES)
    order = rng.permutation(80)
    np.testing.assert_array_equal(weights.fingerprints(COUNTS[:, order], GENES[order]), cells)
    half = COUNTS.copy()
    half.data = half.data // 2
    halves = sp.hstack([half, COUNTS - half]).tocsc()
    np.testing.assert_array_equal(weights.fingerprints(halves, np.tile(GENES, 2)), cells)
    seldom = COUNTS.copy()
    seldom.data[seldom.data == 1] = 0
    np.testing.assert_array_equal(weights.fingerprints(seldom, GENES), cells)
    strangers = sp.hstack([COUNTS, COUNTS]).tocsr()
    np.testing.assert_array_equal(weights.fingerprints(strangers, np.append(GENES, [-1] * 80)), cells)
    rows = np.arange(0, 200, 3)
    np.testing.assert_array_equal(weights.fingerprints(COUNTS[rows], GENES), cells[rows])


def test_a_cell_with_too_few_counts_is_nobody(tmp_path: Path):
    few = COUNTS.toarray()
    few[:, 9:] = np.minimum(few[:, 9:], 1)
    assert not weights.fingerprints(sp.csr_matrix(few), GENES).any()
    assert not weights.fingerprints(COUNTS, np.full(80, -1)).any()
    weights.write_trained_on(write(tmp_path / "tiny"), np.zeros(3, dtype=np.uint32))
    assert not len(weights.read_trained_on(tmp_path / "tiny"))


def test_weights_say_which_cells_they_were_trained_on_or_that_they_do_not_know(tmp_path: Path):
    folder = write(tmp_path / "tiny")
    assert weights.read_trained_on(folder) is None
    before = weights.sha256(folder)
    cells = weights.fingerprints(COUNTS, GENES)
    weights.write_trained_on(folder, np.append(cells, cells[:5]))
    np.testing.assert_array_equal(weights.read_trained_on(folder), np.sort(cells))
    assert weights.sha256(folder) == before
    np.save(folder / "trained_on.npy", np.append(np.zeros(2, dtype=np.uint32), cells))  # by other means
    assert 0 not in weights.read_trained_on(folder)
    write(folder, overwrite=True)  # other weights
    assert weights.read_trained_on(folder) is None


class Trap:
    """Runs when it is read as a pickle."""

    sprung = False

    def __reduce__(self) -> tuple:
        return setattr, (Trap, "sprung", True)


@pytest.mark.parametrize("damage", ["cut", "objects", "kind", "shape", "huge"])
def test_a_damaged_list_of_cells_is_refused_by_name(tmp_path: Path, damage: str):
    folder = write(tmp_path / "tiny")
    path = weights.write_trained_on(folder, weights.fingerprints(COUNTS, GENES))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "huge":
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<u4", "fortran_order": False, "shape": (10**15,)}
            )
    else:
        other = {"objects": np.array([Trap()]), "kind": np.zeros(2), "shape": np.zeros((2, 2), np.uint32)}
        np.save(path, other[damage])
    with pytest.raises(weights.WeightsError, match=r"trained_on\.npy"):
        weights.read_trained_on(folder)
    assert not Trap.sprung


def test_the_starters_know_the_cells_of_their_training_and_no_others(shared_data: Path):
    import anndata as ad

    from cellprior import genes

    for name, known in (("pbmc_facs_zheng2017", True), ("pbmc3k_seurat", False)):
        adata = ad.read_h5ad(shared_data / "rna" / f"{name}.h5ad")
        vocabulary = weights.read_bundle(weights.fetch("cellplm-starter")).genes
        cells = weights.fingerprints(adata.X, genes.match(adata.var, vocabulary).index)
        for starter in ("cellplm-starter", "scbert-starter"):
            assert np.isin(cells, weights.read_trained_on(weights.fetch(starter))).mean() == known
