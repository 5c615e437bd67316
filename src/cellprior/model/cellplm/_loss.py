"""What CellPLM is trained on: the negative binomial of raw counts, hidden and seen; and its floor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor, nn

from cellprior.model.cellplm._inputs import sample_mask

NB_EPS = 1e-10
MIN_DISPERSION, MAX_DISPERSION = 1e-4, 1e4


def reconstruction_loss(
    counts: Tensor, mean: Tensor, dispersion: Tensor, mask: Tensor | None = None, denoise: bool = True
) -> Tensor:
    """Negative-binomial loss over all genes plus, if ``denoise``, over the hidden ones; mean over cells.

    Each term scales the decoder's mean to the cell's own total over the genes it looks at. Counts, ``mean`` up to a
    factor per cell, and ``mask``, ``True`` for hidden, are ``(cells, genes)``; the variance is
    ``mean + mean² / dispersion``, with one of each gene. Cells without a hidden gene do not count. Without a mask,
    all cells do, and nothing is hidden.
    """
    if mask is not None:
        rows = mask.any(1)
        if not rows.any():
            return mean.sum() * 0.0
        counts, mean, mask = counts[rows], mean[rows], mask[rows]
    row, col = counts.nonzero(as_tuple=True)
    x = counts[row, col]
    theta = dispersion + NB_EPS
    at_x = theta.expand_as(counts)[row, col]
    # all that depends on a count alone is 0 where the count is: nine of ten places are spared three gamma functions
    of_counts = torch.lgamma(at_x) + torch.lgamma(x + 1) - torch.lgamma(x + at_x) + x * at_x.log()

    def of_means(mean: Tensor) -> tuple[Tensor, Tensor]:
        return (dispersion + counts) * torch.log1p(mean / theta), x * (mean[row, col] + NB_EPS).log()

    everywhere, at_counts = of_means(_scaled(mean, counts))
    loss = everywhere.sum() + (of_counts - at_counts).sum()
    if mask is not None and denoise:
        everywhere, at_counts = of_means(_scaled(mean * mask, counts * mask))
        loss = loss + (everywhere * mask).sum() + (of_counts - at_counts)[mask[row, col]].sum()
    return loss / len(counts)


def _scaled(mean: Tensor, counts: Tensor) -> Tensor:
    return mean * (counts.sum(1, keepdim=True) / mean.sum(1, keepdim=True))


class GeneMeans(nn.Module):
    """The floor: a predictor that knows each gene's share of the counts, and a cell's depth, and nothing else.

    Shares, up to a factor, and dispersions of the negative binomial are ``(1 or n_batches, n_genes)``: by batch where
    genes were measured in some batches only.
    """

    share: Tensor
    dispersion: Tensor

    def __init__(self, share: Tensor, dispersion: Tensor) -> None:
        super().__init__()
        self.register_buffer("share", share)
        self.register_buffer("dispersion", dispersion)

    @classmethod
    def fit(cls, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> GeneMeans:
        """Shares, and dispersions by moments, ``Σ μ² / Σ ((x - μ)² - μ)``, in one pass over minibatches of a batch."""
        total, square, cross = torch.zeros(3, *measured.shape, dtype=torch.float64)
        depth_square = torch.zeros(len(measured), 1, dtype=torch.float64)
        for batch in batches:
            i = 0 if len(measured) == 1 else int(batch[REGISTRY_KEYS.BATCH_KEY][0])
            x = batch[REGISTRY_KEYS.X_KEY].double()
            depth = x.sum(1)
            total[i] += x.sum(0)
            square[i] += (x**2).sum(0)
            cross[i] += depth @ x
            depth_square[i] += depth @ depth
        share = total / total.sum(1, keepdim=True).clamp(min=1.0)
        square_mean = depth_square * share**2  # Σ μ² with μ = depth·share
        excess = square - 2 * share * cross + square_mean - total
        dispersion = torch.where(excess > 0, square_mean / excess.clamp(min=1e-12), MAX_DISPERSION)
        return cls(share.float(), dispersion.clamp(MIN_DISPERSION, MAX_DISPERSION).float())


def sentence_losses(
    module: Any,
    batch: Mapping[str, Tensor],
    *,
    floor: GeneMeans,
    measured: Tensor,
    rng_seed: int,
    imputation: bool = False,
    cell_rate: float = 0.75,
    gene_rate: float = 0.25,
    drop_rate: float = 0.3,
    kl_warmup_steps: int = 10_000,
    covariate: Sequence[int | None] = (None,),
) -> dict[str, Tensor]:
    """Losses of one sentence of a training run, as the original pretrains.

    Parameters
    ----------
    batch
        ``X``, raw counts over the vocabulary ``(cells, n_genes)``; ``batch``, one code for all of them, if the data
        have batches.
    floor
        Predictor whose loss on the same cells and masks is given too.
    measured
        Which genes were measured, once or by batch ``(1 or n_batches, n_genes)``.
    rng_seed
        Of the mask and of the cells that are dropped.
    imputation
        See :meth:`~cellprior.model.cellplm._module.CellPLMModule.pretraining_loss`.
    cell_rate, gene_rate
        Of the mask, see :func:`~cellprior.model.cellplm._inputs.sample_mask`.
    drop_rate
        Share of the cells that are left out of the sentence in training.
    kl_warmup_steps
        Training steps over which the weight of a VAE's KL rises from 0 to 1.
    covariate
        Category of the decoder's batch covariate of each batch, ``None`` to average over them.
    """
    counts = batch[REGISTRY_KEYS.X_KEY]
    code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
    known = measured[code if len(measured) > 1 else 0]
    rng = np.random.default_rng(rng_seed)
    if module.training:
        n_kept = max(int((1 - drop_rate) * len(counts)), 1)
        counts = counts[torch.from_numpy(rng.permutation(len(counts))[:n_kept]).to(counts.device)]
    hidden = sample_mask(*counts.shape, rng=rng, cell_rate=cell_rate, gene_rate=gene_rate)
    mask = torch.from_numpy(hidden).to(counts.device)
    category = covariate[code if len(covariate) > 1 else 0]
    losses = module.pretraining_loss(
        counts,
        mask,
        batch=None if category is None else torch.full((len(counts),), category, device=counts.device),
        kl_weight=module.kl_weight,
        measured=known,
        imputation=imputation,
    )
    if module.training:
        module.kl_weight = min(module.kl_weight + 1 / kl_warmup_steps, 1.0)
    with torch.no_grad():
        i = code if len(floor.share) > 1 else 0
        losses["reconstruction_floor_gene_means"] = reconstruction_loss(
            counts[:, known],
            floor.share[i, known].expand(len(counts), -1),
            floor.dispersion[i, known],
            None if imputation else mask[:, known],
        )
    return losses
