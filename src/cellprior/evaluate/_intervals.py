"""Scores with intervals: the same cells are drawn again for all methods, so that differences are paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy.stats import norm as normal
from scipy.stats import t as student

from cellprior.evaluate._metrics import f1
from cellprior.evaluate._splits import Split

N_DRAWS = 1000
LEVEL = 0.95
CLASS_SCORES = ("macro_f1", "balanced_accuracy", "accuracy")

Draws: TypeAlias = np.ndarray
"""The score itself, then that of each draw, or of each unit of which it is the mean ``(1 + draws,)``."""


class Resampling:
    r"""How sure a score is, the same draws for everything that is compared.

    Random splits: a bootstrap of cells. A draw weighs each cell by a Poisson variable of mean 1, copies of a cell alike
    [Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Oza and Russell, Online bagging, 2001].

    Scores of labels are of the cells of all splits together, and each split's cells are drawn for themselves. No
    bootstrap of test cells sees that other training cells would have named all of them otherwise. Of one split, that
    adds about :math:`n_\mathrm{test} / n_\mathrm{train}` of its variance [Nadeau and Bengio, Inference for the
    generalization error, Machine Learning 52:239, 2003]. Of several splits together, it is as if one had learned from
    all cells that any of them learns from. So draws are put :math:`\sqrt{1 + n_\mathrm{answers} / n_\mathrm{learned}}`
    times as far from the score: 1.4 times for five folds. Three times five folds have .82 of their interval.

    Means over splits take as many of the splits as there are, with repeats, and a cell that several splits ask about
    weighs the same in all of them.

    Held-out batches: each batch is a unit (its splits are taken together: two fits are not two batches), and the
    interval is Student's, of the mean of the :math:`n` units, with :math:`1 / n + 1 / (n - 1)` instead of
    :math:`1 / n` in its variance, as the units share what they learn from [ibid., for a variance that is measured
    between splits]. A bootstrap of two or three units is far too sure.

    Parameters
    ----------
    n_obs
        Cells of the data.
    splits
        Of one kind.
    copies
        Number of each cell, the same for cells with the same counts ``(n_obs,)``.
    n_draws
        Bootstrap draws.
    seed
        Of the draws.
    """

    def __init__(
        self,
        n_obs: int,
        splits: Sequence[Split],
        *,
        copies: np.ndarray | None = None,
        n_draws: int = N_DRAWS,
        seed: int = 0,
    ) -> None:
        self.splits = list(splits)
        self._copies = np.arange(n_obs) if copies is None else copies
        self._n_draws, self._seed = n_draws, seed
        self._unit, units = pd.factorize(np.array([split.held_out for split in splits], dtype=object))
        self.units = [str(unit) for unit in units] if len(units) > 1 else []
        """Batches that were held out; none if the interval is of cells."""
        self.n_units = len(self.units)

    def mean(self, values: Sequence[np.ndarray]) -> Draws:
        """Mean of one number per cell, for each split ``(cells,)`` in the order of its ``test``."""
        if self.n_units:
            return self._of_units([np.asarray([np.mean(of_cells)]) for of_cells in values])
        return self._over_splits(
            [
                np.asarray(of_cells, dtype=np.float64)
                @ weights
                / np.maximum(weights.sum(axis=0, dtype=float), 1)
                for of_cells, weights in zip(values, self._for_all_splits, strict=True)
            ]
        )

    def quantile(self, values: Sequence[np.ndarray], q: float) -> Draws:
        """The smallest number of a cell that a share ``q`` of the cells does not exceed; values as of :meth:`mean`."""
        of_splits = []
        for of_cells, weights in zip(values, self._for_all_splits, strict=True):
            order = np.argsort(of_cells)
            up_to = weights[order].cumsum(axis=0, dtype=np.int64)  # (cells, 1 + draws)
            of_splits.append(np.asarray(of_cells)[order][(up_to >= q * up_to[-1]).argmax(axis=0)])
        return self._over_splits(of_splits)

    def classification(self, codes: np.ndarray, predicted: Sequence[np.ndarray]) -> dict[str, Draws]:
        """Macro-F1, balanced accuracy and accuracy, over the labels that the cells have.

        ``codes`` are the labels of the cells of the data ``(n_obs,)``, ``predicted`` those given to the ``test`` of
        each split ``(cells,)``.
        """
        if self.n_units:
            once = [
                _class_scores(codes[split.test], given, np.ones((len(given), 1), dtype=np.float32))
                for split, given in zip(self.splits, predicted, strict=True)
            ]
            return {name: self._of_units([score[name] for score in once]) for name in CLASS_SCORES}
        truth = np.concatenate([codes[split.test] for split in self.splits])
        pooled = _class_scores(truth, np.concatenate(list(predicted)), self._for_each_split)
        return {name: _widened(pooled[name], self._wider) for name in CLASS_SCORES}

    def interval(self, draws: Draws) -> tuple[float, float, float]:
        """A score, or a difference of two, and where it lies in 95 % of such data."""
        if not self.n_units:
            return interval(draws)
        half = float(student.ppf((1 + LEVEL) / 2, self.n_units - 1) * self.error(draws))
        return float(draws[0]), float(draws[0]) - half, float(draws[0]) + half

    def error(self, draws: Draws) -> float:
        """Standard error of a score, or of a difference of two."""
        spread = float(np.nanstd(draws[1:], ddof=1))
        n = self.n_units
        return float(spread * np.sqrt(1 / n + 1 / (n - 1))) if n else spread

    def sure(self) -> float:
        """Standard errors between a gain that is found four times of five and none."""
        of: Any = student(self.n_units - 1) if self.n_units else normal
        return float(of.ppf((1 + LEVEL) / 2) + of.ppf(0.8))

    @cached_property
    def _for_each_split(self) -> np.ndarray:
        """Weights of the cells of all splits, drawn for each split anew, float32 ``(cells, 1 + draws)``."""
        rngs = (np.random.default_rng((self._seed, i)) for i in range(len(self.splits)))
        drawn = [self._drawn(split.test, rng) for split, rng in zip(self.splits, rngs, strict=True)]
        return np.concatenate(drawn).astype(np.float32)

    @cached_property
    def _for_all_splits(self) -> list[np.ndarray]:
        """Weights of each split's cells ``(cells, 1 + draws)``, of a cell the same in all."""
        tested = np.unique(np.concatenate([split.test for split in self.splits]))
        weights = self._drawn(tested, np.random.default_rng(self._seed))
        return [weights[np.searchsorted(tested, split.test)] for split in self.splits]

    def _drawn(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Weights of some cells, 1 first ``(cells, 1 + draws)``."""
        alike = np.unique(self._copies[rows], return_inverse=True)[1]
        drawn = rng.poisson(1.0, (alike.max(initial=-1) + 1, self._n_draws)).astype(np.uint8)[alike]
        return np.concatenate([np.ones((len(rows), 1), dtype=np.uint8), drawn], axis=1)

    @cached_property
    def _wider(self) -> float:
        """How much farther from the score its draws are than those of a bootstrap of test cells."""
        learned = np.unique(np.concatenate([split.train for split in self.splits]))
        n_answers = sum(len(split.test) for split in self.splits)
        return float(np.sqrt(1 + n_answers / len(learned))) if len(learned) else 1.0

    def _over_splits(self, scores: Sequence[np.ndarray]) -> Draws:
        """Mean over the splits that a draw takes."""
        n = len(self.splits)
        taken = np.random.default_rng((self._seed, n)).multinomial(n, np.full(n, 1 / n), size=self._n_draws)
        taken = np.concatenate([np.ones((1, n), dtype=taken.dtype), taken])
        return np.asarray((np.stack(scores, axis=1) * taken).sum(axis=1) / n)

    def _of_units(self, scores: Sequence[np.ndarray]) -> Draws:
        """Mean of the units, then each of them."""
        of_splits = np.array([score[0] for score in scores])
        units = np.array([of_splits[self._unit == unit].mean() for unit in range(self.n_units)])
        return np.concatenate([[units.mean()], units])


def _widened(draws: np.ndarray, wider: float) -> Draws:
    """Draws around the score itself, so many times as far from it."""
    spread = draws[1:]
    return np.concatenate([draws[:1], draws[0] + wider * (spread - spread.mean())])


def _class_scores(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of labels by draw ``(1 + draws,)``; weights are ``(cells, 1 + draws)``."""
    present = np.unique(truth)

    def by_label(label: np.ndarray) -> np.ndarray:
        """Weight of the cells of each label ``(labels, 1 + draws)``."""
        return np.asarray((label == present[:, None]).astype(np.float32) @ weights)

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


def compared(
    draws: Mapping[str, Draws],
    *,
    versus: str | None = None,
    of: Callable[[Draws], tuple[float, float, float]] = interval,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> pd.DataFrame:
    """A row per method: its score and interval, and its paired difference to another.

    ``draws`` are of one score, by method; ``of`` gives the interval, and the score and the ends of its interval lie
    ``within``. The columns are ``method``, ``value``, ``low``, ``high``, ``versus``, ``difference``,
    ``difference_low``, ``difference_high``; the last are NaN for ``versus`` itself.
    """
    widest = within[1] - within[0]
    rows = []
    for method, of_method in draws.items():
        row = dict(zip(("value", "low", "high"), np.clip(of(of_method), *within), strict=True))
        other = None if versus in (None, method) else draws[versus]
        difference = (np.nan,) * 3 if other is None else np.clip(of(of_method - other), -widest, widest)
        row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        rows.append({"method": method, "versus": "" if other is None else versus, **row})
    columns = ["method", "value", "low", "high", "versus", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=columns)
