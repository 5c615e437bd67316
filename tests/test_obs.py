"""Columns of obs are read in one way."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cellprior._obs import (
    numbered,
    read_column,
    read_names,
    read_presence,
    text_of,
    warn_of_unlabeled,
    writable,
)


def obs(values: Any) -> pd.DataFrame:
    return pd.DataFrame({"a": values}, index=[f"c{i}" for i in range(len(values))])


SAME = {
    "integers": np.array([2, 1, 2]),
    "floats": np.array([2.0, 1.0, 2.0]),
    "half floats": np.array([2, 1, 2], dtype=np.float16),
    "text": ["2", "1", "2"],
    "numbers and text": np.array([2, "1", 2.0], dtype=object),
    "nullable integers": pd.array([2, 1, 2], dtype="Int64"),
    "nullable text": pd.array(["2", "1", "2"], dtype="string"),
    "categories of text": pd.Categorical(["2", "1", "2"]),
    "categories of numbers, one unused": pd.Categorical([2, 1, 2], categories=[1, 2, 7]),
    "categories of floats": pd.Categorical([2.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("values", SAME.values(), ids=SAME.keys())
def test_a_number_is_the_same_batch_whatever_its_type(values):
    assert read_names(obs(values), "a").tolist() == ["2", "1", "2"]


def test_categories_stay_in_the_order_of_pandas():
    assert numbered([10, 9, 1])[1] == ["1", "9", "10"]
    codes, names = numbered(pd.Categorical(["b", "a"], categories=["unused", "b", "a"]))
    assert names == ["unused", "b", "a"]
    assert codes.tolist() == [1, 2]
    assert codes.dtype == np.int8
    assert numbered([True, False])[1] == ["False", "True"]


def test_one_and_its_text_in_one_column_are_one_batch():
    codes, names = numbered(pd.Series([1, "1", "x", 1.5, None], dtype=object))
    assert [names[code] for code in codes[:-1]] == ["1", "1", "x", "1.5"]
    assert codes[-1] == -1
    assert text_of(b"donor") == "donor"


@pytest.mark.parametrize(
    "values",
    [
        np.array(["x", None, "x", np.nan], dtype=object),
        pd.Categorical(["x", None, "x", None]),
        pd.array(["x", None, "x", None], dtype="string"),
        np.array([1.0, np.nan, 1.0, np.nan]),
        pd.array([1, None, 1, None], dtype="Int64"),
        pd.array([True, None, True, None], dtype="boolean"),
    ],
)
@pytest.mark.parametrize("read", [read_column, read_presence])
def test_missing_values_are_named_with_their_number_and_the_first_cell(values, read):
    with pytest.raises(ValueError, match=r"f\['a'\] is missing \(NaN\) in 2 of 4 cells, the first 'c1'"):
        read(obs(values), "a", frame="f")


def test_a_column_that_is_not_there_or_there_twice_is_an_error():
    with pytest.raises(KeyError, match=r"'b' not found in adata\.obs; its columns are \['a'\]"):
        read_column(obs([1]), "b")
    twice = pd.concat([obs([1]), obs([2])], axis=1)
    with pytest.raises(ValueError, match="2 columns that are called 'a'"):
        read_column(twice, "a")


@pytest.mark.parametrize(
    "values",
    [
        [True, False, True],
        ["True", "False", "True"],
        ["true", " FALSE", "TRUE"],
        pd.Categorical(["True", "False", "True"]),
        np.array([True, "False", 1], dtype=object),
        [1, 0, 1],
        [1.0, 0.0, 1.0],
        pd.array([True, False, True], dtype="boolean"),
    ],
)
def test_the_word_false_is_not_true(values):
    found = read_presence(obs(values), "a")
    assert found.dtype == bool
    assert found.tolist() == [True, False, True]


@pytest.mark.parametrize("wrong", ["no", "nan", "", 2, 0.5])
def test_what_is_neither_yes_nor_no_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"mdata\.obs\['a'\] .* holds {str(wrong)!r}; True or False"):
        read_presence(obs(np.array([True, wrong], dtype=object)), "a")


def test_a_category_that_no_cell_has_does_no_harm_to_presence():
    assert read_presence(obs(pd.Categorical(["True"], categories=["maybe", "True"])), "a").all()


@pytest.mark.parametrize(
    "label", ["Unknown", "UNKNOWN", "unknown ", "nan", "NA", "None", "<NA>", "", "Unassigned"]
)
def test_labels_that_seem_to_stand_for_none_are_warned_of(label):
    with pytest.warns(UserWarning, match="unlabeled_category="):
        warn_of_unlabeled(["B", label], "unknown", where="obs['a']")


def test_other_labels_and_the_word_itself_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unlabeled(["B", "NK", "unknown", "Unknown T"], "unknown", where="obs['a']")


def test_a_word_for_none_is_warned_of_although_another_was_given():
    with pytest.warns(UserWarning, match="has the label 'unknown', which is learned as a type"):
        warn_of_unlabeled(["B", "Unassigned", "unknown"], "Unassigned", where="obs['a']")


def test_columns_that_mix_types_can_be_written_as_text():
    mixed = pd.Series([1, "x", None], index=list("abc"), dtype=object)
    frame = pd.DataFrame({"mixed": mixed, "number": [1, 2, 3], "text": ["a", None, "b"]}, index=list("abc"))
    found = writable(frame)
    assert found["mixed"].tolist()[:2] == ["1", "x"]
    assert found["mixed"].isna().tolist() == [False, False, True]
    pd.testing.assert_frame_equal(found[["number", "text"]], frame[["number", "text"]])
    assert frame["mixed"].tolist()[0] == 1
