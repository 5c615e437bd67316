"""Which cells are learned from, and which are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedShuffleSplit

from cellprior._obs import numbered

RANDOM, HELD_OUT = "random cells", "held-out batches"
MAX_FOLDS = 10  # more batches than these are held out several at a time
MIN_PER_LABEL = 5  # of a label in the whole data, for it to be asked about


@dataclass(frozen=True, slots=True)
class Split:
    """Cells to learn from and cells to be asked about, none of them both."""

    kind: str
    """`RANDOM` or `HELD_OUT`."""

    seed: int
    held_out: str
    """The batches whose cells are asked about, or ""."""

    train: np.ndarray
    test: np.ndarray


def label_codes(labels: pd.Series | Sequence[str] | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Number of the label of each cell, -1 for those left out, and the names.

    Left out are cells without a label and labels of fewer than `MIN_PER_LABEL` cells.

    Raises
    ------
    ValueError
        If fewer than two labels are left.
    """
    names = _text(labels)
    n_cells = names.value_counts()
    kept = sorted(n_cells.index[n_cells >= MIN_PER_LABEL])
    if len(kept) < 2:
        msg = (
            f"{len(kept)} labels have at least {MIN_PER_LABEL} cells, of {len(n_cells)}; at least two are needed. "
            "Merge small labels, or give another labels_key."
        )
        raise ValueError(msg)
    return pd.Index(kept).get_indexer(names.to_numpy()), [str(name) for name in kept]


def _text(column: pd.Series | Sequence[str] | np.ndarray) -> pd.Series:
    """Categories as text, NA where they are missing."""
    codes, names = numbered(column)
    return pd.Series([*names, pd.NA], dtype="string").take(codes).reset_index(drop=True)


def random_splits(codes: np.ndarray, *, seeds: int, test_size: float) -> list[Split]:
    """One split per seed, each label in the same share on both sides.

    Parameters
    ----------
    codes
        Label of each cell, -1 for those left out ``(cells,)``.
    seeds
        How many.
    test_size
        Share of the cells that is asked about.

    Raises
    ------
    ValueError
        If there is no seed, or one side would lack a label.
    """
    if seeds < 1 or not 0 < test_size < 1:
        msg = f"seeds={seeds} and test_size={test_size}: at least one seed, and a share between 0 and 1 are needed."
        raise ValueError(msg)
    rows = np.flatnonzero(codes >= 0)
    found = []
    for seed in range(seeds):
        sampler = StratifiedShuffleSplit(1, test_size=test_size, random_state=seed)
        train, test = next(sampler.split(rows, codes[rows]))
        found.append(Split(RANDOM, seed, "", np.sort(rows[train]), np.sort(rows[test])))
    return found


def batch_splits(codes: np.ndarray, batches: pd.Series | Sequence[str] | np.ndarray) -> list[Split]:
    """Each batch held out in turn; of more than `MAX_FOLDS` batches several at a time, of about as many cells.

    A cell whose label no other batch has is not asked about: nothing could be learned of it.

    Parameters
    ----------
    codes
        Label of each cell, -1 for those left out ``(cells,)``.
    batches
        Batch or donor of each cell ``(cells,)``.

    Raises
    ------
    ValueError
        If a cell has no batch, there is one batch only, or no two share two labels.
    """
    names = _text(batches)
    if names.isna().any():
        msg = f"{int(names.isna().sum())} cells have no batch. Name it, or leave these cells out."
        raise ValueError(msg)
    n_cells = names[codes >= 0].value_counts()
    if len(n_cells) < 2:
        msg = f"Only the batch {n_cells.index.tolist()} has labelled cells; to hold one out, two are needed."
        raise ValueError(msg)
    folds: list[list[str]] = [[] for _ in range(min(len(n_cells), MAX_FOLDS))]
    sizes = np.zeros(len(folds))
    for name, n in n_cells.items():  # the largest first, each to the smallest fold
        smallest = int(sizes.argmin())
        folds[smallest].append(str(name))
        sizes[smallest] += n
    found = []
    for fold in folds:
        held_out = names.isin(fold).to_numpy()
        train = np.flatnonzero((codes >= 0) & ~held_out)
        test = np.flatnonzero(held_out & np.isin(codes, np.unique(codes[train])) & (codes >= 0))
        if len(test) and len(np.unique(codes[train])) > 1:
            found.append(Split(HELD_OUT, 0, ", ".join(sorted(fold)), train, test))
    if not found:
        msg = "No batch can be held out: none shares its labels with the others. Leave out batch_key."
        raise ValueError(msg)
    return found
