"""What goes into ScBERT: counts as bins of their logarithm, and the masks of its pretraining."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellprior.model.engine._kernels import cell_depth, row_of_each

TARGET_SUM = 10_000.0


def counts_to_bins(counts: Tensor, n_bins: int = 5) -> Tensor:
    """Bin ``min(floor(log2(1 + x)), n_bins)`` of counts scaled to 10,000 per cell.

    By comparison with the edges 1, 3, 7, ... of the bins, and not through a logarithm, so that a scaled count that is
    an edge lands in the upper bin. The raw counts ``(cells, genes)``, dense or CSR, are of all genes of the
    vocabulary, as the depth is their sum. Gives bins 0 to ``n_bins``, ``(cells, genes)``, dense uint8. A cell without
    counts is all 0.
    """
    row = None if counts.layout is torch.strided else row_of_each(counts)
    # Apple's GPUs have no float64; there a scaled count beyond 2^24 / 10,000 may round across an edge
    wide = torch.float32 if counts.device.type == "mps" else torch.float64
    depth = cell_depth(counts).to(wide).clamp(min=1.0)
    x = counts if row is None else counts.values()
    depth = depth[:, None] if row is None else depth[row]
    scaled = (x.to(wide) * TARGET_SUM / depth).float()  # rounded as in the original
    edges = torch.arange(1, n_bins + 1, device=counts.device).exp2() - 1.0
    bins = torch.bucketize(scaled.contiguous(), edges, right=True, out_int32=True).to(torch.uint8)
    if row is None:
        return bins
    dense = bins.new_zeros(counts.shape)
    dense[row, counts.col_indices()] = bins
    return dense


def loses_single_counts(depth: Tensor) -> Tensor:
    """For which cells ``(cells,)`` a count of 1 falls into bin 0, as if the gene were not expressed.

    Those with more than 10,000 counts over the vocabulary genes: 1 is then scaled to less than the first edge.
    """
    return depth > TARGET_SUM


class Mask(NamedTuple):
    """What pretraining asks for, and what it hides of that, ``(cells, genes)`` each."""

    selected: np.ndarray
    replaced: np.ndarray


def sample_mask(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    rate: float = 0.15,
    replace: float = 0.9,
    n_bins: int = 5,
) -> Mask:
    """Draw which genes pretraining has to predict, and which of these it shows as the mask token.

    Parameters
    ----------
    tokens
        Bins ``(cells, genes)``. Only genes in bins 1 to ``n_bins`` are drawn.
    rng
        Draws.
    rate
        Share of the expressed genes of each cell that is selected, rounded up in float32 as in the original, which
        is one more than exact arithmetic gives for a few cells in a thousand.
    replace
        Probability of a selected gene to be replaced; the others are predicted in plain sight.
    n_bins
        Bins above bin 0.
    """
    expressed = (tokens > 0) & (tokens <= n_bins)
    n_selected = np.ceil(expressed.sum(axis=1).astype(np.float32) * np.float32(rate)).astype(np.int64)
    noise = np.where(expressed, rng.random(tokens.shape, dtype=np.float32), np.float32(2.0))
    rank = np.empty(tokens.shape, dtype=np.int64)
    np.put_along_axis(rank, noise.argsort(axis=1), np.arange(tokens.shape[1])[None, :], axis=1)
    selected = rank < n_selected[:, None]
    return Mask(selected, selected & (rng.random(tokens.shape, dtype=np.float32) < replace))
