"""Scores with intervals: the same cells are drawn again for all methods, so that differences are paired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from cellprior.evaluate._metrics import f1
from cellprior.evaluate._splits import Split

N_DRAWS = 1000
LEVEL = 0.95
CLASS_SCORES = ("macro_f1", "balanced_accuracy", "accuracy")

Draws: TypeAlias = np.ndarray
"""The score itself, then that of each draw ``(1 + draws,)``."""


class Resampling:
    """A bootstrap of cells within a bootstrap of splits, the same for everything that is compared with it.

    A draw weighs each cell by a Poisson variable of mean 1, so that a cell which several splits ask about weighs the
    same in all of them, and takes as many of the splits (seeds, or held-out batches) as there are, with repeats
    [Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Oza and Russell, Online bagging, 2001]. Splits that
    hold out the same batch are taken together, and then drawn again among themselves: two fits are not two batches.
    The interval is that of percentiles. With two or three held-out batches it is about as wide as they differ, and
    still rough.

    Parameters
    ----------
    n_obs
        Cells of the data.
    splits
        Of one kind.
    n_draws
        Bootstrap draws.
    seed
        Of the draws.
    """

    def __init__(self, n_obs: int, splits: Sequence[Split], *, n_draws: int = N_DRAWS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        tested = np.unique(np.concatenate([split.test for split in splits]))
        self.splits = list(splits)
        self._place = np.full(n_obs, -1, dtype=np.int64)
        self._place[tested] = np.arange(len(tested))
        drawn = rng.poisson(1.0, (len(tested), n_draws)).astype(np.uint8)
        self._weights = np.concatenate([np.ones((len(tested), 1), dtype=np.uint8), drawn], axis=1)
        taken = _take(rng, [split.held_out or i for i, split in enumerate(splits)], n_draws)
        self._taken = np.concatenate([np.ones((1, len(splits)), dtype=taken.dtype), taken])

    def mean(self, values: Sequence[np.ndarray]) -> Draws:
        """Mean of one number per cell, for each split ``(cells,)`` in the order of its ``test``."""
        return self._over_splits(
            [
                np.asarray(of_cells, dtype=np.float64)
                @ weights
                / np.maximum(weights.sum(axis=0, dtype=float), 1)
                for of_cells, weights in zip(values, self._by_split(), strict=True)
            ]
        )

    def quantile(self, values: Sequence[np.ndarray], q: float) -> Draws:
        """The smallest number of a cell that a share ``q`` of the cells does not exceed; values as of :meth:`mean`."""
        of_splits = []
        for of_cells, weights in zip(values, self._by_split(), strict=True):
            order = np.argsort(of_cells)
            up_to = weights[order].cumsum(axis=0, dtype=np.int64)  # (cells, 1 + draws)
            of_splits.append(np.asarray(of_cells)[order][(up_to >= q * up_to[-1]).argmax(axis=0)])
        return self._over_splits(of_splits)

    def classification(self, codes: np.ndarray, predicted: Sequence[np.ndarray]) -> dict[str, Draws]:
        """Macro-F1, balanced accuracy and accuracy, over the labels that a split's cells have.

        Parameters
        ----------
        codes
            Label of each cell of the data ``(n_obs,)``.
        predicted
            For each split, the labels given to its ``test`` ``(cells,)``.
        """
        scores = [
            _class_scores(codes[split.test], given, weights)
            for split, given, weights in zip(self.splits, predicted, self._by_split(), strict=True)
        ]
        return {name: self._over_splits([score[name] for score in scores]) for name in CLASS_SCORES}

    def _by_split(self) -> Iterator[np.ndarray]:
        """Weights of each split's cells ``(cells, 1 + draws)``."""
        return (self._weights[self._place[split.test]] for split in self.splits)

    def _over_splits(self, scores: Sequence[np.ndarray]) -> Draws:
        """Mean over the splits that a draw takes."""
        return np.asarray((np.stack(scores, axis=1) * self._taken).sum(axis=1) / len(self.splits))


def _take(rng: np.random.Generator, units: Sequence[object], n_draws: int) -> np.ndarray:
    """How often each split is taken ``(draws, splits)``: units with repeats, and of each unit its splits with repeats.

    Parameters
    ----------
    rng
        Draws.
    units
        Of each split; all have as many.
    n_draws
        How many.
    """
    number = pd.factorize(np.array([str(unit) for unit in units]))[0]
    n_units = number.max() + 1
    of_units = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=n_draws)
    taken = np.empty((n_draws, len(units)), dtype=of_units.dtype)
    for unit in range(n_units):
        of_unit = np.flatnonzero(number == unit)
        shares = np.full(len(of_unit), 1 / len(of_unit))
        taken[:, of_unit] = rng.multinomial(of_units[:, unit] * len(of_unit), shares)
    return taken


def _class_scores(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of labels by draw ``(1 + draws,)``; weights are ``(cells, 1 + draws)``."""
    present = np.unique(truth)

    def by_label(label: np.ndarray) -> np.ndarray:
        """Weight of the cells of each label ``(labels, 1 + draws)``."""
        return np.stack([weights[label == k].sum(axis=0, dtype=np.float64) for k in present])

    there, given = by_label(truth), by_label(predicted)
    hit = by_label(np.where(truth == predicted, truth, -1))

    def mean(of_label: np.ndarray) -> np.ndarray:
        """A label that a draw lacks has its score of all cells: left out, rare labels would pull the draws off."""
        return np.asarray(np.where(there > 0, of_label, of_label[:, :1]).mean(axis=0))

    return {
        "macro_f1": mean(f1(hit, there, given)),
        "balanced_accuracy": mean(hit / np.maximum(there, 1)),
        "accuracy": hit.sum(axis=0) / np.maximum(there.sum(axis=0), 1),
    }


def interval(draws: Draws, *, level: float = LEVEL) -> tuple[float, float, float]:
    """The score, and where the middle ``level`` of its draws lies."""
    spread = draws[1:][~np.isnan(draws[1:])]
    if not len(spread):
        return float(draws[0]), float("nan"), float("nan")
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return float(draws[0]), float(low), float(high)


def compared(draws: Mapping[str, Draws], *, versus: str | None = None) -> pd.DataFrame:
    """A row per method: its score and interval, and its paired difference to another.

    Parameters
    ----------
    draws
        Of one score, by method.
    versus
        The method that the others are compared with; ``None`` for none.

    Returns
    -------
    Columns ``method``, ``value``, ``low``, ``high``, ``versus``, ``difference``, ``difference_low``,
    ``difference_high``; the last are NaN for ``versus`` itself.
    """
    rows = []
    for method, of_method in draws.items():
        row = dict(zip(("value", "low", "high"), interval(of_method), strict=True))
        other = None if versus in (None, method) else draws[versus]
        difference = (np.nan,) * 3 if other is None else interval(of_method - other)
        row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        rows.append({"method": method, "versus": "" if other is None else versus, **row})
    columns = ["method", "value", "low", "high", "versus", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=columns)
