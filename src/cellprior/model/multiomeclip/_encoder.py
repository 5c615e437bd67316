"""How MultiomeCLIP's cells are encoded: each by the modalities that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellprior.model._errors import NOT_FINITE, DivergedError
from cellprior.model.data._cells import Joint
from cellprior.model.engine._encoder import Covariates, Encoder


@dataclass
class JointEncoder(Encoder):
    """The mean over the modalities of a cell, NaN if it has none; ``center`` turns them together first."""

    def place(self, counts: Joint) -> Joint:
        """Counts of both where the network is."""
        placed = {name: (at, super(JointEncoder, self).place(x)) for name, (at, x) in counts.counts.items()}
        return counts._replace(counts=placed)

    def encode(self, chunks: Iterable[Any], covariates: Covariates) -> Iterator[Tensor]:
        """Latents of each chunk."""
        for chunk in chunks:
            total = torch.zeros(chunk.n_cells, self.width, device=self.module.device)
            n_known = torch.zeros(chunk.n_cells, 1, device=self.module.device)
            for name, (at, counts) in chunk.counts.items():
                latent = self.module.embed(name, counts).float()
                if self.options.get("center", True):
                    latent = self.module.alignment[name](latent).float()
                if not latent.isfinite().all():
                    raise DivergedError(NOT_FINITE)
                total[at] += latent
                n_known[at] += 1
            yield total / n_known
