"""How UCE's cells are encoded: sentences, which are drawn on the CPU, and the mean of the vectors of several draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellprior.model.engine._encoder import Covariates, Encoder
from cellprior.model.uce._draws import average_of_draws
from cellprior.model.uce._module import MIXED

SEVERAL_SPECIES = (
    "Some cells have more than a tenth of their counts in genes of another species than their own: doublets, or RNA of "
    "other cells in their droplets. Only the genes of the species with most counts are read."
)


@dataclass
class UCEEncoder(Encoder):
    """Options are ``n_draws``, ``with_spread``, which adds a column, and those of the draws."""

    is_mixed: bool = False

    @property
    def width(self) -> int:
        """Columns of the embedding."""
        return super().width + bool(self.options.get("with_spread"))

    def place(self, counts: Any) -> Any:
        """Counts stay on the CPU, where sentences are drawn."""
        return counts

    def encode(self, chunks: Iterable[Any], covariates: Covariates) -> Iterator[Tensor]:
        """Unit vectors of the class token."""
        module, columns, draws = self.module, self.columns(), dict(self.options)
        n_draws, with_spread = draws.pop("n_draws", 1), draws.pop("with_spread", False)
        for counts in chunks:
            cells, share = module.cells(counts, columns)
            self.is_mixed = self.is_mixed or bool((share < MIXED).any())
            tokens = module.tokens_of(cells, n_draws=n_draws, **draws)
            latent, spread = average_of_draws(module.latent_of(module.pool(tokens)), n_draws)
            yield torch.cat([latent, spread[:, None]], dim=1) if with_spread else latent

    def finish(self) -> None:
        """Warn of cells with genes of several species."""
        if self.is_mixed:
            warnings.warn(SEVERAL_SPECIES, UserWarning, stacklevel=2)
