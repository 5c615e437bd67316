"""How well two modalities are matched, from the similarities of all pairs of held-out cells."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from cellprior.model.learning._contrast import similarities

RECALL_AT = (1, 10)


def partners_among_others(scores: Tensor) -> tuple[Tensor, Tensor]:
    """How many other cells score higher than a cell's own partner, and how many score the same ``(cells,)``.

    Where a score of a cell is NaN, both are.

    Parameters
    ----------
    scores
        Similarity of cell i of one modality and cell j of the other ``(cells, cells)``.
    """
    own = scores.diagonal()[:, None]
    higher, same = (scores > own).sum(1).double(), (scores == own).sum(1).double() - 1
    unknown = scores.isnan().any(1)
    return higher.masked_fill(unknown, math.nan), same.masked_fill(unknown, math.nan)


def foscttm(scores: Tensor) -> float:
    """Fraction of samples closer than the true match, of rows: 0 is perfect and 0.5 is chance [Liu et al., 2019].

    The mean over cells of the share of the ``cells - 1`` others that score higher than the partner; those that score
    the same count half, lest an embedding that has collapsed be perfect. For the other direction, give ``scores.T``.
    """
    higher, same = partners_among_others(scores)
    return float(((higher + same / 2) / max(len(scores) - 1, 1)).mean())


def recall_at(scores: Tensor, k: int) -> float:
    """Share of cells whose partner is among the ``k`` most similar, of equals in any order; chance is k / cells."""
    higher, same = partners_among_others(scores)
    return float(((k - higher) / (same + 1)).clamp(0, 1).mean())


def matching_score(scores: Tensor) -> float:
    """Mean probability of the true partner, by a softmax over all cells [OpenProblems, match modality]."""
    return float(scores.softmax(1).diagonal().mean())


def modality_gap(first: Tensor, second: Tensor) -> float:
    """Distance of the means of two modalities on the unit sphere [Liang et al., NeurIPS 2022]."""
    return float((first.float().mean(0) - second.float().mean(0)).norm())


def matching_metrics(scores: Tensor) -> dict[str, float]:
    """FOSCTTM and recall of both directions and their mean, from ``(cells of ATAC, cells of RNA)``."""
    found = {
        "foscttm_atac_to_rna": foscttm(scores),
        "foscttm_rna_to_atac": foscttm(scores.T),
    }
    found["foscttm"] = sum(found.values()) / 2
    for k in RECALL_AT:
        found[f"recall_at_{k}"] = (recall_at(scores, k) + recall_at(scores.T, k)) / 2
    return found


def latent_metrics(rna: Tensor, atac: Tensor) -> dict[str, float]:
    """:func:`matching_metrics` of the latents of the same cells ``(cells, n_latent)``, and the modality gap."""
    rna, atac = (torch.nn.functional.normalize(latent.float(), dim=1) for latent in (rna, atac))
    return {**matching_metrics(similarities(atac, rna)), "modality_gap": modality_gap(rna, atac)}


def depth_scores(rna_depth: np.ndarray, atac_depth: np.ndarray) -> Tensor:
    """Similarity of cells that knows their sequencing depth only: how near their ranks are.

    Parameters
    ----------
    rna_depth, atac_depth
        Total counts of the same cells ``(cells,)``.
    """
    rna, atac = (torch.from_numpy(rankdata(depth)) for depth in (rna_depth, atac_depth))
    return -(atac[:, None] - rna[None, :]).abs()
