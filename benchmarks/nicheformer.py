"""Nicheformer's speed beside the original's way, and panels of few genes beside a PCA; both with random weights.

    python benchmarks/nicheformer.py speed --data pbmc3k.h5ad [--cells 4] [--genes 300] [--threads 1]
    python benchmarks/nicheformer.py panels --data pbmc_facs.h5ad [--labels cell_type] [--cells 500] [--panels 2]

``speed`` takes the released shape. "original's way" is what the authors' code does with the same tensors:
``torch.nn.TransformerEncoder`` in its fused path over all 1,500 positions of each cell, with a mask of keys, and a mean
over all of them, padding too. With --genes, cells are cut to a random panel of so many genes that Xenium has measured.
Tokens are made before the clock starts.

``panels`` cuts cells to such panels, says that they are Xenium's, and embeds them with a network of 4 layers and a
width of 64, whose weights are random: what is in its numbers comes from the tokens, not from pretraining. Beside it
stands a PCA of the log-normalised panel. By method and size of the panel:

``macro_f1``
    Of naming each cell by its 15 nearest neighbours in the same panel.
``neighbours_of_all_genes``
    Share of a cell's 15 neighbours that are among its 15 in a PCA of all genes.
``depth``
    R² of a linear prediction of the logarithm of a cell's counts from its vector, cross-validated: how much of the
    depth is in it.
``shift_at_half``, ``kept_at_half``, ``kept_without_10%``
    Of :func:`cellprior.evaluate.stability`: ``median_shift`` and ``neighbours_kept`` with half of the counts, and
    ``neighbours_kept`` with a tenth of the panel's genes dropped.
"""

from __future__ import annotations

import argparse
import time

SHAPE = {"n_hidden": 512, "n_layers": 12, "n_heads": 16, "n_feedforward": 1024}
SMALL = {"n_hidden": 64, "n_layers": 4, "n_heads": 8, "n_feedforward": 128}
WAYS = {
    "Nicheformer, all": {"pooling": "all"},
    "Nicheformer, genes": {"pooling": "genes"},
    "Nicheformer, genes, rounded": {"pooling": "genes", "gene_scale": "rounded"},
}
N_NEIGHBORS = 15
ORIGINAL = "original's way"


def module_of(shape: dict[str, int], seed: int):
    """Random weights that make much of little; the vocabulary and the means of the authors."""
    import torch

    from cellprior.model.nicheformer._module import NicheformerModule
    from cellprior.model.nicheformer._vocabulary import shipped

    vocabulary = shipped()
    torch.manual_seed(seed)
    module = NicheformerModule(len(vocabulary.genes), **shape).eval()
    with torch.no_grad():
        module.embedder.tokens.weight[1] = 0.0
        module.gene_means.copy_(torch.from_numpy(vocabulary.means))
    return module, vocabulary.genes


def panel_of(adata, size: int | None, seed: int):
    """The data cut to a random panel of genes that Xenium has measured."""
    import numpy as np

    from cellprior import genes
    from cellprior.model.nicheformer._inputs import TECHNOLOGIES
    from cellprior.model.nicheformer._vocabulary import shipped

    if size is None:
        return adata
    vocabulary = shipped()
    match = genes.match(adata.var, vocabulary.genes)
    on_panels = vocabulary.means[TECHNOLOGIES.index("xenium")] != 0
    here = np.flatnonzero((match.index >= 0) & on_panels[np.maximum(match.index, 0)])
    return adata[:, np.sort(np.random.default_rng(seed).permutation(here)[:size])].copy()


def as_the_original(module):
    """The network as the original runs it, a function of tokens."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(
        SHAPE["n_hidden"],
        SHAPE["n_heads"],
        SHAPE["n_feedforward"],
        0.0,
        batch_first=True,
        layer_norm_eps=1e-12,
    )
    encoder = torch.nn.TransformerEncoder(layer, SHAPE["n_layers"], enable_nested_tensor=False).eval()
    for theirs, ours in zip(encoder.layers, module.encoder, strict=True):
        projections = (ours.query, ours.key, ours.value)
        theirs.self_attn.in_proj_weight.data = torch.cat([part.weight for part in projections]).data
        theirs.self_attn.in_proj_bias.data = torch.cat([part.bias for part in projections]).data
        theirs.self_attn.out_proj.load_state_dict(ours.out.state_dict())
        theirs.linear1.load_state_dict(ours.ff1.state_dict())
        theirs.linear2.load_state_dict(ours.ff2.state_dict())
        theirs.norm1.load_state_dict(ours.norm1.state_dict())
        theirs.norm2.load_state_dict(ours.norm2.state_dict())

    def embed(tokens):
        full = torch.nn.functional.pad(tokens, (0, module.n_positions - tokens.shape[1]), value=1)
        x = module.embedder(full)
        for one in encoder.layers:
            x = one(x, src_key_padding_mask=full == 1)
        return x[:, 3:].mean(1)

    return embed


def speed(args: argparse.Namespace) -> None:
    """One line for each way."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import torch

    from cellprior import genes
    from cellprior.model.data._counts import csr_tensor, select_columns
    from cellprior.model.nicheformer._inputs import context_code

    torch.set_num_threads(args.threads)
    module, vocabulary = module_of(SHAPE, 0)
    adata = panel_of(ad.read_h5ad(args.data), args.genes, 0)
    match = genes.match(adata.var, vocabulary)
    rows = np.random.default_rng(0).permutation(adata.n_obs)[: args.cells]
    x = select_columns(
        adata.X.tocsr().astype(np.float32)[rows], match.index.astype(np.int32), len(vocabulary)
    )
    code = torch.full((args.cells,), context_code("human", "Xenium" if args.genes else "10x 3' v1"))
    tokens = module.tokens(csr_tensor(x), context=code)
    ways = {
        ORIGINAL: as_the_original(module),
        "all": module.pool,
        "genes": lambda tokens: module.pool(tokens, "genes"),
    }
    found, table = {}, {}
    with torch.inference_mode():
        for name, way in ways.items():
            if name != ORIGINAL:
                way(tokens[:1])  # libraries have started
            start, cpu = time.perf_counter(), time.process_time()
            found[name] = way(tokens)
            table[name] = {
                "CPU s/cell": (time.process_time() - cpu) / args.cells,
                "s/cell": (time.perf_counter() - start) / args.cells,
            }
    for row in table.values():
        row["times original's"] = table[ORIGINAL]["CPU s/cell"] / row["CPU s/cell"]
    length = (tokens != 1).sum(1)
    print(
        f"{args.cells} cells of {int(length.min())} to {int(length.max())} tokens, {args.threads} threads, random "
        "weights"
    )
    print(pd.DataFrame.from_dict(table, orient="index").to_string(float_format="{:.3g}".format))
    print(f"largest difference of all: {float((found['all'] - found[ORIGINAL]).abs().max()):.1e}")


def scores(z, truth, log_depth, of_all):
    """How well neighbours name a cell, agree with those of all genes, and how much of the depth is in the vectors."""
    import numpy as np
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import f1_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.preprocessing import StandardScaler

    nearest = neighbours(z)
    named = np.array([np.bincount(truth[of_cell]).argmax() for of_cell in nearest])
    shared = (nearest[:, :, None] == of_all[:, None, :]).any(2).mean()
    scaled = StandardScaler().fit_transform(z)
    predicted = cross_val_predict(RidgeCV(np.logspace(-2, 4, 13)), scaled, log_depth, cv=5)
    r2 = 1 - ((log_depth - predicted) ** 2).sum() / ((log_depth - log_depth.mean()) ** 2).sum()
    return {
        "macro_f1": f1_score(truth, named, average="macro"),
        "neighbours_of_all_genes": shared,
        "depth": r2,
    }


def neighbours(z):
    """Nearest by cosine, the cell itself left out."""
    from sklearn.neighbors import NearestNeighbors

    z = z - z.mean(0)  # most of a vector of a random network is the same in all cells
    search = NearestNeighbors(n_neighbors=N_NEIGHBORS, metric="cosine", algorithm="brute").fit(z)
    return search.kneighbors(return_distance=False)


def pca(adata):
    """Of log-normalised counts, 50 components."""
    import numpy as np
    import scanpy as sc

    adata = adata.copy()
    adata.X = adata.X.astype(np.float32)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=min(50, min(adata.shape) - 1), random_state=0)
    return adata.obsm["X_pca"]


def panels(args: argparse.Namespace) -> None:
    """A line for each method and size, the mean over panels."""
    import tempfile
    import warnings

    import anndata as ad
    import numpy as np
    import pandas as pd

    from cellprior.evaluate import stability
    from cellprior.model import Nicheformer
    from cellprior.weights import write_bundle

    warnings.filterwarnings("ignore", message="Only")
    whole = ad.read_h5ad(args.data)
    whole = whole[np.sort(np.random.default_rng(0).permutation(whole.n_obs)[: args.cells])].copy()
    of_all, rows = neighbours(pca(whole)), []
    for seed in range(args.panels):
        module, vocabulary = module_of(SMALL, seed)
        with tempfile.TemporaryDirectory() as folder:
            config = {"model": "Nicheformer", "network": SMALL}
            bundle = f"{folder}/bundle"
            write_bundle(bundle, state_dict=module.state_dict(), config=config, genes=vocabulary, card="")
            for size in args.sizes:
                panel = panel_of(whole, size, seed)
                truth = pd.factorize(panel.obs[args.labels].astype(str))[0]
                total = np.asarray(panel.X.sum(1)).ravel()
                log_depth = np.log1p(total)
                Nicheformer.setup_anndata(panel, assay="Xenium")
                model = Nicheformer.from_pretrained(bundle, panel, min_coverage=0.0)
                spaces = {"PCA": pca(panel)}
                spaces |= {name: model.get_latent_representation(**how) for name, how in WAYS.items()}
                kept = {}
                for name, how in WAYS.items():
                    table = stability(
                        model, depths=(0.5,), gene_dropouts=(0.1,), n_companions=len(truth), seeds=1,
                        embed_options=how, progress=False,
                    ).set_index(["perturbation", "metric", "method"])["value"]  # fmt: skip
                    for method in ("model", "PCA"):
                        kept[name if method == "model" else "PCA"] = {
                            "shift_at_half": table["50% of the counts", "median_shift", method],
                            "kept_at_half": table["50% of the counts", "neighbours_kept", method],
                            "kept_without_10%": table["10% of the genes dropped", "neighbours_kept", method],
                        }
                rows += [
                    {"genes": size, "method": name, "counts": np.median(total)}
                    | scores(z, truth, log_depth, of_all)
                    | kept[name]
                    for name, z in spaces.items()
                ]
                model.release()
    table = pd.DataFrame(rows).groupby(["genes", "method"], sort=False).mean()
    print(f"{whole.n_obs} cells, {args.panels} panels of each size, random weights; mean over panels")
    print(table.to_string(float_format="{:.3f}".format))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "panels"])
    parser.add_argument("--data", required=True, help="AnnData with raw counts in X")
    parser.add_argument("--cells", type=int, help="of the data, drawn (4, or 500)")
    parser.add_argument("--genes", type=int, help="speed: of a panel; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--labels", default="cell_type", help="panels: column of obs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 500])
    parser.add_argument("--panels", type=int, default=2)
    args = parser.parse_args()
    args.cells = args.cells or (4 if args.what == "speed" else 500)
    (speed if args.what == "speed" else panels)(args)


if __name__ == "__main__":
    main()
