"""What UCE is trained on: which genes does a cell express, of those that its sentence does not show.

No training code is published; this is the objective of the paper's methods. Beside the loss stands what is reached
without biology, see :class:`~cellprior.model.uce._floors.PresenceFloors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior._arguments import share, whole
from cellprior.model.uce._floors import PresenceFloors
from cellprior.model.uce._inputs import presence_task


def presence_losses(
    module: Any,
    batch: Mapping[str, Tensor],
    *,
    floor: PresenceFloors,
    measured: Tensor,
    rng_seed: int,
    hide_rate: float = 0.2,
    n_queries: int = 200,
) -> dict[str, Tensor]:
    """Mean binary cross-entropy of whether genes are expressed; half of those that are asked for are.

    Raises ValueError if ``hide_rate`` is no share, or ``n_queries`` below 2.

    Parameters
    ----------
    module
        The network.
    batch
        ``X``, raw counts over the vocabulary ``(cells, n_genes)``; ``batch``, one code for all of them, if the data
        have batches.
    floor
        Predictors whose loss on the same genes is given too.
    measured
        Which genes were measured, once or by batch ``(1 or n_batches, n_genes)``; only these are asked for.
    rng_seed
        Of the sentences, of what is hidden and what is asked for.
    hide_rate
        Share of the expressed genes that the sentence does not show.
    n_queries
        Genes of a cell that are asked for.
    """
    code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
    known = measured[code if len(measured) > 1 else 0]
    rng = np.random.default_rng(rng_seed)
    task = asked(
        module, batch[REGISTRY_KEYS.X_KEY], floor, known, rng, hide_rate=hide_rate, n_queries=n_queries
    )
    logits = module.predict_pairs(module.latent_of(module.trained(task.tokens)), task.query)
    target = task.target
    loss = F.binary_cross_entropy_with_logits(logits, target)
    right = ((logits.detach() > 0) == (target > 0)).float().mean()
    return {
        "loss": loss,
        "presence": loss,
        "presence_accuracy": right,
        **{
            f"presence_floor_{name}": F.binary_cross_entropy_with_logits(found, target)
            for name, found in task.floors.items()
        },
        **{
            f"presence_accuracy_floor_{name}": ((found > 0) == (target > 0)).float().mean()
            for name, found in task.floors.items()
        },
    }


class Asked(NamedTuple):
    """What the network is shown and asked, and what is known without biology."""

    tokens: Any
    query: Tensor  # vocabulary rows             (cells, queries)
    target: Tensor  # 1 where expressed, float32  (cells, queries)
    floors: dict[str, Tensor]  # logits by predictor (cells, queries)


@torch.no_grad()
def asked(
    module: Any,
    counts: Tensor,
    floor: PresenceFloors,
    measured: Tensor,
    rng: np.random.Generator,
    *,
    hide_rate: float,
    n_queries: int,
) -> Asked:
    """Sentences of a part of the genes of cells, and genes to ask for; see :func:`presence_losses`."""
    share(hide_rate=hide_rate)
    whole(least=2, n_queries=n_queries)
    cells, _ = module.cells(counts)
    genome, length = module.genome, module.sentence_length
    known = measured.cpu().numpy()
    task = presence_task(cells, genome, known, rng, hide=hide_rate, n_queries=n_queries, length=length)
    device = module.token_table.weight.device
    query = torch.from_numpy(task.query).to(device)
    target = torch.from_numpy(task.target.astype(np.float32)).to(device)
    of_species = module.gene_species[None] == module.gene_species[query[:, -1:]]
    n_positive = target.sum(1)
    floors = floor.logits(
        query,
        measured.to(device) & of_species,
        torch.from_numpy(np.diff(cells.indptr)).to(device),
        n_positive=n_positive,
        n_negative=n_queries - n_positive,
    )
    return Asked(module.on_device(task.sentences), query, target, floors)
