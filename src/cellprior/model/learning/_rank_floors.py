"""Floors of masked-gene prediction: what can be known of a hidden gene without any biology of the cell."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BINS_PER_OCTAVE = 4  # of ranks: 1, 2, 3, 4 to 5, ... the lower the place, the more of them go together


class RankFloors(nn.Module):
    """Probabilities of the genes at a hidden place, by predictors that know no biology.

    With n_bg how often gene g stood at a rank of bin b in the training cells, a sum where an index is left out:

    ``uniform``
        ``1 / n_genes``.
    ``token_frequency``
        ``p_g = (n_g + 1 / n_genes) / (n + 1)``.
    ``gene_at_rank``
        ``p_bg = (n_bg + t_b p_g) / (n_b + t_b)``, with t_b how many genes were seen in the bin [Witten and Bell, IEEE
        Trans. Inf. Theory 37:1085, 1991]; its most likely gene is the most frequent one at that rank.
    ``gene_at_rank_not_in_sight``
        The same over the genes that do not stand elsewhere in the cell, as no gene has two places.

    Parameters
    ----------
    counts
        n_bg ``(n_bins, n_genes)``.
    """

    counts: Tensor

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.register_buffer("counts", counts)

    @classmethod
    def fit(cls, tokens: Iterable[Tensor], *, n_genes: int, n_positions: int, first: int) -> RankFloors:
        """Count in one pass over tokens of cells ``(cells, positions)``; ``first`` is that of the first gene."""
        n_bins = int(rank_bins(torch.tensor([n_positions - 1]))) + 1
        counts = torch.zeros(n_bins * n_genes)
        for part in tokens:
            row, rank = (part >= first).nonzero(as_tuple=True)
            gene = part[row, rank] - first
            counts = counts.to(part.device)
            place = rank_bins(rank) * n_genes + gene
            counts += torch.bincount(place, minlength=len(counts)).float()
        return cls(counts.view(n_bins, n_genes))

    def predict(
        self, tokens: Tensor, selected: Tensor, *, first: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probabilities of the right genes, and whether they are the most likely, ``(selected places,)`` each.

        By predictor, of the ``selected`` tokens of cells ``(cells, positions)``; the others are in sight. The last
        has no most likely gene here. ``first`` is the token of the first gene.
        """
        n_genes = self.counts.shape[1]
        cell, rank = selected.nonzero(as_tuple=True)
        gene, rank_bin = tokens[cell, rank] - first, rank_bins(rank)
        average = (self.counts.sum(0) + 1 / n_genes) / (self.counts.sum() + 1)
        n_seen = (self.counts > 0).sum(1, keepdim=True)
        total = self.counts.sum(1, keepdim=True)
        # in a bin without any place, the average
        at_rank = (self.counts + n_seen.clamp(min=1) * average) / (total + n_seen.clamp(min=1))
        row, place = ((tokens >= first) & ~selected).nonzero(as_tuple=True)
        in_sight = torch.zeros(len(tokens), n_genes, device=tokens.device)
        in_sight[row, tokens[row, place] - first] = 1.0
        hidden_share = (1 - in_sight @ at_rank.T).clamp(min=1e-6)  # (cells, n_bins)
        uniform = torch.full((len(cell),), 1 / n_genes, device=tokens.device)
        p = at_rank[rank_bin, gene]
        probability = {
            "uniform": uniform,
            "token_frequency": average[gene],
            "gene_at_rank": p,
            "gene_at_rank_not_in_sight": p / hidden_share[cell, rank_bin],
        }
        hit = {
            "uniform": uniform,
            "token_frequency": (gene == average.argmax()).float(),
            "gene_at_rank": (gene == at_rank.argmax(1)[rank_bin]).float(),
        }
        return {name: value.log() for name, value in probability.items()}, hit


def rank_bins(rank: Tensor) -> Tensor:
    """Bin of each rank, counted from 0: ``floor(4 log2(1 + rank))`` without the empty ones before 4."""
    return torch.where(rank < 4, rank, (BINS_PER_OCTAVE * (1 + rank).float().log2()).long() - 5)
