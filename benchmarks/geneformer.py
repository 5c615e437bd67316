"""Speed, memory and closeness of Geneformer at the size of V1 or V2, with random weights, beside the original's way.

    pip install transformers
    python benchmarks/geneformer.py --data pbmc3k.h5ad [--cells 32] [--threads 1] [--batch 100] [--shape v1] [--full]

Each row of the table is a process of its own, so that peak memory is its own too. "original's way" is what the
authors' code does with the same tensors: ``transformers.BertForMaskedLM`` with all hidden states, cells from the
longest to the shortest in minibatches of --batch (100 there), padded to the longest; of that, the mean over the genes
behind the last layer but one. "floor" is the time of the matrix products alone that this mean needs, at the length of
each cell. "times original's" is by CPU time. Tokens are made once, before the clock starts, in the vocabulary and with
the medians of V1; with --full, cells of as many tokens as a cell can have are drawn, as real ones are shorter.

The cosine is the lowest of a cell, as is, and after the mean over the cells has been taken off either side, since a
random network embeds all cells nearly alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# n_hidden, n_layers, n_heads, n_feedforward, n_positions
SHAPES = {"v1": (256, 6, 4, 512, 2048), "v2-104m": (768, 12, 12, 3072, 4096)}
N_GENES = 25_424
WAYS = ("original's way", "here", "here, bfloat16")


def module_of(shape: str):
    """The released shape; weights that make much of little, and dropout off."""
    import torch

    from cellprior.model.geneformer._module import GeneformerModule

    torch.manual_seed(0)
    names = ("n_hidden", "n_layers", "n_heads", "n_feedforward", "n_positions")
    module = GeneformerModule(N_GENES, **dict(zip(names, SHAPES[shape], strict=True))).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return module


def tokens_of(args: argparse.Namespace):
    """Tokens of cells of real data, or of as many genes as a cell can have."""
    import anndata as ad
    import numpy as np
    import torch

    from cellprior import genes
    from cellprior.model.data._counts import csr_tensor, select_columns
    from cellprior.model.geneformer._inputs import rank_tokens
    from cellprior.model.geneformer._vocabulary import shipped

    n_positions = SHAPES[args.shape][4]
    rng = np.random.default_rng(0)
    if args.full:
        drawn = [2 + rng.choice(N_GENES, n_positions, replace=False) for _ in range(args.cells)]
        return torch.from_numpy(np.stack(drawn))
    adata, vocabulary = ad.read_h5ad(args.data), shipped()
    match = genes.match(adata.var, vocabulary.genes)
    x = adata.X.tocsr().astype(np.float32)[rng.permutation(adata.n_obs)[: args.cells]]
    counts = csr_tensor(select_columns(x, match.index.astype(np.int32), N_GENES))
    return rank_tokens(counts, torch.from_numpy(vocabulary.scale), n_positions=n_positions, special=False)


def as_the_original(module, shape: str, batch: int):
    """The network as the original runs it, a function of tokens."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    n_hidden, n_layers, n_heads, n_feedforward, n_positions = SHAPES[shape]
    config = BertConfig(
        vocab_size=N_GENES + 2, hidden_size=n_hidden, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        intermediate_size=n_feedforward, max_position_embeddings=n_positions, hidden_act="relu",
        layer_norm_eps=1e-12, pad_token_id=0,
    )  # fmt: skip
    bert = BertForMaskedLM(config).eval()
    parts = {
        "embedder.tokens": "embeddings.word_embeddings", "embedder.positions": "embeddings.position_embeddings",
        "embedder.types": "embeddings.token_type_embeddings", "embedder.norm": "embeddings.LayerNorm",
    }  # fmt: skip
    for i in range(n_layers):
        for ours, theirs in {
            "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
            "out": "attention.output.dense", "norm1": "attention.output.LayerNorm", "ff1": "intermediate.dense",
            "ff2": "output.dense", "norm2": "output.LayerNorm",
        }.items():  # fmt: skip
            parts[f"encoder.{i}.{ours}"] = f"encoder.layer.{i}.{theirs}"
    for ours, theirs in parts.items():
        bert.bert.get_submodule(theirs).load_state_dict(module.get_submodule(ours).state_dict())

    def embed(tokens):
        length = (tokens != 0).sum(1)
        order = length.argsort(descending=True)
        found = torch.empty(len(tokens), n_hidden)
        for cells in order.split(batch):
            few = tokens[cells, : int(length[cells].max())]
            states = bert(few, attention_mask=few != 0, output_hidden_states=True).hidden_states[-2]
            share = (few != 0) / length[cells][:, None]
            found[cells] = torch.bmm(share[:, None], states)[:, 0]
        return found

    return embed


def floor(tokens, shape: str):
    """The matrix products of all layers but the last, cell by cell, and nothing else; a function without arguments."""
    import torch

    n_hidden, n_layers, n_heads, n_feedforward, _ = SHAPES[shape]
    weights = [torch.randn(n_hidden, n) for n in (3 * n_hidden, n_hidden, n_feedforward)]
    last = torch.randn(n_feedforward, n_hidden)

    def multiply() -> None:
        for n in (tokens != 0).sum(1).tolist():
            x, y = torch.randn(n, n_hidden), torch.randn(n, n_feedforward)
            q = torch.randn(n_heads, n, n_hidden // n_heads)
            for _ in range(n_layers - 1):
                for weight in weights:
                    x @ weight
                y @ last
                (q @ q.transpose(1, 2)) @ q

    return multiply


def memory_mb(which: str) -> float:
    """Memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def run(args: argparse.Namespace, way: str, out: Path) -> None:
    """One row; writes it, and the embedding."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    module, tokens = module_of(args.shape), tokens_of(args)
    pool = (
        as_the_original(module, args.shape, args.batch)
        if way == WAYS[0]
        else lambda few: module.pool(few, "mean")
    )
    multiply = floor(tokens, args.shape)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=way == WAYS[2]):
        pool(tokens[:2])  # threads and libraries have started
        Path("/proc/self/clear_refs").write_text("5")  # let the peak start anew
        before, wall, cpu = memory_mb("VmRSS"), float("inf"), float("inf")
        for _ in range(args.repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            latent = multiply() if way == "floor" else pool(tokens)
            wall = min(wall, time.perf_counter() - start)
            cpu = min(cpu, time.process_time() - cpu_start)
    if way != "floor":
        np.save(out.with_suffix(".npy"), latent.float().numpy())
    length = (tokens != 0).sum(1)
    row = {
        "cells/s": args.cells / wall,
        "CPU s/cell": cpu / args.cells,
        "peak MB": memory_mb("VmHWM"),
        "added MB": memory_mb("VmHWM") - before,
    }
    tokens_each = (
        f"{int(length.min())} to {int(length.max())} tokens, mean {float(length.float().mean()):.0f}"
    )
    out.with_suffix(".json").write_text(json.dumps([row, tokens_each]))


def lowest_cosine(x, y) -> float:
    import numpy as np

    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="AnnData with raw counts in X")
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=100, help="cells at a time, of the original's way")
    parser.add_argument("--shape", choices=list(SHAPES), default="v1")
    parser.add_argument("--full", action="store_true", help="cells of as many tokens as possible")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None and not args.full:
        parser.error("--data or --full is needed")
    if args.row:
        run(args, args.row[0], Path(args.row[1]))
        return
    import numpy as np
    import pandas as pd

    rows, reference = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for way in (*WAYS, "floor"):
            out = Path(folder) / "row"
            command = [sys.executable, __file__, *sys.argv[1:], "--row", way, str(out)]
            subprocess.run(command, check=True)
            row, tokens_each = json.loads(out.with_suffix(".json").read_text())
            rows[way] = row
            row["times original's"] = rows[WAYS[0]]["CPU s/cell"] / row["CPU s/cell"]
            if way != "floor":
                latent = np.load(out.with_suffix(".npy")).astype(np.float64)
                reference = latent if reference is None else reference
                row["largest difference"] = float(np.abs(latent - reference).max())
                row["cosine"] = lowest_cosine(latent, reference)
                row["centred"] = lowest_cosine(latent - latent.mean(0), reference - reference.mean(0))
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(f"{args.shape}, {args.cells} cells of {tokens_each}, {args.threads} threads, random weights")
    print(table.to_string(float_format="{:.5g}".format))


if __name__ == "__main__":
    main()
