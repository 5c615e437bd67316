"""A long sentence on a cluster: each worker holds the hidden states of some cells, and only sums go between them.

Exact: the sums that :class:`~cellprior.model.cellplm._module.FlowAttention` streams over a sentence are added up over
the workers, in float64, before any of them goes on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from cellprior.model.cellplm._hidden import HiddenStates
from cellprior.model.cellplm._module import N_STREAMS, Pair, Projections, add_up, as_float, sum_and_size
from cellprior.model.engine._dask import Block, Cluster, Worker

PART_CELLS = 8192  # of a sentence, that a worker has in one piece


def begin(worker: Worker, block: Block) -> list[Tensor]:
    """Hidden states in front of the first layer, by chunk ``(cells, n_hidden)``."""

    def embed() -> list[Tensor]:
        encoder = worker.ready()
        embedder = encoder.module.embedder
        table = embedder.table(encoder.columns())
        return [embedder(counts, table) for counts in worker.chunks(block)]

    return worker.until_it_fits(embed)


def partial_sums(worker: Worker, number: int, hidden: list[Tensor], *known: Pair) -> Pair:
    """What some cells give to the next stream of a layer."""
    layer = worker.ready().module.encoder[number]
    return worker.until_it_fits(lambda: layer.attention.stream(_projected(layer, hidden), known))


def total(*parts: Pair) -> Pair:
    """Sums over the whole sentence."""
    return as_float(add_up(parts))


def layer_output(
    worker: Worker, number: int, n_cells: int, hidden: list[Tensor], *known: Pair
) -> list[Tensor]:
    """Hidden states after a layer, by chunk; those in front of it stay as they are, should they be needed again."""

    def output() -> list[Tensor]:
        layer = worker.ready().module.encoder[number]
        projected, sums = _projected(layer, hidden), layer.attention.sums(n_cells, known)
        return [layer.output(h, projected.of(i, "query")[0], sums) for i, h in enumerate(hidden)]

    return worker.until_it_fits(output)


def _projected(layer: Any, hidden: list[Tensor]) -> Projections:
    return Projections(layer.attention, layer.norm1, HiddenStates.of(hidden))


def latent_sum(worker: Worker, hidden: list[Tensor]) -> Pair:
    """What some cells give to the middle of their sentence."""
    return worker.until_it_fits(lambda: add_up(map(sum_and_size, _latents(worker, hidden))))


def read_out(worker: Worker, hidden: list[Tensor], *known: Pair) -> np.ndarray:
    """Latents ``(cells, n_latent)``, or their directions from the middle of the sentence."""

    def latents() -> np.ndarray:
        found, direction = _latents(worker, hidden), worker.encoder.module.direction
        if known:
            middle = direction.middle(known[0])
            found = [direction(z, middle) for z in found]
        return np.concatenate([latent.cpu().numpy() for latent in found])

    return worker.until_it_fits(latents)


def _latents(worker: Worker, hidden: list[Tensor]) -> list[Tensor]:
    module = worker.ready().module
    return [module.latent.mean(module.pre_latent_norm(h), **worker.encoder.options).float() for h in hidden]


def submit_sentence(
    cluster: Cluster, cells: np.ndarray, n_layers: int, *, centred: bool = False
) -> list[tuple[Any, np.ndarray]]:
    """Ask a cluster for the latents of a sentence; futures, and the cells of each. None of one that is not long.

    ``cells`` are positions of the sentence's cells; ``centred`` says whether the embedding is a direction from its
    middle.
    """
    parts = np.array_split(cells, -(-len(cells) // PART_CELLS))
    if len(parts) == 1:
        return []
    call, worker = cluster.call, cluster.worker
    hidden = [cluster.on_cells(begin, part) for part in parts]
    for number in range(n_layers):
        known: list[Any] = []
        for _ in range(N_STREAMS):
            known.append(call(total, *(call(partial_sums, worker, number, h, *known) for h in hidden)))
        hidden = [call(layer_output, worker, number, len(cells), h, *known) for h in hidden]
    middle = [call(total, *(call(latent_sum, worker, h) for h in hidden))] if centred else []
    return [(call(read_out, worker, h, *middle), part) for h, part in zip(hidden, parts, strict=True)]
