"""Does a pretrained model help on my data? Metrics, baselines and protocols, with intervals and a verdict."""

from __future__ import annotations

from cellprior.evaluate._ablation import pretraining_ablation
from cellprior.evaluate._leak import batch_leak
from cellprior.evaluate._lisi import clisi, ilisi
from cellprior.evaluate._masked import masked_prediction
from cellprior.evaluate._metrics import (
    accuracy,
    balanced_accuracy,
    clustering,
    knn_predict,
    macro_f1,
    silhouette,
)
from cellprior.evaluate._protocols import few_shot, linear_probe, zero_shot
from cellprior.evaluate._report import Report, report
from cellprior.evaluate._scgraph import scgraph
from cellprior.evaluate._species import across_species, macrogenes
from cellprior.evaluate._stability import stability
from cellprior.evaluate._transfer import transfer
from cellprior.evaluate._verdict import Verdict

__all__ = [
    "Report",
    "Verdict",
    "accuracy",
    "across_species",
    "balanced_accuracy",
    "batch_leak",
    "clisi",
    "clustering",
    "few_shot",
    "ilisi",
    "knn_predict",
    "linear_probe",
    "macro_f1",
    "macrogenes",
    "masked_prediction",
    "pretraining_ablation",
    "report",
    "scgraph",
    "silhouette",
    "stability",
    "transfer",
    "zero_shot",
]


def __dir__() -> list[str]:
    return list(__all__)
