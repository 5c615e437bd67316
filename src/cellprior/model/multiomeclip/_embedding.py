"""The embedding of cells with two modalities, by minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cellprior.model._embedding import BatchSize, Part

if TYPE_CHECKING:
    from pathlib import Path

    from cellprior.model.multiomeclip._model import MultiomeCLIP


class JointEmbedding:
    """All attached cells, by what they have; see :class:`~cellprior.model._embedding.Embedding`."""

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
        if client is not None:
            msg = "client=: a cluster embeds data of one modality with CellPLM or ScBERT; MultiomeCLIP runs here."
            raise NotImplementedError(msg)
        self.model, self.cells = model, model._cells(None)
        self.obs = self.cells.obs
        self.counts = model._counts(None, self.cells)
        n_features = max(counts.n_features for counts in self.counts.values())
        self.size = BatchSize(batch_size, model, n_features=n_features)
        self.n_cells, self.width = self.cells.n_obs, model.module.n_latent
        n_units = -(-self.n_cells // (unit_size or self.size.n_cells))
        self.units = np.array_split(np.arange(self.n_cells), n_units) if n_units else []
        self.progress: Callable[[int], Any] = lambda n_cells: None

    def parts(self, pending: Iterable[int]) -> Iterator[Part]:
        """Embed the cells of some units; a cell that has neither modality has a row of NaN."""
        for unit in pending:
            rows = self.units[unit]
            latent = self.model._joint(self.cells, self.counts, rows, self.size.n_cells)
            self.progress(len(rows))
            yield Part(unit, rows, latent, True)
