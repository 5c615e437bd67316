"""What MultiomeCLIP is trained on: a cell's own other modality against those of the minibatch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cellprior.model.learning._contrast import info_nce_of_scores


def infonce(scores: Tensor, *, same: Tensor | None = None) -> Tensor:
    """InfoNCE in both directions [van den Oord et al., 2018; Radford et al., CLIP, 2021].

    Parameters
    ----------
    scores
        Scaled similarity of ATAC of cell i and RNA of cell j ``(cells, cells)``.
    same
        True where cell j is no negative of cell i, as their labels are equal ``(cells, cells)``.
    """
    if same is not None:
        scores = scores.masked_fill(_others(same), float("-inf"))
    return info_nce_of_scores(scores)


def sigmoid_loss(scores: Tensor, *, same: Tensor | None = None) -> Tensor:
    """Each pair by itself, right or wrong, summed over the partners of a cell [Zhai et al., SigLIP, ICCV 2023].

    Parameters
    ----------
    scores
        Scaled similarity and bias of ATAC of cell i and RNA of cell j ``(cells, cells)``.
    same
        True where cell j is no negative of cell i, as their labels are equal ``(cells, cells)``.
    """
    sign = 2 * torch.eye(len(scores), device=scores.device) - 1
    of_pairs = -F.logsigmoid(sign * scores)
    if same is not None:
        of_pairs = of_pairs.masked_fill(_others(same), 0.0)
    return of_pairs.sum() / len(scores)


def infonce_chance(n_cells: int, *, same: Tensor | None = None) -> float:
    """InfoNCE of who cannot tell cells apart: the mean over cells of the logarithm of how many there are."""
    return float(_allowed(n_cells, same).log().mean())


def sigmoid_chance(n_cells: int, *, same: Tensor | None = None) -> float:
    """Sigmoid loss of who gives all pairs the one best score, the logit of the share of right pairs."""
    n_pairs = float(_allowed(n_cells, same).sum())
    wrong = n_pairs - n_cells
    return (n_cells * math.log(n_pairs / n_cells) + wrong * math.log(n_pairs / max(wrong, 1.0))) / n_cells


def _allowed(n_cells: int, same: Tensor | None) -> Tensor:
    """Number of cells that each is compared with, itself among them ``(cells,)``."""
    if same is None:
        return torch.full((n_cells,), float(n_cells))
    return (n_cells - _others(same).sum(1)).float()


def same_label(code: Tensor) -> Tensor:
    """Which cells have the same label ``(cells, cells)``; a code below 0 is none, and like no other."""
    return (code[:, None] == code[None, :]) & (code >= 0)[:, None]


def _others(same: Tensor) -> Tensor:
    return same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
