"""What the verdict says where the answer is known: of PCA, of labels and noise, of shuffled labels, of cells twice.

    python benchmarks/verdict_controls.py FOLDER [--only pca labels shuffled twice] [--shuffles 100] [--sets NAME ...]
    python benchmarks/verdict_controls.py FOLDER --only weights [--weights cellplm-starter] [--sets NAME ...]

FOLDER holds h5ad files with raw counts, types in ``obs["cell_type"]`` and batches in ``obs["batch"]``; the eight below
are of several tissues, species and protocols. Printed are tables in Markdown:

pca
    Principal components of the 2,000 most variable genes, of all cells, handed in as arrays of 5 to 100 components. It
    is the method of the baseline, so none must be said to help.
labels
    One column for each type, and noise: it names every cell, and the verdict must say what it is.
shuffled
    Types shuffled over the cells: there is no signal, and each verdict must say so.
twice
    Every cell twice, and an array that is noise, the same for both copies: neighbours would be the copies.
weights
    The verdicts on some weights, where nobody knows the answer, as they are printed.

Verdicts are those of ``cp.evaluate.report``, without its other tables, of at most 1,000 cells of a set.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is read

import anndata as ad
import numpy as np
import pandas as pd

from cellprior.evaluate._ask import KNN, LINEAR, ask
from cellprior.evaluate._expression import log_normalised
from cellprior.evaluate._methods import highly_variable
from cellprior.evaluate._preserved import preserved
from cellprior.evaluate._splits import random_folds
from cellprior.evaluate._task import Task, make_task
from cellprior.evaluate._verdict import WITHIN_TYPES, Verdict, judge

SETS = (
    "pbmc_facs_zheng2017",
    "pbmc3k_seurat",
    "pbmc_kang_ifnb_muscat",
    "pancreas_5tech_panc8small",
    "mouse_pancreas_endocrinogenesis",
    "breast_tnbc_wu2021_cid4465",
    "lung_adeno_kim2020",
    "lymphoid_ref_spacexr",
)
BATCHES = {  # columns of obs; where there is none, parts of the cells are held out
    "pancreas_5tech_panc8small": "batch",
    "celllines_sc_mixology": "protocol",
    "oligodendroglioma_tirosh2016": "batch",
    "pbmc_kang_ifnb_muscat": "sample_id",
}
COMPONENTS = (5, 10, 20, 30, 50, 100, 200)
MOST_CELLS = 1000
NOISE = 0.3


def read(folder: Path, name: str) -> ad.AnnData:
    """Labelled cells of a set, at most `MOST_CELLS`."""
    adata = ad.read_h5ad(folder / f"{name}.h5ad")
    adata = adata[adata.obs["cell_type"].notna().to_numpy()]
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:MOST_CELLS]
    return adata[np.sort(rows)].copy()


def verdicts(
    adata: ad.AnnData, embeddings: str | Mapping[str, np.ndarray], batch_key: str | None
) -> list[Verdict]:
    """Of each embedding."""
    return judged(make_task(adata, embeddings, labels_key="cell_type", batch_key=batch_key))


def judged(task: Task) -> list[Verdict]:
    """Verdicts from the headline splits, with the test for a signal and neighbours within types, as in a report."""
    headline = next(iter(task.splits))
    answers = ask(task, headline, (KNN, LINEAR), signal=True, progress=False)
    scores = answers.scores(task.codes)
    names = [method.name for method in task.methods if method.kind == "embedding"]
    latents = {
        method.name: method.fit()[0].usual for method in task.methods if method.name in (*names, "PCA")
    }
    within: dict[str, float] = {}
    if task.counts is not None:
        batches = None if task.batches is None else task.batches.to_numpy()
        kept = preserved(latents, task.counts, task.codes, batches)
        within = {name: of[WITHIN_TYPES] for name, of in kept.items()}
    return [judge(task, answers, scores, name, within) for name in names]


def of_weights(folder: Path, sets: list[str], weights: str) -> str:
    """The verdict on each set, as it is printed."""
    found = []
    for name in sets:
        adata = read(folder, name)
        text = str(verdicts(adata, weights, BATCHES.get(name))[0])
        found.append(f"{name}, {adata.n_obs:,} cells\n\n{text}\n")
        sys.stderr.write(f"{found[-1]}\n")
    return "\n".join(found)


def components(adata: ad.AnnData, n: int) -> np.ndarray:
    """Principal components of variable genes, of all cells ``(cells, n)``."""
    log = log_normalised(adata.X)
    x = log[:, highly_variable(log)].toarray()
    left, values, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return np.asarray((left * values)[:, :n], dtype=np.float32)


def of_pca(folder: Path, sets: list[str]) -> pd.DataFrame:
    """A row per set, a column per number of components."""
    rows = []
    for name in sets:
        adata = read(folder, name)
        whole = components(adata, max(COMPONENTS))
        arrays = {str(n): whole[:, :n] for n in COMPONENTS if n <= whole.shape[1]}
        row = {"set": name, "cells": adata.n_obs}
        for verdict in verdicts(adata, arrays, BATCHES.get(name)):
            row[verdict.embedding] = f"{verdict.neighbours}; {verdict.naming}"
        rows.append(row)
        sys.stderr.write(f"{row}\n")
    return pd.DataFrame(rows)


def of_labels(folder: Path, sets: list[str]) -> pd.DataFrame:
    """Whether the verdict says that an array proves nothing, and that it knows nothing within types."""
    rows = []
    for name in sets:
        adata = read(folder, name)
        told = pd.get_dummies(adata.obs["cell_type"]).to_numpy(np.float32)
        told += NOISE * np.random.default_rng(1).standard_normal(told.shape, dtype=np.float32)
        text = verdicts(adata, {"told": told}, BATCHES.get(name))[0].text
        row = {
            "set": name,
            "verdict": text.partition("\n")[0],
            "an array proves nothing": "this proves nothing" in text,
            "labels and noise": "as labels and noise would" in text,
        }
        rows.append(row)
        sys.stderr.write(f"{row}\n")
    return pd.DataFrame(rows)


def of_shuffled(folder: Path, sets: list[str], n: int) -> pd.DataFrame:
    """How often the verdict is that there is no signal."""
    rows = []
    for name in sets:
        adata = read(folder, name)
        task = make_task(adata, {"PCA 20": components(adata, 20)}, labels_key="cell_type")
        found: Counter[str] = Counter()
        labels = task.codes.copy()
        for seed in range(n):
            task.codes = np.where(labels < 0, labels, 0)
            task.codes[labels >= 0] = np.random.default_rng(seed).permutation(labels[labels >= 0])
            splits = random_folds(task.codes, copies=task.copies)
            task.splits = {next(iter(task.splits)): splits}
            found[judged(task)[0].neighbours] += 1
            sys.stderr.write(f"{name}: {dict(found)}\n")
        rows.append({"set": name, "shuffles": n, **found})
    return pd.DataFrame(rows).fillna(0)


def of_twice(folder: Path, sets: list[str]) -> pd.DataFrame:
    """The verdict on noise, of the cells once and twice."""
    rows = []
    for name in sets:
        adata = read(folder, name)
        noise = np.random.default_rng(2).standard_normal((adata.n_obs, 10), dtype=np.float32)
        once = verdicts(adata, {"noise": noise}, None)[0]
        both = ad.concat([adata, adata], index_unique="-")
        twice = verdicts(both, {"noise": np.tile(noise, (2, 1))}, None)[0]
        row: dict[str, Any] = {"set": name}
        for words, verdict in (("once", once), ("twice", twice)):
            line = next(line for line in verdict.text.split("\n") if "As an embedding" in line)
            row |= {words: f"{verdict.neighbours}; {verdict.naming}", f"macro-F1, {words}": line.split()[9]}
        rows.append(row)
        sys.stderr.write(f"{row}\n")
    return pd.DataFrame(rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=["pca", "labels", "shuffled", "twice"])
    parser.add_argument("--shuffles", type=int, default=100)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--weights", default="cellplm-starter")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.only == ["weights"]:
        sys.stdout.write(of_weights(args.folder, args.sets, args.weights))
        return
    tables = {
        "pca": lambda: of_pca(args.folder, args.sets),
        "labels": lambda: of_labels(args.folder, args.sets),
        "shuffled": lambda: of_shuffled(args.folder, args.sets[-1:], args.shuffles),
        "twice": lambda: of_twice(args.folder, args.sets[-2:]),
    }
    for name in args.only:
        sys.stdout.write(f"\n{name}\n\n{tables[name]().to_markdown(index=False)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
