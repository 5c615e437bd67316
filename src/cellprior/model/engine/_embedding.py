"""The embedding loop: cells in units that do not depend on each other, in this process or on a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model.data._fields import CountsManager
from cellprior.model.data._minibatches import ToVocabulary, minibatches
from cellprior.model.engine._dask import Blocks, Worker, parts_on_cluster, refuse_here

if TYPE_CHECKING:
    import pandas as pd

    from cellprior.model._base import PretrainedModel
from cellprior.model.engine._sizes import BatchSize, Chunks, Part


class Embedding:
    """Cells that a model is to embed, in units: sentences where cells see each other, else minibatches.

    Parameters
    ----------
    model
        The model.
    manager
        Of the data.
    rows
        Row numbers of the cells.
    batch_size
        Cells in memory at a time; by default what fits, see :class:`BatchSize`.
    unit_size
        Cells of a unit of a model whose cells do not see each other; by default ``batch_size``.
    precision
        ``"float32"`` or ``"bfloat16"``.
    encode
        What gives ``width`` columns instead of the embedding.
    client
        Of a Dask cluster that embeds.
    **options
        To ``encode``, or to the model's own.
    """

    def __init__(
        self,
        model: PretrainedModel,
        manager: CountsManager,
        rows: np.ndarray,
        *,
        batch_size: int | None = None,
        unit_size: int | None = None,
        precision: str = "float32",
        encode: Callable[..., Iterable[Tensor]] | None = None,
        width: int | None = None,
        client: Any = None,
        **options: Any,
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            msg = f'precision={precision!r} is not known; choose "float32" or "bfloat16".'
            raise ValueError(msg)
        self.model, self.manager, self.rows, self.precision = model, manager, rows, precision
        self.used, self.column = model._columns(model._match_of(manager))
        self.size = BatchSize(batch_size, model, n_features=len(self.used))
        self.width = width or model.module.n_latent
        self.encode, self.options, self.client = encode, options, client
        if client is not None:
            refuse_here(manager.get_from_registry(REGISTRY_KEYS.X_KEY))
        self.units = model._units(manager, rows, unit_size or self.size.n_cells)
        self.scratch: Path | None = None  # folder for what a sentence holds; else memory
        self.n_stages = model._n_stages  # times that progress is told of each cell
        self.progress: Callable[[int], Any] = lambda n_cells: None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.rows)

    @property
    def obs(self) -> pd.DataFrame:
        """Annotation of the cells."""
        return self.manager.adata.obs.iloc[self.rows]

    def parts(self, pending: Iterable[int] | None = None) -> Iterator[Part]:
        """Embed the cells of some units, by default of all; where a GPU runs out of memory, fewer at a time.

        A unit in which that happens is begun anew: some of its cells may be given twice.
        """
        queue = deque(range(len(self.units)) if pending is None else pending)
        self.model.module.eval()
        if self.client is not None:
            yield from parts_on_cluster(self, self.client, queue)
            return
        while queue:
            try:
                yield from self._parts(queue)
                return
            except torch.cuda.OutOfMemoryError as error:
                self.size.halve(error)
            torch.cuda.empty_cache()  # not in the handler, whose traceback still holds the tensors

    def worker(self) -> Worker:
        """What each worker of a cluster needs."""
        adata, layer = self.manager.adata, self.manager.data_registry["X"]["attr_key"]
        return Worker(
            module=self.model.module,
            encode=type(self.model)._encode,
            to_vocabulary=ToVocabulary(self.column, len(self.used)),
            gene_index=None if self.gene_index is None else self.used,
            size=self.size,
            precision=self.precision,
            options=self.options,
            labels=SimpleNamespace(
                var_names=self.manager.counts.var.index, layers=list(adata.layers), layer=layer, raw=None
            ),
        )

    def submit(self, client: Any, worker: Any, cells: np.ndarray) -> list[tuple[Any, np.ndarray]]:
        """Futures of the latents of one unit on a cluster, and the cells of each."""
        return self.model._submit(client, worker, Blocks(self), cells)

    def _parts(self, queue: deque[int]) -> Iterator[Part]:
        together = self.model._sentences
        flow = None if together else self._read([p for unit in queue for p in self._pieces(self.units[unit])])
        while queue:
            unit = self.units[queue[0]]
            pieces = self._pieces(unit)
            chunks = self._chunks(pieces) if flow is None else islice(flow, len(pieces))
            start = 0
            for latent in self._encoded(chunks, queue[0]):
                cells = unit[start : start + len(latent)]
                start += len(latent)
                self.progress(len(latent))
                yield Part(queue[0], cells, latent, start == len(unit))
            queue.popleft()
        for _ in flow or ():  # the end of the flow is where a model says what it has noticed on the way
            pass

    def _encoded(self, chunks: Iterable[Tensor], unit: int) -> Iterator[np.ndarray]:
        """Latents of the chunks of one unit."""
        options = self.options
        if self.encode is None and self.model._sentences:
            scratch = self.scratch and self.scratch / str(unit)
            options = {**options, "scratch": scratch, "step": self.progress}
        device, half = self.model.module.device.type, self.precision == "bfloat16"
        latents: Iterator[Tensor] | None = None
        while True:
            # not over the yield: what is done with the latents is not part of the network
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
                if latents is None:
                    encode = self.encode or self.model._encode
                    latents = iter(encode(chunks, self.gene_index, **options))
                found = next(latents, None)
                latent = None if found is None else found.float().cpu().numpy()
            if latent is None:
                return
            yield latent

    @cached_property
    def gene_index(self) -> Tensor | None:
        """Vocabulary row of each column of the counts; None if the columns are the vocabulary, in order."""
        if len(self.used) == len(self.model.genes):
            return None
        return torch.as_tensor(self.used, device=self.model.module.device)

    @cached_property
    def dataset(self) -> Any:
        """Counts by row, made once, as the rows of a CSC matrix in memory cost a pass over it."""
        return self.manager.create_torch_dataset(
            data_and_attributes=[REGISTRY_KEYS.X_KEY, *self.model._covariates]
        )

    def _pieces(self, cells: np.ndarray) -> list[np.ndarray]:
        """Cells in pieces of nearly equal size: none of a handful of cells."""
        return np.array_split(cells, -(-len(cells) // self.size.n_cells))

    def _chunks(self, pieces: list[np.ndarray]) -> Chunks:
        return Chunks([len(piece) for piece in pieces], lambda start: self._read(pieces[start:]))

    def _read(self, pieces: list[np.ndarray]) -> Iterator[Tensor]:
        loader = minibatches(
            self.dataset, [self.rows[piece] for piece in pieces], self.column, len(self.used)
        )
        return self.model._counts(loader)


def in_memory(embedding: Embedding) -> np.ndarray:
    """All cells of an embedding, float32 ``(cells, width)``."""
    latent = np.empty((embedding.n_cells, embedding.width), dtype=np.float32)
    for part in embedding.parts():
        latent[part.cells] = part.latent
    return latent
