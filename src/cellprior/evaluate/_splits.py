"""Which cells are learned from, and which are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedShuffleSplit

from cellprior._arguments import count
from cellprior._obs import means_no_label, numbered

RANDOM, HELD_OUT = "random cells", "held-out batches"
MAX_FOLDS = 10  # more batches than these are held out several at a time
MIN_PER_LABEL = 5  # of a label in the whole data, for it to be asked about
MIN_HELD_OUT = 10  # cells that can be asked about in a batch, for it to be held out
MIN_LEARNED = 8  # of a label in the training cells: as many make a majority of 15 neighbours
N_DIVISIONS, FEW_CELLS = 3, 2000  # as often are as many cells divided into folds, and more cells once
N_INNER = 5  # folds of the training cells, in which what can be chosen is chosen


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
    batches: tuple[str, ...] = ()
    """The same, one by one."""


def label_codes(
    labels: pd.Series | Sequence[str] | np.ndarray, minimum: int = MIN_PER_LABEL
) -> tuple[np.ndarray, list[str]]:
    """Number of the label of each cell, -1 for those left out, and the names.

    Left out are cells without a label, or with one that says so, and labels of fewer than ``minimum`` cells.

    Raises ValueError if fewer than two labels are left.
    """
    names = _text(labels)
    names = names.mask(names.isin([name for name in names.dropna().unique() if means_no_label(name)]))
    n_cells = names.value_counts()
    kept = sorted(n_cells.index[n_cells >= minimum])
    if len(kept) < 2:
        msg = (
            f"{len(kept)} labels have at least {minimum} cells, of {len(n_cells)}; at least two are needed. "
            "Merge small labels, or give another labels_key."
        )
        raise ValueError(msg)
    return pd.Index(kept).get_indexer(names.to_numpy()), [str(name) for name in kept]


def _text(column: pd.Series | Sequence[str] | np.ndarray) -> pd.Series:
    """Categories as text, NA where they are missing."""
    codes, names = numbered(column)
    return pd.Series([*names, pd.NA], dtype="string").take(codes).reset_index(drop=True)


def random_splits(codes: np.ndarray, *, seeds: int, test_size: float) -> list[Split]:
    """One split per seed, each label in the same share on both sides; cells with the code -1 are left out.

    Raises ValueError if there is no seed, or one side would lack a label.
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


def random_folds(
    codes: np.ndarray,
    *,
    seeds: int | None = None,
    test_size: float = 0.2,
    divisions: int | None = None,
    copies: np.ndarray | None = None,
) -> list[Split]:
    """Stratified folds, each held out in turn; if more splits are wanted than there are folds, of further divisions.

    Cells with the code -1 are left out. The share of a fold is taken as one of a whole number; without ``seeds`` there
    are whole ``divisions``, by default `N_DIVISIONS` of up to `FEW_CELLS` cells, and one of more. ``copies`` is the
    same number for cells with the same counts, which stay on one side ``(cells,)``. Raises ValueError if there is no
    seed, or the share is not between 0 and 1.
    """
    if (seeds is not None and seeds < 1) or not 0 < test_size < 1:
        msg = f"seeds={seeds} and test_size={test_size}: at least one seed, and a share between 0 and 1 are needed."
        raise ValueError(msg)
    if seeds is not None:
        count(seeds=seeds)
    n_folds = max(2, round(1 / test_size))
    rows = np.flatnonzero(codes >= 0)
    if seeds is None:
        seeds = n_folds * (divisions or (N_DIVISIONS if len(rows) <= FEW_CELLS else 1))
    alike = rows if copies is None else copies[rows]
    found = []
    for seed in range(seeds):
        division, fold = divmod(seed, n_folds)
        held_out = stratified(codes[rows], n_folds, copies=alike, seed=division) == fold
        train = rows[~held_out]
        test = rows[held_out]
        found.append(Split(RANDOM, seed, "", train, test[np.isin(codes[test], codes[train])]))
    return found


def stratified(codes: np.ndarray, n_folds: int, *, copies: np.ndarray, seed: int = 0) -> np.ndarray:
    """Fold of each cell ``(cells,)``: of each label about as many cells in each, copies of a cell in one."""
    rng = np.random.default_rng(seed)
    first, of_cell = np.unique(copies, return_index=True, return_inverse=True)[1:]
    shuffled = rng.permutation(len(first))
    by_label = shuffled[np.argsort(codes[first][shuffled], kind="stable")]
    fold = np.empty(len(first), dtype=np.int64)
    fold[by_label] = np.arange(len(first)) % n_folds
    return np.asarray(fold[of_cell])


def inner_folds(
    codes: np.ndarray, *, copies: np.ndarray, batches: np.ndarray | None, seed: int
) -> np.ndarray:
    """Fold of each training cell, to choose in ``(cells,)``: whole batches if they are held out outside, too."""
    if batches is not None and len(np.unique(batches)) > 1:
        return _together(pd.Series(batches), N_INNER)
    return stratified(codes, N_INNER, copies=copies, seed=seed)


def _together(batches: pd.Series, n_folds: int) -> np.ndarray:
    """Fold of each cell: whole batches, the largest first, each to the smallest fold."""
    n_cells = batches.value_counts()
    sizes = np.zeros(min(len(n_cells), n_folds))
    fold = {}
    for name, n in n_cells.items():
        fold[name] = int(sizes.argmin())
        sizes[fold[name]] += n
    return np.asarray(batches.map(fold), dtype=np.int64)


def batch_splits(
    codes: np.ndarray,
    batches: pd.Series | Sequence[str] | np.ndarray,
    *,
    copies: np.ndarray | None = None,
    least: int = 1,
    least_asked: int = 1,
) -> list[Split]:
    """Each batch held out in turn; of more than `MAX_FOLDS` batches several at a time, of about as many cells.

    A batch of which fewer than ``least_asked`` cells can be asked about is not held out. A cell whose label the other
    batches do not have is not asked about: nothing could be learned of it. A cell that is in a held-out batch, too, is
    not learned from. Cells with the code -1 are left out; a label needs ``least`` training cells for its cells to be
    asked about; ``copies`` are as of :func:`random_folds`. Raises ValueError if a cell has no batch, there is one batch
    only, or none can be held out.
    """
    names = _text(batches)
    if names.isna().any():
        msg = f"{int(names.isna().sum())} cells have no batch. Name it, or leave these cells out."
        raise ValueError(msg)
    n_cells = names[codes >= 0].value_counts()
    if len(n_cells) < 2:
        msg = f"Only the batch {n_cells.index.tolist()} has labelled cells; to hold one out, two are needed."
        raise ValueError(msg)
    fold = _together(names, MAX_FOLDS)
    found = []
    for number in range(fold.max() + 1):
        held_out = fold == number
        learned = (codes >= 0) & ~held_out
        if copies is not None:
            learned &= ~np.isin(copies, copies[held_out])
        train = np.flatnonzero(learned)
        enough = np.flatnonzero(np.bincount(codes[train], minlength=codes.max() + 1) >= least)
        test = np.flatnonzero(held_out & np.isin(codes, enough))
        if len(test) >= least_asked and len(enough) > 1:
            alike = tuple(sorted(names[held_out & (codes >= 0)].unique()))
            found.append(Split(HELD_OUT, 0, ", ".join(alike), train, test, alike))
    if not found:
        few = f", of at least {least_asked} cells" if least_asked > 1 else ""
        msg = f"No batch can be held out: none shares its labels{few} with the others. Leave out batch_key."
        raise ValueError(msg)
    return sorted(found, key=lambda split: split.held_out)
