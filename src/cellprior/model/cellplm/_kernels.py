"""The gene sum at the bottom of CellPLM: the one product that touches the count matrix."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import scipy.sparse as sp
import torch
from torch import Tensor


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

    A sparse chunk goes through the sparse product or is made dense first, whichever a measurement on this machine
    says is faster at the chunk's density.
    """
    if x.layout is torch.strided:
        return x.to(table.dtype) @ table
    density = x.values().numel() / max(x.shape[0] * x.shape[1], 1)
    if density < break_even_density(table.device, table.dtype):
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


@cache
def break_even_density(device: torch.device, dtype: torch.dtype) -> float:
    """Density above which making a chunk dense beats the sparse product, measured once per device and type.

    The shape is that of a chunk of an 85-million-parameter CellPLM, cut to an eighth of the genes.
    """
    n_cells, n_genes, n_hidden, density = 256, 2048, 1024, 0.05
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(n_cells, n_genes, generator=generator) < density).float()
    x = dense.to_sparse_csr().to(device)
    table = torch.rand(n_genes, n_hidden, generator=generator).to(device, dtype)
    sparse = _seconds(lambda: _sparse_product(x, table), device)
    through_dense = _seconds(lambda: to_dense(x).to(dtype) @ table, device)
    return density * through_dense / sparse  # the sparse product costs in proportion to the density


def _seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    """Best of three runs after a first one."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
