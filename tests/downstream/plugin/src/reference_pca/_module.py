"""The network: tensors in, latent out; no AnnData, no gene names, no files."""

from __future__ import annotations

import torch
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn


class ReferencePCAModule(BaseModuleClass):
    """Principal components of reference cells.

    Parameters
    ----------
    n_genes
        Size of the vocabulary.
    n_latent
        Number of components.
    target_sum
        Counts that each cell is scaled to before the logarithm.
    """

    def __init__(self, n_genes: int, *, n_latent: int = 16, target_sum: float = 10_000) -> None:
        super().__init__()
        self.n_hidden = self.n_latent = n_latent
        self.target_sum = target_sum
        self.loadings = nn.Parameter(torch.zeros(n_genes, n_latent))
        self.mean = nn.Parameter(torch.zeros(n_genes))  # of the logarithms

    def encode(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """Embedding ``(cells, n_latent)``; a gene that the data lack counts as its mean.

        Parameters
        ----------
        counts
            Raw counts ``(cells, genes)``, dense or sparse.
        gene_index
            Vocabulary row of each column; ``None`` if the columns are the vocabulary.
        """
        rows = slice(None) if gene_index is None else gene_index
        return (self.logarithms(counts) - self.mean[rows]) @ self.loadings[rows]

    def logarithms(self, counts: Tensor) -> Tensor:
        """Logarithms of scaled counts ``(cells, genes)``."""
        counts = counts.to_dense()
        depth = counts.sum(dim=1, keepdim=True).clamp(min=1.0)  # an empty cell stays finite
        return torch.log1p(counts / depth * self.target_sum)

    # The rest is for fine_tune and predict: what the classifier reads, and what may train besides it.

    def hidden(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """What the annotation head reads ``(cells, n_hidden)``."""
        return self.encode(counts, gene_index=gene_index)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """Values of ``fine_tune(trainable=...)``."""
        return {"last": [], "head": []}

    def adapted_layers(self) -> list[nn.Linear]:
        """What ``trainable="lora"`` would change."""
        return []
