"""What every metric refuses, and what all take."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellprior.evaluate import (
    accuracy,
    batch_leak,
    clisi,
    clustering,
    ilisi,
    knn_predict,
    macro_f1,
    silhouette,
)
from cellprior.evaluate._inputs import as_embedding

LABELS = np.repeat(["a", "b", "c"], 40)
BATCHES = np.tile(["x", "y"], 60)


def embedding() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(120, 4)).round(3) + 3.0 * np.eye(4)[np.repeat([0, 1, 2], 40)]


def table_at_one(*args: Any) -> float:
    return clustering(*args, resolutions=(1.0,))["nmi"][0]


def vote(points: Any, labels: Any) -> float:
    return macro_f1(labels, knn_predict(points, labels, points))


def leak(points: Any, labels: Any) -> float:
    return batch_leak(points, labels, BATCHES)


METRICS = [vote, table_at_one, silhouette, clisi, ilisi, leak]
each_metric = pytest.mark.parametrize("metric", METRICS, ids=attrgetter("__name__"))


@each_metric
def test_every_metric_takes_any_kind_of_matrix_and_of_labels(metric: Callable[..., float]):
    points = embedding().astype(np.float32)
    expected = metric(points, LABELS)
    kinds = [
        (points.astype(np.float64), pd.Series(LABELS, index=np.arange(120)[::-1])),
        (sp.csr_matrix(points), pd.Categorical(LABELS, categories=["c", "none", "b", "a"])),
        (pd.DataFrame(points), LABELS.tolist()),
        (points, [{"a": 1, "b": "one", "c": 1.5}[label] for label in LABELS]),
    ]
    for kind, labels in kinds:
        assert metric(kind, labels) == pytest.approx(expected, abs=1e-9)


@each_metric
def test_every_metric_refuses_values_that_are_not_finite(metric: Callable[..., float]):
    for bad in (np.nan, np.inf):
        points = embedding()
        points[[7, 90], 1] = bad
        with pytest.raises(ValueError, match="not finite in 2 of 120 cells, the first in row 7"):
            metric(points, LABELS)


@each_metric
def test_every_metric_refuses_labels_that_are_missing_or_do_not_fit_the_cells(metric: Callable[..., float]):
    missing = LABELS.astype(object)
    missing[3], missing[4] = None, np.nan
    with pytest.raises(ValueError, match="missing in 2 of 120 cells"):
        metric(embedding(), missing)
    with pytest.raises(ValueError, match="119 entries for 120 cells"):
        metric(embedding(), LABELS[:-1])
    with pytest.raises(ValueError, match="2 dimensions; give one value per cell"):
        metric(embedding(), pd.DataFrame({"cell_type": LABELS}))


@pytest.mark.parametrize("metric", METRICS[:-1], ids=attrgetter("__name__"))
def test_one_label_alone_is_refused(metric: Callable[..., float]):
    with pytest.raises(ValueError, match="has one value only, 'a'"):
        metric(embedding(), np.full(120, "a"))


def test_one_label_leaves_a_batch_to_be_found_and_one_batch_does_not():
    assert -1 < batch_leak(embedding(), np.full(120, "a"), BATCHES) < 1
    with pytest.raises(ValueError, match="batches has one value only, 'x'"):
        batch_leak(embedding(), LABELS, np.full(120, "x"))


@pytest.mark.parametrize("metric", [vote, table_at_one, clisi, ilisi], ids=attrgetter("__name__"))
def test_fewer_cells_than_neighbours_are_refused(metric: Callable[..., float]):
    with pytest.raises(ValueError, match="has 12 cells and n_neighbors="):
        metric(embedding()[::10], LABELS[::10])


def test_as_many_cells_as_neighbours_are_enough():
    points, labels = embedding()[::8], LABELS[::8]
    assert len(knn_predict(points, labels, points, n_neighbors=15)) == 15
    assert len(clustering(points, labels, n_neighbors=15, resolutions=[1.0])) == 1
    assert 0 <= clisi(points, labels, n_neighbors=15, perplexity=5) <= 1


def test_an_embedding_that_is_no_matrix_of_cells_is_refused():
    for shape in [(120,), (0, 4), (120, 0), (2, 3, 4)]:
        with pytest.raises(ValueError, match=r"\(cells, dimensions\)"):
            silhouette(np.ones(shape), LABELS)


def test_the_array_that_was_given_is_left_as_it_is():
    points = embedding()
    before = points.copy()
    assert not np.shares_memory(as_embedding(points), points)
    clisi(points, LABELS)
    np.testing.assert_array_equal(points, before)


def test_training_and_test_cells_of_different_dimensions_are_refused():
    with pytest.raises(ValueError, match="train has 4 dimensions and test 3"):
        knn_predict(embedding(), LABELS, embedding()[:, :3])


def test_labels_all_different_have_no_silhouette():
    with pytest.raises(ValueError, match="different for all 120 cells"):
        silhouette(embedding(), np.arange(120))


def test_predictions_for_other_cells_are_refused():
    with pytest.raises(ValueError, match="predicted has 1 entries for 2 cells"):
        accuracy(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="truth has 0 entries"):
        accuracy([], [])


@pytest.mark.parametrize("resolutions", [(), (0.5, 0.0)])
def test_a_grid_without_resolutions_is_refused(resolutions):
    with pytest.raises(ValueError, match="all above 0"):
        clustering(embedding(), LABELS, resolutions=resolutions)
