"""Speed and memory of CellPLM at the size of the released models (85 million parameters), with random weights.

    python benchmarks/cellplm_85m.py [--cells 2000] [--growth-to 50000] [--repeats 3]

Each row of the table is a process of its own, so that peak memory is its own too. "original's way" is the same network
with the product over a COO tensor and the dense masks that the original allocates; the counts are Poisson draws at
uniformly random genes, 2,000 of 19,374 per cell. The second table gives the memory for more cells: what is
added per cell on top of the counts themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

N_GENES, N_EXPRESSED = 19_374, 2_000
VARIANTS = ("original's way", "float32", "bfloat16")


def synthetic(n_cells: int):
    """AnnData with random counts; written row by row, as 50,000 cells are 100 million values."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    indices = np.empty((n_cells, N_EXPRESSED), dtype=np.int32)
    for i in range(n_cells):
        indices[i] = np.sort(rng.choice(N_GENES, N_EXPRESSED, replace=False))
    counts = rng.poisson(2, n_cells * N_EXPRESSED).astype(np.float32) + 1
    indptr = np.arange(n_cells + 1, dtype=np.int32) * N_EXPRESSED
    x = sp.csr_matrix((counts, indices.ravel(), indptr), shape=(n_cells, N_GENES))
    return ad.AnnData(x, var=pd.DataFrame(index=[f"gene {i}" for i in range(N_GENES)]))


def forget_peak() -> None:
    """Let the peak memory start anew (Linux), so that making the data does not count."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_mb(which: str) -> float:
    """Memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def original_way(module, x):
    """The original's steps: float64 CSR to COO, dense masks, all cells at once, attention as the paper writes it."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    coo = x.astype(np.float64).tocsr().tocoo()
    counts = torch.sparse_coo_tensor(
        np.stack([coo.row, coo.col]), coo.data.astype(np.float32), x.shape
    ).coalesce()
    mask = torch.ones(x.shape).int()
    counts = torch.sparse_coo_tensor(counts.indices(), torch.log1p(counts.values()), x.shape).coalesce()
    embedder = module.embedder
    table = embedder.gene_embedding[torch.arange(N_GENES)]
    h = embedder.norm(F.relu(embedder.linear(torch.sparse.mm(counts, table))))
    for layer in module.encoder:
        h = h + plain_attention(layer.attention, layer.norm1(h))
        h = h + layer.ff(layer.norm2(h))
    h = module.pre_latent_norm(h)
    module.latent.log_var(h)
    del mask
    return module.latent.mu(h).numpy()


def plain_attention(attention, x, eps=1e-6):
    """Flow attention term by term."""
    import torch

    q, k, v = (
        f(x).unflatten(1, (attention.n_heads, -1)) for f in (attention.query, attention.key, attention.value)
    )
    q, k = q.sigmoid(), k.sigmoid()
    incoming = 1 / torch.einsum("nhd,hd->nh", q + eps, k.sum(0) + eps)
    outgoing = 1 / torch.einsum("nhd,hd->nh", k + eps, q.sum(0) + eps)
    sink = torch.einsum("nhd,hd->nh", q + eps, (k * outgoing[..., None]).sum(0) + eps)
    source = torch.einsum("nhd,hd->nh", k + eps, (q * incoming[..., None]).sum(0) + eps).clamp(-1, 1)
    competition = source.softmax(0) * len(x)
    memory = torch.einsum("nhd,nhe->hde", k, v * competition[..., None])
    out = torch.einsum("nhd,hde->nhe", q * incoming[..., None], memory) * sink.sigmoid()[..., None]
    return attention.out(out.flatten(1))


def run(variant: str, n_cells: int, repeats: int) -> dict[str, float]:
    """One row: cells per second (best of the repeats) and peak memory."""
    import warnings

    import numpy as np
    import torch

    warnings.filterwarnings("ignore", message="Sparse")
    from cellprior.model import CellPLM

    adata = synthetic(n_cells)
    CellPLM.setup_anndata(adata)
    torch.manual_seed(0)
    model = CellPLM(adata, size="released")
    model.is_trained_ = True  # random weights are as fast as trained ones
    model.module.eval()
    forget_peak()
    before = memory_mb("VmRSS")

    def embed() -> np.ndarray:
        if variant == "original's way":
            with torch.inference_mode():
                return original_way(model.module, adata.X)
        return model.get_latent_representation(precision=variant)

    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        latent = embed()
        seconds.append(time.perf_counter() - start)
    peak = memory_mb("VmHWM")
    cosine = float("nan")
    if repeats > 1:
        exact = model.get_latent_representation()
        lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(latent, axis=1)
        cosine = float(((exact * latent).sum(axis=1) / lengths).mean())
    return {"cells/s": n_cells / min(seconds), "peak MB": peak, "added MB": peak - before, "cosine": cosine}


def in_process(variant: str, n_cells: int, repeats: int) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--variant",
        variant,
        "--cells",
        str(n_cells),
        "--repeats",
        str(repeats),
    ]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    import pandas as pd

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=2_000)
    parser.add_argument(
        "--growth-to", type=int, default=50_000, help="cells of the memory table; 0 leaves it out"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run(args.variant, args.cells, args.repeats)))
        return
    rows = {variant: in_process(variant, args.cells, args.repeats) for variant in VARIANTS}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(1, "times the original", table["cells/s"] / table.loc["original's way", "cells/s"])
    print(f"{args.cells:,} cells, {N_EXPRESSED:,} of {N_GENES:,} genes each")
    print(table.to_string(float_format="{:.6g}".format))
    if args.growth_to:
        small, large = (in_process("float32", n, 1) for n in (args.cells, args.growth_to))
        per_cell = (large["added MB"] - small["added MB"]) * 1024 / (args.growth_to - args.cells)
        print(f"\nfloat32, added memory: {small['added MB']:.0f} MB at {args.cells:,} cells,", end=" ")
        print(
            f"{large['added MB']:.0f} MB at {args.growth_to:,}: {per_cell:.2f} KB per further cell;", end=" "
        )
        print(f"{large['cells/s']:.0f} cells/s there")


if __name__ == "__main__":
    main()
