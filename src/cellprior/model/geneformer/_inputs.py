"""What goes into Geneformer: the genes of a cell, most remarkable first, and the masks of its pretraining."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PAD, MASK, CLS, EOS = 0, 1, 2, 3  # of V1, only the first two
TARGET_SUM = 10_000.0


def first_gene(special: bool) -> int:
    """Token of the first gene of the vocabulary; the others follow in its order."""
    return 4 if special else 2


def rank_tokens(
    counts: Tensor,
    scale: Tensor,
    *,
    n_positions: int,
    special: bool,
    gene_index: Tensor | None = None,
) -> Tensor:
    """Tokens of cells: their expressed genes by ``count / scale``, highest first.

    The original divides by the cell's total too, a positive number that changes no order. Equal values are in the
    order of the vocabulary; there the original's order is that of an unstable sort. Raw counts ``(cells, genes)`` are
    dense or CSR, with ``gene_index``, the vocabulary row of each column, increasing; ``None`` if the columns are the
    vocabulary. ``scale`` is what is usual for each gene of it, float64 ``(n_genes,)``: its median over the cells of
    the corpus that have it, of counts per 10,000. Genes beyond ``n_positions`` are cut off; ``special`` puts
    ``<cls>`` in front and ``<eos>`` at the end, as V2 does. Gives int64 ``(cells, longest)``, ``<pad>`` behind each
    cell's tokens.
    """
    device, n_cells = counts.device, len(counts)
    if device.type == "mps":  # has no float64
        counts, scale = counts.cpu(), scale.cpu()
        gene_index = None if gene_index is None else gene_index.cpu()
    if counts.layout is torch.strided:
        row, gene = counts.nonzero(as_tuple=True)
        value = counts[row, gene]
    else:
        row = torch.arange(n_cells, device=counts.device).repeat_interleave(counts.crow_indices().diff())
        gene, value = counts.col_indices().long(), counts.values()
        row, gene, value = row[value != 0], gene[value != 0], value[value != 0]
    gene = gene if gene_index is None else gene_index[gene]
    order = torch.sort(value.double() / scale[gene].double(), descending=True, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    row, gene = row[order], gene[order]
    n_genes = torch.bincount(row, minlength=n_cells)
    rank = torch.arange(len(row), device=row.device) - (n_genes.cumsum(0) - n_genes)[row]
    room = n_positions - 2 * special
    kept = rank < room
    row, gene, rank = row[kept], gene[kept], rank[kept]
    n_genes = n_genes.clamp(max=room)
    longest = int(n_genes.max()) if n_cells else 0
    tokens = torch.full((n_cells, longest + 2 * special), PAD, dtype=torch.long, device=row.device)
    tokens[row, rank + int(special)] = gene + first_gene(special)
    if special:
        tokens[:, 0] = CLS
        tokens.scatter_(1, n_genes[:, None] + 1, EOS)
    return tokens.to(device)


def token_counts(tokens: Tensor) -> Tensor:
    """Tokens of each cell ``(cells,)``, those of padding left out."""
    return (tokens != PAD).sum(1)


def nonzero_medians(counts: list[Tensor], n_genes: int) -> np.ndarray:
    """Median of each gene's counts per 10,000 over the cells that have it, float64 ``(n_genes,)``.

    Of raw counts, dense ``(cells, n_genes)`` each. A gene that no cell has gets the median of the others' medians.
    """
    genes, values = [], []
    for part in counts:
        row, column = part.nonzero(as_tuple=True)
        total = part.double().sum(1).clamp(min=1.0)
        genes.append(column)
        values.append(part[row, column].double() * TARGET_SUM / total[row])
    gene: np.ndarray = torch.cat(genes).cpu().numpy()
    value: np.ndarray = torch.cat(values).cpu().numpy()
    order = np.lexsort((value, gene))
    value, n_cells = value[order], np.bincount(gene, minlength=n_genes)
    seen = n_cells > 0
    start = (np.cumsum(n_cells) - n_cells)[seen]
    low, high = start + (n_cells[seen] - 1) // 2, start + n_cells[seen] // 2
    found = np.ones(n_genes)
    if seen.any():
        found[seen] = (value[low] + value[high]) / 2
        found[~seen] = np.median(found[seen])
    return found


class Masked(NamedTuple):
    """What pretraining shows and asks for, ``(cells, positions)`` each."""

    shown: np.ndarray
    selected: np.ndarray


def mask_tokens(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    n_tokens: int,
    special: bool,
    rate: float = 0.15,
    hide: float = 0.8,
    swap: float = 0.1,
) -> Masked:
    """Draw which genes pretraining has to predict, and what it shows in their place.

    Parameters
    ----------
    tokens
        Of cells ``(cells, positions)``. Only genes are drawn, never ``<cls>`` and ``<eos>``.
    rng
        Draws.
    n_tokens
        Number of tokens, special ones included.
    special
        See :func:`rank_tokens`.
    rate
        Probability of a gene to be selected.
    hide, swap
        Probability of a selected gene to be shown as ``<mask>``, and as any token; else it is in plain sight.
    """
    selected = (tokens >= first_gene(special)) & (rng.random(tokens.shape, dtype=np.float32) < rate)
    fate = rng.random(tokens.shape, dtype=np.float32)
    others = rng.integers(PAD + 1, n_tokens, size=tokens.shape)  # the original's may be padding
    shown = np.where(selected & (fate < hide), MASK, tokens)
    shown = np.where(selected & (fate >= hide) & (fate < hide + swap), others, shown)
    return Masked(shown, selected)
