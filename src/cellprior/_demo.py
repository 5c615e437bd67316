"""The first minute with the package: blood cells that ship with scanpy, embedded, drawn and judged beside PCA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cellprior import pp, tl

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData

LABELS = "bulk_labels"
N_NEIGHBORS = 15


def demo(folder: Path) -> pd.DataFrame:
    """Embed 700 blood cells with ``cellplm-starter`` and write ``cellprior_demo.png`` and ``.h5ad``.

    Parameters
    ----------
    folder
        Where to write; created if needed.

    Returns
    -------
    Accuracy of a leave-one-out vote of 15 neighbours for the embedding and for PCA.
    """
    import pandas as pd
    import scanpy as sc

    folder.mkdir(parents=True, exist_ok=True)
    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    adata.uns.clear()  # colours and graphs of another analysis
    adata.layers["counts"] = pp.recover_counts(adata)
    tl.embed(adata, "cellplm-starter", layer="counts")
    sc.pp.pca(adata, n_comps=50)
    labels = adata.obs[LABELS].to_numpy()
    rows = {}
    for name, key in (("CellPLM starter", "X_cellplm"), ("PCA", "X_pca")):
        sc.pp.neighbors(adata, n_neighbors=N_NEIGHBORS, use_rep=key)
        sc.tl.umap(adata)
        adata.obsm[key.replace("X_", "X_umap_")] = adata.obsm.pop("X_umap")
        rows[name] = {
            "dimensions": adata.obsm[key].shape[1],
            "15-NN accuracy": neighbour_accuracy(adata.obsm[key], labels),
        }
    _draw(adata, folder / "cellprior_demo.png")
    adata.write_h5ad(folder / "cellprior_demo.h5ad")
    return pd.DataFrame.from_dict(rows, orient="index")


def neighbour_accuracy(embedding: np.ndarray, labels: np.ndarray) -> float:
    """Share of cells whose label is the commonest among their 15 nearest other cells, by Euclidean distance."""
    import pandas as pd
    from sklearn.neighbors import NearestNeighbors

    codes, names = pd.factorize(labels)
    neighbours = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(embedding).kneighbors(return_distance=False)
    votes = (codes[neighbours][:, :, None] == range(len(names))).sum(axis=1)  # (cells, labels)
    return float((votes.argmax(axis=1) == codes).mean())


def _draw(adata: AnnData, path: Path) -> None:
    """The two UMAPs side by side."""
    import scanpy as sc
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and leaves the user's plots alone
    left, right = figure.subplots(1, 2)
    sc.pl.embedding(
        adata,
        "umap_cellplm",
        color=LABELS,
        ax=left,
        show=False,
        legend_loc=None,
        title="CellPLM starter",
        size=40,
    )
    sc.pl.embedding(adata, "umap_pca", color=LABELS, ax=right, show=False, title="PCA", size=40)
    for axes in (left, right):
        axes.set(xlabel="UMAP 1", ylabel="UMAP 2")
    figure.savefig(path, dpi=150)
