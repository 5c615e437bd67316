"""How well UCE says which genes a cell expresses, beside predictors that know no biology."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellprior.model.learning._masked import MODEL, MaskedScores
from cellprior.model.uce._floors import PresenceFloors
from cellprior.model.uce._loss import asked

N_QUERIES = 200


@torch.no_grad()
def masked_scores(
    module: Any,
    counts: Tensor,
    floor: PresenceFloors,
    *,
    share: float,
    rng: np.random.Generator,
    measured: Tensor,
    **unread: Any,
) -> MaskedScores:
    """Cross-entropy and accuracy of whether genes are expressed, half of which are, and of those most are hidden.

    Of raw counts over the vocabulary ``(cells, n_genes)``, a ``share`` of the expressed genes of a cell is hidden;
    the module is in eval mode, the floor fitted to other cells, ``measured`` is ``(n_genes,)``.
    """
    task = asked(module, counts, floor, measured, rng, hide_rate=share, n_queries=N_QUERIES)
    logits = module.predict_pairs(module.latent_of(module.pool(task.tokens)), task.query)
    found = {MODEL: logits, **task.floors}

    def by_cell(values: Tensor) -> Tensor:
        return values.double().sum(1).cpu()

    entropy = {
        name: by_cell(F.binary_cross_entropy_with_logits(z, task.target, reduction="none"))
        for name, z in found.items()
    }
    right = {name: by_cell((z > 0) == (task.target > 0)) for name, z in found.items()}
    n_asked = torch.full((len(logits),), logits.shape[1])
    return MaskedScores(n_asked, {"cross_entropy": entropy, "accuracy": right})
