"""Genes in the context of cells: their vectors, and the attention between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellprior.model.data._panels import gene_rows
from cellprior.model.engine._encoder import Covariates, Encoder


def gene_vectors(model: Any, adata: Any, indices: Any, precision: str) -> pd.DataFrame:
    """See :meth:`cellprior.model.ScBERT.get_gene_representation`."""
    rows, names = model._known_genes(adata)
    total = _mean_over_cells(
        model, lambda tokens: model.module.encode(tokens)[0, :-1], adata, indices, precision
    )
    return pd.DataFrame(total[rows], index=names)


def attention_between(
    model: Any, adata: Any, indices: Any, genes: Sequence[str] | None
) -> pd.DataFrame | pd.Series:
    """See :meth:`cellprior.model.ScBERT.get_attention`."""
    if genes is None:
        rows, names = model._known_genes(adata)
        received = _mean_over_cells(model, model.module.attention, adata, indices)
        return pd.Series(received[rows], index=names, name="attention")
    chosen = gene_rows(genes, model.genes, model._match_of(adata))
    positions = torch.as_tensor(chosen, device=model.module.device)
    paid = _mean_over_cells(
        model, lambda tokens: model.module.attention(tokens, genes=positions), adata, indices
    )
    return pd.DataFrame(paid, index=list(genes), columns=list(genes))


def _mean_over_cells(
    model: Any, function: Callable[[Tensor], Tensor], adata: Any, indices: Any, precision: str = "float32"
) -> np.ndarray:
    """Mean over cells of a function of the tokens of one cell ``(1, n_genes)``, float32."""
    total = torch.zeros((), dtype=torch.float64)

    def add_up(encoder: Encoder, chunks: Iterable[Tensor], covariates: Covariates) -> Iterator[Tensor]:
        nonlocal total
        of_unit = torch.zeros((), dtype=torch.float64)  # which is begun anew where memory runs out
        for counts in chunks:
            for tokens in encoder.module.tokens(counts, gene_index=encoder.columns()).split(1):
                of_unit = of_unit + function(tokens).cpu()
                yield tokens.new_zeros(1, 1)
        total = total + of_unit

    n_cells = len(model._embed(adata, indices, None, precision, encode=add_up, width=1))
    if not n_cells:
        msg = "indices names no cells; a mean needs at least one."
        raise ValueError(msg)
    return (total / n_cells).float().numpy()
