"""How ScGPT's cells are encoded: tokens, which are made on the CPU, and what is pooled of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cellprior.model.engine._encoder import Covariates, Encoder

OF_TOKENS = ("ties", "seed", "max_genes")  # the other options are of the pooling


@dataclass
class ScGPTEncoder(Encoder):
    """Pooled states of the tokens."""

    def place(self, counts: Any) -> Any:
        """Counts stay on the CPU, where bins are made."""
        return counts

    def encode(self, chunks: Iterable[Any], covariates: Covariates) -> Iterator[Tensor]:
        """Pooled states of the tokens."""
        columns = self.columns()
        how = {name: value for name, value in self.options.items() if name in OF_TOKENS}
        pool = {name: value for name, value in self.options.items() if name not in OF_TOKENS}
        for counts in chunks:
            yield self.module.pool(self.module.tokens(counts, gene_index=columns, **how), **pool)
