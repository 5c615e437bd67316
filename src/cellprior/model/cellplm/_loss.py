"""What CellPLM is trained on: the negative binomial of raw counts, hidden and seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cellprior.model.cellplm._inputs import sample_mask

if TYPE_CHECKING:
    from cellprior.model._training import GeneMeans
    from cellprior.model.cellplm._module import CellPLMModule

NB_EPS = 1e-10


def reconstruction_loss(
    counts: Tensor, mean: Tensor, dispersion: Tensor, mask: Tensor, denoise: bool = True
) -> Tensor:
    """Negative-binomial loss over all genes plus, if ``denoise``, over the hidden ones; mean over masked cells.

    Each term scales the decoder's mean to the cell's own total over the genes it looks at. Cells without a hidden
    gene do not count.

    Parameters
    ----------
    counts
        ``(cells, genes)``.
    mean
        Up to a factor per cell ``(cells, genes)``.
    dispersion
        Variance is ``mean + mean² / dispersion``; ``(genes,)``.
    mask
        ``True`` for hidden ``(cells, genes)``.
    """
    rows = mask.any(1)
    if not rows.any():
        return mean.sum() * 0.0
    counts, mean, mask = counts[rows], mean[rows], mask[rows]
    row, col = counts.nonzero(as_tuple=True)
    x, hidden = counts[row, col], mask[row, col]
    theta = dispersion + NB_EPS
    at_x = theta.expand_as(counts)[row, col]
    # all that depends on a count alone is 0 where the count is: nine of ten places are spared three gamma functions
    of_counts = torch.lgamma(at_x) + torch.lgamma(x + 1) - torch.lgamma(x + at_x) + x * at_x.log()

    def of_means(mean: Tensor) -> tuple[Tensor, Tensor]:
        return (dispersion + counts) * torch.log1p(mean / theta), x * (mean[row, col] + NB_EPS).log()

    everywhere, at_counts = of_means(_scaled(mean, counts))
    loss = everywhere.sum() + (of_counts - at_counts).sum()
    if denoise:
        everywhere, at_counts = of_means(_scaled(mean * mask, counts * mask))
        loss = loss + (everywhere * mask).sum() + (of_counts - at_counts)[hidden].sum()
    return loss / len(counts)


def _scaled(mean: Tensor, counts: Tensor) -> Tensor:
    return mean * (counts.sum(1, keepdim=True) / mean.sum(1, keepdim=True))


def sentence_losses(
    module: CellPLMModule,
    batch: Mapping[str, Tensor],
    *,
    floor: GeneMeans,
    measured: Tensor,
    rng_seed: int,
    cell_rate: float = 0.75,
    gene_rate: float = 0.25,
    drop_rate: float = 0.3,
    denoise: bool = True,
    kl_warmup_steps: int = 10_000,
) -> dict[str, Tensor]:
    """Losses of one sentence of a training run, as the original pretrains.

    Parameters
    ----------
    batch
        ``X``, raw counts over the vocabulary ``(cells, n_genes)``.
    floor
        Predictor whose loss on the same cells and masks is given as ``floor``.
    measured
        Numbers of the genes that the data hold.
    rng_seed
        Of the mask and of the cells that are dropped.
    cell_rate, gene_rate
        Of the mask, see :func:`~cellprior.model.cellplm._inputs.sample_mask`.
    drop_rate
        Share of the cells that are left out of the sentence in training.
    denoise
        See :meth:`~cellprior.model.cellplm._module.CellPLMModule.pretraining_loss`.
    kl_warmup_steps
        Training steps over which the weight of a VAE's KL rises from 0 to 1.
    """
    counts = batch["X"]
    rng = np.random.default_rng(rng_seed)
    if module.training:
        n_kept = max(int((1 - drop_rate) * len(counts)), 1)
        counts = counts[torch.from_numpy(rng.permutation(len(counts))[:n_kept]).to(counts.device)]
    hidden = sample_mask(*counts.shape, rng=rng, cell_rate=cell_rate, gene_rate=gene_rate)
    mask = torch.from_numpy(hidden).to(counts.device)
    losses = module.pretraining_loss(
        counts, mask, kl_weight=module.kl_weight, measured=measured, denoise=denoise
    )
    if module.training:
        module.kl_weight = min(module.kl_weight + 1 / kl_warmup_steps, 1.0)
    with torch.no_grad():
        counts, mask, dispersion = counts[:, measured], mask[:, measured], floor.dispersion[measured]
        mean = floor.share[measured].expand_as(counts)
        losses["floor"] = reconstruction_loss(counts, mean, dispersion, mask, denoise)
    return losses
