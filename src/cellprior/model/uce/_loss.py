"""What UCE is trained on: which genes does a cell express, of those that its sentence does not show.

No training code is published; this is the objective of the paper's methods. Beside the loss stands what is reached
without biology, see :class:`~cellprior.model.uce._floors.PresenceFloors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior._arguments import share, whole
from cellprior.model.uce._floors import PresenceFloors
from cellprior.model.uce._inputs import presence_task

if TYPE_CHECKING:
    from cellprior.model.uce._module import UCEModule


def presence_losses(
    module: UCEModule,
    batch: Mapping[str, Tensor],
    *,
    floor: PresenceFloors,
    measured: Tensor,
    rng_seed: int,
    hide_rate: float = 0.2,
    n_queries: int = 200,
) -> dict[str, Tensor]:
    """Mean binary cross-entropy of whether genes are expressed; half of those that are asked for are.

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

    Raises
    ------
    ValueError
        If ``hide_rate`` is no share, or ``n_queries`` below 2.
    """
    share(hide_rate=hide_rate)
    whole(least=2, n_queries=n_queries)
    code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
    known = measured[code if len(measured) > 1 else 0]
    cells, _ = module.cells(batch[REGISTRY_KEYS.X_KEY])
    task = presence_task(
        cells,
        module.genome,
        known.cpu().numpy(),
        np.random.default_rng(rng_seed),
        hide=hide_rate,
        n_queries=n_queries,
        length=module.sentence_length,
    )
    device = module.token_table.weight.device
    query, target = (
        torch.from_numpy(part).to(device) for part in (task.query, task.target.astype(np.float32))
    )
    latent = module.decode(module.trained(module.on_device(task.sentences)))
    logits = module.predict_pairs(latent, query)
    loss = F.binary_cross_entropy_with_logits(logits, target)
    with torch.no_grad():
        of_species = module.gene_species[None] == module.gene_species[query[:, -1:]]
        n_positive = target.sum(1)
        floors = floor.logits(
            query,
            known.to(device) & of_species,
            torch.from_numpy(np.diff(cells.indptr)).to(device),
            n_positive=n_positive,
            n_negative=query.shape[1] - n_positive,
        )
    right = ((logits.detach() > 0) == (target > 0)).float().mean()
    return {
        "loss": loss,
        "presence": loss,
        "presence_accuracy": right,
        **{
            f"presence_floor_{name}": F.binary_cross_entropy_with_logits(found, target)
            for name, found in floors.items()
        },
        **{
            f"presence_accuracy_floor_{name}": ((found > 0) == (target > 0)).float().mean()
            for name, found in floors.items()
        },
    }
