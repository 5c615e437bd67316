"""Speed, memory and closeness of ScBERT at the size of the released model, with random weights.

    python benchmarks/scbert.py [--data pbmc3k.h5ad] [--cells 4] [--threads 2] [--n-zero-genes 500 2000]

Each row of the table is a process of its own, so that peak memory is its own too. "plain" is a transcription of the
model's formulas, whole positions x features tensors and one cell at a time; the other rows are compared with its
embedding: largest difference, lowest cosine of a cell, and the same cosine after the mean over the cells has been
taken off either side, as embeddings of a random network differ little between cells. With --data the first cells of
that file are read, its genes as the first ones of the vocabulary; else counts are drawn. Where there is a CUDA
device, a second table gives cells per second by batch size, with torch.compile and without.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N_GENES = 16_906
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


def some_tokens(module, path: str | None, n_cells: int):
    """Bins of real or drawn counts ``(cells, genes)``."""
    import numpy as np
    import torch

    if path is None:
        rng = np.random.default_rng(0)
        rate = rng.gamma(0.1, 1.0, N_GENES)
        return module.tokens(torch.from_numpy(rng.poisson(rate, (n_cells, N_GENES)).astype(np.float32)))
    import anndata as ad

    counts = ad.read_h5ad(path, backed="r")[:n_cells].to_memory().X
    counts = np.asarray(counts.todense(), dtype=np.float32)[:, :N_GENES]
    return module.tokens(torch.from_numpy(counts), gene_index=torch.arange(counts.shape[1]))


def plain(module, tokens):
    """Mean of the encodings over the genes, formula by formula."""
    import torch

    def kernel(u, projection, highest):
        scaled = u * u.shape[-1] ** -0.25
        logits = scaled @ projection.T
        half_square = scaled.pow(2).sum(-1, keepdim=True) / 2
        return len(projection) ** -0.5 * (torch.exp(logits - half_square - highest(logits)) + 1e-4)

    embedder = module.embedder
    x = torch.cat([embedder.token_embedding(tokens.int()) + embedder.gene_vectors,
                   embedder.token_embedding.weight[0].expand(len(tokens), 1, -1)], dim=1)  # fmt: skip
    for layer in module.encoder:
        attention, y = layer.attention, layer.norm1(x)
        q, k, v = (
            linear(y).unflatten(2, (attention.n_heads, -1)).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        q = kernel(q, attention.projection, lambda logits: logits.amax(-1, keepdim=True))
        k = kernel(k, attention.projection, lambda logits: logits.amax())
        read = q @ (k.transpose(-1, -2) @ v) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        x = x + attention.out(read.transpose(1, 2).flatten(2))
        x = x + layer.ff2(torch.nn.functional.gelu(layer.ff1(layer.norm2(x))))
    return module.norm(x)[:, :-1].mean(1)


def full_size():
    import torch

    from cellprior.model.scbert._module import ScBERTModule

    torch.manual_seed(0)
    return ScBERTModule(N_GENES).eval()


def forget_peak() -> None:
    """Let the peak memory start anew (Linux), so that imports and weights do not count twice."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_mb(which: str) -> float:
    """Memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def run(args: argparse.Namespace) -> dict[str, float]:
    """One row; writes the embedding to ``args.out``."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    module = full_size()
    tokens = some_tokens(module, args.data, args.cells)
    dtype, _, n_zero_genes = args.variant.partition(" ")
    n_zero_genes = int(n_zero_genes) if n_zero_genes else None

    def embed(cells):
        if dtype == "plain":
            return torch.cat([plain(module, cell[None]) for cell in cells])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return module.pool(cells, n_zero_genes=n_zero_genes)

    with torch.inference_mode():
        module.pool(tokens[:1], n_zero_genes=10)  # threads and libraries have started
        forget_peak()
        before = memory_mb("VmRSS")
        best = math.inf
        for _ in range(args.repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            latent = embed(tokens)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            if wall < best:
                best, best_cpu = wall, cpu
    np.save(args.out, latent.numpy())
    return {
        "CPU s/cell": best_cpu / len(tokens),
        "wall s/cell": best / len(tokens),
        "cells/s": len(tokens) / best,
        "peak MB": memory_mb("VmHWM"),
        "added MB": memory_mb("VmHWM") - before,
    }


def compare(latent, reference) -> dict[str, float]:
    """How far an embedding is from that of the plain formulas."""
    import numpy as np

    def cosine(x, y) -> float:
        return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())

    x, y = latent.astype(np.float64), reference.astype(np.float64)
    return {
        "max diff": float(np.abs(x - y).max()),
        "cosine": cosine(x, y),
        "cosine, centred": cosine(x - x.mean(0), y - y.mean(0)) if len(x) > 1 else math.nan,
    }


def on_cuda(args: argparse.Namespace) -> None:
    """Cells per second by batch size."""
    import pandas as pd
    import torch

    tokens = some_tokens(full_size(), args.data, max(BATCH_SIZES)).cuda()
    rows = {}
    for dtype in ("float32", "bfloat16"):
        for compiled in (False, True):
            module = full_size().cuda()
            if compiled:
                for layer in module.encoder:
                    layer.compile(dynamic=False)
            row = {}
            for size in BATCH_SIZES:
                cells = tokens[torch.arange(size) % len(tokens)]
                with (
                    torch.inference_mode(),
                    torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"),
                ):
                    module.pool(cells)
                    torch.cuda.synchronize()
                    n_calls = max(1, 64 // size)
                    start = time.perf_counter()
                    for _ in range(n_calls):
                        module.pool(cells)
                    torch.cuda.synchronize()
                row[size] = n_calls * size / (time.perf_counter() - start)
            row["peak MB"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            rows[f"{dtype}{', compiled' if compiled else ''}"] = row
    print(f"\ncells/s by batch size on {torch.cuda.get_device_name()}")
    print(pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="{:.1f}".format))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="AnnData with raw counts in X")
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--n-zero-genes", type=int, nargs="+", default=[500, 2_000])
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run(args)))
        return

    import numpy as np
    import pandas as pd
    import torch

    variants = ["plain", "float32", "bfloat16"]
    variants += [f"{dtype} {n}" for n in args.n_zero_genes for dtype in ("float32", "bfloat16")]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            out = str(Path(folder) / f"{variant}.npy")
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant, "--out", out]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[variant] = json.loads(output.splitlines()[-1])
            rows[variant] |= compare(np.load(out), np.load(Path(folder) / "plain.npy"))
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(3, "times plain", table["cells/s"] / table.loc["plain", "cells/s"])
    print(f"{args.cells} cells, {N_GENES + 1:,} positions, 6 layers, {args.threads} threads")
    print(table.to_string(float_format="{:.5g}".format))
    if torch.cuda.is_available():
        on_cuda(args)


if __name__ == "__main__":
    main()
