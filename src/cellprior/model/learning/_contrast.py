"""Contrast of two views of the same cells, shared by the models; and large minibatches on small devices."""

from __future__ import annotations

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

    Parameters
    ----------
    first, second
        Two views of the same cells ``(cells, width)``.
    temperature
        Of the softmax.
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
    leave each with its own negatives only.

    Parameters
    ----------
    function
        Of a few cells at a time, none of which sees another; gives rows of fixed width, any number per cell.
    *tensors
        Of the same cells ``(cells, ...)``.
    size
        Cells of a micro-batch; ``None`` for all at once.

    Returns
    -------
    What ``function`` gives for the parts, concatenated.
    """
    if size is None or size >= len(tensors[0]):
        return function(*tensors)
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat(
        [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=True) for part in parts]
    )
