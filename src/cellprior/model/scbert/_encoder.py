"""How ScBERT's cells are encoded: tokens, and a mean over them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cellprior.model.engine._encoder import Covariates, Encoder
from cellprior.model.engine._kernels import cell_depth
from cellprior.model.scbert._inputs import loses_single_counts


@dataclass
class ScBERTEncoder(Encoder):
    """Counts the cells that are too deep for the bins, and says how many there were."""

    n_deep: int = 0

    def place(self, counts: Any) -> Any:
        """Counts where the network is."""
        counts = super().place(counts)
        self.n_deep += int(loses_single_counts(cell_depth(counts)).sum())
        return counts

    def encode(self, chunks: Iterable[Any], covariates: Covariates) -> Iterator[Tensor]:
        """Pooled states of the tokens."""
        columns = self.columns()
        for counts in chunks:
            yield self.module.pool(self.module.tokens(counts, gene_index=columns), **self.options)

    def finish(self) -> None:
        """Warn of cells in which single counts were lost."""
        if self.n_deep:
            msg = (
                f"{self.n_deep} cells have more than 10,000 counts over the genes of the vocabulary: there, a gene "
                "with a single count is in bin 0, as if it were not expressed. To compare them with shallower cells, "
                "thin them first: scanpy.pp.downsample_counts(adata, counts_per_cell=10_000)."
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
