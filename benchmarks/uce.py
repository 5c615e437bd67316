"""Speed, memory and closeness of UCE at the size of the released 4-layer model, with random weights.

    python benchmarks/uce.py [--data pbmc3k.h5ad] [--cells 6] [--layers 4] [--threads 1]

Each row of the first table is a process of its own, so that peak memory is its own too. "original's way" is written
here, from the model's formulas: a table of 5,120 numbers for each token, of which each token of each cell is made
anew; PyTorch's own encoder layers, and the decoder on all positions, of which the first is read. Sentences are the
same on both sides: without --data, of made-up cells of 3,000 expressed genes on 24 chromosomes.

The second table is how far vectors lie from those of many draws, by the number of draws: 1 - cosine, mean over cells,
beside the spread that the model itself states, and the same of systematic sentences. The weights are random: what
becomes of these numbers with the released ones is not known.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

N_GENES, N_CHROMOSOMES, WAYS = 19_790, 25, ("original's way", "here", "here, bfloat16")


def full_size(n_layers: int) -> Any:
    """The released shapes with made-up places of genes; dropout off."""
    import torch

    from cellprior.model.uce._module import UCEModule

    torch.manual_seed(0)
    module = UCEModule(N_GENES, n_chromosomes=N_CHROMOSOMES, n_layers=n_layers).eval()
    module.gene_chromosome.copy_(torch.randint(N_CHROMOSOMES, (N_GENES,)))
    module.gene_start.copy_(torch.randint(10**8, (N_GENES,)))
    return module


def counts_of(args: argparse.Namespace) -> Any:
    """Some cells."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    if args.data:
        import anndata as ad

        x = ad.read_h5ad(args.data).X.tocsr().astype(np.float32)
        x = x[rng.permutation(x.shape[0])[: args.cells], :N_GENES]
        wide = np.zeros((x.shape[0], N_GENES), dtype=np.float32)
        wide[:, : x.shape[1]] = x.toarray()
        return torch.from_numpy(wide)
    x = np.zeros((args.cells, N_GENES), dtype=np.float32)
    for cell in x:
        cell[rng.choice(N_GENES, 3000, replace=False)] = rng.geometric(0.4, 3000)
    return torch.from_numpy(x)


def originals_way(module: Any, tokens: Any) -> Any:
    """A function from tokens to embeddings, whose tables and layers hold what the module's do."""
    import math

    import torch
    from torch import nn

    from cellprior.model.uce._module import sinusoids

    d = module.n_hidden
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(d, 20, 5120, 0.0, batch_first=True),
        len(module.encoder),
        enable_nested_tensor=False,
    ).eval()
    names = {
        "self_attn.in_proj_weight": "qkv.weight", "self_attn.in_proj_bias": "qkv.bias", "self_attn.out_proj": "out",
        "linear1": "ff1", "linear2": "ff2",
    }  # fmt: skip
    state = module.encoder.state_dict()

    def ours(name: str) -> str:
        number, _, rest = name.removeprefix("layers.").partition(".")
        for theirs, mine in names.items():
            rest = rest.replace(theirs, mine)
        return f"{number}.{rest}"

    layers.load_state_dict({name: state[ours(name)] for name in layers.state_dict()})
    # vectors of proteins, and two layers whose cost is the original's; what they give is put in the table's place
    proteins, encoder = nn.Embedding(len(module.token_table.weight), 5120), nn.Linear(5120, d)

    def embed(token: Any) -> Any:
        unused = nn.functional.gelu(encoder(nn.functional.normalize(proteins(token), dim=2)))
        x = (module.token_table(token) + 0 * unused) * math.sqrt(d) + sinusoids(token.shape[1], d)
        return nn.functional.normalize(module.decoder(layers(x))[:, 0], dim=1)

    return lambda: torch.cat([embed(tokens.token[[i], :n]) for i, n in enumerate(tokens.length.tolist())])


def row(args: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    import resource

    import torch

    torch.set_num_threads(args.threads)
    module = full_size(args.layers)
    with torch.inference_mode():
        tokens = module.tokens(counts_of(args))
        function = lambda: module.latent_of(module.pool(tokens))  # noqa: E731
        if args.way == WAYS[0]:
            function = originals_way(module, tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.way == WAYS[2]):
            start, wall = time.process_time(), time.perf_counter()
            found = function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu, wall = ((t / args.cells) for t in (time.process_time() - start, time.perf_counter() - wall))
    return {
        "cpu": cpu,
        "wall": wall,
        "peak": peak,
        "tokens": int(tokens.length.float().mean()),
        "found": found.tolist(),
    }


def spreads(args: argparse.Namespace) -> None:
    """The second table."""
    import torch

    from cellprior.model.uce._draws import average_of_draws

    torch.set_num_threads(args.threads)
    module, counts = full_size(args.layers), counts_of(args)
    with torch.inference_mode():

        def latent(**how: Any) -> Any:
            draws = module.latent_of(module.pool(module.tokens(counts, **how)))
            return average_of_draws(draws, how.get("n_draws", 1))

        many, _ = latent(n_draws=args.draws, seed=1)
        print("\n| draws | 1 - cosine to many | stated spread |\n| --- | --- | --- |")
        for name, how in (
            ("1", {}),
            ("4", {"n_draws": 4}),
            ("16", {"n_draws": 16}),
            ("systematic", {"sampling": "systematic"}),
        ):
            found, spread = latent(**how)
            print(f"| {name} | {1 - (found * many).sum(1).mean():.1e} | {spread.mean():.1e} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    for name, default in (("cells", 6), ("layers", 4), ("threads", 1), ("draws", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", choices=(*WAYS, "spread"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way == "spread":
        spreads(args)
        return
    if args.way:
        print(json.dumps(row(args)))
        return
    reference = None
    print("| way | tokens | CPU s per cell | s per cell | peak MB | largest difference |\n|" + " --- |" * 6)
    for way in WAYS:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        reference = reference or found["found"]
        far = max(
            abs(a - b)
            for x, y in zip(found["found"], reference, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        seconds = f"{found['cpu']:.2f} | {found['wall']:.2f}"
        print(f"| {way} | {found['tokens']} | {seconds} | {found['peak']:,.0f} | {far:.0e} |")
    subprocess.run([sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--way", "spread"], check=True)


if __name__ == "__main__":
    main()
