"""How `cellplm-starter` is judged, and its card. Every number on the card is computed here, by `cellprior.evaluate`.

    python scripts/_starter_judge.py --data <folder of .h5ad> --bundle <folder> [--seeds <folder> <folder>]

`--seeds` are bundles of the same recipe with other seeds: their scores stand beside those of the bundle.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from _starter_corpus import TRAINING_SETS, TRUSTED, UNLIKE, UNSEEN_STUDIES, read_corpus, read_profiles
from _starter_data import CellSet, read_pbmc68k_reduced, read_set, subset
from _starter_fit import as_anndata
from _starter_terms import JUDGED, JUDGED_COARSE, TERMS

import cellprior as cp
from cellprior.evaluate import accuracy, clustering, knn_predict
from cellprior.evaluate._twin import random_twin
from cellprior.model import CellPLM, PretrainedModel

SEEDS = (0, 1, 2)
MOST_CELLS = 800  # of a set
STARTER, BY_BATCH = "starter", "starter, batch_key"
PCA10, PCA50, PCA_L2, RANDOM = "PCA 10", "PCA 50", "PCA 50, L2", "random weights"
METHODS = (STARTER, PCA10, PCA50, PCA_L2, RANDOM)
FEW_CELLS, FEW_GENES, SHALLOW = 100, 300, (100, 250)
CARD = Path(__file__).with_name("_starter_card_cellplm.md")
log = logging.getLogger("judge")


def read_judged(folder: Path) -> list[CellSet]:
    """Studies that were not trained on, at most `MOST_CELLS` cells of each."""
    sets = [read_set(folder, name) for name in (*UNSEEN_STUDIES, *UNLIKE)]
    sets.insert(len(UNSEEN_STUDIES), read_pbmc68k_reduced())
    return [some_cells(cells, MOST_CELLS, seed=0) for cells in sets]


def some_cells(cells: CellSet, n: int, *, seed: int) -> CellSet:
    """Cells drawn at random."""
    return subset(cells, np.sort(np.random.default_rng(seed).permutation(len(cells.cells))[:n]))


def thinned(cells: CellSet, depth: float, *, seed: int) -> CellSet:
    """Cells with about `depth` counts each, where they have more."""
    counts = cells.counts.copy()
    keep = np.minimum(1.0, depth / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0))
    rng = np.random.default_rng(seed)
    counts.data = rng.binomial(counts.data.astype(int), np.repeat(keep, np.diff(counts.indptr))).astype(
        np.float32
    )
    counts.eliminate_zeros()
    return replace(cells, counts=counts, name=f"{cells.name}, {depth:g} counts a cell")


def panel(cells: CellSet, n_genes: int, *, seed: int) -> CellSet:
    """Some of the genes that are seen at all."""
    seen = np.flatnonzero(np.asarray((cells.counts > 0).sum(axis=0)).ravel() >= 3)
    kept = np.sort(np.random.default_rng(seed).permutation(seen)[:n_genes])
    genes, counts = cells.genes[kept], cells.counts[:, kept]
    some = np.flatnonzero(np.asarray(counts.sum(axis=1)).ravel() > 0)  # PCA needs a count
    found = subset(replace(cells, counts=counts, genes=genes, ensembl_id=None), some)
    return replace(found, name=f"{cells.name}, {n_genes} genes")


def pca_of(adata: ad.AnnData, n_components: int, seed: int) -> np.ndarray:
    """Scanpy's usual way: counts to 10,000 per cell, log1p; centred, not scaled."""
    adata = ad.AnnData(adata.X.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    n_components = min(n_components, adata.n_obs - 1, adata.n_vars - 1)
    return sc.pp.pca(adata, n_comps=n_components, random_state=seed, copy=True).obsm["X_pca"]


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def embeddings(model: PretrainedModel, cells: CellSet, seed: int) -> dict[str, np.ndarray]:
    """What is compared, by the name of the method."""
    adata = as_anndata(cells)
    twin = random_twin(model, adata, seed=seed)
    found = {
        STARTER: model.get_latent_representation(adata),
        PCA10: pca_of(adata, 10, seed),
        PCA50: pca_of(adata, 50, seed),
        RANDOM: twin.get_latent_representation(),
    }
    twin.release()
    found[PCA_L2] = unit(found[PCA50])
    return found


def scored(embedding: np.ndarray, labels: np.ndarray, seed: int, *, clusters: bool) -> dict[str, float]:
    """Accuracy of 15 neighbours in a five-fold cross-validation; and agreement of Leiden clusters, resolution 1."""
    fold = np.random.default_rng(seed).permutation(len(labels)) % 5
    said = np.empty(len(labels), dtype=object)
    for i in range(5):
        known, asked = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
        said[asked] = knn_predict(embedding[known], labels[known], embedding[asked])
    ari = np.nan
    if clusters:
        ari = float(clustering(embedding, labels, resolutions=(1.0,), seed=seed)["ari"].iloc[0])
    return {"knn": accuracy(labels, said), "ari": ari}


def judge(
    model: PretrainedModel, sets: Iterable[CellSet], *, clusters: bool, resample: int | None = None
) -> pd.DataFrame:
    """One row per set, method and seed; with `resample`, each seed draws so many cells anew."""
    rows = []
    for whole in sets:
        for seed in SEEDS:
            cells = whole if resample is None else some_cells(whole, resample, seed=seed)
            assert cells.labels is not None
            found = embeddings(model, cells, seed)
            if clusters and isinstance(model, CellPLM) and len(np.unique(cells.batch)) > 1:
                found[BY_BATCH] = by_batch(model, cells)
            for method, embedding in found.items():
                score = scored(embedding, cells.labels, seed, clusters=clusters)
                rows.append({"set": whole.name, "method": method, "seed": seed, **score})
    return pd.DataFrame(rows)


def by_batch(model: CellPLM, cells: CellSet) -> np.ndarray:
    """The starter's embedding with one sentence for each batch."""
    adata = as_anndata(cells)
    CellPLM.setup_anndata(adata, batch_key="batch")
    with_batches = CellPLM.from_pretrained(model.pretrained_["weights"], adata)
    latent = with_batches.get_latent_representation()
    with_batches.release()
    return latent


def transfer(model: CellPLM, cells: CellSet) -> pd.DataFrame:
    """Labels from each batch to the others, 15 neighbours."""
    assert cells.labels is not None
    shared = by_batch(model, cells)
    adata = as_anndata(cells)
    joint = pca_of(adata, 50, 0)
    centred = joint - np.stack([joint[cells.batch == b].mean(axis=0) for b in cells.batch])
    rows = []
    for batch in np.unique(cells.batch):
        known, asked = np.flatnonzero(cells.batch == batch), np.flatnonzero(cells.batch != batch)
        for method, embedding in (
            (BY_BATCH, shared),
            ("PCA 50, joint", joint),
            ("PCA 50, L2, centred by batch", unit(centred)),
        ):
            said = knn_predict(embedding[known], cells.labels[known], embedding[asked])
            rows.append({"from": batch, "method": method, "accuracy": accuracy(cells.labels[asked], said)})
    return pd.DataFrame(rows)


def named(bundle: Path, cells: CellSet, truth: dict[str, str], *, coarse: bool) -> dict[str, Any]:
    """How right the head is on a study that it has not seen; types that it has no name for should be unknown."""
    adata = as_anndata(cells)
    cp.tl.annotate(adata, bundle)
    fine, group = adata.obs["cellplm_label"].astype(str), adata.obs["cellplm_label_coarse"].astype(str)
    right = pd.Series(cells.labels, index=adata.obs_names).map(truth)
    row: dict[str, Any] = {"set": cells.name, "cells": len(right)}
    levels = {"coarse": (group, right if coarse else right.map({t: c for t, (_, c) in TERMS.items()}))}
    if not coarse:
        levels["fine"] = fine, right
    guess = adata.obs["cellplm_label_best_guess"].astype(str)
    for level, (said, of) in levels.items():
        is_named = said != "unknown"
        row[f"{level}: unknown"] = 1 - is_named.mean()
        row[f"{level}: right of all"] = (said == of).mean()
        row[f"{level}: wrong of the named"] = (said != of)[is_named].mean() if is_named.any() else 0.0
    if not coarse:
        row["fine: best guess right"] = (guess == right).mean()
    return row


def upper_case(cells: CellSet) -> CellSet:
    """Mouse genes under the names of the human ones: a mistake that the head should not cover up."""
    genes = cells.genes.str.upper()
    once = ~genes.duplicated()
    return replace(cells, counts=cells.counts[:, once], genes=genes[once], ensembl_id=None)


def judge_names(bundle: Path, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Studies whose types the head has names for, and cells that it should not name."""
    rows = [named(bundle, read_set(folder, name), truth, coarse=False) for name, truth in JUDGED.items()]
    rows += [
        named(bundle, read_set(folder, name), truth, coarse=True) for name, truth in JUDGED_COARSE.items()
    ]
    foreign = [read_set(folder, name) for name in UNLIKE]
    foreign.append(upper_case(read_set(folder, "mouse_pancreas_endocrinogenesis")))
    foreign.append(upper_case(replace(read_set(folder, "mouse_heart_1k_v2_10x"), ensembl_id=None)))
    unknown = []
    for cells in foreign:
        adata = as_anndata(cells)
        try:
            cp.tl.annotate(adata, bundle)
        except cp.genes.GeneMatchError as error:
            log.info("%s: %s", cells.name, error)
            continue
        shares = {
            level: (adata.obs[f"cellplm_label{level}"] == "unknown").mean() for level in ("", "_coarse")
        }
        unknown.append(
            {
                "set": cells.name,
                "cells": adata.n_obs,
                "fine: unknown": shares[""],
                "coarse: unknown": shares["_coarse"],
            }
        )
    return pd.DataFrame(rows), pd.DataFrame(unknown)


def table(results: pd.DataFrame, column: str, methods: Iterable[str]) -> str:
    """Markdown: a row per set, a column per method, mean ± standard deviation over the seeds; the best in bold."""
    methods = list(methods)
    lines = ["| cells | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for name, of_set in results.groupby("set", sort=False):
        values = [of_set.loc[of_set["method"] == method, column] for method in methods]
        best = max(v.mean() for v in values if len(v))
        shown = [f"{v.mean():.3f} ± {v.std(ddof=0):.3f}" if len(v) else "" for v in values]
        shown = [f"**{s}**" if len(v) and v.mean() == best else s for s, v in zip(shown, values, strict=True)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plain(frame: pd.DataFrame) -> str:
    """Markdown of a frame, shares with three digits."""
    columns = list(frame.columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in frame.itertuples(index=False):
        shown = ["" if x != x else f"{x:.3f}" if isinstance(x, float) else str(x) for x in row]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def sources(folder: Path) -> str:
    """Markdown: what was trained on, where it is from, its licence, and of what kind its labels are."""
    lines = []
    for cells in read_corpus(folder):
        kind = (
            "none"
            if cells.labels is None
            else "not used"
            if cells.name not in TRAINING_SETS
            else "authors' clusters"
        )
        kind = "sorted, or lines" if cells.name in TRUSTED else kind
        about = cells.provenance
        lines.append(
            f"| {cells.name} | {len(cells.cells):,} | {kind} | {about['repo']} | {about['licence']} |"
        )
    profiles = read_profiles(folder)
    about = next(iter(profiles.values()))[0].provenance
    n = sum(len(cells.cells) for cells, _ in profiles.values())
    kind = "authors' clusters, averaged"
    what = f"average profiles of {len(profiles)} tissue matrices | {n} profiles"
    lines.append(f"| {what} | {kind} | {about['repo']} | {about['licence']} |")
    return "\n".join(lines)


def arguments(description: str | None) -> argparse.Namespace:
    """Of a script that judges; what it finds is logged."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seeds", type=Path, nargs="*", default=[], help="bundles of other seeds")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    return parser.parse_args()


def of_starter(model: PretrainedModel, sets: Iterable[CellSet]) -> pd.DataFrame:
    """Scores of the starter's embedding alone, as :func:`judge` has them."""
    rows = []
    for cells in sets:
        assert cells.labels is not None
        latent = model.get_latent_representation(as_anndata(cells))
        for seed in SEEDS:
            score = scored(latent, cells.labels, seed, clusters=True)
            rows.append({"set": cells.name, "method": STARTER, "seed": seed, **score})
    return pd.DataFrame(rows)


def judge_all(
    model: PretrainedModel, sets: Sequence[CellSet], hard: Sequence[CellSet], seeds: Sequence[Path]
) -> dict[str, pd.DataFrame]:
    """Whole sets; few cells, few genes and shallow cells of the ``hard`` ones; and bundles of other training seeds."""
    knn = judge(model, sets, clusters=True)
    few = [replace(c, name=f"{c.name}, {FEW_CELLS} cells") for c in hard]
    others = [panel(c, FEW_GENES, seed=0) for c in hard]
    others += [thinned(c, depth, seed=1) for c in hard for depth in SHALLOW]
    parts = [judge(model, few, clusters=False, resample=FEW_CELLS), judge(model, others, clusters=False)]
    runs = []
    for number, found in enumerate((knn, *(of_starter(model.from_pretrained(f), sets) for f in seeds))):
        mean = found[found["method"] == STARTER].groupby("set", sort=False)[["knn", "ari"]].mean()
        runs.append(mean.add_prefix(f"training seed {number}: "))
    return {"knn": knn, "hard": pd.concat(parts), "runs": pd.concat(runs, axis=1).reset_index()}


def main() -> None:
    """Judge, and write the card into the bundle."""
    args = arguments(__doc__)
    sets = read_judged(args.data)
    by_name = {cells.name: cells for cells in sets}
    blood, pancreas = by_name["pbmc3k_seurat"], by_name["pancreas_5tech_panc8small"]
    model = CellPLM.from_pretrained(args.bundle)
    parts = judge_all(model, sets, (blood, pancreas), args.seeds)
    parts["transfer"] = (
        transfer(model, pancreas).groupby("method", sort=False)["accuracy"].agg(["mean", "min"]).reset_index()
    )
    parts["names"], parts["unknown"] = judge_names(args.bundle, args.data)
    for name, frame in parts.items():
        log.info("%s\n%s", name, frame.round(4).to_csv(index=False))
    card = CARD.read_text(encoding="utf-8").format(
        n_genes=f"{len(model.genes):,}",
        million=sum(p.numel() for p in model.module.parameters()) / 1e6,
        knn=table(parts["knn"], "knn", METHODS),
        ari=table(parts["knn"], "ari", [*METHODS, BY_BATCH]),
        hard=table(parts["hard"], "knn", METHODS),
        transfer=plain(parts["transfer"]),
        runs=plain(parts["runs"]),
        names=plain(parts["names"]),
        unknown=plain(parts["unknown"]),
        sources=sources(args.data),
        renamed=int((model.genes["previous_symbols"] != "").sum()),
        n_terms=len(TERMS),
    )
    (args.bundle / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
