from __future__ import annotations

import math

import numpy as np
import pytest

from cellprior.evaluate import batch_leak, ilisi
from tests.evaluate.simulated import cells, corners, noise


@pytest.fixture
def labels() -> np.ndarray:
    return np.repeat(np.arange(4), 100)


@pytest.fixture
def batches() -> np.ndarray:
    return np.tile(["x", "y"], 200)


def test_an_embedding_that_separates_batches_is_seen_by_both_scores():
    simulated = cells()
    code = np.unique(simulated.batches, return_inverse=True)[1]
    apart = corners(simulated.types, distance=5.0) + 30.0 * np.eye(10)[code]
    mixed = corners(simulated.types, distance=5.0)
    assert batch_leak(apart, simulated.types, simulated.batches) == pytest.approx(1.0)
    assert batch_leak(mixed, simulated.types, simulated.batches) == pytest.approx(0.0, abs=0.1)
    assert ilisi(apart, simulated.batches) == pytest.approx(0.0, abs=1e-6)
    assert ilisi(mixed, simulated.batches) > 0.7


def test_noise_and_a_collapsed_embedding_know_no_batch(labels, batches):
    leaks = [batch_leak(noise(400, seed=seed), labels, batches) for seed in range(5)]
    assert np.mean(leaks) == pytest.approx(0.0, abs=0.05)
    assert batch_leak(np.ones((400, 3)), labels, batches) == 0.0


def test_batches_that_differ_between_labels_only_are_not_a_leak(labels):
    """Where each label has batches of its own share, a probe that ignored labels would find the batch."""
    rng = np.random.default_rng(5)
    batches = np.where(rng.random(400) < np.array([0.2, 0.4, 0.6, 0.8])[labels], "x", "y")
    embedding = 20.0 * np.eye(4)[labels] + noise(400)[:, :4]
    assert batch_leak(embedding, labels, batches) == pytest.approx(0.0, abs=0.1)
    assert batch_leak(embedding, np.zeros(400), batches) > 0.2


def test_pushing_labels_apart_does_not_hide_the_batch_nor_does_the_unit(labels, batches):
    embedding = noise(400)
    embedding[batches == "x", 0] += 2.0
    expected = batch_leak(embedding, labels, batches)
    assert expected > 0.5
    pushed = embedding + 1e4 * np.eye(10)[labels]
    assert batch_leak(pushed, labels, batches) == pytest.approx(expected, abs=1e-3)
    assert batch_leak(1e-6 * embedding, labels, batches) == pytest.approx(expected, abs=1e-3)


def test_the_score_is_the_mean_over_labels_however_many_cells_they_have():
    labels, batches = np.repeat([0, 1], [300, 40]), np.tile(["x", "y"], 170)
    embedding = 0.01 * noise(340)
    embedding[(labels == 1) & (batches == "x"), 0] += 1.0  # the batch is plain in the small label alone
    assert batch_leak(embedding, labels, batches) == pytest.approx(0.5, abs=0.1)


def test_a_small_batch_counts_as_much_as_a_large_one():
    """Two normal distributions two deviations apart are told apart with a balanced accuracy of 0.84 at best."""
    batches = np.repeat(["x", "y"], [900, 100])
    embedding = noise(1000)[:, :1] + 2.0 * (batches == "y")[:, None]
    assert batch_leak(embedding, np.zeros(1000), batches) == pytest.approx(2 * 0.84 - 1, abs=0.06)


def test_a_batch_with_fewer_than_ten_cells_of_a_label_is_left_out():
    labels, batches = np.zeros(69), np.repeat(["x", "y", "z"], [30, 30, 9])
    embedding = noise(69)
    embedding[:, 0] += 20.0 * (batches == "z")
    without = batches != "z"
    expected = batch_leak(embedding[without], labels[without], batches[without])
    assert batch_leak(embedding, labels, batches) == pytest.approx(expected)
    assert math.isnan(batch_leak(embedding, labels, np.where(batches == "z", "y", "x")))


def test_the_same_seed_gives_the_same_score_and_another_seed_other_folds(labels, batches):
    first, second, other = (batch_leak(noise(400), labels, batches, seed=seed) for seed in (0, 0, 1))
    assert first == second != other
