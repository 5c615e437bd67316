"""Contrast of two views of the same cells, shared by the models; and large minibatches on small devices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def info_nce(first: Tensor, second: Tensor, *, temperature: float | Tensor) -> Tensor:
    """InfoNCE in both directions [van den Oord et al., 2018; Radford et al., CLIP, 2021].

    With s_ij the cosine of view i of ``first`` and view j of ``second`` over the temperature, the mean over cells of
    ``-ln(exp s_ii / Σ_j exp s_ij)``, averaged with the same of the other direction. All other cells of the minibatch
    are the negatives; who cannot tell them apart reaches ``ln(cells)``.
    """
    return info_nce_of_scores(similarities(first, second) / temperature)


def info_nce_of_scores(scores: Tensor) -> Tensor:
    """InfoNCE in both directions of scaled similarities ``(cells, cells)``, see :func:`info_nce`."""
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def retrieval_accuracy(scores: Tensor) -> Tensor:
    """Share of cells whose other view scores highest of all, mean of both directions.

    Parameters
    ----------
    scores
        Of view i and other view j, the higher the more alike ``(cells, cells)``.
    """
    own = torch.arange(len(scores), device=scores.device)
    return ((scores.argmax(1) == own).float().mean() + (scores.argmax(0) == own).float().mean()) / 2


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of all pairs ``(cells of first, cells of second)``, float32."""
    return F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T


def in_micro_batches(function: Callable[..., Tensor], *tensors: Tensor, size: int | None) -> Tensor:
    """Rows of ``function(*tensors)``, a few cells at a time, with the memory of a few and the gradient of all.

    Gradient caching [Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP
    2021]: nothing but the outputs is kept, a loss may couple them all, and its backward pass computes each
    micro-batch once more, with the random state that it had. Adding up the gradients of micro-batches would instead
    leave each with its own negatives only. ``function`` takes ``size`` cells at a time, none of which sees another,
    and gives rows of fixed width, any number per cell; without a size, all at once.
    """
    if size is None or size >= len(tensors[0]):
        return function(*tensors)
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat(
        [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=True) for part in parts]
    )


def label_contrast(first: Tensor, second: Tensor, code: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Supervised contrast [Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, L_out].

    For each of the two views of a labelled cell, the mean over all other views of cells of its label, its own among
    them, of ``-ln(exp s_ap / Σ_j exp s_aj)``, with s the cosine over the temperature and j over all views but a. Who
    cannot tell the views apart reaches ``ln(2 cells - 1)``. Cells without a label are left out: they may be of any.
    Their ``code`` is negative. Views are ``(cells, width)``.
    """
    known = code >= 0
    if int(known.sum()) < 2:
        return first.sum() * 0.0
    views = torch.cat([first[known], second[known]])
    label = code[known].repeat(2)
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    scores = (similarities(views, views) / temperature).masked_fill(itself, -torch.inf)
    alike = (label[:, None] == label) & ~itself
    of_alike = scores.log_softmax(1).masked_fill(~alike, 0.0)
    return -(of_alike.sum(1) / alike.sum(1)).mean()


def chance_of_labels(code: Tensor) -> float:
    """What :func:`label_contrast` is for whom all views are alike: ``ln(2 cells - 1)``, 0 for fewer than two cells."""
    n_known = int((code >= 0).sum())
    return math.log(2 * n_known - 1) if n_known > 1 else 0.0
