"""The original's way, for comparison: one stream of draws over all cells, and padding that cells see."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cellprior.model.uce._inputs import released_sentences
from cellprior.model.uce._module import Padding, UCEModule


@torch.inference_mode()
def released_latents(
    module: UCEModule,
    batches: Iterable[Tensor],
    gene_index: Tensor | None,
    *,
    order: np.ndarray,
    stream: np.random.RandomState | None,
    seed: int,
    padding: Padding,
) -> list[np.ndarray]:
    """Embeddings of batches that are padded together, ``(cells, n_latent)`` each.

    Of raw counts, see :meth:`~cellprior.model.uce._module.UCEModule.cells`. ``order`` is, by vocabulary row, the
    place of each gene in the data; ``stream`` is of the original's draws, ``None`` for keyed ones, by ``seed``. The
    module is in eval mode.
    """
    found = []
    for counts in batches:
        if stream is None:
            tokens = module.tokens(counts, gene_index=gene_index, seed=seed)
        else:
            cells, _ = module.cells(counts, gene_index)
            length = module.sentence_length
            tokens = module.on_device(released_sentences(cells, module.genome, order, stream, length=length))
        found.append(module.latent_of(module.pool(tokens, padding=padding)).cpu().numpy())
    return found
