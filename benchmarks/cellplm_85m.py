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


def peak_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 1024**2
    )


def original_way(module, x):
    """Whole sentence at once, COO product, masks as dense as in the original."""
    import torch
    import torch.nn.functional as F

    mask = torch.ones(x.shape).int()
    coo = x.tocoo()
    counts = torch.sparse_coo_tensor((coo.row, coo.col), coo.data.astype("float32"), x.shape).coalesce()
    counts = torch.sparse_coo_tensor(counts.indices(), torch.log1p(counts.values()), x.shape)
    embedder = module.embedder
    table = embedder.gene_embedding[torch.arange(N_GENES)]
    hidden = [embedder.norm(F.relu(embedder.linear(torch.sparse.mm(counts, table))))]
    for layer in module.encoder:
        layer(hidden)
    del mask
    return module.latent.mean(module.pre_latent_norm(hidden[0])).numpy()


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
    model = CellPLM(adata)
    model.is_trained_ = True  # random weights are as fast as trained ones
    model.module.eval()
    before = peak_mb()

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
    peak = peak_mb()
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
