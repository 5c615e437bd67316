"""Classifiers that read labels off an embedding, or off genes: numbers of labels in, numbers of labels out."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from threadpoolctl import threadpool_limits

from cellprior.evaluate._methods import Space
from cellprior.evaluate._neighbors import Chosen, macro_f1
from cellprior.evaluate._splits import Split

Matrix: TypeAlias = np.ndarray | sp.csr_matrix

STRENGTHS = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)  # inverse, of the L2 penalty
L1_STRENGTH = 0.1  # always the best in the comparison it is from
N_INNER = 3
PENALTIES = (0.01, 0.1, 1.0)  # of ridge, times the mean squared length of a training cell
FIXED_PENALTY = 0.3  # where nothing is chosen
L2_STRENGTHS, L1_STRENGTHS = (0.01, 0.1, 1.0), (0.1, 1.0)
N_STEPS = 50  # of logistic regression
MOST_DIMENSIONS = 512  # that a logistic regression reads; ridge reads more
MOST_TUNED = 2000  # training cells with which the L1 penalty is chosen


def one_scale(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Center each dimension and divide all by one number, both of the training cells.

    Dividing each dimension by its own deviation would give noise the weight of signal: it makes the flat spectrum of
    a neural embedding look two to three times better than a PCA when labels are few. The mean variance of a dimension
    of ``train`` becomes 1.
    """
    mean = train.mean(axis=0)
    scale = float(np.sqrt(train.var(axis=0).mean())) or 1.0
    return [((x - mean) / scale).astype(np.float64) for x in (train, *others)]


def linear(
    train: np.ndarray, codes: np.ndarray, test: np.ndarray, *, seed: int = 0, tuned: bool = True
) -> np.ndarray:
    """Labels of test cells by multinomial logistic regression on one global scale ``(cells, dimensions)``.

    Its L2 penalty is chosen within the training cells, with inner folds drawn by ``seed``, if ``tuned``; else it is
    1, for cells too few to choose with.
    """
    train, test = _in_span(*one_scale(train, test))
    folds = min(N_INNER, int(np.unique(codes, return_counts=True)[1].min()))
    if not tuned:
        labels, numbers = np.unique(codes, return_inverse=True)
        x = _with_constant(train)
        weights = logistic(x, numbers, len(labels), [(1.0, np.ones(len(codes), dtype=bool))])[0]
        return np.asarray(labels[(_with_constant(test) @ weights).argmax(axis=1)])
    model: Any = LogisticRegression(C=1.0, max_iter=1000, tol=1e-3)
    if folds > 1:
        inner = StratifiedKFold(folds, shuffle=True, random_state=seed)
        model = LogisticRegressionCV(
            Cs=STRENGTHS, cv=inner, scoring="balanced_accuracy", max_iter=1000, tol=1e-3
        )
    return np.asarray(_fitted(model, train, codes).predict(test))


class Ridge:
    """Ridge regression on indicators of the labels, in closed form, over features or over products of cells.

    Features ``(cells, features)`` have the mean of the training cells at the origin; with ``products``, these are
    products with the training cells ``(cells, training cells)``.
    """

    def __init__(self, train: np.ndarray, test: np.ndarray, *, products: bool = False) -> None:
        if not products and train.shape[1] > len(train):
            train, test, products = train @ train.T, test @ train.T, True
        self.train, self.test = train, test
        self._products = products
        self._square = train[:0] if products else train.T @ train
        self._unit = float(np.trace(train) if products else (train**2).sum()) / len(train) or 1.0

    def weights(self, rows: np.ndarray, targets: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
        """By which features, or products, give targets, learned from some training cells, for each penalty."""
        if self._products:
            square, right = np.take(self.train[rows], rows, axis=1), targets
        else:
            others = np.delete(self.train, rows, axis=0)
            square, right = self._square - others.T @ others, self.train[rows].T @ targets
        found = []
        for penalty in penalties:
            penalised = square.copy()
            penalised.flat[:: len(square) + 1] += penalty * self._unit
            # of a symmetric matrix the transpose is the same, and in the order in which LAPACK works in place
            factor = cho_factor(penalised.T, lower=True, overwrite_a=True, check_finite=False)
            solved = cho_solve(factor, right, check_finite=False)
            if self._products:
                whole = np.zeros((len(self.train), targets.shape[1]), dtype=solved.dtype)
                whole[rows] = solved
                solved = whole
            found.append(solved)
        return found

    def within(self, codes: np.ndarray, folds: np.ndarray, n_labels: int) -> list[np.ndarray]:
        """Names of the training cells, each by the other folds, for each of `PENALTIES`."""
        said = [np.empty(len(codes), dtype=np.int64) for _ in PENALTIES]
        for fold in np.unique(folds):
            rows, asked = np.flatnonzero(folds != fold), folds == fold
            targets, mean = _targets(codes[rows], n_labels)
            for names, weights in zip(said, self.weights(rows, targets, PENALTIES), strict=True):
                names[asked] = (self.train[asked] @ weights + mean).argmax(axis=1)
        return said

    def predict(self, codes: np.ndarray, n_labels: int, penalty: float = FIXED_PENALTY) -> np.ndarray:
        """Names of the test cells, for one or more labellings of the training cells ``(..., training cells)``."""
        said = self.scores(np.atleast_2d(codes), n_labels, penalty).argmax(axis=2)
        return np.asarray(said if codes.ndim > 1 else said[0])

    def scores(self, codes: np.ndarray, n_labels: int, penalty: float) -> np.ndarray:
        """What each test cell has of each label, for each labelling ``(labellings, cells, labels)``."""
        both = [_targets(labelling, n_labels) for labelling in codes]
        targets = np.concatenate([of for of, _ in both], axis=1)
        weights = self.weights(np.arange(len(self.train)), targets, [penalty])[0]
        found = (self.test @ weights).reshape(len(self.test), len(codes), n_labels)
        return np.asarray((found + np.stack([mean for _, mean in both])).transpose(1, 0, 2))


def _targets(codes: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Indicators of the labels around their means ``(cells, labels)``, and the means."""
    one = np.eye(n_labels, dtype=np.float32)[codes]
    mean = one.mean(axis=0)
    return one - mean, mean


def best_penalty(ridge: Ridge, codes: np.ndarray, folds: np.ndarray, n_labels: int) -> tuple[float, float]:
    """The penalty that names the training cells best, and its macro-F1."""
    scores = [macro_f1(codes, said, n_labels) for said in ridge.within(codes, folds, n_labels)]
    best = int(np.argmax(scores))
    return PENALTIES[best], scores[best]


def best_ridge(ridge: Ridge, codes: np.ndarray, folds: np.ndarray, n_labels: int) -> Chosen:
    """Names of the test cells, with the penalty that names the training cells best."""
    penalty, score = best_penalty(ridge, codes, folds, n_labels)
    return Chosen(ridge.predict(codes, n_labels, penalty), score, "ridge regression")


def best_linear(
    spaces: Sequence[Space], split: Split, codes: np.ndarray, folds: np.ndarray, n_labels: int
) -> Chosen:
    """Names of the test cells by ridge or logistic regression, in the space in which it names training cells best."""
    found = []
    sized = [
        (space, size) for space in spaces for size in space.sizes[::2]
    ]  # fits take longer than neighbours
    for space, size in sized:
        of = f" on {size} components of {space.words}" if space.words else ""
        train, test = one_scale(*(space.values[rows, :size] for rows in (split.train, split.test)))
        ridge = Ridge(train.astype(np.float32), test.astype(np.float32))
        found.append((best_ridge(ridge, codes, folds, n_labels), of))
        if train.shape[1] <= MOST_DIMENSIONS:
            found.append((_best_logistic(train, codes, test, folds, n_labels), of))
    chosen, of = max(found, key=lambda pair: pair[0].inner)
    return chosen._replace(words=f"{chosen.words}{of}")


def _best_logistic(
    train: np.ndarray, codes: np.ndarray, test: np.ndarray, folds: np.ndarray, n_labels: int
) -> Chosen:
    train, test = _in_span(train, test)
    x, each = _with_constant(train), np.unique(folds)
    plans = [(strength, folds != fold) for strength in L2_STRENGTHS for fold in each]
    weights = logistic(x, codes, n_labels, plans)
    said = np.empty((len(L2_STRENGTHS), len(codes)), dtype=np.int64)
    for i, ((_, learned), of_plan) in enumerate(zip(plans, weights, strict=True)):
        said[i // len(each), ~learned] = (x[~learned] @ of_plan).argmax(axis=1)
    inner = [macro_f1(codes, names, n_labels) for names in said]
    best = int(np.argmax(inner))
    fitted = logistic(x, codes, n_labels, [(L2_STRENGTHS[best], np.ones(len(codes), dtype=bool))])[0]
    return Chosen((_with_constant(test) @ fitted).argmax(axis=1), inner[best], "logistic regression")


def _in_span(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the span of the training cells, if that is smaller: weights lie there, so nothing is lost."""
    if train.shape[1] <= len(train):
        return train, test
    axes = np.linalg.svd(train, full_matrices=False)[2].T
    return train @ axes, test @ axes


def _with_constant(x: np.ndarray) -> np.ndarray:
    return np.hstack([x, np.ones((len(x), 1))]).astype(np.float32)


def logistic(
    x: np.ndarray,
    codes: np.ndarray,
    n_labels: int,
    plans: Sequence[tuple[float, np.ndarray]],
    *,
    steps: int = N_STEPS,
) -> np.ndarray:
    """Multinomial logistic regressions with an L2 penalty, all at once.

    Each step solves with a bound of the curvature that stays the same, so that one factor of a small matrix serves
    all steps [Böhning, Multinomial logistic regression algorithm, Ann. Inst. Stat. Math. 44:197, 1992], and looks
    ahead [Nesterov, 1983]; it starts anew where the gradient points back [O'Donoghue and Candès, Found. Comput. Math.
    15:715, 2015]. The last of the features ``(cells, features)`` is a constant, which is not penalised. Each of the
    ``plans`` is a strength (inverse of the penalty), and which cells to learn from ``(cells,)``. Gives weights
    ``(plans, features, labels)``.
    """
    learned = np.stack([of for _, of in plans])  # (plans, cells)
    truth = np.ascontiguousarray(np.eye(n_labels, dtype=np.float32)[codes].T)[:, None]  # (labels, 1, cells)
    penalty = np.array([1 / strength for strength, _ in plans], dtype=np.float32)[:, None] * np.ones(
        x.shape[1], dtype=np.float32
    )
    penalty[:, -1] = 0
    squares = np.stack([x[of].T @ x[of] for of in learned])
    bound = 0.5 * squares + np.apply_along_axis(np.diag, 1, penalty + 1e-6)
    step = np.linalg.inv(bound.astype(np.float64)).astype(np.float32)
    shape = (n_labels, len(plans), x.shape[1])
    weights = ahead = np.zeros(shape, dtype=np.float32)
    ages = np.zeros((1, len(plans), 1), dtype=np.float32)
    across = np.ascontiguousarray(x.T)
    for _ in range(steps):
        scores = (ahead.reshape(-1, x.shape[1]) @ across).reshape(n_labels, len(plans), len(x))
        scores -= scores.max(axis=0)
        np.exp(scores, out=scores)
        scores *= learned / scores.sum(axis=0)
        scores -= truth * learned
        slope = (scores.reshape(-1, len(x)) @ x).reshape(shape)
        slope += penalty * ahead
        new = ahead - (slope.transpose(1, 0, 2) @ step).transpose(1, 0, 2)
        back = (slope * (new - weights)).sum(axis=(0, 2))[None, :, None] > 0
        ages = np.where(back, 0, ages + 1)
        weights, ahead = new, new + ages / (ages + 3) * (new - weights)
    return weights.transpose(1, 2, 0)


def best_sparse(train: Matrix, codes: np.ndarray, test: Matrix, folds: np.ndarray, n_labels: int) -> Chosen:
    """Names of the test cells by :func:`sparse_on_genes`, its strength chosen where cells are few.

    With many cells it is that of Boiarsky et al., and ``inner`` NaN.
    """
    if len(codes) > MOST_TUNED:
        return Chosen(sparse_on_genes(train, codes, test), np.nan, f"C = {L1_STRENGTH}")
    asked = folds == 0  # one fold, as every label is a fit
    inner = [
        macro_f1(
            codes[asked],
            _fitted(_sparse(strength), train[~asked], codes[~asked]).predict(train[asked]),
            n_labels,
        )
        for strength in L1_STRENGTHS
    ]
    best = int(np.argmax(inner))
    said = np.asarray(_fitted(_sparse(L1_STRENGTHS[best]), train, codes).predict(test))
    return Chosen(said, inner[best], f"C = {L1_STRENGTHS[best]:g}")


def best_centroid(
    spaces: Sequence[Space], split: Split, codes: np.ndarray, folds: np.ndarray, n_labels: int
) -> Chosen:
    """Names of the test cells by the nearest mean; arguments as of :func:`best_linear`."""
    found = []
    for space in spaces:
        train, test = (space.values[rows].astype(np.float64) for rows in (split.train, split.test))
        said = np.empty(len(codes), dtype=np.int64)
        for fold in np.unique(folds):
            asked = folds == fold
            said[asked] = nearest_centroid(train[~asked], codes[~asked], train[asked])
        score = macro_f1(codes, said, n_labels)
        found.append(Chosen(nearest_centroid(train, codes, test), score, space.words))
    return max(found, key=lambda chosen: chosen.inner)


def sparse_on_genes(train: Matrix, codes: np.ndarray, test: Matrix) -> np.ndarray:
    """L1 logistic regression on log-normalised genes, one label against the rest [Boiarsky et al., 2023].

    The baseline that equals fine-tuned scBERT on Zheng68K: ``liblinear``, C = 0.1, no scaling, no selection of genes
    [Boiarsky et al., A deep dive into single-cell RNA sequencing foundation models, bioRxiv 2023.10.19.563100].
    """
    return np.asarray(_fitted(_sparse(L1_STRENGTH), train, codes).predict(test))


def _sparse(strength: float) -> Any:
    model = LogisticRegression(l1_ratio=1, solver="liblinear", C=strength, random_state=0)
    return OneVsRestClassifier(model)


def nearest_centroid(train: np.ndarray, codes: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Label of the nearest mean of the training cells of a label, by Euclidean distance."""
    labels = np.unique(codes)
    centroids = np.stack([train[codes == label].mean(axis=0, dtype=np.float64) for label in labels])
    return np.asarray(labels[cdist(test, centroids).argmin(axis=1)])


def largest(codes: np.ndarray, n_test: int) -> np.ndarray:
    """The most frequent label, for all."""
    values, n_cells = np.unique(codes, return_counts=True)
    return np.full(n_test, values[n_cells.argmax()])


_random = threading.Lock()


def _fitted(model: Any, x: Matrix, codes: np.ndarray) -> Any:
    # liblinear's random numbers are those of the process: two fits at a time would take from each other's. The
    # products are so small that several threads of BLAS spend their time on waiting for each other
    with _random, warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        # weak penalties need not converge to be compared; the chosen one is as good as its held-out score
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)  # attributes that are not read here change their shape
        return model.fit(x, codes)
