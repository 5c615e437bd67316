"""What goes into Geneformer: the genes of a cell, most remarkable first, and the masks of its pretraining."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellprior.model.data._entries import entries
from cellprior.model.learning import _ranked as ranked
from cellprior.model.learning._ranked import Masked

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
    row, gene, value = entries(counts)
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


def mask_tokens(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    n_tokens: int,
    special: bool,
    rate: float = 0.15,
    **shown: float,
) -> Masked:
    """As the original does: never of ``<cls>`` and ``<eos>``; what is shown instead may be any token but padding."""
    how: dict[str, Any] = {"first": first_gene(special), "mask": MASK, "rate": rate, "hide": 0.8, "swap": 0.1}
    others = (PAD + 1, n_tokens)  # the original's may be padding
    return ranked.mask_tokens(tokens, rng, others=others, **how | shown)
