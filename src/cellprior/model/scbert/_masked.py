"""How well ScBERT predicts the bins of hidden genes, beside predictors that know no biology."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellprior.model.learning._masked import MODEL, MaskedScores, by_cell
from cellprior.model.scbert._floors import PRIOR, BinFloors
from cellprior.model.scbert._inputs import sample_mask
from cellprior.model.scbert._loss import hits
from cellprior.model.scbert._module import ScBERTModule


@torch.no_grad()
def masked_scores(
    module: ScBERTModule,
    counts: Tensor,
    floor: BinFloors,
    *,
    share: float,
    rng: np.random.Generator,
    batch: int = 0,
    **unread: Any,
) -> MaskedScores:
    """Accuracy and cross-entropy (nats) of the bins of hidden genes.

    Only expressed genes are hidden, as in pretraining, and all of them are. That they are expressed is known to all
    predictors: the network's probabilities are those of the bins 1 and above, together 1. Of raw counts over the
    vocabulary ``(cells, n_genes)``, a ``share`` of the expressed genes of a cell is hidden; the module is in eval
    mode, the floor fitted to other cells, see :class:`~cellprior.model.scbert._floors.BinFloors`. There is one more
    predictor here, see :func:`gene_mean_and_cell`, which has an accuracy only.
    """
    tokens = module.tokens(counts)
    drawn = sample_mask(tokens.cpu().numpy(), rng, rate=share, replace=1.0, n_bins=module.n_bins)
    selected = torch.from_numpy(drawn.selected).to(tokens.device)
    shown = tokens.masked_fill(selected, module.n_bins + 1)
    rank = tokens[selected].long() - 1
    logits = [
        module.predict_bins(module.encode(cell[None])[0, :-1][of_cell]).float()
        for cell, of_cell in zip(shown, selected, strict=True)
    ]
    predictions = {MODEL: torch.cat(logits)[:, 1:-1].log_softmax(1)}
    predictions |= floor.predict(counts, tokens, selected, batch=batch)
    correct = {name: hits(log_probability, rank) for name, log_probability in predictions.items()}
    correct["gene_mean_and_cell"] = (
        gene_mean_and_cell(floor, tokens, selected, batch=batch) == rank + 1
    ).float()
    surprise = {name: -p.gather(1, rank[:, None])[:, 0] for name, p in predictions.items()}
    cell = selected.nonzero()[:, 0].cpu()
    sums = {
        measure: {name: by_cell(values, cell, len(tokens)) for name, values in of_measure.items()}
        for measure, of_measure in (("accuracy", correct), ("cross_entropy", surprise))
    }
    return MaskedScores(selected.sum(1), sums)


def gene_mean_and_cell(floor: BinFloors, bins: Tensor, selected: Tensor, *, batch: int = 0) -> Tensor:
    """The bin nearest to the gene's mean plus what the cell's genes in sight are above theirs ``(selected genes,)``.

    For ``bins``, ``selected`` and ``batch`` see :meth:`~cellprior.model.scbert._floors.BinFloors.predict`.
    """
    of_gene = floor.bin_counts[batch if len(floor.bin_counts) > 1 else 0]  # (n_genes, n_bins)
    value = torch.arange(1, of_gene.shape[1] + 1, device=of_gene.device, dtype=of_gene.dtype)
    overall = (of_gene @ value).sum() / of_gene.sum().clamp(min=1.0)
    mean = (of_gene @ value + PRIOR * overall) / (of_gene.sum(1) + PRIOR)
    in_sight = (bins > 0) & ~selected
    above = ((bins - mean) * in_sight).sum(1) / in_sight.sum(1).clamp(min=1)
    cell, gene = selected.nonzero(as_tuple=True)
    return (mean[gene] + above[cell]).round().clamp(1, len(value)).long()
