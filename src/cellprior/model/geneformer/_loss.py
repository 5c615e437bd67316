"""What Geneformer is trained on: which gene stands at a hidden place of a cell; beside what is known without cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model.geneformer._inputs import mask_tokens, token_counts
from cellprior.model.learning._contrast import in_micro_batches
from cellprior.model.learning._rank_floors import RankFloors

TRAINED_TOKENS = 4096  # of the cells whose gradient is computed at a time


def masked_losses(
    module: Any,
    batch: Mapping[str, Tensor],
    *,
    floor: RankFloors,
    measured: Tensor,
    rng_seed: int,
    mask_rate: float = 0.15,
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy of the genes at selected places, as the original pretrains; mean over these places.

    Of held-out cells, all selected genes are hidden: what is shown in plain sight can be copied, which the floors
    cannot.

    Parameters
    ----------
    module
        The network.
    batch
        ``X``, raw counts over the vocabulary ``(cells, n_genes)``.
    floor
        Predictors whose loss on the same places is given too.
    measured
        Not read: a gene that was not measured has no counts, and so no place.
    rng_seed
        Of the mask.
    mask_rate
        See :func:`~cellprior.model.geneformer._inputs.mask_tokens`.
    micro_batch_size
        Cells in memory at a time; by default about 4,096 tokens. Never changes the gradient.

    Returns
    -------
    ``loss`` and ``masked``, which are equal; ``masked_accuracy``, how often the most likely gene is right; and the
    floors of both.

    Raises
    ------
    ValueError
        If ``micro_batch_size`` is below 1.
    """
    if micro_batch_size is not None and micro_batch_size < 1:
        msg = f"micro_batch_size={micro_batch_size}; at least one cell at a time is needed."
        raise ValueError(msg)
    tokens = module.tokens(batch[REGISTRY_KEYS.X_KEY])
    tokens = tokens[token_counts(tokens).argsort(descending=True, stable=True)]
    plain: dict[str, float] = {} if module.training else {"hide": 1.0, "swap": 0.0}
    masked = mask_tokens(
        tokens.cpu().numpy(),
        np.random.default_rng(rng_seed),
        n_tokens=module.n_tokens,
        special=module.special,
        rate=mask_rate,
        **plain,
    )
    shown, selected = (torch.from_numpy(part).to(tokens.device) for part in masked)
    found = gene_scores(module, tokens, shown, selected, micro_batch_size=micro_batch_size)
    if not len(found):  # of cells with a handful of genes
        found = found.new_zeros(1, 2) + 0.0 * module.gene_bias.sum()
    loss, hit = -found[:, 0].mean(), found[:, 1].detach().mean()
    with torch.no_grad():
        logs, hits = floor.predict(tokens, selected, first=module.first_gene)
    return {
        "loss": loss,
        "masked": loss,
        "masked_accuracy": hit,
        **{f"masked_floor_{name}": -_mean(value) for name, value in logs.items()},
        **{f"masked_accuracy_floor_{name}": _mean(value) for name, value in hits.items()},
    }


def gene_scores(
    module: Any,
    tokens: Tensor,
    shown: Tensor,
    selected: Tensor,
    *,
    micro_batch_size: int | None = None,
) -> Tensor:
    """Log-probability of the right gene at each selected place, and whether it is the most likely ``(places, 2)``.

    The logits of all genes are there for the places of a few cells at a time only.

    Parameters
    ----------
    module
        The network.
    tokens
        Of cells ``(cells, positions)``.
    shown
        What the network sees.
    selected
        Which places are asked for.
    micro_batch_size
        See :func:`masked_losses`.
    """

    def score(tokens: Tensor, shown: Tensor, selected: Tensor) -> Tensor:
        longest = int(token_counts(tokens).max())
        tokens, shown, selected = (part[:, :longest] for part in (tokens, shown, selected))
        log_probability = module.predict_genes(module.states(shown)[selected]).float().log_softmax(1)
        right = tokens[selected][:, None]
        hit = log_probability.argmax(1, keepdim=True) == right
        return torch.cat([log_probability.gather(1, right), hit.float()], dim=1)

    if micro_batch_size is None:
        micro_batch_size = max(TRAINED_TOKENS // max(tokens.shape[1], 1), 1)
    return in_micro_batches(score, tokens, shown, selected, size=micro_batch_size)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.sum()
