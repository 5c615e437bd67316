"""Does a pretrained model help on my data?"""

from __future__ import annotations

from cellprior.evaluate._leak import batch_leak
from cellprior.evaluate._lisi import clisi, ilisi
from cellprior.evaluate._metrics import (
    accuracy,
    balanced_accuracy,
    clustering,
    knn_predict,
    macro_f1,
    silhouette,
)
from cellprior.evaluate._scgraph import scgraph

__all__ = [
    "accuracy",
    "balanced_accuracy",
    "batch_leak",
    "clisi",
    "clustering",
    "ilisi",
    "knn_predict",
    "macro_f1",
    "scgraph",
    "silhouette",
]
