"""How much of the batch an embedding knows, beyond what the labels say."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from cellprior.evaluate._inputs import as_codes, as_embedding, at_least_two

N_FOLDS = 5
MIN_CELLS = 10  # of a batch within a label: two in each fold


def batch_leak(embedding: Any, labels: Any, batches: Any, *, seed: int = 0) -> float:
    r"""How well the batch can be read from the embedding within a label: about 0 for not at all, 1 for always.

    The mean over labels of :math:`(a - 1/B) / (1 - 1/B)`, where :math:`a` is the balanced accuracy with which a
    logistic regression (L2, ``C=1``, batches weighted equally) tells the label's B batches apart, on cells left out in
    five stratified folds. Lower is better for an embedding that should not know the batch, provided that the batch is
    technical: where it is a treatment or a donor, some of this is biology. Noise scores 0, too: read it beside a score
    of the labels only. A little below 0 is 0.

    The cells of a label are divided by one number, their root mean square distance to their mean per dimension, so that
    neither the unit nor the distance between labels matters. Dimensions are not scaled one by one, which would enlarge
    those that vary little.

    Parameters
    ----------
    embedding
        ``(cells, dimensions)``.
    labels, batches
        ``(cells,)``. Within a label, a batch with fewer than 10 cells is left out.
    seed
        Of the folds.

    Returns
    -------
    NaN if no label has 10 cells of each of two batches.

    Raises
    ------
    ValueError
        If the embedding is not finite, labels or batches are missing, or all batches are the same.
    """
    embedding = as_embedding(embedding)
    label, labels_found = as_codes(labels, len(embedding))
    batch, batches_found = as_codes(batches, len(embedding), name="batches")
    n_batches = at_least_two(batches_found, name="batches")
    scores = []
    for k in range(len(labels_found)):
        large = np.bincount(batch[label == k], minlength=n_batches) >= MIN_CELLS
        if large.sum() > 1:
            rows = (label == k) & large[batch]
            scores.append(_predictability(embedding[rows], batch[rows], seed))
    return float(np.mean(scores)) if scores else float("nan")


def _predictability(embedding: np.ndarray, batch: np.ndarray, seed: int) -> float:
    """Cross-validated balanced accuracy, moved and scaled so that chance is 0."""
    embedding = embedding - embedding.mean(axis=0)
    scale = np.sqrt((embedding**2).mean())
    probe = LogisticRegression(class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed)
    predicted = cross_val_predict(probe, embedding / (scale if scale > 0 else 1.0), batch, cv=folds)
    return float(balanced_accuracy_score(batch, predicted, adjusted=True))
