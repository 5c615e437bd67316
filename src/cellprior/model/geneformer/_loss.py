"""What Geneformer is trained on: which gene stands at a hidden place of a cell; beside what is known without cells."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model.geneformer._inputs import mask_tokens, token_counts
from cellprior.model.learning import _ranked as ranked
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.learning._rank_floors import RankFloors

gene_scores = partial(ranked.gene_scores, token_counts)


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
    """Losses as the original pretrains, see :func:`~cellprior.model.learning._ranked.masked_losses`.

    ``batch`` has ``X``, raw counts over the vocabulary ``(cells, n_genes)``. Which genes were ``measured`` is not
    read: one that was not has no counts, and so no place. ``micro_batch_size``, cells in memory at a time, by default
    about 4,096 tokens, never changes the gradient. Raises ValueError if it is below 1.
    """
    tokens = module.tokens(batch[REGISTRY_KEYS.X_KEY])
    tokens = tokens[token_counts(tokens).argsort(descending=True, stable=True)]
    draw, predict = _asked(module, floor, mask_rate)
    how: dict[str, Any] = {"rng_seed": rng_seed, "micro_batch_size": micro_batch_size}
    return ranked.masked_losses(gene_scores, module, tokens, draw, predict, bias=module.gene_bias, **how)


def masked_scores(
    module: Any, counts: Tensor, floor: RankFloors, *, share: float, rng: np.random.Generator, **unread: Any
) -> MaskedScores:
    """Of raw counts over the vocabulary ``(cells, n_genes)``; a ``share`` of the tokens of a cell is hidden."""
    return ranked.masked_scores(
        gene_scores, module, module.tokens(counts), *_asked(module, floor, share), rng
    )


def _asked(module: Any, floor: RankFloors, rate: float) -> tuple[ranked.Draw, ranked.Predict]:
    """What draws genes, and the floors of these."""
    draw = partial(mask_tokens, n_tokens=module.n_tokens, special=module.special, rate=rate)
    return draw, partial(floor.predict, first=module.first_gene)
