"""How well Nicheformer predicts hidden genes, beside predictors that know no biology."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cellprior.model.learning._masked import MaskedScores
from cellprior.model.learning._ranked import scores_by_cell
from cellprior.model.nicheformer._floors import TechnologyFloors
from cellprior.model.nicheformer._inputs import mask_tokens
from cellprior.model.nicheformer._loss import gene_scores
from cellprior.model.nicheformer._module import NicheformerModule


@torch.no_grad()
def masked_scores(
    module: NicheformerModule,
    counts: Tensor,
    floor: TechnologyFloors,
    context: Tensor,
    *,
    share: float,
    rng: np.random.Generator,
) -> MaskedScores:
    """Accuracy and cross-entropy (nats) of hidden genes, each of which is one of all that the vocabulary has.

    Of raw counts over the vocabulary ``(cells, n_genes)``, a ``share`` of the genes of a cell is hidden; the module
    is in eval mode, the floor fitted to other cells, ``context`` the code of each cell ``(cells,)``.
    """
    tokens = module.tokens(counts, context=context)
    drawn = mask_tokens(tokens.cpu().numpy(), rng, n_tokens=module.n_tokens, rate=share, hide=1.0, swap=0.0)
    shown, selected = (torch.from_numpy(part).to(tokens.device) for part in drawn)
    found = gene_scores(module, tokens, shown, selected)
    return scores_by_cell(found, floor.predict(tokens, selected, context), selected)
