"""What goes into Nicheformer: the context of a cell, its genes by rank, and the masks of its pretraining.

A gene's place is that of its count over its mean in the technology, of a corpus. A technology in which it was never
seen has no mean of it; the original's notebook divides by NaN there, which puts all such genes into every cell. Here it
is divided by 1, as the authors' own tokens were made.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellprior.model.data._entries import entries
from cellprior.model.learning import _ranked as ranked
from cellprior.model.learning._ranked import Masked

MASK, PAD = 0, 1  # 2 is a token of the cell that nothing uses
FIRST_GENE = 30  # token of the first gene of the vocabulary; the others follow in its order
TARGET_SUM = 10_000.0
SMALL_SORT = 15  # parts of fewer numbers are sorted by insertion

CONTEXT_KEY = "context"  # what a cell's code of context is called, in the data and in minibatches
GeneScale = Literal["clean", "rounded"]

TECHNOLOGIES = ("dissociated", "merfish", "cosmx", "xenium", "iss")  # which have means of their own
MODALITIES = {"dissociated": 3, "spatial": 4}
SPECIES = {"human": 5, "mouse": 6}


class Assay(NamedTuple):
    """What an assay is to the network."""

    token: int  # PAD if the authors have none
    technology: str

    @property
    def modality(self) -> str:
        """``"dissociated"`` or ``"spatial"``."""
        return "dissociated" if self.technology == "dissociated" else "spatial"


# 9 stands for Visium in one of the authors' notebooks and for Xenium, which has no other, in another
ASSAYS = {
    "MERFISH": Assay(7, "merfish"),
    "CosMx": Assay(8, "cosmx"),
    "Xenium": Assay(9, "xenium"),
    "ISS": Assay(PAD, "iss"),
    **{
        name: Assay(10 + i, "dissociated")
        for i, name in enumerate(
            (
                "10x 5' v2",
                "10x 3' v3",
                "10x 3' v2",
                "10x 5' v1",
                "10x 3' v1",
                "10x 3' transcription profiling",
                "10x 5' transcription profiling",
                "CITE-seq",
                "Smart-seq v4",
            )
        )
    },
}
UNKNOWN_ASSAY = Assay(PAD, "dissociated")
N_CONTEXT = 3
# by code of context: tokens of species, assay and modality ``(codes, 3)``, PAD for none; and row of TECHNOLOGIES
_CODES = [(species, assay) for species in SPECIES.values() for assay in (UNKNOWN_ASSAY, *ASSAYS.values())]
CONTEXT_TOKENS = torch.tensor([(s, a.token, MODALITIES[a.modality]) for s, a in _CODES])
CONTEXT_TECHNOLOGY = torch.tensor([TECHNOLOGIES.index(a.technology) for _, a in _CODES])


def context_code(species: str = "human", assay: str | None = None) -> int:
    """Number of a context, a row of ``CONTEXT_TOKENS``; without an assay, that of dissociated cells of some assay."""
    of_assay = 0 if assay is None else 1 + list(ASSAYS).index(assay)
    return list(SPECIES).index(species) * (1 + len(ASSAYS)) + of_assay


def scale_of(means: Tensor, gene_scale: GeneScale) -> Tensor:
    """What counts are divided by, float64 ``(technologies, n_genes)``: the mean of each gene, ``"clean"``.

    ``"rounded"`` divides by whole numbers (half up); both by 1 where there is a 0, of a gene that was never seen.
    """
    scale = means.double()
    if gene_scale == "rounded":
        scale = (scale + 0.5).floor()
    return scale.masked_fill(scale == 0, 1.0)


def rank_tokens(
    counts: Tensor,
    means: Tensor,
    context: Tensor,
    *,
    n_positions: int,
    gene_index: Tensor | None = None,
    gene_scale: GeneScale = "clean",
) -> Tensor:
    """Tokens of cells: species, assay and modality, then the expressed genes by ``count / scale``, highest first.

    ``"clean"`` leaves equal values in the order of the vocabulary. ``"rounded"`` has many, in the order that the
    original's unstable sort gives them. A gene with a mean below 0, as some of MERFISH have, comes behind all others.

    Raw counts ``(cells, genes)`` are dense or CSR, with ``gene_index``, the vocabulary row of each column,
    increasing; ``None`` if the columns are the vocabulary. For ``means`` and ``gene_scale`` see :func:`scale_of`, for
    the code of each cell, ``context``, :func:`context_code`. Genes beyond ``n_positions`` are cut off. Gives int64
    ``(cells, longest)``, padding behind each cell's tokens.
    """
    device, n_cells = counts.device, len(counts)
    if device.type == "mps" or gene_scale == "rounded":  # the one has no float64, the other sorts one by one
        counts, means, context = counts.cpu(), means.cpu(), context.cpu()
        gene_index = None if gene_index is None else gene_index.cpu()
    row, gene, value = entries(counts)
    gene = gene if gene_index is None else gene_index[gene]
    total = torch.zeros(n_cells, dtype=torch.float64, device=row.device).index_add_(0, row, value.double())
    technology = CONTEXT_TECHNOLOGY.to(row.device)[context]
    # the original's operations in their order, so that what is equal there is equal here; a number divided by a tensor
    # would be multiplied by its reciprocal
    factor = torch.full_like(total, TARGET_SUM) / total
    value = value.double() * factor[row] / scale_of(means, gene_scale)[technology[row], gene]
    order = _order(row, gene, value, gene_scale)
    row, gene = row[order], gene[order]
    n_genes = torch.bincount(row, minlength=n_cells)
    rank = torch.arange(len(row), device=row.device) - (n_genes.cumsum(0) - n_genes)[row]
    prefix = CONTEXT_TOKENS.to(row.device)[context]
    n_context = (prefix != PAD).sum(1)
    place = rank + n_context[row]
    kept = place < n_positions
    row, gene, place = row[kept], gene[kept], place[kept]
    longest = int((n_context + n_genes).clamp(max=n_positions).max()) if n_cells else 0
    tokens = torch.full((n_cells, max(longest, N_CONTEXT)), PAD, dtype=torch.long, device=row.device)
    # those that there are, in their order
    tokens[:, :N_CONTEXT] = prefix.gather(1, (prefix == PAD).long().argsort(dim=1, stable=True))
    tokens[row, place] = gene + FIRST_GENE
    return tokens[:, :n_positions].to(device)


def _order(row: Tensor, gene: Tensor, value: Tensor, gene_scale: GeneScale) -> Tensor:
    """Entries by cell, and within it by value."""
    if gene_scale == "clean":
        order = torch.sort(value, descending=True, stable=True).indices
        return order[torch.sort(row[order], stable=True).indices]
    order = torch.from_numpy(np.lexsort((gene.numpy(), row.numpy())))
    ends = torch.bincount(row).cumsum(0).tolist()
    value = -value[order]
    cells = zip([0, *ends], ends, strict=False)
    sorted_ = [start + unstable_argsort(value[start:end].numpy()) for start, end in cells]
    return order[torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *sorted_]))]


def unstable_argsort(values: np.ndarray) -> np.ndarray:
    """Increasing order of some numbers, equal ones in that of numba's ``argsort``, with which the original sorts.

    A quicksort around the median of the first, the middle and the last [Hoare; as numba has it], and an insertion sort
    of what is short.
    """
    order, of = list(range(len(values))), values.tolist()
    waiting = [(0, len(order) - 1)]
    while waiting:
        low, high = waiting.pop()
        if high - low >= SMALL_SORT:
            middle = _partition(order, of, low, high)
            waiting += [(low, middle - 1), (middle + 1, high)]  # which do not touch each other
        else:
            few = slice(low, high + 1)
            order[few] = sorted(order[few], key=of.__getitem__)  # stable, as insertion is
    return np.array(order, dtype=np.int64)


def _partition(order: list[int], of: list[float], low: int, high: int) -> int:
    """Put what is below the pivot before it, and what is above behind it; what is equal goes either way."""
    middle = (low + high) >> 1
    for one, other in ((low, middle), (middle, high), (low, middle)):
        if of[order[other]] < of[order[one]]:
            order[one], order[other] = order[other], order[one]
    pivot = of[order[middle]]
    order[middle], order[high] = order[high], order[middle]
    i, j = low, high - 1
    while True:
        while i < high and of[order[i]] < pivot:
            i += 1
        while j >= low and pivot < of[order[j]]:
            j -= 1
        if i >= j:
            break
        order[i], order[j] = order[j], order[i]
        i, j = i + 1, j - 1
    order[i], order[high] = order[high], order[i]
    return i


def token_counts(tokens: Tensor) -> Tensor:
    """Tokens of each cell ``(cells,)``, those of padding left out."""
    return (tokens != PAD).sum(1)


def is_context(tokens: Tensor) -> Tensor:
    """Which tokens are those of species, assay and modality; a mask is none."""
    return (tokens > PAD) & (tokens < FIRST_GENE)


def nonzero_means(counts: list[Tensor], technology: list[Tensor], n_genes: int) -> Tensor:
    """Mean of each gene's counts per 10,000 over the cells that have it, float64 ``(technologies, n_genes)``.

    Of raw counts, dense ``(cells, n_genes)`` each, and the row of ``TECHNOLOGIES`` of each of these cells. A gene
    that no cell of a technology has gets 0 there.
    """
    total = torch.zeros(len(TECHNOLOGIES), n_genes, dtype=torch.float64)
    n_cells = torch.zeros_like(total)
    for part, of_cell in zip(counts, technology, strict=True):
        x, where = part.double().cpu(), of_cell.cpu()
        share = x * (TARGET_SUM / x.sum(1, keepdim=True).clamp(min=1.0))
        total.index_add_(0, where, share)
        n_cells.index_add_(0, where, (x != 0).double())
    return total / n_cells.clamp(min=1.0)


def mask_tokens(
    tokens: np.ndarray, rng: np.random.Generator, *, n_tokens: int, rate: float = 0.15, **shown: float
) -> Masked:
    """Genes alone are drawn, and shown in their place; the original's may be an assay.

    The original also hides species, assay and ``spatial``, and never ``dissociated``, which it takes for the token of
    the cell.
    """
    how: dict[str, Any] = {"first": FIRST_GENE, "mask": MASK, "rate": rate, "hide": 0.81, "swap": 0.1}
    return ranked.mask_tokens(tokens, rng, others=(FIRST_GENE, n_tokens), **how | shown)
