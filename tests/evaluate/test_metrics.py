from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier

from cellprior.evaluate import (
    _metrics,
    _structure,
    accuracy,
    balanced_accuracy,
    clustering,
    knn_predict,
    macro_f1,
    silhouette,
)
from cellprior.evaluate._graph import exact_neighbors, umap_weights
from tests.evaluate.simulated import N_TYPES, Cells, cells, corners, noise


@pytest.fixture(scope="module")
def simulated() -> Cells:
    return cells()


@pytest.fixture
def guesses() -> tuple[np.ndarray, np.ndarray]:
    """True labels and predicted ones, of which "new" is not true of any cell."""
    rng = np.random.default_rng(1)
    truth = rng.choice(["a", "b", "c"], p=[0.6, 0.3, 0.1], size=300)
    return truth, np.where(rng.random(300) < 0.6, truth, rng.choice(["a", "b", "new"], size=300))


def test_the_label_with_most_votes_wins_and_of_equals_that_of_the_nearest_cell(simulated):
    train, test = simulated.pca[:300], simulated.pca[300:]
    labels = np.random.default_rng(5).choice(["a", "b", "c", "d"], size=300)  # many votes are equal
    for n_neighbors in (1, 2, 15):
        expected = []
        for cell in test:
            order = np.argsort(np.linalg.norm(train - cell, axis=1))[:n_neighbors]
            votes = Counter(labels[order])  # in the order of coming, and max() takes the first of equals
            expected.append(max(votes, key=votes.__getitem__))
        found = knn_predict(train, labels, test, n_neighbors=n_neighbors)
        np.testing.assert_array_equal(found, expected)


def test_without_equal_votes_neighbours_predict_as_those_of_scikit_learn(simulated):
    train, test = simulated.pca[:300], simulated.pca[300:]
    labels = np.random.default_rng(5).choice(["a", "b"], size=300)  # of 15 votes, one label has more
    expected = KNeighborsClassifier(15, algorithm="brute").fit(train, labels).predict(test)
    np.testing.assert_array_equal(knn_predict(train, labels, test), expected)


def test_labels_of_any_type_are_predicted_as_they_were_given():
    train, test = np.array([[0.0], [1.0], [2.0]]), np.array([[0.1], [1.9]])
    assert knn_predict(train, [3, "three", 3.5], test, n_neighbors=1).tolist() == [3, 3.5]
    assert knn_predict(train, np.array([7, 8, 9]), test, n_neighbors=1).dtype.kind == "i"
    categories = pd.Categorical(["x", "y", "z"], categories=["z", "unused", "y", "x"])
    assert knn_predict(train, categories, test, n_neighbors=1).tolist() == ["x", "z"]


def test_scores_of_predictions_agree_with_scikit_learn(guesses):
    truth, predicted = guesses
    assert accuracy(truth, predicted) == pytest.approx(sk.accuracy_score(truth, predicted))
    present = ["a", "b", "c"]
    recall = sk.recall_score(truth, predicted, labels=present, average="macro")
    assert balanced_accuracy(truth, predicted) == pytest.approx(recall)
    f1 = sk.f1_score(truth, predicted, labels=present, average="macro")
    assert macro_f1(truth, predicted) == pytest.approx(f1)


def test_a_predicted_label_that_no_cell_has_costs_its_cells_but_is_not_averaged_in(guesses):
    truth, predicted = guesses
    over_all = sk.f1_score(truth, predicted, average="macro")
    assert macro_f1(truth, predicted) == pytest.approx(over_all * 4 / 3)
    assert macro_f1(["a", "a", "b"], ["a", "new", "b"]) == pytest.approx((2 / 3 + 1) / 2)


def test_the_most_common_label_looks_good_by_accuracy_alone():
    truth, predicted = ["a"] * 90 + ["b"] * 10, ["a"] * 100
    assert accuracy(truth, predicted) == 0.9
    assert balanced_accuracy(truth, predicted) == 0.5
    assert macro_f1(truth, predicted) == pytest.approx(0.9 / 1.9)


def test_categories_and_mixed_types_are_compared_by_value():
    truth = pd.Categorical(["b", "a", "b"], categories=["b", "a"])
    predicted = pd.Series(["b", "a", "a"], index=[5, 6, 7], dtype="category")
    assert accuracy(truth, predicted) == pytest.approx(2 / 3)
    assert accuracy([1, "1", 2, 3.0], [1.0, 1, "2", "three"]) == pytest.approx(3 / 4)


def test_clusters_are_compared_as_scikit_learn_does_and_the_resolution_picked_by_labels_is_marked(simulated):
    import scanpy as sc
    from anndata import AnnData

    table = clustering(simulated.pca, simulated.types, resolutions=(0.1, 1.0, 3.0))
    assert table["resolution"].tolist() == [0.1, 1.0, 3.0]
    assert table["n_clusters"].is_monotonic_increasing
    assert table["picked_by_labels"].sum() == 1
    assert table.loc[table["picked_by_labels"], "nmi"].item() == table["nmi"].max()
    graph = AnnData(simulated.pca)
    sc.pp.neighbors(graph, n_neighbors=15, use_rep="X")
    sc.tl.leiden(graph, 1.0, flavor="igraph", n_iterations=2, directed=False)
    weights = umap_weights(exact_neighbors(simulated.pca, 14))
    np.testing.assert_allclose(weights.toarray(), graph.obsp["connectivities"].toarray(), atol=2e-5)
    types, clusters = simulated.types, graph.obs["leiden"]
    assert table["ari"][1] == pytest.approx(sk.adjusted_rand_score(types, clusters))
    assert table["nmi"][1] == pytest.approx(sk.normalized_mutual_info_score(types, clusters))


def test_the_default_grid_holds_the_resolution_one_and_the_same_seed_gives_the_same_clusters(simulated):
    first, second = (clustering(simulated.pca, simulated.types) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert (first["resolution"] == 1.0).sum() == 1
    assert len(first) == 20


def test_the_silhouette_is_that_of_scikit_learn_scaled(simulated):
    expected = (sk.silhouette_score(simulated.pca, simulated.types) + 1) / 2
    assert silhouette(simulated.pca, simulated.types) == pytest.approx(expected, abs=1e-12)


def test_a_large_part_that_all_cells_share_changes_nothing(simulated):
    moved = simulated.pca + 1e6
    assert silhouette(moved, simulated.types) == pytest.approx(
        silhouette(simulated.pca, simulated.types), abs=1e-6
    )


def test_labels_with_noise_are_near_one():
    labels = np.repeat(np.arange(5), 60)
    embedding = np.eye(5)[labels] + 0.02 * noise(300)[:, :5]
    halves = np.random.default_rng(0).permutation(300).reshape(2, 150)
    predicted = knn_predict(embedding[halves[0]], labels[halves[0]], embedding[halves[1]])
    assert macro_f1(labels[halves[1]], predicted) == 1.0
    assert silhouette(embedding, labels) > 0.95
    assert clustering(embedding, labels)["ari"][0] == 1.0


def test_random_labels_are_at_chance(simulated):
    labels = np.random.default_rng(3).integers(4, size=450)
    predicted = knn_predict(simulated.pca[:300], labels[:300], simulated.pca[300:])
    assert balanced_accuracy(labels[300:], predicted) == pytest.approx(1 / 4, abs=0.1)
    assert macro_f1(labels[300:], predicted) < 0.35
    assert silhouette(simulated.pca, labels) == pytest.approx(0.5, abs=0.02)
    assert clustering(simulated.pca, labels)["ari"].abs().max() < 0.02


def test_equal_cells_sorted_by_label_tell_nothing_of_their_labels():
    labels = np.repeat(np.arange(N_TYPES), 40)
    one_place = np.full((320, 3), 0.1)
    few_places = noise(320)[np.random.default_rng(0).integers(10, size=320)]
    for embedding in (one_place, few_places):
        assert clustering(embedding, labels, resolutions=(1.0,))["ari"][0] == pytest.approx(0, abs=0.02)
        assert silhouette(embedding, labels) < 0.51


def test_types_pushed_into_random_corners_win_the_silhouette(simulated):
    assert silhouette(corners(simulated.types), simulated.types) > 0.95
    assert silhouette(simulated.pca, simulated.types) < 0.8


def test_without_igraph_clusters_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(_metrics, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'cellprior[leiden]'")):
        clustering(np.eye(20), ["a", "b"] * 10)
    assert np.isnan(list(_structure._clusters(np.eye(20), np.tile([0, 1], 10)).values())).all()
    assert "cellprior[leiden]" in _structure._reason("ari", "")
