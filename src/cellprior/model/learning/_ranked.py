"""Genes at hidden places of cells that are lists of tokens by rank: scored, beside floors; with the memory of a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cellprior.model.learning._contrast import in_micro_batches
from cellprior.model.learning._masked import MODEL, MaskedScores

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


def losses_beside(
    found: Tensor, floors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], bias: Tensor
) -> dict[str, Tensor]:
    """``loss`` and ``masked``, which are equal, ``masked_accuracy``, and the floors of both; means over the places.

    ``found`` is from :func:`gene_scores`, ``floors`` are log-probabilities and hits at the same places, by predictor,
    and ``bias`` is of the network: a loss without places depends on it.
    """
    if not len(found):  # of cells with a handful of genes
        found = found.new_zeros(1, 2) + 0.0 * bias.sum()
    loss, hit = -found[:, 0].mean(), found[:, 1].detach().mean()
    logs, hits = floors
    return {
        "loss": loss,
        "masked": loss,
        "masked_accuracy": hit,
        **{f"masked_floor_{name}": -_mean(value) for name, value in logs.items()},
        **{f"masked_accuracy_floor_{name}": _mean(value) for name, value in hits.items()},
    }


def scores_by_cell(
    found: Tensor, floors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], selected: Tensor
) -> MaskedScores:
    """Accuracy and cross-entropy (nats) of genes of each cell that are ``selected``; see :func:`losses_beside`."""
    cell = selected.nonzero()[:, 0].cpu()
    logs, hits = floors

    def by_cell(values: Tensor) -> Tensor:
        return torch.zeros(len(selected), dtype=torch.float64).index_add_(0, cell, values.cpu().double())

    measures: dict[str, dict[str, Any]] = {
        "accuracy": {MODEL: found[:, 1]} | dict(hits),
        "cross_entropy": {MODEL: -found[:, 0]} | {name: -value for name, value in logs.items()},
    }
    sums = {
        measure: {name: by_cell(values) for name, values in of_measure.items()}
        for measure, of_measure in measures.items()
    }
    return MaskedScores(selected.sum(1), sums)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.sum()
