"""Floors of saying which genes are expressed: what can be known of that without any biology of the cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor, nn

PRIOR = 1.0  # cells of the average gene that each gene is mixed with
STEPS = 40  # of halving, when a cell's depth is looked for
WIDEST = 12.0  # a depth is between exp(-12) and exp(12) times that of an average cell


class PresenceFloors(nn.Module):
    """Whether a cell expresses a gene, by predictors that know no biology.

    ``gene_rate``
        The share of cells that express the gene.
    ``gene_rate_at_depth``
        That of cells as deep as this one: with r the rate of gene g, ``1 - (1 - r)^s``, where s is such that the sum
        over all genes is the number of genes that the cell expresses.

    Parameters
    ----------
    expressed
        Training cells that express each gene ``(n_genes,)``.
    cells
        Training cells of its species in which it was measured ``(n_genes,)``.
    """

    expressed: Tensor
    cells: Tensor

    def __init__(self, expressed: Tensor, cells: Tensor) -> None:
        super().__init__()
        self.register_buffer("expressed", expressed)
        self.register_buffer("cells", cells)

    @classmethod
    def fit(cls, module: Any, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> PresenceFloors:
        """Count in one pass over minibatches of raw counts over the vocabulary, each of one batch.

        ``cells`` of the module leaves of each cell the genes of its species.
        """
        species = module.gene_species.cpu().numpy()
        expressed, cells = np.zeros(len(species)), np.zeros(len(species))
        for batch in batches:
            counts, _ = module.cells(batch[REGISTRY_KEYS.X_KEY])
            expressed += np.bincount(counts.gene, minlength=len(species))
            filled = np.diff(counts.indptr) > 0
            of_cell = species[counts.gene[counts.indptr[:-1][filled]]]
            n_cells = np.bincount(of_cell, minlength=int(species.max(initial=0)) + 1)
            code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
            cells += n_cells[species] * measured[code if len(measured) > 1 else 0].cpu().numpy()
        return cls(torch.from_numpy(expressed).float(), torch.from_numpy(cells).float())

    def rate(self) -> Tensor:
        """Share of cells that express each gene, mixed with that of the average gene ``(n_genes,)``."""
        average = self.expressed.sum() / self.cells.sum().clamp(min=1.0)
        return ((self.expressed + PRIOR * average) / (self.cells + PRIOR)).clamp(1e-6, 1 - 1e-6)

    def predict(self, query: Tensor, known: Tensor, n_expressed: Tensor) -> dict[str, Tensor]:
        """Probability that genes are expressed, by predictor ``(cells, queries)``.

        Queries are vocabulary rows; ``known`` are the genes that are a cell's to express, measured, and of its
        species ``(cells, n_genes)``; ``n_expressed`` is how many it does ``(cells,)``.
        """
        rate = self.rate()
        never = torch.log1p(-rate)  # log of 1 - rate
        low, high = (torch.full((len(query), 1), x, device=query.device) for x in (-WIDEST, WIDEST))
        target = n_expressed[:, None].float()
        for _ in range(STEPS):
            middle = (low + high) / 2
            genes = (-torch.expm1(never * middle.exp()) * known).sum(1, keepdim=True)
            low, high = torch.where(genes < target, middle, low), torch.where(genes < target, high, middle)
        at_depth = -torch.expm1(never[query] * low.exp())
        return {"gene_rate": rate[query], "gene_rate_at_depth": at_depth.clamp(1e-6, 1 - 1e-6)}

    def logits(
        self, query: Tensor, known: Tensor, n_expressed: Tensor, *, n_positive: Tensor, n_negative: Tensor
    ) -> dict[str, Tensor]:
        """Logits that genes are expressed, given how many of both kinds are asked for ``(cells, queries)``.

        With p as of :meth:`predict`, ``logit p + ln((positive / expressed) / (negative / not expressed))``: most genes
        are not expressed, and of those that are asked for half are. Beside them ``chance``, which knows that alone.
        """
        n_silent = known.sum(1) - n_expressed
        odds = (n_positive.clamp(min=0.5) / n_negative.clamp(min=0.5)).log()
        offset = odds + (n_silent.clamp(min=1) / n_expressed.clamp(min=1)).log()
        found = {
            name: p.logit() + offset[:, None] for name, p in self.predict(query, known, n_expressed).items()
        }
        return {"chance": odds[:, None].expand(query.shape), **found}
