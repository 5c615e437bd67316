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


@torch.no_grad()
def gene_vectors(model: Any, adata: Any) -> pd.DataFrame:
    """Vectors that genes have in every cell, of the genes of the data, or of the vocabulary where there are none."""
    if adata is None and model.adata is None:
        names = pd.Index(model.genes["symbol"].where(model.genes["symbol"] != "", model.genes["ensembl_id"]))
        rows = np.arange(len(names))
    else:
        rows, names = model._known_genes(adata)
    index = torch.as_tensor(rows, device=model.module.device)
    return pd.DataFrame(model.module.gene_encoder(index).cpu().numpy(), index=names)


def gene_vectors_in_cells(model: Any, adata: Any, indices: Any) -> pd.DataFrame:
    """Hidden states of genes, mean over the cells that express them; NaN where none does."""
    rows, names = model._known_genes(adata)
    module, place = model.module, _places(rows, len(model.genes))

    def add(total: Tensor, n: Tensor, tokens: Any) -> None:
        for cells in module.groups(tokens.length):
            part = module.of(tokens, cells)
            at = place[part.gene.cpu()]
            hidden = module.encode(part).float().cpu()[at >= 0]
            total.index_add_(0, at[at >= 0], hidden.double())
            n.index_add_(0, at[at >= 0], torch.ones(len(hidden), dtype=torch.float64))

    total, n, _ = _summed(model, add, (len(place[rows].unique()), module.n_hidden), adata, indices)
    mean = (total / n[:, None]).float().numpy()
    return pd.DataFrame(mean[place[rows].numpy()], index=names)


def attention_received(model: Any, adata: Any, indices: Any, layer: int | None) -> pd.Series:
    """Attention that each gene receives, mean over all tokens of a cell and over cells."""
    rows, names = model._known_genes(adata)
    module, place = model.module, _places(rows, len(model.genes))

    def add(total: Tensor, n: Tensor, tokens: Any) -> None:
        for cell in _one_by_one(tokens):
            at = place[cell.gene[0].cpu()]
            received = module.attention(cell, layer).mean(0).cpu().double()
            total.index_add_(0, at[at >= 0], received[at >= 0])

    total, _, n_cells = _summed(model, add, (len(place[rows].unique()),), adata, indices)
    return pd.Series((total / n_cells).float().numpy()[place[rows].numpy()], index=names, name="attention")


def attention_between(
    model: Any,
    adata: Any,
    indices: Any,
    genes: Sequence[str],
    layer: int | None,
) -> pd.DataFrame:
    """Attention that some genes pay to each other, mean over the cells that express both; NaN where none does."""
    chosen = gene_rows(genes, model.genes, model._match_of(adata))
    place = _places(chosen, len(model.genes))
    size = len(np.unique(chosen))

    def add(total: Tensor, n: Tensor, tokens: Any) -> None:
        for cell in _one_by_one(tokens):
            at = place[cell.gene[0].cpu()]
            found = (at >= 0).nonzero()[:, 0]
            if len(found):
                pairs = (at[found][:, None] * size + at[found]).flatten()
                paid = model.module.attention(cell, layer).cpu().double()[found][:, found]
                total.view(-1).index_add_(0, pairs, paid.flatten())
                n.view(-1).index_add_(0, pairs, torch.ones(len(pairs), dtype=torch.float64))

    total, n, _ = _summed(model, add, (size, size), adata, indices, n_shape=(size, size))
    paid = (total / n).float()[place[chosen]][:, place[chosen]]
    return pd.DataFrame(paid.numpy(), index=list(genes), columns=list(genes))


def _places(rows: np.ndarray, n_genes: int) -> Tensor:
    """Place of each vocabulary row, special tokens too, among the sorted distinct ``rows``; -1 for none."""
    place = torch.full((n_genes + 2,), -1, dtype=torch.int64)
    distinct = torch.from_numpy(np.unique(rows))
    place[distinct] = torch.arange(len(distinct))
    return place


def _one_by_one(tokens: Any) -> Iterator[Any]:
    """Cells without padding."""
    for i, n in enumerate(tokens.length.tolist()):
        yield type(tokens)(tokens.gene[i : i + 1, :n], tokens.value[i : i + 1, :n], tokens.length[i : i + 1])


def _summed(
    model: Any,
    add: Callable[[Tensor, Tensor, Any], None],
    shape: tuple[int, ...],
    adata: Any,
    indices: Any,
    n_shape: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """What ``add`` adds up over cells, float64: a sum, how many it is of, and the number of cells.

    Raises ValueError if there are no cells.
    """
    sizes: Any = (shape, n_shape or shape[:1])
    total, n = (torch.zeros(size, dtype=torch.float64) for size in sizes)

    def add_up(encoder: Encoder, chunks: Iterable[Tensor], covariates: Covariates) -> Iterator[Tensor]:
        of_unit = [
            torch.zeros(size, dtype=torch.float64) for size in sizes
        ]  # begun anew where memory runs out
        for counts in chunks:
            tokens = encoder.module.tokens(counts, gene_index=encoder.columns())
            add(of_unit[0], of_unit[1], tokens)
            yield tokens.gene.new_zeros(len(tokens.gene), 1)
        for whole, part in zip((total, n), of_unit, strict=True):
            whole += part

    n_cells = len(model._embed(adata, indices, None, "float32", encode=add_up, width=1))
    if not n_cells:
        msg = "indices names no cells; a mean needs at least one."
        raise ValueError(msg)
    return total, n, n_cells
