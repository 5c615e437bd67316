"""What the embedding loop knows of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

Covariates = Mapping[str, Tensor]  # of the cells of a unit, by name (cells,)


@dataclass
class Encoder:
    """What makes latents of cells; all that the loop, and each worker of a cluster, gets of a model.

    It can be pickled. A model whose cells are looked at one by one, by ``module.encode(counts, gene_index=...)`` and
    nothing else, needs no other. A subclass says how cells are cut into units, and what is made of a unit.

    Attributes
    ----------
    module
        The network.
    gene_index
        Vocabulary row of each column of the counts; None if the columns are the vocabulary, in order.
    default_batch_size
        Cells at a time on a CPU.
    options
        To ``module.encode``: those of ``get_latent_representation``. Only that gives any: each needs a default, the
        same here, as :func:`cellprior.tl.embed` with ``out=`` or on a cluster gives none, and neither does
        ``fine_tune``, which asks for :meth:`hidden`.
    """

    sees_others: ClassVar[bool] = False  # whether the cells of a unit see each other

    module: Any
    gene_index: np.ndarray | None = None
    default_batch_size: int = 1024
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns of the embedding."""
        return int(self.module.n_latent)

    @property
    def n_stages(self) -> int:
        """Times that a cell is worked on, for the bar of progress."""
        return 1

    def cell_bytes(self, n_columns: int) -> int:
        """Memory that a cell takes: its counts, dense and sparse, and sixteen vectors of the network's width, float32.

        Parameters
        ----------
        n_columns
            Features of a cell.
        """
        return 16 * n_columns + 64 * int(getattr(self.module, "n_hidden", self.width))

    def units(self, n_cells: int, batch: np.ndarray | None, size: int) -> list[np.ndarray]:
        """Positions of the cells that are encoded together, increasing.

        Parameters
        ----------
        n_cells
            Number of cells.
        batch
            Code of the batch of each, None without one ``(n_cells,)``.
        size
            Cells of a unit where they do not see each other.
        """
        n_units = -(-n_cells // size)
        return np.array_split(np.arange(n_cells), n_units) if n_units else []

    def columns(self) -> Tensor | None:
        """``gene_index`` where the network is."""
        return (
            None if self.gene_index is None else torch.as_tensor(self.gene_index, device=self.module.device)
        )

    def place(self, counts: Any) -> Any:
        """Counts of a chunk where the network is; Apple's GPUs have no sparse tensors."""
        device = self.module.device
        return counts.to_dense().to(device) if device.type == "mps" else counts.to(device)

    def encode(self, chunks: Iterable[Any], covariates: Covariates) -> Iterator[Tensor]:
        """Latents ``(cells, width)`` of each chunk of one unit.

        Parameters
        ----------
        chunks
            Counts ``(cells, n_columns)``, sparse CSR, of a few cells at a time.
        covariates
            What else the network is told of the cells of the unit.
        """
        columns = self.columns()
        for counts, of_chunk in with_covariates(chunks, covariates):
            yield self.module.encode(counts, gene_index=columns, **of_chunk, **self.options)

    def hidden(self, chunks: Iterable[Any], covariates: Covariates) -> Iterable[Tensor]:
        """Hidden states ``(cells, n_hidden)`` of each chunk of one unit, what the annotation head reads."""
        columns = self.columns()
        for counts, of_chunk in with_covariates(chunks, covariates):
            yield self.module.hidden(counts, gene_index=columns, **of_chunk)

    def finish(self) -> None:
        """Say what was noticed on the way, after the last cell."""

    def submit(self, cluster: Any, cells: np.ndarray) -> list[tuple[Any, np.ndarray]]:
        """Futures of the latents of a unit that is too much for one worker, and the cells of each; else none."""
        return []


def with_covariates(chunks: Iterable[Any], covariates: Covariates) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Each chunk, and what is told of its cells."""
    start = 0
    for counts in chunks:
        stop = start + len(counts)
        yield counts, {name: values[start:stop] for name, values in covariates.items()}
        start = stop
