from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy

from cellprior.evaluate import clisi, ilisi
from cellprior.evaluate._lisi import neighbor_weights
from tests.evaluate.simulated import cells, noise


def test_weights_sum_to_one_have_the_perplexity_and_fall_exponentially_with_distance():
    distances = np.sort(np.random.default_rng(0).gamma(5.0, size=(40, 89)), axis=1)
    for unit in (1e-9, 1.0, 1e9):
        weights = neighbor_weights(distances * unit, 30.0)
        np.testing.assert_allclose(weights.sum(axis=1), 1.0)
        np.testing.assert_allclose(np.exp(entropy(weights, axis=1)), 30.0, rtol=1e-9)
    beta = -np.diff(np.log(weights), axis=1) / np.diff(distances, axis=1)
    np.testing.assert_allclose(beta, beta[:, :1] * np.ones((1, 88)), rtol=1e-6)


def test_neighbours_in_one_place_share_the_weight_where_they_are_more_than_the_perplexity():
    distances = np.repeat([[0.0, 1.0]], 40, axis=1).reshape(1, 80)
    np.testing.assert_allclose(neighbor_weights(distances, 30.0), (distances == 0) / 40, atol=1e-12)
    np.testing.assert_allclose(neighbor_weights(np.full((1, 89), 2.0), 30.0), 1 / 89)


def test_the_index_is_the_inverse_of_the_chance_that_two_weighted_neighbours_share_a_label():
    rng = np.random.default_rng(0)
    embedding, labels = rng.normal(size=(60, 3)), rng.integers(3, size=60)
    index = []
    for row in cdist(embedding, embedding):
        others = np.argsort(row)[1:30]
        low, high = 0.0, 1e3
        for _ in range(100):
            beta = (low + high) / 2
            weights = softmax(-beta * row[others])
            low, high = (beta, high) if entropy(weights) > np.log(10) else (low, beta)
        same = labels[others][:, None] == labels[others]
        index.append(1 / (weights @ same @ weights))
    median = np.median(index)
    assert clisi(embedding, labels, n_neighbors=30, perplexity=10) == pytest.approx(
        (3 - median) / 2, abs=1e-8
    )
    assert ilisi(embedding, labels, n_neighbors=30, perplexity=10) == pytest.approx(
        (median - 1) / 2, abs=1e-8
    )


def test_labels_apart_are_pure_and_batches_apart_are_not_mixed():
    labels = np.repeat(np.arange(3), 100)
    apart = 50.0 * np.eye(3)[labels] + noise(300)[:, :3]
    assert clisi(apart, labels) == pytest.approx(1.0)
    assert ilisi(apart, labels) == pytest.approx(0.0)


def test_labels_at_random_are_neither():
    labels = np.random.default_rng(1).integers(3, size=600)
    assert clisi(noise(600), labels) < 0.2
    assert ilisi(noise(600), labels) > 0.8


def test_neither_unit_nor_place_nor_order_matters():
    simulated = cells()
    expected = ilisi(simulated.pca, simulated.batches)
    assert ilisi(1e-5 * simulated.pca + 3.0, simulated.batches) == pytest.approx(expected, abs=1e-6)
    assert ilisi(simulated.pca[::-1], simulated.batches[::-1]) == pytest.approx(expected, abs=1e-12)


def test_cells_in_one_place_are_mixed_even_if_they_come_batch_by_batch():
    batches = np.repeat(["x", "y"], 300)
    assert ilisi(np.ones((600, 2)), batches) > 0.9


@pytest.mark.parametrize("perplexity", [0.5, 90.0])
def test_a_perplexity_that_the_neighbours_cannot_have_is_refused(perplexity):
    with pytest.raises(ValueError, match=f"perplexity={perplexity:g} with n_neighbors=90"):
        clisi(noise(100), np.arange(100) % 2, perplexity=perplexity)
