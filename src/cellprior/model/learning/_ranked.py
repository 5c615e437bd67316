"""Genes at hidden places of cells that are lists of tokens by rank: scored, beside floors; with the memory of a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellprior.model.learning._contrast import in_micro_batches
from cellprior.model.learning._masked import MODEL, MaskedScores, by_cell

TRAINED_TOKENS = 4096  # of the cells whose gradient is computed at a time


def cells_at_a_time(tokens: Tensor) -> int:
    """Cells of about 4,096 tokens."""
    return max(TRAINED_TOKENS // max(tokens.shape[1], 1), 1)


def pooled(pool: Callable[[Tensor], Tensor], tokens: Tensor, length: Tensor) -> Tensor:
    """``pool(tokens)`` of cells with so many tokens; its gradient is that of all, with the memory of a few."""
    if not torch.is_grad_enabled():
        return pool(tokens)
    order = length.argsort(descending=True)
    return in_micro_batches(pool, tokens[order], size=cells_at_a_time(tokens))[order.argsort()]


def gene_scores(
    count: Callable[[Tensor], Tensor],
    module: Any,
    tokens: Tensor,
    shown: Tensor,
    selected: Tensor,
    *,
    micro_batch_size: int | None = None,
) -> Tensor:
    """Log-probability of the right gene at each selected place, and whether it is the most likely ``(places, 2)``.

    The logits of all genes are there for the places of a few cells at a time only. ``count`` gives the number of
    tokens of each cell; tokens are ``(cells, positions)``, ``shown`` is what the network sees. ``micro_batch_size``,
    by default about 4,096 tokens, never changes the gradient. Raises ValueError if ``micro_batch_size`` is below 1.
    """
    if micro_batch_size is not None and micro_batch_size < 1:
        msg = f"micro_batch_size={micro_batch_size}; at least one cell at a time is needed."
        raise ValueError(msg)

    def score(tokens: Tensor, shown: Tensor, selected: Tensor) -> Tensor:
        longest = int(count(tokens).max())
        tokens, shown, selected = (part[:, :longest] for part in (tokens, shown, selected))
        log_probability = module.predict_genes(module.states(shown)[selected]).float().log_softmax(1)
        right = tokens[selected][:, None]
        hit = log_probability.argmax(1, keepdim=True) == right
        return torch.cat([log_probability.gather(1, right), hit.float()], dim=1)

    return in_micro_batches(score, tokens, shown, selected, size=micro_batch_size or cells_at_a_time(tokens))


class Masked(NamedTuple):
    """What pretraining shows and asks for, ``(cells, positions)`` each."""

    shown: np.ndarray
    selected: np.ndarray


def mask_tokens(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    first: int,
    mask: int,
    others: tuple[int, int],
    rate: float,
    hide: float,
    swap: float,
) -> Masked:
    """Draw which genes, tokens from ``first`` on, pretraining has to predict, and what it shows in their place.

    A gene is selected with probability ``rate``, and then shown as ``mask`` with probability ``hide``, and as a token
    from ``others[0]`` to below ``others[1]`` with ``swap``; else it is in plain sight.
    """
    selected = (tokens >= first) & (rng.random(tokens.shape, dtype=np.float32) < rate)
    fate = rng.random(tokens.shape, dtype=np.float32)
    drawn = rng.integers(*others, size=tokens.shape)
    shown = np.where(selected & (fate < hide), mask, tokens)
    shown = np.where(selected & (fate >= hide) & (fate < hide + swap), drawn, shown)
    return Masked(shown, selected)


Draw = Callable[
    ..., Masked
]  # of tokens and a generator; ``hide`` and ``swap`` of :func:`mask_tokens` can be given
# of tokens and of those that are selected, log-probabilities and hits, by predictor
Predict = Callable[[Tensor, Tensor], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]


def masked_losses(
    score: Callable[..., Tensor],
    module: Any,
    tokens: Tensor,
    draw: Draw,
    predict: Predict,
    *,
    bias: Tensor,
    rng_seed: int,
    micro_batch_size: int | None,
) -> dict[str, Tensor]:
    """Cross-entropy of the genes at selected places; mean over these places.

    ``loss`` and ``masked``, which are equal; ``masked_accuracy``, how often the most likely gene is right; and the
    floors of both, which ``predict`` gives of the same places. Of held-out cells, all selected genes are hidden: what
    is shown in plain sight can be copied, which the floors cannot. ``bias`` is of the network: a loss without places
    depends on it. ``score`` is :func:`gene_scores` of the model's tokens.
    """
    plain: dict[str, float] = {} if module.training else {"hide": 1.0, "swap": 0.0}
    masked = draw(tokens.cpu().numpy(), np.random.default_rng(rng_seed), **plain)
    shown, selected = (torch.from_numpy(part).to(tokens.device) for part in masked)
    found = score(module, tokens, shown, selected, micro_batch_size=micro_batch_size)
    with torch.no_grad():
        logs, hits = predict(tokens, selected)
    if not len(found):  # of cells with a handful of genes
        found = found.new_zeros(1, 2) + 0.0 * bias.sum()
    loss = -found[:, 0].mean()
    return {
        "loss": loss,
        "masked": loss,
        "masked_accuracy": found[:, 1].detach().mean(),
        **{f"masked_floor_{name}": -_mean(value) for name, value in logs.items()},
        **{f"masked_accuracy_floor_{name}": _mean(value) for name, value in hits.items()},
    }


@torch.no_grad()
def masked_scores(
    score: Callable[..., Tensor],
    module: Any,
    tokens: Tensor,
    draw: Draw,
    predict: Predict,
    rng: np.random.Generator,
) -> MaskedScores:
    """Accuracy and cross-entropy (nats) of hidden genes, each of which is one of all that the vocabulary has.

    The module is in eval mode, what ``predict`` stands for fitted to other cells; see :func:`masked_losses`.
    """
    masked = draw(tokens.cpu().numpy(), rng, hide=1.0, swap=0.0)
    shown, selected = (torch.from_numpy(part).to(tokens.device) for part in masked)
    found = score(module, tokens, shown, selected)
    logs, hits = predict(tokens, selected)
    cell = selected.nonzero()[:, 0].cpu()
    measures: dict[str, dict[str, Tensor]] = {
        "accuracy": {MODEL: found[:, 1]} | dict(hits),
        "cross_entropy": {MODEL: -found[:, 0]} | {name: -value for name, value in logs.items()},
    }
    sums = {
        measure: {name: by_cell(values, cell, len(selected)) for name, values in of_measure.items()}
        for measure, of_measure in measures.items()
    }
    return MaskedScores(selected.sum(1), sums)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.sum()
