"""The same numbers as the package that the field uses; slow, as it compiles its code first."""

from __future__ import annotations

import pytest
from sklearn.neighbors import NearestNeighbors

from cellprior.evaluate import clisi, clustering, ilisi, silhouette
from tests.evaluate.simulated import cells, corners, noise

pytestmark = pytest.mark.filterwarnings("default")  # what it and its dependencies warn of is not ours


@pytest.mark.parametrize("make", ["pca", "corners", "noise"])
def test_silhouette_lisi_and_clusters_agree_with_scib_metrics(make):
    reason = "needs scib-metrics: pip install 'cellprior[eval]'"
    scib = pytest.importorskip("scib_metrics", reason=reason)
    from scib_metrics.nearest_neighbors import NeighborsResults

    simulated = cells()
    embedding = {"pca": simulated.pca, "corners": corners(simulated.types), "noise": noise(450)}[make]
    search = NearestNeighbors(n_neighbors=90, algorithm="brute").fit(embedding)
    distances, indices = search.kneighbors(embedding)
    neighbors = NeighborsResults(indices=indices, distances=distances)
    types, batches = simulated.types, simulated.batches
    assert clisi(embedding, types) == pytest.approx(float(scib.clisi_knn(neighbors, types)), abs=1e-3)
    assert ilisi(embedding, batches) == pytest.approx(float(scib.ilisi_knn(neighbors, batches)), abs=1e-3)
    assert silhouette(embedding, types) == pytest.approx(
        float(scib.silhouette_label(embedding, types)), abs=1e-3
    )
    graph = neighbors.subset_neighbors(15)
    theirs = scib.nmi_ari_cluster_labels_leiden(graph, types, optimize_resolution=False, resolution=1.0)
    ours = clustering(embedding, types, resolutions=(1.0,)).iloc[0]  # clusters depend on random numbers
    assert [ours["nmi"], ours["ari"]] == pytest.approx([theirs["nmi"], theirs["ari"]], abs=0.03)
