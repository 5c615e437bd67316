"""Floors of masked-gene prediction: what can be known of a hidden bin without any biology of the cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from scvi import REGISTRY_KEYS
from torch import Tensor, nn

from cellprior.model.engine._kernels import cell_depth
from cellprior.model.scbert._inputs import TARGET_SUM, counts_to_bins

PRIOR = 1.0  # places of average bins that the frequencies of a gene or a cell are mixed with
SHARE_OF_AVERAGE = 0.02  # in the Poisson predictor, lest a single surprising count cost without bound


class BinFloors(nn.Module):
    """Probabilities of the bins 1 to K of a hidden gene, by predictors that know no biology.

    Only expressed genes are hidden, so bin 0 is never right. With n_gb how often gene g was in bin b in the training
    cells, a sum where an index is left out, and a = 1:

    ``uniform``
        ``1 / K``.
    ``all_genes``
        ``p_b = (n_b + a / K) / (n + a)``, the marginal frequency.
    ``per_gene``
        ``(n_gb + a p_b) / (n_g + a)``; its most likely bin is the most common of the gene.
    ``per_cell``
        ``(m_b + a p_b) / (m + a)``, with m_b how many genes in sight of this cell are in bin b. The baseline of
        Boiarsky et al., A deep dive into single-cell RNA sequencing foundation models, bioRxiv 2023.
    ``rate_and_depth``
        ``0.98 (S(x_b) - S(x_b+1)) / S(x_1) + 0.02 p_b``: the count of gene g in a cell of depth d is Poisson with mean
        ``d r_g``, where ``r_g`` is the gene's share of the training counts, and it is known to be in bin 1 or above.
        The depth is that of the whole cell, as it is in the bins in sight.
        S(x) is the probability of a count of x or more, ``x_b = max(1, ceil(d (2^b - 1) / 10,000))`` the smallest
        count in bin b, ``S(x_K+1) = 0``.

    Parameters
    ----------
    bin_counts
        n_gb, where genes were measured in some batches only by batch ``(1 or n_batches, n_genes, K)``.
    rate
        r_g ``(1 or n_batches, n_genes)``.
    """

    bin_counts: Tensor
    rate: Tensor

    def __init__(self, bin_counts: Tensor, rate: Tensor) -> None:
        super().__init__()
        self.register_buffer("bin_counts", bin_counts)
        self.register_buffer("rate", rate)

    @classmethod
    def fit(cls, batches: Iterable[Mapping[str, Tensor]], measured: Tensor, n_bins: int) -> BinFloors:
        """Count in one pass over minibatches of raw counts, each of one batch."""
        bin_counts = torch.zeros(*measured.shape, n_bins)
        total = torch.zeros(*measured.shape, dtype=torch.float64)
        for batch in batches:
            i = 0 if len(measured) == 1 else int(batch[REGISTRY_KEYS.BATCH_KEY][0])
            counts = batch[REGISTRY_KEYS.X_KEY]
            bins = counts_to_bins(counts, n_bins)
            bin_counts[i] += torch.stack([(bins == b).sum(0) for b in range(1, n_bins + 1)], dim=1)
            total[i] += counts.double().sum(0)
        return cls(bin_counts, (total / total.sum(1, keepdim=True).clamp(min=1.0)).float())

    def predict(self, counts: Tensor, bins: Tensor, selected: Tensor, *, batch: int = 0) -> dict[str, Tensor]:
        """Log-probabilities ``(selected genes, n_bins)`` by predictor, in the order of ``selected.nonzero()``.

        The ``selected`` of the ``bins`` ``(cells, n_genes)`` are to be predicted; the others are in sight. Of the
        counts, only the cells' depths are read.
        """
        i = batch if len(self.rate) > 1 else 0
        n_bins = self.bin_counts.shape[-1]
        cell, gene = selected.nonzero(as_tuple=True)
        average = frequencies(self.bin_counts[i].sum(0), torch.full_like(self.bin_counts[i, 0], 1 / n_bins))
        in_sight = torch.stack([((bins == b) & ~selected).sum(1) for b in range(1, n_bins + 1)], dim=1)
        poisson = truncated_poisson(self.rate[i, gene], cell_depth(counts)[cell], n_bins)
        found = {
            "uniform": torch.full_like(average, 1 / n_bins).expand(len(cell), -1),
            "all_genes": average.expand(len(cell), -1),
            "per_gene": frequencies(self.bin_counts[i, gene], average),
            "per_cell": frequencies(in_sight, average)[cell],
            "rate_and_depth": (1 - SHARE_OF_AVERAGE) * poisson + SHARE_OF_AVERAGE * average,
        }
        return {name: probability.log() for name, probability in found.items()}


def frequencies(n: Tensor, average: Tensor) -> Tensor:
    """``(n_b + a p_b) / (n + a)`` along the last dimension."""
    return (n + PRIOR * average) / (n.sum(-1, keepdim=True) + PRIOR)


def truncated_poisson(rate: Tensor, depth: Tensor, n_bins: int) -> Tensor:
    """Probability of the bins 1 to K of a Poisson count that is known not to be in bin 0, see :class:`BinFloors`.

    ``rate`` is of the gene, as a share of the depth of the cell ``(places,)``. Gives float32 ``(places, n_bins)``.
    """
    device = rate.device
    if device.type == "mps":  # has no float64, without which the tails of rare genes are 0 / 0
        rate, depth = rate.cpu(), depth.cpu()
    edges = torch.arange(1, n_bins + 1, device=rate.device).double().exp2() - 1.0
    depth = depth.double()[:, None]
    smallest = (depth * edges / TARGET_SUM).ceil().clamp(min=1.0)
    mean = (rate.double()[:, None] * depth).clamp(min=1e-12)  # of a gene that no training cell has
    at_least = torch.special.gammainc(smallest, mean.expand_as(smallest))
    within = at_least - torch.cat([at_least[:, 1:], torch.zeros_like(at_least[:, :1])], dim=1)
    tiny = torch.finfo(torch.float64).tiny
    return (within / at_least[:, :1].clamp(min=tiny)).float().to(device)
