"""Genes in the context of cells: their vectors, and the attention between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellprior.model._base import Precision, PretrainedModel
from cellprior.model.data._panels import gene_rows

Indices = Sequence[int] | Sequence[bool] | np.ndarray | None


class ContextMixin(PretrainedModel):
    """``get_gene_representation`` and ``get_attention``, for a module with ``encode`` and ``attention``."""

    def get_gene_representation(
        self, adata: ad.AnnData | None = None, indices: Indices = None, *, precision: Precision = "float32"
    ) -> pd.DataFrame:
        """Vectors of genes in context: each gene's hidden state, mean over cells.

        Parameters
        ----------
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask; a type of cells gives the genes' vectors in that type.
        precision
            See :meth:`get_latent_representation`.

        Returns
        -------
        Genes of the data that are in the vocabulary, under the data's names, by ``n_hidden``; float32.

        Raises
        ------
        ValueError
            If there are no cells.
        """
        rows, names = self._known_genes(adata)
        total = self._mean_over_cells(
            lambda tokens: self.module.encode(tokens)[0, :-1], adata, indices, precision
        )
        return pd.DataFrame(total[rows], index=names)

    def get_attention(
        self, adata: ad.AnnData | None = None, indices: Indices = None, *, genes: Sequence[str] | None = None
    ) -> pd.DataFrame | pd.Series:
        """Attention between genes, mean over heads, layers and cells.

        Each layer's from that layer's own input; the original takes it from an input to which the layer's output has
        been added already, and rounds to float16.

        Parameters
        ----------
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask. One takes about as long as its embedding.
        genes
            Names of the data, symbols or Ensembl ids. The result holds their number squared: all genes of a large
            vocabulary are a gigabyte.

        Returns
        -------
        With ``genes``, what these (rows) pay to each other (columns), as shares of all that they pay. Without, what
        each gene of the data receives, mean over all positions; together 1 with what goes to the other genes of the
        vocabulary and the class token.

        Raises
        ------
        KeyError
            If a gene is not in the vocabulary.
        ValueError
            If there are no cells.
        """
        if genes is None:
            rows, names = self._known_genes(adata)
            received = self._mean_over_cells(self.module.attention, adata, indices)
            return pd.Series(received[rows], index=names, name="attention")
        with self._attached(adata) as manager:
            chosen = gene_rows(genes, self.genes, self._match_of(manager))
        positions = torch.as_tensor(chosen, device=self.module.device)
        paid = self._mean_over_cells(
            lambda tokens: self.module.attention(tokens, genes=positions), adata, indices
        )
        return pd.DataFrame(paid, index=list(genes), columns=list(genes))

    def _mean_over_cells(
        self,
        function: Callable[[Tensor], Tensor],
        adata: ad.AnnData | None,
        indices: Indices,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Mean over cells of a function of the tokens of one cell ``(1, n_genes)``, float32."""
        total = torch.zeros((), dtype=torch.float64)

        def add_up(chunks: Iterable[Tensor], gene_index: Tensor | None) -> Iterator[Tensor]:
            nonlocal total
            of_unit = torch.zeros((), dtype=torch.float64)  # which is begun anew where memory runs out
            for counts in chunks:
                for tokens in self.module.tokens(counts, gene_index=gene_index).split(1):
                    of_unit = of_unit + function(tokens).cpu()
                    yield tokens.new_zeros(1, 1)
            total = total + of_unit

        n_cells = len(self._embed(adata, indices, None, precision, encode=add_up, width=1))
        if not n_cells:
            msg = "indices names no cells; a mean needs at least one."
            raise ValueError(msg)
        return (total / n_cells).float().numpy()
