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
    """Cross-entropy of the genes at selected places, as the original pretrains; mean over these places.

    Of held-out cells, all selected genes are hidden: what is shown in plain sight can be copied, which the floors
    cannot.

    Raises ValueError if ``micro_batch_size`` is below 1.

    Parameters
    ----------
    module
        The network, a :class:`~cellprior.model.nicheformer._module.NicheformerModule`.
    batch
        ``X``, raw counts over the vocabulary ``(cells, n_genes)``; ``context``, the code of each cell, where it is
        known.
    floor
        Predictors whose loss on the same places is given too.
    measured
        Not read: a gene that was not measured has no counts, and so no place.
    rng_seed
        Of the mask.
    mask_rate
        See :func:`~cellprior.model.nicheformer._inputs.mask_tokens`.
    micro_batch_size
        Cells in memory at a time; by default about 4,096 tokens. Never changes the gradient.

    Returns
    -------
    ``loss`` and ``masked``, which are equal; ``masked_accuracy``, how often the most likely gene is right; and the
    floors of both.
    """
    context = context_of(batch)
    tokens = module.tokens(batch[REGISTRY_KEYS.X_KEY], context=context)
    order = token_counts(tokens).argsort(descending=True, stable=True)
    tokens, context = tokens[order], context[order.cpu()]
    plain: dict[str, float] = {} if module.training else {"hide": 1.0, "swap": 0.0}
    rng = np.random.default_rng(rng_seed)
    masked = mask_tokens(tokens.cpu().numpy(), rng, n_tokens=module.n_tokens, rate=mask_rate, **plain)
    shown, selected = (torch.from_numpy(part).to(tokens.device) for part in masked)
    found = gene_scores(module, tokens, shown, selected, micro_batch_size=micro_batch_size)
    with torch.no_grad():
        floors = floor.predict(tokens, selected, context)
    return ranked.losses_beside(found, floors, module.gene_logits.bias)


def context_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Code of each cell's context in a minibatch ``(cells,)``, on the CPU; 0, the default, where it is not known."""
    if CONTEXT_KEY not in batch:
        return torch.zeros(len(batch[REGISTRY_KEYS.X_KEY]), dtype=torch.long)
    return batch[CONTEXT_KEY].reshape(-1).long().cpu()
