"""The sparse product of counts and gene vectors against the dense one, by density: where is the break-even?

    python benchmarks/cellplm_gene_sum.py [--genes 17000] [--hidden 1024] [--cells 512]

The result stands as BREAK_EVEN_DENSITY in cellprior/model/engine/_kernels.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cellprior.model.data._counts import csr_tensor
from cellprior.model.engine._kernels import _sparse_product, to_dense

DENSITIES = (0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3)


def milliseconds(product: Callable[[], torch.Tensor]) -> float:
    """Best of five runs after a first one."""
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--genes", type=int, default=17_000)
    parser.add_argument("--hidden", type=int, default=1_024)
    parser.add_argument("--cells", type=int, default=512)
    args = parser.parse_args()
    table = torch.randn(args.genes, args.hidden)
    half = table.bfloat16()
    rows = {}
    for density in DENSITIES:
        rng = np.random.default_rng(0)
        x = sp.random_array(
            (args.cells, args.genes), density=density, format="csr", dtype=np.float32, rng=rng
        )
        x = sp.csr_matrix(x)
        x.sort_indices()
        tensor = csr_tensor(x)
        rows[density] = {
            "sparse, whole": milliseconds(lambda tensor=tensor: torch.sparse.mm(tensor, table)),
            "sparse": milliseconds(lambda tensor=tensor: _sparse_product(tensor, table)),
            "dense float32": milliseconds(lambda tensor=tensor: to_dense(tensor, table.dtype) @ table),
            "dense bfloat16": milliseconds(lambda tensor=tensor: to_dense(tensor, half.dtype) @ half),
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("density")
    print(f"milliseconds for {args.cells:,} cells x {args.genes:,} genes x {args.hidden:,}")
    print(frame.to_string(float_format="{:.2f}".format))
    for kind in ("float32", "bfloat16"):
        gain = frame["sparse"] - frame[f"dense {kind}"]  # grows with the density
        print(f"break-even of {kind}: density {np.interp(0.0, gain, frame.index):.3f}")


if __name__ == "__main__":
    main()
