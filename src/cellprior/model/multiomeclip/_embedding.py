"""The embedding of cells with two modalities, by minibatch, in this process or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cellprior.model.data._counts import csr_tensor
from cellprior.model.engine._dask import block_of, on_device_here, parts_on_cluster, refuse_here
from cellprior.model.engine._sizes import BatchSize, Part
from cellprior.model.learning._finite import NOT_FINITE, DivergedError
from cellprior.model.multiomeclip._cells import CountsOf

if TYPE_CHECKING:
    from pathlib import Path

    from cellprior.model.multiomeclip._model import MultiomeCLIP


class Encoder:
    """What makes vectors of counts."""

    module: Any
    default_batch_size = 1024

    def _embed(
        self,
        counts: CountsOf,
        rows: np.ndarray,
        batch_size: int | None = None,
        *,
        aligned: bool = False,
    ) -> np.ndarray:
        """Unit vectors of cells that have a modality ``(cells, n_latent)``."""

        def vectors(part: Tensor) -> Tensor:
            found = self.module.embed(counts.modality, part)
            return self.module.alignment[counts.modality](found) if aligned else found

        return self._in_parts(counts, rows, batch_size, vectors, self.module.n_latent)

    @torch.inference_mode()
    def _in_parts(
        self,
        counts: CountsOf,
        rows: np.ndarray,
        batch_size: int | None,
        function: Callable[[Tensor], Tensor],
        width: int,
    ) -> np.ndarray:
        """What a function makes of the counts, a few cells at a time ``(cells, width)``."""
        size = BatchSize(batch_size, self, n_features=counts.n_features)
        self.module.eval()
        device = self.module.device
        result = np.empty((len(rows), width), dtype=np.float32)
        start = 0
        while start < len(rows):
            cells = slice(start, start + size.n_cells)
            part = csr_tensor(counts.read(rows[cells]))
            try:
                # Apple's GPUs have no sparse tensors
                part = part.to_dense().to(device) if device.type == "mps" else part.to(device)
                result[cells] = function(part).float().cpu().numpy()
                start = cells.stop
                continue
            except torch.cuda.OutOfMemoryError as error:
                size.halve(error)
            torch.cuda.empty_cache()  # not in the handler, whose traceback still holds the tensors
        if not np.isfinite(result).all():
            raise DivergedError(NOT_FINITE)
        return result

    def _joint(
        self,
        counts: Iterable[CountsOf],
        rows: np.ndarray,
        batch_size: int | None = None,
        *,
        center: bool = True,
    ) -> np.ndarray:
        """Mean over the modalities of those that a cell has ``(cells, n_latent)``, NaN if it has none."""
        total = np.zeros((len(rows), self.module.n_latent), dtype=np.float32)
        n_found = np.zeros(len(rows), dtype=np.float32)
        for of_modality in counts:
            at = np.flatnonzero(of_modality.row[rows] >= 0)
            total[at] += self._embed(of_modality, rows[at], batch_size, aligned=center)
            n_found[at] += 1
        with np.errstate(invalid="ignore"):
            return total / n_found[:, None]


@dataclass
class Worker(Encoder):
    """What each worker of a cluster needs: the network, and of the counts all but themselves."""

    module: Any
    counts: list[CountsOf]
    batch_size: int

    def latents(self, parts: list[tuple[Any, np.ndarray, np.ndarray]]) -> np.ndarray:
        """Latents ``(cells, n_latent)`` of one unit, of which each modality has a block, rows in it, and names."""
        on_device_here(self.module)
        counts = []
        for of_modality, (block, row, names) in zip(self.counts, parts, strict=True):
            labels = SimpleNamespace(**vars(of_modality.adata), obs_names=names)
            counts.append(replace(of_modality, x=block, row=row, adata=labels))
        return self._joint(counts, np.arange(len(counts[0].row)), self.batch_size)


class JointEmbedding:
    """All attached cells, by what they have; see :class:`~cellprior.model.engine._embedding.Embedding`."""

    n_stages = 1
    scratch: Path | None = None

    def __init__(
        self,
        model: MultiomeCLIP,
        *,
        batch_size: int | None = None,
        unit_size: int | None = None,
        client: Any = None,
    ) -> None:
        cells = model._cells(None)
        self.model, self.client, self.obs = model, client, cells.obs
        self.counts = list(model._counts(None, cells).values())
        if client is not None:
            for counts in self.counts:
                refuse_here(counts.x)
        self.size = BatchSize(batch_size, model, n_features=max(counts.n_features for counts in self.counts))
        self.n_cells, self.width = cells.n_obs, model.module.n_latent
        n_units = -(-self.n_cells // (unit_size or self.size.n_cells))
        self.units = np.array_split(np.arange(self.n_cells), n_units) if n_units else []
        self.progress: Callable[[int], Any] = lambda n_cells: None

    def parts(self, pending: Iterable[int] | None = None) -> Iterator[Part]:
        """Embed the cells of some units, by default of all; a cell that has neither modality has a row of NaN."""
        pending = range(len(self.units)) if pending is None else pending
        if self.client is not None:
            yield from parts_on_cluster(self, self.client, pending)
            return
        for unit in pending:
            rows = self.units[unit]
            latent = self.model._joint(self.counts, rows, self.size.n_cells)
            self.progress(len(rows))
            yield Part(unit, rows, latent, True)

    def worker(self) -> Worker:
        """What each worker of a cluster needs."""
        counts = []
        for part in self.counts:
            labels = SimpleNamespace(var_names=part.adata.var_names, layers=list(part.adata.layers))
            counts.append(replace(part, x=None, row=np.empty(0, dtype=np.int64), adata=labels))
        return Worker(self.model.module, counts, self.size.n_cells)

    def submit(self, client: Any, worker: Any, cells: np.ndarray) -> list[tuple[Any, np.ndarray]]:
        """The future of the latents of one unit on a cluster, and its cells."""
        import dask

        parts = []
        for counts in self.counts:
            row = counts.row[cells]
            has = row >= 0
            block, position = block_of(counts.x, row[has]) if has.any() else (counts.x[:0], row[has])
            names = np.asarray(counts.adata.obs_names[np.unique(row[has])])
            row[has] = position
            parts.append((block, row, names))
        return [(client.compute(dask.delayed(Worker.latents, pure=False)(worker, parts)), cells)]
