import numpy as np
import pytest
from scipy.stats import ttest_1samp
from sklearn.metrics import balanced_accuracy_score, f1_score

from cellprior.evaluate._intervals import Resampling, compared, interval
from cellprior.evaluate._splits import (
    HELD_OUT,
    RANDOM,
    Split,
    batch_splits,
    inner_folds,
    label_codes,
    random_folds,
    random_splits,
)
from cellprior.evaluate._structure import _half_width


@pytest.fixture
def codes() -> np.ndarray:
    return np.random.default_rng(0).choice(4, 600, p=[0.5, 0.3, 0.15, 0.05])


def guesses(codes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Right in a share of the cells, else drawn."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(codes)) < share, codes, rng.integers(0, 4, len(codes)))


def test_scores_are_those_of_scikit_learn_on_the_cells_of_all_folds_together(codes):
    splits = random_folds(codes, seeds=5, test_size=0.2)
    given = guesses(codes, 0.6, 1)
    found = Resampling(len(codes), splits).classification(codes, [given[s.test] for s in splits])
    expected = {
        "macro_f1": f1_score(codes, given, average="macro"),
        "balanced_accuracy": balanced_accuracy_score(codes, given),
        "accuracy": np.mean(codes == given),
    }
    for name, value in expected.items():
        assert found[name][0] == pytest.approx(value)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        right = rng.random(300) < 0.7
        split = Split(RANDOM, 0, "", np.arange(0), np.arange(300))
        _, low, high = interval(Resampling(300, [split], n_draws=300, seed=seed).mean([right]))
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_an_interval_leaves_out_a_fortieth_of_the_draws_at_each_end():
    assert interval(np.append(7.0, np.linspace(0, 1, 1001))) == pytest.approx((7, 0.025, 0.975))
    # of the jackknife: 5 parts, each without a fifth; t of 4 degrees of freedom leaves out a fortieth at 2.776
    samples = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert _half_width(samples) == pytest.approx(2.776 * np.sqrt(4 * np.var(samples)), rel=1e-3)


def test_differences_are_paired(codes):
    """Two methods that are right in the same cells differ by less than their own intervals suggest."""
    splits = random_splits(codes, seeds=5, test_size=0.2)
    draws = Resampling(len(codes), splits)
    good = guesses(codes, 0.6, 1)
    better = np.where(np.random.default_rng(2).random(len(codes)) < 0.1, codes, good)
    score = {
        name: draws.classification(codes, [given[s.test] for s in splits])["accuracy"]
        for name, given in (("good", good), ("better", better))
    }
    table = compared(score, versus="good").set_index("method")
    assert table.loc["better", "difference_low"] > 0
    assert table.loc["better", "low"] < table.loc["good", "high"]
    assert np.isnan(table.loc["good", "difference"])


def test_the_same_seed_gives_the_same_interval(codes):
    splits = random_splits(codes, seeds=2, test_size=0.2)
    given = [guesses(codes, 0.5, 3)[s.test] for s in splits]
    first, second, other = (
        interval(Resampling(len(codes), splits, seed=seed).classification(codes, given)["macro_f1"])
        for seed in (0, 0, 1)
    )
    assert first == second
    assert first != other


def test_the_interval_of_held_out_batches_is_that_of_a_t_test_on_their_differences():
    codes = np.zeros(400, dtype=int)
    quarters = [np.arange(400)[i * 100 : (i + 1) * 100] for i in range(4)]
    splits = [
        Split(HELD_OUT, 0, name, np.arange(0), rows) for name, rows in zip("abcd", quarters, strict=True)
    ]
    rng = np.random.default_rng(0)
    right, other = rng.random(400) < 0.8, rng.random(400) < 0.6
    draws = Resampling(len(codes), splits)
    difference = draws.mean([right[rows] for rows in quarters]) - draws.mean(
        [other[rows] for rows in quarters]
    )
    each = [right[rows].mean() - other[rows].mean() for rows in quarters]
    expected = np.array(ttest_1samp(each, 0).confidence_interval(0.95))
    value, low, high = draws.interval(difference)
    assert value == pytest.approx(np.mean(each))
    # wider than Student's, as the batches' training cells are in part the same
    np.testing.assert_allclose(
        (low - value, high - value), np.sqrt(1 + 4 / 3) * (expected - value), rtol=1e-6
    )
    assert draws.error(difference) == pytest.approx(np.std(each, ddof=1) * np.sqrt(1 / 4 + 1 / 3))
    np.testing.assert_allclose(difference[1:], each)


def test_an_interval_of_labels_is_wider_than_the_bootstrap_says_by_what_the_training_cells_add():
    """By the root of 1 + answers / cells learned from, where answers are drawn for themselves; not without learning."""
    codes = np.random.default_rng(0).integers(0, 3, 400)
    given, cells = guesses(codes, 0.6, 1) % 3, np.arange(400)
    folds = random_folds(codes, seeds=5, test_size=0.2)
    spread = []
    for splits in (
        [Split(RANDOM, 0, "", cells[:0], cells)],
        folds,
        folds * 2,
        [Split(RANDOM, 0, "", cells[:50], cells)],
    ):
        again = Resampling(400, splits, n_draws=5000)
        found = again.classification(codes, [given[split.test] for split in splits])
        assert found["accuracy"][0] == pytest.approx(np.mean(codes == given))
        spread.append(found["accuracy"][1:].std())
    np.testing.assert_allclose(np.divide(spread[1:], spread[0]), np.sqrt([2, 3 / 2, 1 + 400 / 50]), rtol=0.03)


def test_three_divisions_of_the_cells_have_an_interval_that_covers_the_truth_and_is_narrower():
    """Of names that other training cells would in part have given otherwise, the same for all cells of a split."""
    held, halves = np.zeros((2, 300), dtype=bool), np.zeros((2, 300))
    for seed in range(300):
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, 2, 200)
        hard, learned = rng.random(200), rng.normal(0, 0.02)
        for i, n in enumerate((5, 15)):
            splits = random_folds(codes, seeds=n)
            said = []
            for split in splits:
                right = hard[split.test] + rng.normal(0, 0.1, len(split.test)) < 0.7 + learned
                said.append(np.where(right, codes[split.test], 1 - codes[split.test]))
            again = Resampling(200, splits, n_draws=200, seed=seed)
            _, low, high = again.interval(again.classification(codes, said)["accuracy"])
            held[i, seed], halves[i, seed] = low <= 0.7 <= high, (high - low) / 2
    assert ((held.mean(axis=1) > 0.91) & (held.mean(axis=1) < 0.995)).all()
    assert halves[1].mean() / halves[0].mean() == pytest.approx(np.sqrt(2 / 3), rel=0.05)


def test_copies_of_all_cells_make_no_interval_narrower(codes):
    twice = np.tile(codes, 2)
    alike = np.tile(np.arange(len(codes)), 2)
    given = np.tile(guesses(codes, 0.6, 1), 2)
    for divided in (
        lambda truth, of: [Split(RANDOM, 0, "", np.arange(0), np.arange(len(truth)))],
        lambda truth, of: random_folds(truth, copies=of),
    ):
        narrow = []
        for truth, of in ((codes, np.arange(len(codes))), (twice, alike)):
            splits = divided(truth, of)
            found = Resampling(len(truth), splits, copies=of).classification(
                truth, [given[split.test] for split in splits]
            )
            narrow.append(interval(found["accuracy"]))
        assert narrow[0] == pytest.approx(narrow[1], abs=0.01)


def test_labels_that_are_missing_or_too_small_are_left_out():
    labels = ["a"] * 10 + ["b"] * 5 + ["c"] * 4 + [None]
    codes, names = label_codes(labels)
    assert names == ["a", "b"]
    assert (codes[-5:] == -1).all()
    with pytest.raises(ValueError, match="at least two are needed"):
        label_codes(["a"] * 10 + ["b"])


def test_numbers_as_labels_are_labels():
    codes, names = label_codes(np.repeat([10, 9], 5))
    assert names == ["10", "9"]
    assert codes.tolist() == [0] * 5 + [1] * 5


def test_a_random_split_has_each_label_on_both_sides(codes):
    for split in random_splits(codes, seeds=3, test_size=0.2):
        assert not np.intersect1d(split.train, split.test).size
        assert np.union1d(split.train, split.test).size == len(codes)
        assert set(codes[split.train]) == set(codes[split.test]) == {0, 1, 2, 3}


def test_folds_ask_about_every_cell_once_and_keep_copies_on_one_side(codes):
    alike = np.arange(len(codes)) // 2  # each cell and the next are the same
    splits = random_folds(codes, seeds=7, test_size=0.2, copies=alike)
    assert np.array_equal(np.sort(np.concatenate([s.test for s in splits[:5]])), np.arange(len(codes)))
    assert not np.array_equal(splits[0].test, splits[5].test)  # divided again
    for split in splits:
        assert not np.intersect1d(alike[split.train], alike[split.test]).size
    for split in random_folds(codes, seeds=5, test_size=0.2):
        assert abs(np.mean(codes[split.test] == 0) - np.mean(codes == 0)) < 0.01


def test_few_cells_are_divided_three_times_and_many_once():
    few, many = np.tile([0, 1], 1000), np.tile([0, 1], 1001)
    assert [len(random_folds(codes)) for codes in (few, many)] == [15, 5]
    assert len(random_folds(np.append(few, [-1] * 100))) == 15  # cells without a label do not count
    assert len(random_folds(few, divisions=1)) == 5 and len(random_folds(few, test_size=0.5)) == 6
    assert len(random_folds(few, seeds=7)) == 7


def test_a_copy_of_a_held_out_cell_is_not_learned_from_and_rare_labels_are_not_asked_about():
    codes, batches = np.array([0, 1, 0, 1, 0, 1, 0, 0]), list("aaaabbbb")
    alike = np.array([0, 1, 2, 3, 0, 5, 6, 7])  # the first of b is the first of a
    a, b = batch_splits(codes, batches, copies=alike)
    assert a.train.tolist() == [5, 6, 7] and b.train.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="none shares"):
        batch_splits(codes, batches, least=3)


def test_inner_folds_are_whole_batches_where_batches_are_held_out():
    codes, batches = np.tile([0, 1], 60), np.repeat(list("abcdef"), 20)
    folds = inner_folds(codes, copies=np.arange(120), batches=batches, seed=0)
    assert all(len(set(folds[batches == name])) == 1 for name in "abcdef") and len(set(folds)) == 5
    one = inner_folds(codes, copies=np.arange(120), batches=np.repeat("a", 120), seed=0)
    assert np.bincount(one).tolist() == [24] * 5


def test_cells_of_a_label_that_only_the_held_out_batch_has_are_not_asked_about():
    codes = np.array([0, 0, 1, 1, 0, 1, 2, 2])
    splits = batch_splits(codes, list("aaaabbbb"))
    assert [s.held_out for s in splits] == ["a", "b"]
    assert splits[1].test.tolist() == [4, 5]
    # without b, one label is left: there is nothing to tell apart
    assert [s.held_out for s in batch_splits(np.array([0, 0, 0, 1]), list("aabb"))] == ["a"]


def test_many_batches_are_held_out_several_at_a_time():
    batches = np.repeat([f"donor {i}" for i in range(30)], 10)
    codes = np.tile([0, 1], 150)
    splits = batch_splits(codes, batches)
    assert len(splits) == 10
    assert np.array_equal(np.sort(np.concatenate([s.test for s in splits])), np.arange(300))
    for split in splits:
        assert not set(batches[split.train]) & set(batches[split.test])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (["a"] * 4, "Only the batch"),
        (["a", "a", "b", None], "1 cells have no batch"),
        (["a", "a", "b", "b"], "none shares its labels"),
    ],
)
def test_batches_that_cannot_be_held_out_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        batch_splits(np.array([0, 0, 1, 1]), batches)


def test_fits_of_the_same_held_out_batch_do_not_count_as_batches():
    """Three batches fitted once, or twice with the same outcome, say the same."""
    codes = np.zeros(300, dtype=int)
    right = np.repeat([1.0, 0.5, 0.0], 100)
    thirds = [np.arange(300)[i * 100 : (i + 1) * 100] for i in range(3)]
    batches = [Split(HELD_OUT, 0, name, np.arange(0), rows) for name, rows in zip("abc", thirds, strict=True)]
    once = Resampling(len(codes), batches).mean([right[rows] for rows in thirds])
    twice = Resampling(len(codes), [s for s in batches for _ in range(2)]).mean(
        [right[rows] for rows in thirds for _ in range(2)]
    )
    assert once[0] == twice[0] == pytest.approx(0.5)
    np.testing.assert_array_equal(once, twice)


def test_quantiles_are_of_the_cells_and_spread_as_a_bootstrap_does():
    values = np.random.default_rng(0).gamma(2.0, 1.0, size=400)
    split = Split(RANDOM, 0, "", np.arange(0), np.arange(400))
    draws = Resampling(400, [split]).quantile([values], 0.9)
    assert draws[0] == np.quantile(values, 0.9, method="inverted_cdf")
    rng = np.random.default_rng(1)
    again = [np.quantile(rng.choice(values, 400), 0.9) for _ in range(1000)]
    assert draws[1:].std() == pytest.approx(np.std(again), rel=0.15)
