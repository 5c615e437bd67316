"""Training cells from a datamodule of scvi-tools, which may read them from disk as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior import genes as matching
from cellprior.model.data._counts import NotCountsError

# training cells that predictors without biology are fitted to: a pass over all may take hours
FLOOR_CELLS = 100_000


class StreamedCells(pl.LightningDataModule):
    """Minibatches of another datamodule, with counts in vocabulary order and nothing else.

    Parameters
    ----------
    inner
        Such as :class:`scvi.dataloaders.AnnbatchDataModule`: with ``registry``, and loaders whose minibatches its
        ``on_before_batch_transfer`` makes dictionaries with ``X``, dense ``(cells, genes)``.
    genes
        The vocabulary.
    min_coverage
        Least share of its genes that must match.
    **split
        To its ``set_split``.

    Raises
    ------
    GeneMatchError
        If too few genes match.
    """

    def __init__(self, inner: Any, genes: pd.DataFrame, min_coverage: float, **split: Any) -> None:
        super().__init__()
        if split["train_size"] is None and split["validation_size"] is None:
            split["train_size"] = 0.9
        self.inner = inner
        inner.set_split(**split)
        state = inner.registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]
        self.names = pd.Index(state["column_names"]).astype(str)
        self.match = matching.match(pd.DataFrame(index=self.names), genes, min_coverage=min_coverage)
        self.n_genes = len(genes)
        self.n_train, self.n_val = inner.n_train, inner.n_val

    def train_dataloader(self) -> Minibatches:
        """Training cells."""
        return Minibatches(self, self.inner.train_dataloader())

    def val_dataloader(self) -> Minibatches:
        """Held-out cells."""
        return Minibatches(self, self.inner.val_dataloader())

    def floor_minibatches(self) -> Iterator[dict[str, Tensor]]:
        """Some training cells, enough to know each gene's share."""
        return islice(self.train_dataloader(), max(FLOOR_CELLS // self.inner.batch_size, 1))

    def to_vocabulary(self, batch: Any) -> dict[str, Tensor]:
        """Counts ``X`` of a minibatch ``(cells, n_genes)``.

        Raises NotCountsError if they are not counts, with the gene.
        """
        x = self.inner.on_before_batch_transfer(batch, 0)[REGISTRY_KEYS.X_KEY].float()
        bad = ~x.isfinite() | (x < 0) | (x != x.round())
        if bad.any():
            row, column = (int(i) for i in bad.nonzero()[0])
            msg = (
                f"The datamodule does not give raw counts: gene {self.names[column]!r} is {float(x[row, column]):g} "
                "in a cell. Make it of files with raw counts, or name the layer that holds them."
            )
            raise NotCountsError(msg)
        known = np.flatnonzero(self.match.index >= 0)
        target = torch.from_numpy(self.match.index[known].astype(np.int64))
        counts = x.new_zeros(len(x), self.n_genes)
        return {REGISTRY_KEYS.X_KEY: counts.index_add_(1, target, x[:, torch.from_numpy(known)])}


class Minibatches:
    """A loader of :class:`StreamedCells`."""

    def __init__(self, cells: StreamedCells, loader: Iterable[Any]) -> None:
        self.cells, self.loader = cells, loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.cells.to_vocabulary, self.loader)
