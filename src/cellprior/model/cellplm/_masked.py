"""How well CellPLM predicts the counts of hidden genes, beside predictors that know no biology."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi.distributions import NegativeBinomial
from torch import Tensor
from torch.distributions import Poisson

from cellprior.model._masked import MODEL, MaskedScores
from cellprior.model.cellplm._inputs import sample_mask
from cellprior.model.cellplm._loss import GeneMeans

if TYPE_CHECKING:
    from cellprior.model.cellplm._module import CellPLMModule

MIN_MEAN = 1e-4  # of all predictors, lest a count of a gene that no training cell has cost without bound


@torch.no_grad()
def masked_scores(
    module: CellPLMModule,
    counts: Tensor,
    floor: GeneMeans,
    *,
    share: float,
    rng: np.random.Generator,
    measured: Tensor,
) -> MaskedScores:
    """Negative-binomial and Poisson loss (nats per gene) of the counts of hidden genes.

    The cells are one sentence, three quarters of them with hidden genes, as in pretraining. In the training loss, the
    means of the hidden genes are scaled to the cell's true sum of them, which gives part of the answer away; here
    those of all predictors are scaled to what is in sight of the cell. Covariates of the decoder are averaged over.

    Parameters
    ----------
    module
        In eval mode.
    counts
        Raw counts over the vocabulary ``(cells, n_genes)``.
    floor
        Fitted to other cells: ``gene_means``, each gene's share of the counts at the cell's depth. Beside it,
        ``equal_shares``, the same for all genes.
    share
        Most frequent share of the genes of a cell that is hidden, expressed or not, see
        :func:`~cellprior.model.cellplm._inputs.sample_mask`.
    rng
        Draws them.
    measured
        Which genes were measured ``(n_genes,)``.
    """
    hidden = (
        torch.from_numpy(sample_mask(*counts.shape, rng=rng, gene_rate=share)).to(counts.device) & measured
    )
    in_sight = ~hidden & measured
    (state,) = module.hidden_chunks([counts.masked_fill(hidden, 0.0)])
    mean, dispersion = module.decode(module.latent.mean(state))
    predictions = {
        MODEL: (mean, dispersion),
        "gene_means": (floor.share[0], floor.dispersion[0]),
        "equal_shares": (torch.ones_like(floor.share[0]), floor.dispersion[0]),
    }
    sums: dict[str, dict[str, Tensor]] = {"negative_binomial": {}, "poisson": {}}
    # the gamma functions of a large dispersion cancel out: float32 would leave two digits
    counts = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)
    depth = (counts * in_sight).sum(1, keepdim=True)
    for name, (shares, theta) in predictions.items():
        shares, theta = shares.to(counts.dtype), theta.to(counts.dtype)
        scaled = shares * depth / (shares * in_sight).sum(1, keepdim=True).clamp(min=1e-12)
        scaled = scaled.clamp(min=MIN_MEAN)
        for measure, distribution in (
            ("negative_binomial", NegativeBinomial(mu=scaled, theta=theta.expand_as(scaled))),
            ("poisson", Poisson(scaled)),
        ):
            sums[measure][name] = -(distribution.log_prob(counts) * hidden).sum(1)
    return MaskedScores(hidden.sum(1), sums)
