"""Classifiers that read labels off an embedding, or off genes: numbers of labels in, numbers of labels out."""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from threadpoolctl import threadpool_limits

Matrix: TypeAlias = np.ndarray | sp.csr_matrix

STRENGTHS = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)  # inverse, of the L2 penalty
L1_STRENGTH = 0.1  # always the best in the comparison it is from
N_INNER = 3


def one_scale(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Center each dimension and divide all by one number, both of the training cells.

    Dividing each dimension by its own deviation would give noise the weight of signal: it makes the flat spectrum of a
    neural embedding look two to three times better than a PCA when labels are few.

    Parameters
    ----------
    train, others
        Embeddings ``(cells, dimensions)``; the mean variance of a dimension of ``train`` becomes 1.
    """
    mean = train.mean(axis=0)
    scale = float(np.sqrt(train.var(axis=0).mean())) or 1.0
    return [((x - mean) / scale).astype(np.float64) for x in (train, *others)]


def linear(
    train: np.ndarray, codes: np.ndarray, test: np.ndarray, *, seed: int = 0, tuned: bool = True
) -> np.ndarray:
    """Multinomial logistic regression on one global scale, its L2 penalty chosen within the training cells.

    Parameters
    ----------
    train, test
        Embeddings ``(cells, dimensions)``.
    codes
        Labels of the training cells.
    seed
        Of the inner folds.
    tuned
        Choose the penalty; otherwise it is 1, for cells too few to choose with.

    Returns
    -------
    Labels of the test cells.
    """
    train, test = one_scale(train, test)
    if train.shape[1] > len(train):  # the weights lie in the span of the training cells: nothing is lost
        axes = np.linalg.svd(train, full_matrices=False)[2].T
        train, test = train @ axes, test @ axes
    folds = min(N_INNER, int(np.unique(codes, return_counts=True)[1].min()))
    model: Any = LogisticRegression(C=1.0, max_iter=1000, tol=1e-3)
    if tuned and folds > 1:
        inner = StratifiedKFold(folds, shuffle=True, random_state=seed)
        model = LogisticRegressionCV(
            Cs=STRENGTHS, cv=inner, scoring="balanced_accuracy", max_iter=1000, tol=1e-3
        )
    return np.asarray(_fitted(model, train, codes).predict(test))


def sparse_on_genes(train: Matrix, codes: np.ndarray, test: Matrix) -> np.ndarray:
    """L1 logistic regression on log-normalised genes, one label against the rest [Boiarsky et al., 2023].

    The baseline that equals fine-tuned scBERT on Zheng68K: ``liblinear``, C = 0.1, no scaling, no selection of genes
    [Boiarsky et al., A deep dive into single-cell RNA sequencing foundation models, bioRxiv 2023.10.19.563100].

    Parameters
    ----------
    train, test
        Log-normalised expression ``(cells, genes)``.
    codes
        Labels of the training cells.
    """
    model = LogisticRegression(l1_ratio=1, solver="liblinear", C=L1_STRENGTH, random_state=0)
    return np.asarray(_fitted(OneVsRestClassifier(model), train, codes).predict(test))


def nearest_centroid(train: np.ndarray, codes: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Label of the nearest mean of the training cells of a label, by Euclidean distance."""
    labels = np.unique(codes)
    centroids = np.stack([train[codes == label].mean(axis=0, dtype=np.float64) for label in labels])
    return np.asarray(labels[cdist(test, centroids).argmin(axis=1)])


def largest(codes: np.ndarray, n_test: int) -> np.ndarray:
    """The most frequent label, for all."""
    values, n_cells = np.unique(codes, return_counts=True)
    return np.full(n_test, values[n_cells.argmax()])


def _fitted(model: Any, x: Matrix, codes: np.ndarray) -> Any:
    # the products are so small that several threads of BLAS spend their time on waiting for each other
    with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        # weak penalties need not converge to be compared; the chosen one is as good as its held-out score
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)  # attributes that are not read here change their shape
        return model.fit(x, codes)
