"""How well ScGPT predicts the bins of hidden genes, beside predictors that know no biology."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellprior.model.learning._masked import MODEL, MaskedScores, by_cell
from cellprior.model.scgpt._floors import BinFloors, depth_of
from cellprior.model.scgpt._inputs import MASK, sample_mask
from cellprior.model.scgpt._module import ScGPTModule


@torch.no_grad()
def masked_scores(
    module: ScGPTModule,
    counts: Tensor,
    floor: BinFloors,
    *,
    share: float,
    rng: np.random.Generator,
    batch: int = 0,
    **unread: Any,
) -> MaskedScores:
    """Squared error of the bins of hidden genes, expressed ones; that they are is known to all predictors.

    Of raw counts over the vocabulary ``(cells, n_genes)``, a ``share`` of the expressed genes of a cell is hidden;
    the module is in eval mode, the floor fitted to other cells.
    """
    tokens = module.tokens(counts)
    hidden = torch.from_numpy(sample_mask(tokens.value.cpu().numpy(), share, rng)).to(tokens.gene.device)
    shown = tokens._replace(value=tokens.value.masked_fill(hidden, MASK))
    cell, place = hidden.nonzero(as_tuple=True)
    truth = tokens.value[cell, place].float()
    depth = depth_of(tokens.length).to(cell.device)[cell]
    predictions = floor.predict(tokens.gene[cell, place], depth)
    domain = batch if module.batch_norm is not None else None
    code = torch.tensor([batch], device=cell.device)
    found = torch.zeros_like(tokens.value, dtype=torch.float32)
    for some in module.groups(tokens.length):
        part = module.of(shown, some)
        bins, _ = module.predict_bins(module.encode(part, domain=domain), batch=code.expand(len(some)))
        found[some.to(found.device), : bins.shape[1]] = bins.float()
    predictions[MODEL] = found[cell, place]

    of_cell = cell.cpu()
    errors = {
        name: by_cell((guess - truth).square(), of_cell, len(hidden)) for name, guess in predictions.items()
    }
    return MaskedScores(hidden.sum(1), {"squared_error": errors})
