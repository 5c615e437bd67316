"""Links of peaks and genes by MultiomeCLIP, beside plain correlation, correlation over metacells, and distance.

    python benchmarks/links.py cells.h5mu held_out.h5mu genes.gtf.gz [--weights folder] [--null]

Two MuData of raw counts, of cells of one kind: one is trained on and linked, the other tells how well. Positions of
genes as of `cellprior.genes.read_positions`. A Markdown table on stdout, progress on stderr. No experiment says here
which links are true; two things stand in for it.

own promoters
    Peaks within 2,000 base pairs of the start of a gene: how often the gene has a higher score than another gene, of
    another chromosome and found in about as many cells, would have with this peak; 0.5 is chance. The distance is the
    same by design, so it tells nothing. Standard error by a bootstrap over genes.
held-out cells
    Of all pairs in the window, rank correlation of the score with the correlation over cells of the other file, and the
    mean of that over the 5 % best pairs; and the rank correlation for the same peaks with other genes, which knows no
    place: kinds of cells alone.

``metacells`` are 500 means of the 50 cells that are nearest to one: by the principal components of RNA, which asks no
model, or by MultiomeCLIP. Second table: how many links have a small p, as they are, with the positions of the genes
shuffled, and, with ``--null``, by a model of cells whose RNA was shuffled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch are read

import mudata as md
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from mudata import MuData
from scipy.stats import spearmanr
from sklearn.utils.extmath import randomized_svd

from cellprior._compat import without_pulled_columns
from cellprior.genes import read_positions
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.model.multiomeclip import _links as links
from cellprior.model.multiomeclip._controls import PROMOTER
from cellprior.model.multiomeclip._features import vectors_over

START = time.perf_counter()
N_METACELLS, N_CELLS = 500, 50
N_WRONG = 20
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def read(path: Path) -> MuData:
    with warnings.catch_warnings(), without_pulled_columns():
        warnings.simplefilter("ignore")  # mudata announces other defaults
        return md.read_h5mu(path)


def trained(mdata: MuData, args: argparse.Namespace) -> MultiomeCLIP:
    scvi.settings.seed = args.seed
    MultiomeCLIP.setup_mudata(mdata)
    model = MultiomeCLIP(mdata)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(accelerator=args.accelerator, enable_progress_bar=False)
    progress("trained")
    return model


def by_correlation(rna: sp.csc_matrix, atac: sp.csc_matrix) -> Score:
    def score(gene: np.ndarray, peak: np.ndarray) -> np.ndarray:
        return links.correlations(rna, atac, links.Candidates(gene, peak, np.zeros(len(gene))))

    return score


def metacells(points: np.ndarray, *values: sp.csc_matrix) -> list[sp.csc_matrix]:
    """Means of the cells that are nearest to some cells."""
    seeds = np.random.default_rng(0).choice(len(points), N_METACELLS, replace=False)
    points = links.unit(points)
    near = np.argsort(-points[seeds] @ points.T, axis=1)[:, :N_CELLS]
    mean = sp.csr_matrix(
        (np.full(near.size, 1 / N_CELLS), near.ravel(), np.arange(N_METACELLS + 1) * N_CELLS),
        shape=(N_METACELLS, len(points)),
    )
    return [(mean @ x).tocsc() for x in values]


def components(rna: sp.csc_matrix, n: int = 30) -> np.ndarray:
    u, s, _ = randomized_svd(rna.toarray() - np.asarray(rna.mean(axis=0)), n, random_state=0)
    return np.asarray(u * s)


def candidates(
    model: MultiomeCLIP, positions: pd.DataFrame, held_out: MuData, args: argparse.Namespace
) -> tuple[links.Features, links.Features, links.Places, links.Candidates, Score]:
    """Genes, peaks, places of genes, pairs, and what gives the correlation over the held-out cells."""
    cells = model._cells()
    rows = np.flatnonzero(cells.complete)
    rna, atac = (links.frequent(cells, name, rows, 10) for name in links.MODALITIES)
    rna, places, _ = links.placed(model, rna, positions, given=True)
    intervals = links.read_peaks(np.asarray(model.peaks, dtype=object)[atac.rows])
    pairs = links.within(places, intervals, args.window)
    others = model._cells(held_out)
    theirs = [
        links.log_values(others.counts[name], np.arange(others.n_obs)).tocsc()[:, features.rows]
        for name, features in zip(links.MODALITIES, (rna, atac), strict=True)
    ]
    return rna, atac, places, pairs, by_correlation(*theirs)


def wrong_genes(
    rna: links.Features, places: links.Places, gene: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """For each gene some others, of other chromosomes and found in about as many cells ``(genes, N_WRONG)``."""
    order = np.argsort(rna.n_cells, kind="stable")
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(len(order))
    found = []
    for g in gene:
        near = order[max(rank[g] - 75, 0) : rank[g] + 75]
        found.append(rng.choice(near[places.chromosome[near] != places.chromosome[g]], N_WRONG))
    return np.array(found)


def promoters(
    score: Score, gene: np.ndarray, peak: np.ndarray, wrong: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """Share of other genes that a gene beats at its own promoters, and its standard error."""
    own = score(gene, peak)[:, None]
    theirs = score(wrong.ravel(), np.repeat(peak, N_WRONG)).reshape(wrong.shape)
    share = ((own > theirs) + 0.5 * (own == theirs)).mean(axis=1)
    _, code = np.unique(gene, return_inverse=True)
    total, n = np.bincount(code, share), np.bincount(code)
    drawn = rng.integers(0, len(n), (500, len(n)))
    return float(share.mean()), float((total[drawn].sum(axis=1) / n[drawn].sum(axis=1)).std())


def small(table: pd.DataFrame) -> list[str]:
    shares = [f"{(table.p <= at).mean():.4f}" for at in (0.05, 0.01)]
    return [f"{len(table):,}", *shares, str(int((table.q <= 0.1).sum()))]


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def compare(model: MultiomeCLIP, positions: pd.DataFrame, held_out: MuData, args: argparse.Namespace) -> None:
    rng = np.random.default_rng(args.seed)
    rna, atac, places, pairs, over_held_out = candidates(model, positions, held_out, args)
    cells = model._cells()
    rows = np.flatnonzero(cells.complete)
    vectors = [
        links.unit(vectors_over(model, name, cells, rows)[x.rows])
        for name, x in zip(links.MODALITIES, (rna, atac), strict=True)
    ]
    joint = model.get_latent_representation()
    values = rna.values, atac.values
    methods: dict[str, Score] = {
        "MultiomeCLIP": lambda gene, peak: np.einsum("pd,pd->p", vectors[0][gene], vectors[1][peak]),
        "correlation over cells": by_correlation(*values),
        "correlation over metacells, by RNA": by_correlation(*metacells(components(rna.values), *values)),
        "correlation over metacells, by MultiomeCLIP": by_correlation(*metacells(joint, *values)),
    }
    near = np.abs(pairs.distance) <= PROMOTER
    wrong = wrong_genes(rna, places, pairs.gene[near], rng)
    other = wrong_genes(rna, places, pairs.gene, rng)[:, 0]
    truth, unrelated = (over_held_out(gene, pairs.peak) for gene in (pairs.gene, other))
    table = []
    for name, score in methods.items():
        auc, error = promoters(score, pairs.gene[near], pairs.peak[near], wrong, rng)
        of_pairs, of_others = score(pairs.gene, pairs.peak), score(other, pairs.peak)
        table.append(
            [
                name,
                f"{auc:.3f} ± {error:.3f}",
                *agreement(of_pairs, truth),
                agreement(of_others, unrelated)[0],
            ]
        )
        progress(name)
    table.append(["distance", "0.500", *agreement(-np.abs(pairs.distance), truth), "-"])
    table.append(["all pairs", "-", "-", f"{np.nanmean(truth):.4f}", "-"])
    print(f"\n{len(truth):,} pairs of {len(rna.rows):,} genes, {int(near.sum()):,} own promoters")
    columns = ["", "own promoters", "held-out cells, ρ", "the best 5 %", "ρ with other genes"]
    print_table(columns, table)


def agreement(score: np.ndarray, truth: np.ndarray) -> list[str]:
    known = ~(np.isnan(score) | np.isnan(truth))
    best = np.argsort(-score[known], kind="stable")[: int(known.sum()) // 20]
    return [f"{spearmanr(score[known], truth[known])[0]:.3f}", f"{truth[known][best].mean():.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("positions", type=Path, help="GTF, GFF3 or BED of the genome of the peaks")
    parser.add_argument("--weights", type=Path, help="a bundle that was trained on these cells")
    parser.add_argument(
        "--null", action="store_true", help="train a second model, on cells whose RNA is shuffled"
    )
    parser.add_argument("--window", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mdata, positions = read(args.cells), read_positions(args.positions)
    model = MultiomeCLIP.from_pretrained(args.weights, mdata) if args.weights else trained(mdata, args)
    compare(model, positions, read(args.held_out), args)
    rows = [["as it is", *small(model.peak_gene_links(gene_positions=positions, window=args.window))]]
    progress("links")
    known = positions[~positions.index.duplicated() & positions.index.isin(mdata["rna"].var_names)]
    shuffled = known.set_axis(np.random.default_rng(args.seed).permutation(known.index))
    found = [small(model.peak_gene_links(gene_positions=shuffled, window=args.window))]
    rows += [["positions of genes shuffled", *found[0]]]
    if args.null:
        order = np.random.default_rng(args.seed).permutation(mdata.n_obs)
        rna = mdata["rna"][order].copy()
        rna.obs_names = mdata["rna"].obs_names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            null = MuData({"rna": rna, "atac": mdata["atac"].copy()})
        model = trained(null, args)
        rows += [
            [
                "RNA of cells shuffled",
                *small(model.peak_gene_links(gene_positions=positions, window=args.window)),
            ]
        ]
    print_table(["", "pairs", "p ≤ 0.05", "p ≤ 0.01", "q ≤ 0.1"], rows)


if __name__ == "__main__":
    main()
