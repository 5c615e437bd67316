"""Genes in the context of cells: their vectors, and the attention between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellprior._talk import bar
from cellprior.model.data._counts import row_numbers
from cellprior.model.data._panels import gene_rows
from cellprior.model.engine._embedding import Embedding

FEW = 16  # cells whose hidden states are in memory at a time


def gene_vectors(model: Any, adata: Any, indices: Any, *, layer: int, precision: str) -> pd.DataFrame:
    """See :meth:`cellprior.model.Geneformer.get_gene_representation`."""
    module = model.module
    module.checked_layer(layer)
    if precision not in ("float32", "bfloat16"):
        msg = f'precision={precision!r} is not known; choose "float32" or "bfloat16".'
        raise ValueError(msg)
    total = torch.zeros(module.n_genes, module.n_hidden, dtype=torch.float64)
    n_cells = torch.zeros(module.n_genes, dtype=torch.float64)

    half = torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    for _, tokens in token_chunks(model, adata, indices):
        with torch.inference_mode(), half:
            states = module.states(tokens, layer=layer)
        here = tokens >= module.first_gene
        gene = (tokens[here] - module.first_gene).cpu()
        total.index_add_(0, gene, states[here].double().cpu())
        n_cells.index_add_(0, gene, torch.ones(len(gene), dtype=torch.float64))
    rows, names = model._known_genes(adata)
    mean = (total[rows] / n_cells[rows][:, None]).float().numpy()  # 0 / 0 is NaN
    return pd.DataFrame(mean, index=names)


def attention_between(
    model: Any, adata: Any, indices: Any, genes: Sequence[str] | None
) -> pd.DataFrame | pd.Series:
    """See :meth:`cellprior.model.Geneformer.get_attention`."""
    module = model.module
    if genes is not None:
        chosen = gene_rows(genes, model.genes, model._match_of(adata))
        place_of = torch.full((module.n_tokens,), -1)
        place_of[torch.from_numpy(np.unique(chosen)) + module.first_gene] = torch.arange(
            len(np.unique(chosen))
        )
        size: tuple[int, ...] = (len(np.unique(chosen)),) * 2
    else:
        place_of = torch.arange(module.n_tokens) - module.first_gene
        size = (module.n_genes,)
    total, n_cells = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)

    for _, tokens in token_chunks(model, adata, indices):
        for cell in tokens:
            cell = cell[cell != 0][None]
            place = place_of[cell[0].cpu()]
            here = (place >= 0).nonzero()[:, 0]
            if not len(here):
                continue
            paid = module.attention(cell).double().cpu()  # (queries, keys)
            if genes is None:
                total.index_add_(0, place[here], paid.mean(0)[here])
                n_cells.index_add_(0, place[here], torch.ones(len(here), dtype=torch.float64))
            else:
                row, column = place[here][:, None], place[here][None]
                total[row, column] += paid[here][:, here]
                n_cells[row, column] += 1
    mean = (total / n_cells).float().numpy()
    if genes is None:
        rows, names = model._known_genes(adata)
        return pd.Series(mean[rows], index=names, name="attention")
    order = np.searchsorted(np.unique(chosen), chosen)
    return pd.DataFrame(mean[np.ix_(order, order)], index=list(genes), columns=list(genes))


def token_chunks(
    model: Any,
    adata: Any,
    indices: Any,
    batch_size: int | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Row numbers and tokens of a few cells at a time, in the order of ``indices``; the network is in eval mode.

    Raises ValueError if there are no cells.
    """
    model._check_if_trained(warn=False)
    cells = model._cells(adata)
    rows = row_numbers(indices, cells.n_obs)
    if not len(rows):
        msg = "indices names no cells; at least one is needed."
        raise ValueError(msg)
    encoder = model._encoder(cells)
    embedding = Embedding(encoder, cells, rows, batch_size=batch_size)
    encoder.module.eval()
    pieces = np.array_split(np.arange(len(rows)), -(-len(rows) // embedding.size.n_cells))
    with bar(len(rows), "cells") as drawn:
        for piece, counts in zip(pieces, embedding.read(pieces), strict=True):
            with torch.inference_mode():
                tokens = encoder.module.tokens(counts, gene_index=encoder.columns())
            for start in range(0, len(piece), FEW):
                few = piece[start : start + FEW]
                yield rows[few], tokens[start : start + FEW]
                drawn.update(len(few))
