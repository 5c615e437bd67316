"""Train a small CellPLM from scratch on two blood data sets, then impute genes that one of them lacks.

    python benchmarks/cellplm_training.py FOLDER

FOLDER holds ``pbmc3k_seurat.h5ad`` and ``pbmc_facs_zheng2017.h5ad``: raw counts in ``X``, symbols in ``var_names``.

Part 1 prints the reconstruction loss on held-out cells beside its floor, the loss of a predictor that knows each gene's
mean. Part 2 hides a fifth of the genes of the first data set, as if it had been measured with a panel, trains on both
with the imputation objective, and prints how the imputed counts of the hidden genes correlate with the true ones over
the cells of the first data set, gene by gene: beside gene means of the second data set, and beside the mean of the
nearest cells of the second data set.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import scvi
import torch
from sklearn.neighbors import NearestNeighbors

from cellprior.model import CellPLM

NETWORK = {"n_hidden": 128, "n_layers": 2, "n_heads": 4, "n_latent": 32, "n_batches": 2}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def read(folder: Path, query: str, reference: str, n_genes: int) -> ad.AnnData:
    """Both data sets on the genes that both have and that are found in most cells."""
    cells = {name: ad.read_h5ad(folder / f"{name}.h5ad") for name in (query, reference)}
    joined = ad.concat(cells, label="study", join="inner", index_unique="-")
    detected = np.asarray((joined.X > 0).sum(axis=0)).ravel()
    return joined[:, np.sort(np.argsort(-detected)[:n_genes])].copy()


def train(adata: ad.AnnData, weights: str | None, seed: int, epochs: int, **options) -> CellPLM:
    scvi.settings.seed = seed
    CellPLM.setup_anndata(adata, batch_key="study")
    model = CellPLM.from_pretrained(weights, adata) if weights else CellPLM(adata, **NETWORK)
    model.train(max_epochs=epochs, batch_size=256, **QUIET, **options)
    return model


def show_training(adata: ad.AnnData, epochs: int) -> None:
    model = train(adata, None, 0, epochs, plan_kwargs={"lr": 2e-3})
    columns = ["reconstruction", "reconstruction_floor_gene_means"]
    history = pd.concat([model.history[f"validation_{name}"] for name in columns], axis=1)
    history.index = history.index + 1
    print(f"## From scratch on {adata.n_obs:,} cells, {adata.n_vars:,} genes\n")
    print(history.iloc[[0, *range(4, len(history), 5)]].round(1).to_string(), "\n")


def correlations(truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Pearson over cells, per gene; 0 for a constant guess."""
    truth, guess = (x - x.mean(axis=0) for x in (truth, guess))
    scale = np.sqrt((truth**2).sum(axis=0) * (guess**2).sum(axis=0))
    return (truth * guess).sum(axis=0) / np.where(scale == 0, np.inf, scale)


def nearest_mean(query: ad.AnnData, reference: ad.AnnData, measured: np.ndarray, k: int = 50) -> np.ndarray:
    """Expected counts from the k nearest reference cells in a PCA of the measured genes."""
    both = ad.concat([query[:, measured], reference[:, measured]])
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    sc.pp.pca(both, n_comps=30)
    latent = both.obsm["X_pca"]
    near = NearestNeighbors(n_neighbors=k).fit(latent[query.n_obs :])
    neighbours = near.kneighbors(latent[: query.n_obs], return_distance=False)
    share = reference.X.multiply(1 / reference[:, measured].X.sum(axis=1)).tocsr()
    mean = np.stack([np.asarray(share[rows].mean(axis=0)).ravel() for rows in neighbours])
    return mean * np.asarray(query[:, measured].X.sum(axis=1))


def show_imputation(adata: ad.AnnData, query: str, epochs: int, seed: int) -> None:
    hidden = np.random.default_rng(seed).random(adata.n_vars) < 0.2
    is_query = (adata.obs["study"] == query).to_numpy()
    truth = adata[is_query, hidden].X.toarray()
    studied = adata.copy()
    keep = sp.csr_matrix(np.where(np.outer(is_query, hidden), 0.0, 1.0), dtype=np.float32)
    studied.X = sp.csr_matrix(adata.X.multiply(keep))
    studied.X.eliminate_zeros()
    other = adata.obs["study"].cat.categories.drop(query)[0]
    measured = {query: list(adata.var_names[~hidden]), other: list(adata.var_names)}
    reference = adata[~is_query]
    share = np.asarray(reference.X.sum(axis=0)).ravel()
    depth = np.asarray(adata[is_query, ~hidden].X.sum(axis=1))
    guesses = {
        "gene means": depth * share[hidden] / share[~hidden].sum(),
        "50 nearest cells": nearest_mean(adata[is_query], reference, ~hidden)[:, hidden],
    }
    for name, weights, lr in (
        ("CellPLM from scratch", None, 2e-3),
        ("starter, fine-tuned", "cellplm-starter", 5e-4),
    ):
        model = train(
            studied, weights, seed, epochs, objective="imputation", measured=measured, plan_kwargs={"lr": lr}
        )
        known = model.gene_match.index >= 0
        genes = adata.var_names[hidden & known]
        imputed = model.impute(genes, indices=is_query, measured=measured).to_numpy()
        guess = np.full_like(truth, np.nan)
        guess[:, adata.var_names[hidden].isin(genes)] = imputed
        guesses[name] = guess
    found = (truth > 0).mean(axis=0) >= 0.01
    found &= ~np.any([np.isnan(guess).any(axis=0) for guess in guesses.values()], axis=0)
    print(f"## Imputation of {found.sum()} hidden genes in {len(truth):,} cells of {query}, seed {seed}\n")
    table = pd.DataFrame(
        {name: correlations(truth[:, found], guess[:, found]) for name, guess in guesses.items()}
    )
    summary = pd.DataFrame(
        {
            "median correlation": table.median(),
            "mean": table.mean(),
            "better than gene means": table.gt(table["gene means"], axis=0).mean(),
        }
    )
    print(summary.round(3).to_string(), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--query", default="pbmc3k_seurat")
    parser.add_argument("--reference", default="pbmc_facs_zheng2017")
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="GPU available|The 'val_dataloader'|Lightning")
    adata = read(args.folder, args.query, args.reference, args.genes)
    show_training(adata, args.epochs)
    for seed in range(args.seeds):
        show_imputation(adata, args.query, args.epochs, seed)


if __name__ == "__main__":
    main()
