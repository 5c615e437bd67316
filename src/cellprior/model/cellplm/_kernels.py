"""The gene sum at the bottom of CellPLM: the one product that touches the count matrix."""

from __future__ import annotations

import scipy.sparse as sp
import torch
from torch import Tensor

# Density of a chunk from which making it dense beats the sparse product, by type of the gene vectors. Measured with
# benchmarks/cellplm_gene_sum.py on an x86 CPU. Constants, not timings at run time: those go wrong on a busy machine,
# and the two products round differently, so that the same call would not give the same bits twice.
BREAK_EVEN_DENSITY = {torch.float32: 0.04, torch.bfloat16: 0.013}


def log_counts(counts: Tensor, target_sum: float | None) -> Tensor:
    """``log(1 + x)`` of counts, dense or CSR, each cell scaled to ``target_sum`` first if given."""
    if counts.layout is torch.strided:
        if target_sum is not None:
            counts = counts * (target_sum / counts.sum(1, keepdim=True).clamp(min=1.0))
        return torch.log1p(counts)
    values = counts.values()
    if target_sum is not None:
        rows = _rows(counts)
        total = torch.zeros(len(counts), device=values.device).index_add_(0, rows, values)
        values = values * (target_sum / total.clamp(min=1.0))[rows]
    crow, col = counts.crow_indices(), counts.col_indices()
    return torch.sparse_csr_tensor(crow, col, torch.log1p(values), counts.shape, check_invariants=False)


def weighted_gene_sum(x: Tensor, table: Tensor) -> Tensor:
    """``x @ table`` for cells ``(cells, genes)`` and gene vectors ``(genes, n_hidden)``.

    A sparse chunk goes through the sparse product or is made dense first, whichever is faster at its density.
    """
    if x.layout is torch.strided:
        return x.to(table.dtype) @ table
    density = x.values().numel() / max(x.shape[0] * x.shape[1], 1)
    if density < BREAK_EVEN_DENSITY[table.dtype]:
        return _sparse_product(x, table)
    return to_dense(x).to(table.dtype) @ table


def _sparse_product(x: Tensor, table: Tensor) -> Tensor:
    """Sparse times dense in float32; autocast would ask for a half-precision product that CPUs do not have."""
    with torch.autocast(table.device.type, enabled=False):
        return torch.sparse.mm(x, table.float())


def to_dense(x: Tensor) -> Tensor:
    """A CSR tensor as a dense one; on the CPU through SciPy, an order of magnitude faster than torch there."""
    if x.device.type != "cpu":
        return x.to_dense()
    parts = (x.values().numpy(), x.col_indices().numpy(), x.crow_indices().numpy())
    return torch.from_numpy(sp.csr_matrix(parts, shape=tuple(x.shape)).toarray())


def _rows(x: Tensor) -> Tensor:
    """Row of each stored value of a CSR tensor."""
    return torch.repeat_interleave(torch.arange(len(x), device=x.device), x.crow_indices().diff())
