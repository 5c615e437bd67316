"""Work on the count matrix itself: sums of the vectors of features, weighted by counts, and the depth of cells."""

from __future__ import annotations

import scipy.sparse as sp
import torch
from torch import Tensor

# Density of a chunk from which making it dense beats the sparse product, by type of the gene vectors. Measured with
# benchmarks/cellplm_gene_sum.py on an x86 CPU. Constants, not timings at run time: those go wrong on a busy machine,
# and the two products round differently, so that the same call would not give the same bits twice.
BREAK_EVEN_DENSITY = {torch.float32: 0.2, torch.bfloat16: 0.06}
BLOCK_BYTES = 2 * 2**20  # of gene vectors at a time in the sparse product: what a core's cache holds


def log_counts(counts: Tensor, target_sum: float | None) -> Tensor:
    """``log(1 + x)`` of counts, dense or CSR, each cell scaled to ``target_sum`` first if given."""
    if counts.layout is torch.strided:
        if target_sum is not None:
            counts = counts * (target_sum / counts.sum(1, keepdim=True).clamp(min=1.0))
        return torch.log1p(counts)
    values = counts.values()
    if target_sum is not None:
        rows = row_of_each(counts)
        values = values * (target_sum / cell_depth(counts, rows).clamp(min=1.0))[rows]
    crow, col = counts.crow_indices(), counts.col_indices()
    return torch.sparse_csr_tensor(crow, col, torch.log1p(values), counts.shape, check_invariants=False)


def weighted_gene_sum(x: Tensor, table: Tensor) -> Tensor:
    """``x @ table`` for cells ``(cells, genes)`` and gene vectors ``(genes, n_hidden)``.

    A sparse chunk goes through the sparse product, or is made dense first: whichever is faster at its density, and
    always the latter where a gradient is asked for.
    """
    if x.layout is torch.strided:
        return x.to(table.dtype) @ table
    density = x.values().numel() / max(x.shape[0] * x.shape[1], 1)
    learning = torch.is_grad_enabled() and table.requires_grad
    if density < BREAK_EVEN_DENSITY[table.dtype] and not learning:
        return _sparse_product(x, table)
    return to_dense(x, table.dtype) @ table


def _sparse_product(x: Tensor, table: Tensor) -> Tensor:
    """Sparse times dense in float32.

    On the CPU in blocks of genes: as a whole, the product waits for memory at every stored value, where a block of
    gene vectors stays in the cache.
    """
    # autocast would ask for a product in half precision, which CPUs do not have
    with torch.autocast(table.device.type, enabled=False):
        if x.device.type != "cpu":
            return torch.sparse.mm(x, table.float())
        by_gene = _as_scipy(x, x.values()).tocsc()
        size = max(BLOCK_BYTES // (4 * table.shape[1]), 1)
        out = torch.zeros(len(x), table.shape[1])
        for start in range(0, len(table), size):
            block = by_gene[:, start : start + size].tocsr()
            crow, col, values = (torch.from_numpy(part) for part in (block.indptr, block.indices, block.data))
            tensor = torch.sparse_csr_tensor(crow, col, values, block.shape, check_invariants=False)
            torch.addmm(out, tensor, table[start : start + size].float(), out=out)
        return out


def to_dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A CSR tensor as a dense one; on the CPU through SciPy, an order of magnitude faster than torch there."""
    values = x.values().to(dtype)
    if x.device.type != "cpu":
        crow, col = x.crow_indices(), x.col_indices()
        return torch.sparse_csr_tensor(crow, col, values, x.shape, check_invariants=False).to_dense()
    if dtype is torch.bfloat16:  # a type that NumPy lacks: the bits are moved as integers
        return torch.from_numpy(_as_scipy(x, values.view(torch.int16)).toarray()).view(torch.bfloat16)
    return torch.from_numpy(_as_scipy(x, values).toarray())


def _as_scipy(x: Tensor, values: Tensor) -> sp.csr_matrix:
    """A CSR tensor on the CPU, with other values, as a SciPy matrix that shares their memory."""
    parts = (values.numpy(), x.col_indices().numpy(), x.crow_indices().numpy())
    return sp.csr_matrix(parts, shape=tuple(x.shape))


def row_of_each(x: Tensor) -> Tensor:
    """Row of each stored value of a CSR tensor."""
    return torch.repeat_interleave(torch.arange(len(x), device=x.device), x.crow_indices().diff())


def cell_depth(counts: Tensor, rows: Tensor | None = None) -> Tensor:
    """Sum of each cell's counts ``(cells,)``; dense or CSR, of which :func:`row_of_each` may be known already."""
    if counts.layout is torch.strided:
        return counts.sum(1)
    rows = row_of_each(counts) if rows is None else rows
    return counts.values().new_zeros(len(counts)).index_add_(0, rows, counts.values())
