"""The first minute with the package: blood cells that ship with scanpy, embedded, drawn and judged beside PCA.

As they are, where a PCA does as well; and with few counts a cell, where knowing other cells helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellprior import pp, tl

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData

LABELS = "bulk_labels"
N_NEIGHBORS = 15
SHALLOW = 50  # counts of a cell


def demo(folder: Path) -> pd.DataFrame:
    """Embed 700 blood cells with ``cellplm-starter`` and write ``cellprior_demo.png`` and ``.h5ad``.

    Gives the accuracy of a leave-one-out vote of 15 neighbours for the embedding and for PCA, of the cells as they
    are and thinned to ``SHALLOW`` counts. The folder is made if needed.
    """
    import numpy as np
    import pandas as pd
    import scanpy as sc

    folder.mkdir(parents=True, exist_ok=True)
    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    adata.uns.clear()  # colours and graphs of another analysis
    adata.layers["counts"] = pp.recover_counts(adata)
    shallow = adata.copy()
    counts = shallow.layers["counts"].toarray()
    share = np.minimum(SHALLOW / counts.sum(axis=1, keepdims=True), 1.0)
    shallow.X = np.random.default_rng(0).binomial(counts.astype(int), share).astype(np.float32)
    shallow.layers["counts"] = shallow.X.copy()
    sc.pp.normalize_total(shallow, target_sum=1e4)
    sc.pp.log1p(shallow)
    rows = {}
    for cells, what in ((adata, ""), (shallow, f", {SHALLOW} counts a cell")):
        tl.embed(cells, "cellplm-starter", layer="counts")
        sc.pp.pca(cells, n_comps=50)
        labels = cells.obs[LABELS].to_numpy()
        for name, key in (("CellPLM starter", "X_cellplm"), ("PCA", "X_pca")):
            sc.pp.neighbors(cells, n_neighbors=N_NEIGHBORS, use_rep=key)
            sc.tl.umap(cells)
            cells.obsm[key.replace("X_", "X_umap_")] = cells.obsm.pop("X_umap")
            accuracy = neighbour_accuracy(cells.obsm[key], labels)
            rows[name + what] = {"dimensions": cells.obsm[key].shape[1], "15-NN accuracy": accuracy}
    table = pd.DataFrame.from_dict(rows, orient="index")
    _draw((adata, shallow), table["15-NN accuracy"], folder / "cellprior_demo.png")
    adata.write_h5ad(folder / "cellprior_demo.h5ad")
    return table


def neighbour_accuracy(embedding: np.ndarray, labels: np.ndarray) -> float:
    """Share of cells whose label is the commonest among their 15 nearest other cells, by Euclidean distance."""
    import pandas as pd
    from sklearn.neighbors import NearestNeighbors

    codes, names = pd.factorize(labels)
    neighbours = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(embedding).kneighbors(return_distance=False)
    votes = (codes[neighbours][:, :, None] == range(len(names))).sum(axis=1)  # (cells, labels)
    return float((votes.argmax(axis=1) == codes).mean())


def _draw(data: Sequence[AnnData], accuracy: pd.Series, path: Path) -> None:
    """UMAPs of starter and PCA side by side, a row for each depth."""
    import scanpy as sc
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and leaves the user's plots alone
    axes = figure.subplots(len(data), 2).ravel()
    places = [(cells, basis) for cells in data for basis in ("umap_cellplm", "umap_pca")]
    for place, ((cells, basis), (name, value)) in enumerate(zip(places, accuracy.items(), strict=True)):
        legend = "right margin" if place % 2 else None
        title = f"{name}\n{value:.3f} of the neighbours' votes are right"
        shown = {"color": LABELS, "ax": axes[place], "show": False, "legend_loc": legend, "size": 40}
        sc.pl.embedding(cells, basis, title=title, **shown)
        axes[place].set(xlabel="UMAP 1", ylabel="UMAP 2")
    figure.savefig(path, dpi=150)
