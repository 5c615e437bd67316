"""How well Geneformer predicts hidden genes, beside predictors that know no biology."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cellprior.model.geneformer._inputs import mask_tokens
from cellprior.model.geneformer._loss import gene_scores
from cellprior.model.geneformer._module import GeneformerModule
from cellprior.model.learning._masked import MODEL, MaskedScores
from cellprior.model.learning._rank_floors import RankFloors


@torch.no_grad()
def masked_scores(
    module: GeneformerModule, counts: Tensor, floor: RankFloors, *, share: float, rng: np.random.Generator
) -> MaskedScores:
    """Accuracy and cross-entropy (nats) of hidden genes, each of which is one of all that the vocabulary has.

    Parameters
    ----------
    module
        In eval mode.
    counts
        Raw counts over the vocabulary ``(cells, n_genes)``.
    floor
        Fitted to other cells.
    share
        Of the tokens of a cell that is hidden.
    rng
        Draws them.
    """
    tokens = module.tokens(counts)
    drawn = mask_tokens(
        tokens.cpu().numpy(),
        rng,
        n_tokens=module.n_tokens,
        special=module.special,
        rate=share,
        hide=1.0,
        swap=0.0,
    )
    shown, selected = (torch.from_numpy(part).to(tokens.device) for part in drawn)
    scores = gene_scores(module, tokens, shown, selected)
    logs, hits = floor.predict(tokens, selected, first=module.first_gene)
    cell = selected.nonzero()[:, 0].cpu()

    def by_cell(values: Tensor) -> Tensor:
        return torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, cell, values.cpu().double())

    measures = {
        "accuracy": {MODEL: scores[:, 1]} | hits,
        "cross_entropy": {MODEL: -scores[:, 0]} | {name: -value for name, value in logs.items()},
    }
    return MaskedScores(
        selected.sum(1),
        {
            measure: {name: by_cell(values) for name, values in of_measure.items()}
            for measure, of_measure in measures.items()
        },
    )
