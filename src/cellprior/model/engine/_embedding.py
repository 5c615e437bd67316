"""The embedding loop: cells in units that do not depend on each other, in this process or on a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellprior._talk import bar
from cellprior.model._errors import NOT_FINITE, DivergedError
from cellprior.model.data._cells import Cells
from cellprior.model.data._minibatches import pieces_of
from cellprior.model.engine._dask import parts_on_cluster, refuse_here
from cellprior.model.engine._encoder import Encoder
from cellprior.model.engine._sizes import BatchSize, Chunks, Part, no_progress

Encode = Callable[..., Iterable[Tensor]]


class Embedding:
    """Cells that are to be embedded, in units: sentences where cells see each other, else minibatches.

    Parameters
    ----------
    encoder
        What makes latents of them.
    cells
        Where the counts are.
    rows
        Row numbers of the cells.
    batch_size
        Cells in memory at a time; by default what fits, see :class:`~cellprior.model.engine._sizes.BatchSize`.
    unit_size
        Cells of a unit of a model whose cells do not see each other; by default ``batch_size``.
    precision
        ``"float32"`` or ``"bfloat16"``.
    encode
        ``encode(encoder, chunks, covariates)`` that gives ``width`` columns instead of the embedding.
    client
        Of a Dask cluster that embeds.
    """

    def __init__(
        self,
        encoder: Encoder,
        cells: Cells,
        rows: np.ndarray,
        *,
        batch_size: int | None = None,
        unit_size: int | None = None,
        precision: str = "float32",
        encode: Encode | None = None,
        width: int | None = None,
        client: Any = None,
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            msg = f'precision={precision!r} is not known; choose "float32" or "bfloat16".'
            raise ValueError(msg)
        self.encoder, self.cells, self.rows, self.precision = encoder, cells, rows, precision
        self.size = BatchSize(
            batch_size,
            device=encoder.module.device,
            cell_bytes=encoder.cell_bytes(cells.n_columns),
            default=encoder.default_batch_size,
        )
        self.encode, self.width, self.client = encode or type(encoder).encode, width or encoder.width, client
        if client is not None:
            for x in cells.matrices():
                refuse_here(x)
        batch = None if cells.batch is None else cells.batch[rows]
        self.units = encoder.units(len(rows), batch, unit_size or self.size.n_cells)
        self.scratch: Path | None = None  # folder for what a sentence holds; else memory
        self.progress: Callable[[int], Any] = no_progress

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.rows)

    @property
    def obs(self) -> pd.DataFrame:
        """Annotation of the cells."""
        return self.cells.obs.iloc[self.rows]

    @contextmanager
    def bar(self, progress: bool | None = None, *, n_done: int = 0) -> Iterator[None]:
        """A bar over all cells, of which some are done; see :func:`cellprior._talk.bar`."""
        n_stages = self.encoder.n_stages
        total, initial = n_stages * self.n_cells, n_stages * n_done
        with bar(total, "embedding", initial=initial, parts=n_stages, progress=progress) as drawn:
            self.progress = drawn.update
            yield

    def parts(self, pending: Iterable[int] | None = None) -> Iterator[Part]:
        """Embed the cells of some units, by default of all; where a GPU runs out of memory, fewer at a time.

        A unit in which that happens is begun anew: some of its cells may be given twice.

        Raises DivergedError if a latent is not finite; ValueError if the encoder does not give a row per cell, of
        ``width`` columns.
        """
        queue = deque(range(len(self.units)) if pending is None else pending)
        self.encoder.module.eval()
        for part in self._on_cluster(queue) if self.client is not None else self._here(queue):
            if part.latent.shape != (len(part.cells), self.width):
                self._refuse_shape(len(part.cells), part.latent.shape)
            if (
                not np.isfinite(part.latent).all()
                and not np.isfinite(part.latent[self._known[part.cells]]).all()
            ):
                raise DivergedError(NOT_FINITE)
            yield part

    def _refuse_shape(self, n_cells: int, found: tuple[int, ...]) -> None:
        msg = (
            f"{type(self.encoder.module).__name__} and its {type(self.encoder).__name__} give numbers of shape {found} "
            f"for {n_cells} cells, instead of {(n_cells, self.width)}: a row per cell, in the order of the cells."
        )
        raise ValueError(msg)

    @cached_property
    def _known(self) -> np.ndarray:
        """Which cells have counts at all; the others are NaN."""
        return self.cells.known[self.rows]

    def _on_cluster(self, queue: deque[int]) -> Iterator[Part]:
        plan = self.encoder, self.cells, self.rows, self.units
        yield from parts_on_cluster(*plan, self.client, queue, self.size, self.precision, self.progress)

    def _here(self, queue: deque[int]) -> Iterator[Part]:
        while queue:
            try:
                yield from self._parts(queue)
                return
            except torch.cuda.OutOfMemoryError as error:
                self.size.halve(error)
            torch.cuda.empty_cache()  # not in the handler, whose traceback still holds the tensors

    def _parts(self, queue: deque[int]) -> Iterator[Part]:
        together = self.encoder.sees_others
        flow = None if together else self.read([p for unit in queue for p in self._pieces(self.units[unit])])
        while queue:
            unit = self.units[queue[0]]
            pieces = self._pieces(unit)
            chunks = self._chunks(pieces, queue[0]) if flow is None else islice(flow, len(pieces))
            start = 0
            for latent in self._encoded(chunks, unit):
                cells = unit[start : start + len(latent)]
                start += len(latent)
                self.progress(len(latent))
                yield Part(queue[0], cells, latent, start == len(unit))
            if start < len(unit):
                self._refuse_shape(len(unit), (start, self.width))
            queue.popleft()
        for _ in flow or ():  # as the last cells were asked for, nothing is left
            pass
        self.encoder.finish()

    def _encoded(self, chunks: Iterable[Any], unit: np.ndarray) -> Iterator[np.ndarray]:
        """Latents of the chunks of one unit."""
        device, half = self.encoder.module.device, self.precision == "bfloat16"
        rows = self.rows[unit]
        covariates = {
            name: torch.as_tensor(values[rows], device=device)
            for name, values in self.cells.covariates.items()
        }
        latents: Iterator[Tensor] | None = None
        while True:
            # not over the yield: what is done with the latents is not part of the network
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                if latents is None:
                    latents = iter(self.encode(self.encoder, chunks, covariates))
                found = next(latents, None)
                latent = None if found is None else found.float().cpu().numpy()
            if latent is None:
                return
            yield latent

    def _pieces(self, cells: np.ndarray) -> list[np.ndarray]:
        """Cells in pieces of nearly equal size: none of a handful of cells."""
        return np.array_split(cells, -(-len(cells) // self.size.n_cells))

    def _chunks(self, pieces: list[np.ndarray], unit: int) -> Chunks:
        scratch = self.scratch and self.scratch / str(unit)
        sizes = [len(piece) for piece in pieces]
        return Chunks(sizes, lambda start: self.read(pieces[start:]), scratch=scratch, step=self.progress)

    def read(self, pieces: list[np.ndarray]) -> Iterator[Any]:
        """Counts of cells, piece by piece, where the network is."""
        return map(self.encoder.place, pieces_of(self.cells, [self.rows[piece] for piece in pieces]))


def in_memory(embedding: Embedding) -> np.ndarray:
    """All cells of an embedding, float32 ``(cells, width)``."""
    latent = np.empty((embedding.n_cells, embedding.width), dtype=np.float32)
    with embedding.bar():
        for part in embedding.parts():
            latent[part.cells] = part.latent
    return latent
