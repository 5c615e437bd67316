"""Work on the count matrix itself: sums of the vectors of features, weighted by counts, and the depth of cells."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
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
        values = values * for_each(counts, target_sum / cell_depth(counts).clamp(min=1.0))
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
        size = max(BLOCK_BYTES // (4 * table.shape[1]), 1)
        out = torch.zeros(len(x), table.shape[1])
        for start, (crow, col, values) in _blocks_of_genes(_as_scipy(x, x.values()), size):
            vectors = table[start : start + size].float()
            shape = (len(x), len(vectors))
            block = torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=False)
            torch.addmm(out, block, vectors, out=out)
        return out


def _blocks_of_genes(x: sp.csr_matrix, size: int) -> Iterator[tuple[int, list[Tensor]]]:
    """First gene of each block of ``size`` genes, and the block's row pointers, columns and values.

    The values of a cell that belong to a block stand together, so each block is cut out as rows of a matrix that has a
    row for each cell and block.
    """
    if not x.has_sorted_indices:
        x = x.sorted_indices()
    n_cells, n_genes = x.shape
    n_blocks = -(-n_genes // size)
    piece = np.repeat(np.arange(n_cells) * n_blocks, np.diff(x.indptr))
    piece += x.indices // size
    pointers = np.zeros(n_cells * n_blocks + 1, dtype=x.indices.dtype)
    np.cumsum(np.bincount(piece, minlength=n_cells * n_blocks), out=pointers[1:])
    pieces = sp.csr_matrix((x.data, x.indices, pointers), shape=(n_cells * n_blocks, n_genes))
    for i in range(n_blocks):
        block = pieces[i::n_blocks]
        block.indices -= block.indices.dtype.type(i * size)
        yield i * size, [torch.from_numpy(part) for part in (block.indptr, block.indices, block.data)]


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


def for_each(x: Tensor, of_cells: Tensor) -> Tensor:
    """A number of each cell ``(cells,)``, for each stored value of a CSR tensor."""
    return torch.repeat_interleave(of_cells, x.crow_indices().diff())


def row_of_each(x: Tensor) -> Tensor:
    """Row of each stored value of a CSR tensor."""
    return for_each(x, torch.arange(len(x), device=x.device))


def cell_depth(counts: Tensor) -> Tensor:
    """Sum of each cell's counts ``(cells,)``; dense or CSR."""
    if counts.layout is torch.strided:
        return counts.sum(1)
    return torch.segment_reduce(counts.values(), "sum", lengths=counts.crow_indices().diff().long())
