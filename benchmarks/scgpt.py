"""Speed, memory and closeness of ScGPT at the size of the released model, with random weights.

    python benchmarks/scgpt.py [--data pbmc3k.h5ad] [--cells 24] [--threads 1] [--bfloat16]

Each row of the first table is a process of its own, so that peak memory is its own too. "original's way" is written
here, from the model's formulas: PyTorch's own encoder layers, whose fused kernels run where there are no gradients;
minibatches of 64 cells in the order of the data, padded to the longest of them; values through their network token by
token. Cells have exactly 600 or 1,200 tokens, or as many as the real cells of --data. "floor" is the time of the
matrix products alone, at the size of the tokens that there are. "times original's" is by CPU time.

The second table is how far the vectors of real cells move with the way that ties are broken and with fewer genes:
the cosine to "fixed" and all genes, as is, and after the mean over the cells has been taken off either side, since a
random network embeds all cells nearly alike. The weights are random, as the released ones are not at hand here: what
becomes of these numbers with them is not known. Beside them stands the same of the original's draws, twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N_GENES = 60_694
WAYS = ("original's way", "here", "here, bfloat16")


def full_size():
    """The released shapes; weights that make much of little, as the golden ones, and dropout off."""
    import torch

    from cellprior.model.scgpt._module import ScGPTModule

    torch.manual_seed(0)
    module = ScGPTModule(N_GENES, mvc=None, expression=None).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.mul_(2.0)
    return module


def tokens_of(module, args, n_tokens: str, **how):
    """Cells with so many tokens, or, for "real", those of real data."""
    import numpy as np
    import torch

    if n_tokens == "real":
        import anndata as ad

        x = ad.read_h5ad(args.data).X.tocsr().astype(np.float32)
        x = x[np.random.default_rng(0).permutation(x.shape[0])[: args.cells]]
        rows = np.sort(np.random.default_rng(1).choice(N_GENES, x.shape[1], replace=False))
        return module.tokens(torch.from_numpy(x.toarray()), gene_index=torch.from_numpy(rows), **how)
    rng = np.random.default_rng(0)
    counts = torch.zeros(args.cells, N_GENES)
    for cell in counts:
        genes = torch.from_numpy(rng.choice(N_GENES, int(n_tokens) - 1, replace=False))
        cell[genes] = torch.from_numpy(rng.poisson(1.0, len(genes)) + 1).float()
    return module.tokens(counts, **how)


def as_the_original(module):
    """The network as the original runs it without flash-attn, a function of tokens."""
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(512, 8, 512, 0.2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for theirs, ours in zip(encoder.layers, module.encoder, strict=True):
            theirs.self_attn.in_proj_weight.copy_(ours.qkv.weight)
            theirs.self_attn.in_proj_bias.copy_(ours.qkv.bias)
            for name, own in (("linear1", "ff1"), ("linear2", "ff2"), ("norm1", "norm1"), ("norm2", "norm2")):
                getattr(theirs, name).load_state_dict(getattr(ours, own).state_dict())
            theirs.self_attn.out_proj.load_state_dict(ours.out.state_dict())

    def embed(tokens):
        found = []
        for start in range(0, len(tokens.gene), 64):
            width = int(tokens.length[start : start + 64].max())
            gene, value = (part[start : start + 64, :width] for part in (tokens.gene, tokens.value))
            x = module.gene_encoder(gene) + module.value_encoder(value.float())
            x = encoder(x, src_key_padding_mask=gene == N_GENES)
            found.append(nn.functional.normalize(x[:, 0], dim=1))
        return torch.cat(found)

    return embed


def floor(tokens):
    """The matrix products of all layers, cell by cell, and nothing else; a function without arguments."""
    import torch

    weights = [torch.randn(512, n) for n in (1536, 512, 512, 512)]

    def multiply() -> None:
        for n in tokens.length.tolist():
            x, q = torch.randn(n, 512), torch.randn(8, n, 64)
            for _ in range(12):
                for weight in weights:
                    x @ weight
                scores = q @ q.transpose(1, 2)
                scores @ q

    return multiply


def memory_mb(which: str) -> float:
    """Memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def run(args: argparse.Namespace, way: str, n_tokens: str, out: Path) -> None:
    """One row; writes it, and the embedding."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    module = full_size()
    tokens = tokens_of(module, args, n_tokens)
    if way == "floor":
        embed = floor(tokens)
    else:
        pool = as_the_original(module) if way == WAYS[0] else module.pool

        def embed():
            return pool(tokens)

    half = way == WAYS[2]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        if way != "floor":
            pool(type(tokens)(*(part[:2] for part in tokens)))  # threads and libraries have started
        Path("/proc/self/clear_refs").write_text("5")  # let the peak start anew
        before, wall, cpu = memory_mb("VmRSS"), float("inf"), float("inf")
        for _ in range(args.repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            latent = embed()
            wall = min(wall, time.perf_counter() - start)
            cpu = min(cpu, time.process_time() - cpu_start)
    if way != "floor":
        np.save(out.with_suffix(".npy"), latent.float().numpy())
    row = {
        "cells/s": args.cells / wall,
        "CPU s/cell": cpu / args.cells,
        "peak MB": memory_mb("VmHWM"),
        "added MB": memory_mb("VmHWM") - before,
    }
    out.with_suffix(".json").write_text(json.dumps(row))


def cosines(x, y) -> dict[str, float]:
    """Lowest and median cosine of cells, as they are and centred."""
    import numpy as np

    def of(a, b):
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    x, y = x.astype(np.float64), y.astype(np.float64)
    plain, centred = of(x, y), of(x - x.mean(0), y - y.mean(0))
    return {
        "lowest": plain.min(),
        "median": np.median(plain),
        "lowest, centred": centred.min(),
        "median, centred": np.median(centred),
    }


def deviations(args: argparse.Namespace):
    """How far real cells move."""
    import pandas as pd
    import torch

    torch.set_num_threads(args.threads)
    args.cells = args.deviation_cells
    module = full_size()
    found = {}
    with torch.inference_mode():

        def embed(**how):
            return module.pool(tokens_of(module, args, "real", **how)).numpy()

        reference, random = embed(), embed(ties="random", seed=0)
        for ties in ("middle", "upper"):
            found[f'ties="{ties}"'] = cosines(embed(ties=ties), reference)
        found['ties="random"'] = cosines(random, reference)
        found['ties="random", two seeds'] = cosines(embed(ties="random", seed=1), random)
        for n in args.max_genes:
            found[f"max_genes={n}"] = cosines(embed(max_genes=n), reference)
        length = tokens_of(module, args, "real").length
    note = f"{args.cells} cells of {Path(args.data).name}, {int(length.min()) - 1} to {int(length.max()) - 1} genes"
    print(
        f'\nRandom weights. {note}, median {int(length.median()) - 1}. Cosine to ties="fixed" and all genes:'
    )
    print(pd.DataFrame.from_dict(found, orient="index").to_string(float_format="{:.5f}".format))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="AnnData with raw counts in X")
    parser.add_argument("--cells", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-genes", type=int, nargs="+", default=[250, 500, 1_199])
    parser.add_argument("--deviation-cells", type=int, default=24)
    parser.add_argument(
        "--bfloat16", action="store_true", help="a row more; slow without the instructions for it"
    )
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        way, n_tokens, out = args.row
        run(args, way, n_tokens, Path(out))
        return
    import numpy as np
    import pandas as pd

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for n_tokens in ["600", "1200", *(["real"] if args.data else [])]:
            latents = {}
            for way in (*WAYS[: 3 if args.bfloat16 else 2], "floor"):
                out = Path(folder) / "row"
                command = [sys.executable, __file__, *sys.argv[1:], "--row", way, n_tokens, str(out)]
                subprocess.run(command, check=True)
                row = rows[n_tokens, way] = json.loads(out.with_suffix(".json").read_text())
                row["times original's"] = rows[n_tokens, WAYS[0]]["CPU s/cell"] / row["CPU s/cell"]
                if way != "floor":
                    latents[way] = np.load(out.with_suffix(".npy"))
                    row["largest difference"] = float(np.abs(latents[way] - latents[WAYS[0]]).max())
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(f"{args.cells} cells, 12 layers, {args.threads} threads, random weights")
    print(table.to_string(float_format="{:.4g}".format))
    if args.data:
        deviations(args)


if __name__ == "__main__":
    main()
