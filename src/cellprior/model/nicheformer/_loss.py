"""What Nicheformer is trained on: which gene stands at a hidden place of a cell; beside what is known without cells."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model.learning import _ranked as ranked
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.nicheformer._floors import TechnologyFloors
from cellprior.model.nicheformer._inputs import CONTEXT_KEY, mask_tokens, token_counts

gene_scores = partial(ranked.gene_scores, token_counts)


def masked_losses(
    module: Any,
    batch: Mapping[str, Tensor],
    *,
    floor: TechnologyFloors,
    measured: Tensor,
    rng_seed: int,
    mask_rate: float = 0.15,
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Losses as the original pretrains, see :func:`~cellprior.model.learning._ranked.masked_losses`.

    ``batch`` has ``X``, raw counts over the vocabulary ``(cells, n_genes)``, and ``context``, the code of each cell,
    where it is known. Which genes were ``measured`` is not read: one that was not has no counts, and so no place.
    ``micro_batch_size``, cells in memory at a time, by default about 4,096 tokens, never changes the gradient. Raises
    ValueError if it is below 1.
    """
    context = context_of(batch)
    tokens = module.tokens(batch[REGISTRY_KEYS.X_KEY], context=context)
    order = token_counts(tokens).argsort(descending=True, stable=True)
    draw, predict = _asked(module, floor, context[order.cpu()], mask_rate)
    how: dict[str, Any] = {"rng_seed": rng_seed, "micro_batch_size": micro_batch_size}
    bias = module.gene_logits.bias
    return ranked.masked_losses(gene_scores, module, tokens[order], draw, predict, bias=bias, **how)


def masked_scores(
    module: Any,
    counts: Tensor,
    floor: TechnologyFloors,
    context: Tensor,
    *,
    share: float,
    rng: np.random.Generator,
    **unread: Any,
) -> MaskedScores:
    """Of raw counts over the vocabulary ``(cells, n_genes)``; a ``share`` of the genes of a cell is hidden.

    ``context`` is the code of each cell ``(cells,)``.
    """
    tokens = module.tokens(counts, context=context)
    return ranked.masked_scores(gene_scores, module, tokens, *_asked(module, floor, context, share), rng)


def _asked(
    module: Any, floor: TechnologyFloors, context: Tensor, rate: float
) -> tuple[ranked.Draw, ranked.Predict]:
    """What draws genes, and the floors of these."""
    return partial(mask_tokens, n_tokens=module.n_tokens, rate=rate), partial(floor.predict, context=context)


def context_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Code of each cell's context in a minibatch ``(cells,)``, on the CPU; 0, the default, where it is not known."""
    if CONTEXT_KEY not in batch:
        return torch.zeros(len(batch[REGISTRY_KEYS.X_KEY]), dtype=torch.long)
    return batch[CONTEXT_KEY].reshape(-1).long().cpu()
