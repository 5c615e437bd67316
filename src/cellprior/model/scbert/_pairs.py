"""Class tokens of a network with one layer, exactly, at the price of its pairs of a gene and a bin.

What the class token reads of a position depends on the position's gene and bin alone, as there is no layer before it,
and its query is the same in every cell. So each pair's share of the attention is computed once for all cells that have
it, and a cell is a sum over its pairs. Of the genes in bin 0, the sum over all of them is taken, less those that the
cell expresses.

The terms are those of :mod:`~cellprior.model.scbert._attention`. With φ(q) including its ε, a key's maximum M that
differs between cells and R that does not, a position k has the weight

    2^(R - M) Σ φ(q) exp(c W k - |c k|² / 2 - R)  +  ε Σ φ(q).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cellprior.model.scbert._attention import KERNEL_EPS

CELLS = 256  # at a time, of those whose pairs are computed together without gradients


def class_tokens(module: Any, tokens: Tensor) -> Tensor:
    """State of the class token after the only layer and the last norm ``(cells, n_hidden)``, float32.

    Parameters
    ----------
    module
        A :class:`~cellprior.model.scbert._module.ScBERTModule` with one layer, whose ``key_max`` is ``"cell"``.
    tokens
        Bins ``(cells, n_genes)``.
    """
    device = tokens.device.type
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return _class_tokens(module, tokens)
        return torch.cat([_class_tokens(module, some) for some in tokens.split(CELLS)])


def _class_tokens(module: Any, tokens: Tensor) -> Tensor:
    embedder, layer = module.embedder, module.encoder[0]
    n_genes, n_tokens = module.n_genes, embedder.token_embedding.num_embeddings
    cell, gene = tokens.nonzero(as_tuple=True)  # of what is not in bin 0
    number = gene * n_tokens + tokens[cell, gene].long()
    pairs, pair = number.unique(return_inverse=True)
    silent = torch.arange(n_genes, device=tokens.device) * n_tokens
    pairs = torch.cat([silent, pairs])
    bins, genes = pairs % n_tokens, pairs.div(n_tokens, rounding_mode="floor")
    x = (embedder.token_embedding(bins) + embedder.gene_vectors[genes]).float()
    of_class = embedder.token_embedding.weight[:1].float()
    scores, values, high = _read(layer, torch.cat([x, of_class]))

    top = high[:n_genes].max()  # the same for all cells; those above it are far from an overflow
    kernel = torch.exp2(scores - top)  # (pairs, heads, features)
    query = _query(layer, of_class)  # (heads, features)
    weight = torch.einsum("phm,hm->ph", kernel, query)
    # of each pair: what its weighted values and its bare ones add to a cell, and the same of ones
    table = torch.cat([weight[..., None] * values, values], 2).flatten(1)  # (pairs, heads * 2 * (dim + 1))
    silent, more, last = table.split([n_genes, len(pairs) - n_genes, 1])
    start = torch.searchsorted(cell, torch.arange(len(tokens), device=tokens.device))
    changed = _sums(more - silent[genes[n_genes:]], pair, start)
    sums = (silent.sum(0) + last + changed).view(len(tokens), layer.attention.n_heads, 2, -1)

    highest = _highest(tokens, high[:n_genes], high[n_genes:-1], high[-1], pair, cell)
    scale = torch.exp2(top - highest)[:, None, None]
    read = scale * sums[:, :, 0] + KERNEL_EPS * query.sum(1)[:, None] * sums[:, :, 1]
    out = layer.attention.out((read[..., :-1] / read[..., -1:]).flatten(1))
    x = of_class + layer.dropout(out)
    x = x + layer.dropout(layer.ff2(F.gelu(layer.ff1(layer.norm2(x)))))
    return module.norm(x)


def _sums(table: Tensor, row: Tensor, start: Tensor) -> Tensor:
    """Sums over the rows of a table that each cell has; its first is at ``start``."""
    if not len(row):
        return table.new_zeros(len(start), table.shape[1])
    return F.embedding_bag(row, table, start, mode="sum")


def _read(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a key gives: the exponents of its features, its value with a last 1, and the highest of its logits.

    Of positions ``(pairs, n_hidden)``: ``(pairs, heads, features)``, ``(pairs, heads, dim + 1)``, ``(pairs,)``.
    """
    attention, normed = layer.attention, layer.norm1(x)[None]
    logits, half_square = attention._logits(attention.key, normed)
    values = attention._heads(attention.value, normed).permute(2, 0, 1)
    return (logits - half_square).permute(2, 0, 1), F.pad(values, (0, 1), value=1.0), logits.amax((0, 1))


def _query(layer: Any, of_class: Tensor) -> Tensor:
    """φ(q) of the class token ``(heads, features)``, its ε included."""
    return layer.attention._query_kernel(layer.norm1(of_class)[None])[..., 0] + KERNEL_EPS


def _highest(
    tokens: Tensor, silent: Tensor, more: Tensor, of_class: Tensor, pair: Tensor, cell: Tensor
) -> Tensor:
    """The keys' maximum M of each cell ``(cells,)``.

    Parameters
    ----------
    tokens
        Bins ``(cells, n_genes)``.
    silent, more, of_class
        Highest logit of each gene in bin 0, of each other pair, and of the class token.
    pair, cell
        Numbers of the pair and of the cell, of all genes that are not in bin 0.
    """
    highest = silent.where(tokens == 0, silent.new_tensor(-torch.inf)).amax(1).maximum(of_class)
    return highest.scatter_reduce(0, cell, more[pair], "amax")
