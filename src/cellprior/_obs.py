"""Columns of ``obs``: batches, donors, labels, and which cells have a modality. Read in one way everywhere.

A category is known by its text, and a whole number by its digits: 1, 1.0 and "1" are the same batch, as a column
changes its type on its way through csv, concat and other laboratories.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

NO_VALUE = {
    "",
    "<na>",
    "n/a",
    "na",
    "nan",
    "none",
    "null",
}  # what missing values become where they turn into text
NO_TYPE = {"unannotated", "unassigned", "undefined", "undetermined", "unknown", "unlabeled", "unlabelled"}
TRUTH = {"true": True, "false": False, "1": True, "0": False}


def text_of(value: object) -> str:
    """A category as text: a whole number by its digits, whatever its type."""
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value)


def means_no_label(text: str) -> bool:
    """Whether a label says that there is none."""
    return text.strip().lower() in NO_VALUE | NO_TYPE


def older_text(text: str) -> str:
    """The same of a text that was noted before whole numbers were known by their digits: ``"1.0"`` is ``"1"``."""
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def numbered(values: Any) -> tuple[np.ndarray, list[str]]:
    """Number the categories of a column, in the order of pandas: that of a Categorical, else sorted if they can be.

    Returns
    -------
    Codes ``(cells,)``, -1 where a value is missing, of the smallest integer type; and the categories as text, those
    that no cell has among them.
    """
    if getattr(values, "dtype", None) == np.float16:  # pandas has no categories of half precision
        values = values.astype(np.float32)
    column = pd.Categorical(values)
    place: dict[str, int] = {}
    new = np.array([place.setdefault(text_of(value), len(place)) for value in column.categories], dtype=int)
    if len(place) == len(column.categories):
        return column.codes, list(place)
    codes = np.where(column.codes < 0, -1, new[column.codes])
    return pd.Categorical.from_codes(codes, list(place)).codes, list(place)


def read_column(
    obs: pd.DataFrame, key: str, *, frame: str = "adata.obs", advice: str = ""
) -> tuple[np.ndarray, list[str]]:
    """Number the categories of a column of ``obs`` in which no value may be missing; see :func:`numbered`.

    Errors call ``obs`` by ``frame``, and where values are missing give the ``advice``. Raises KeyError if there is no
    such column; ValueError if values are missing, or several columns have this name.
    """
    if key not in obs:
        msg = f"{key!r} not found in {frame}; its columns are {list(obs.columns)}."
        raise KeyError(msg)
    column = obs[key]
    if column.ndim != 1:
        msg = f"{frame} has {column.shape[1]} columns that are called {key!r}: rename or drop all but one."
        raise ValueError(msg)
    codes, names = numbered(column)
    if (codes < 0).any():
        advice = advice or f"Fill it in, {frame}[{key!r}] = ..., or leave these cells out."
        raise ValueError(f"{_missing(obs, codes < 0, f'{frame}[{key!r}]')} {advice}")
    return codes, names


def read_names(obs: pd.DataFrame, key: str, **options: Any) -> np.ndarray:
    """Category of each cell as text ``(cells,)``, objects; arguments as of :func:`read_column`."""
    codes, names = read_column(obs, key, **options)
    return np.asarray(names, dtype=object)[codes]


def read_presence(obs: pd.DataFrame, key: str, *, frame: str = "mdata.obs") -> np.ndarray:
    """A column of yes and no ``(cells,)``: booleans, 1 and 0, or the words true and false.

    Raises ValueError, for anything else, and for missing values: neither is a yes.
    """
    codes, names = read_column(
        obs, key, frame=frame, advice="It says which cells have the modality: write True or False for each."
    )
    truth = [TRUTH.get(name.strip().lower()) for name in names]
    used = np.unique(codes)
    if wrong := [names[code] for code in used if truth[code] is None]:
        msg = (
            f"{frame}[{key!r}] says which cells have the modality, and holds {wrong[0]!r}; True or False are needed. "
            "If the column is not yours, it is cellprior's: rename it if it means something else."
        )
        raise ValueError(msg)
    return np.array([bool(value) for value in truth], dtype=bool)[codes]


def writable(obs: pd.DataFrame) -> pd.DataFrame:
    """``obs`` with columns that mix text and other things as text, which is all that a file holds of them."""
    mixed = {
        key: column.map(text_of, na_action="ignore")
        for key, column in obs.items()
        if column.dtype == object
        and pd.api.types.infer_dtype(column, skipna=True) in ("mixed", "mixed-integer")
    }
    return obs.assign(**mixed) if mixed else obs


def warn_of_unlabeled(labels: Iterable[str], unlabeled: str, *, where: str) -> None:
    """Warn of labels that seem to stand for "no label", and would be learned as a type.

    Warns
    -----
    UserWarning
        If they differ from ``unlabeled`` in case only, are what missing values become as text, or say so.
    """
    same = unlabeled.strip().lower()
    if alike := [
        label
        for label in labels
        if label != unlabeled and (means_no_label(label) or label.strip().lower() == same)
    ]:
        msg = (
            f"{where} has the label {', '.join(map(repr, alike))}, which is learned as a type like any other. If it "
            f"means that a cell is not labelled, say so: unlabeled_category={alike[0]!r} (now {unlabeled!r}; "
            "--unlabeled on the command line)."
        )
        warnings.warn(msg, UserWarning, stacklevel=5)


def _missing(obs: pd.DataFrame, missing: np.ndarray, column: str) -> str:
    first = obs.index[int(np.argmax(missing))]
    return f"{column} is missing (NaN) in {int(missing.sum())} of {len(obs)} cells, the first {first!r}."
