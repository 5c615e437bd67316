"""How well Geneformer predicts hidden genes, beside predictors that know no biology."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cellprior.model.geneformer._inputs import mask_tokens
from cellprior.model.geneformer._loss import gene_scores
from cellprior.model.geneformer._module import GeneformerModule
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.learning._rank_floors import RankFloors
from cellprior.model.learning._ranked import scores_by_cell


@torch.no_grad()
def masked_scores(
    module: GeneformerModule, counts: Tensor, floor: RankFloors, *, share: float, rng: np.random.Generator
) -> MaskedScores:
    """Accuracy and cross-entropy (nats) of hidden genes, each of which is one of all that the vocabulary has.

    Of raw counts over the vocabulary ``(cells, n_genes)``, a ``share`` of the tokens of a cell is hidden; the module
    is in eval mode, the floor fitted to other cells.
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
    found = gene_scores(module, tokens, shown, selected)
    return scores_by_cell(found, floor.predict(tokens, selected, first=module.first_gene), selected)
