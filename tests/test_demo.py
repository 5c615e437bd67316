from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from matplotlib.image import imread

from cellprior._demo import neighbour_accuracy
from cellprior.cli import main


def test_the_demo_draws_saves_and_judges_without_a_network(tmp_path, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    figures = plt.get_fignums()
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    assert main(["demo", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    table = {line.rsplit(None, 2)[0].strip(): line.split()[-1] for line in printed.splitlines()[1:5]}
    shallow = [f"{name}, 50 counts a cell" for name in ("CellPLM starter", "PCA")]
    assert list(table) == ["CellPLM starter", "PCA", *shallow]
    assert float(table[shallow[0]]) > float(table[shallow[1]]) + 0.03  # where a prior helps
    adata = ad.read_h5ad(tmp_path / "new" / "cellprior_demo.h5ad")
    for name, key in (("CellPLM starter", "X_cellplm"), ("PCA", "X_pca")):
        accuracy = neighbour_accuracy(adata.obsm[key], adata.obs["bulk_labels"].to_numpy())
        assert float(table[name]) == pytest.approx(accuracy, abs=6e-4)
        assert 0.5 < accuracy < 1
        assert adata.obsm[key.replace("X_", "X_umap_")].shape == (700, 2)
    assert adata.uns["cellprior"]["X_cellplm"]["weights"] == "cellplm-starter"

    picture = imread(tmp_path / "new" / "cellprior_demo.png")
    height, width, _ = picture.shape
    assert width > 1500 and height > 500
    pixels = (picture[..., :3] * 255).astype(int)
    for half in (pixels[:, : width // 2], pixels[:, width // 2 :]):
        colours, n = np.unique(half.reshape(-1, 3), axis=0, return_counts=True)
        vivid = np.ptp(colours, axis=1) > 60  # neither paper nor text
        assert (n[vivid] > 200).sum() >= 8  # ten types of cells
    assert plt.get_fignums() == figures  # its own is closed


def test_neighbour_accuracy_is_a_vote_that_leaves_the_cell_itself_out():
    rng = np.random.default_rng(0)
    apart = np.repeat([[0.0, 0.0], [100.0, 0.0]], 30, axis=0) + rng.normal(size=(60, 2))
    labels = np.repeat(["a", "b"], 30)
    assert neighbour_accuracy(apart, labels) == 1
    assert neighbour_accuracy(apart, rng.permutation(labels)) < 0.7
    assert neighbour_accuracy(apart, np.arange(60).astype(str)) == 0

    # the same by hand
    cloud, kinds = rng.normal(size=(80, 3)), rng.integers(0, 3, 80)
    distance = np.linalg.norm(cloud[:, None] - cloud[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = kinds[distance.argsort(axis=1)[:, :15]]
    votes = np.stack([(nearest == kind).sum(axis=1) for kind in range(3)], axis=1)
    clear = (np.sort(votes, axis=1)[:, -1] > np.sort(votes, axis=1)[:, -2]).all()
    right = votes.argmax(axis=1) == kinds
    tied = (votes == votes.max(axis=1, keepdims=True)).sum(axis=1) > 1
    found = neighbour_accuracy(cloud, kinds) * 80
    assert right[~tied].sum() <= found + 1e-9
    assert found <= right[~tied].sum() + tied.sum() + 1e-9
    assert clear == (not tied.any())
