"""How the starter weights are judged, and the card that tells it. Every number on the card is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from _starter_data import DEPTH_CONFOUNDED, TRAINING_SETS, UNSEEN_BLOOD, UNSEEN_TISSUE, CellSet
from _starter_fit import as_anndata

from cellprior.evaluate import accuracy, clustering, knn_predict
from cellprior.evaluate._twin import random_twin
from cellprior.model import PretrainedModel

SEEDS = (0, 1, 2)
N_COMPONENTS = 50
STARTER = "starter"
PCA_ALL = "PCA, all genes"
PCA_VOCABULARY = "PCA, vocabulary"
RANDOM = "random weights"
DEPTH = "depth alone"
CARD = Path(__file__).with_suffix(".md")
METHODS = (STARTER, PCA_ALL, PCA_VOCABULARY, RANDOM, DEPTH)


def judge(
    cls: type[PretrainedModel],
    weights: Path | str,
    sets: list[CellSet],
    held_out: dict[str, np.ndarray],
    *,
    variants: Mapping[str, Mapping[str, Any]] = {STARTER: {}},
    of_random: Mapping[str, Any] = {},
) -> pd.DataFrame:
    """Score every method on every labelled set.

    Parameters
    ----------
    cls, weights
        Model class and the bundle of the starter.
    sets, held_out
        Cells, and of sets that were trained on, which were not.
    variants, of_random
        Options of `get_latent_representation`: of the starter by the name of the method, and of random weights.

    Returns
    -------
    One row per set, method and seed: `knn` (accuracy), `ari`, and how much of the set the vocabulary covers.
    """
    rows = []
    for cells in sets:
        if cells.labels is None:
            continue
        adata = as_anndata(cells)
        model = cls.from_pretrained(weights, adata)
        match = model.gene_match
        known = {"genes": int((match.index >= 0).sum()), "counts_share": match.counts_share}
        fixed = {name: model.get_latent_representation(**options) for name, options in variants.items()}
        fixed[DEPTH] = np.log1p(np.asarray(cells.counts.sum(axis=1)))
        for seed in SEEDS:
            twin = random_twin(model, adata, seed=seed)
            embeddings = {
                **fixed,
                PCA_ALL: pca(adata, seed),
                PCA_VOCABULARY: pca(adata[:, match.index >= 0], seed),
                RANDOM: twin.get_latent_representation(**of_random),
            }
            twin.release()
            for method, embedding in embeddings.items():
                scores = scored(embedding, cells.labels, held_out.get(cells.name), seed)
                rows.append({"set": cells.name, "method": method, "seed": seed, **scores, **known})
        model.release()
    return pd.DataFrame(rows)


def pca(adata: ad.AnnData, seed: int) -> np.ndarray:
    """Scanpy's usual way: counts to 10,000 per cell, log1p, 50 components; centred, not scaled."""
    adata = ad.AnnData(adata.X.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return sc.pp.pca(adata, n_comps=N_COMPONENTS, random_state=seed, copy=True).obsm["X_pca"]


def scored(
    embedding: np.ndarray, labels: np.ndarray, held_out: np.ndarray | None, seed: int
) -> dict[str, float]:
    """Accuracy of the vote of 15 neighbours, and agreement of Leiden clusters at resolution 1 with the labels.

    Held-out cells are named by a random 80 % of the others, and clustered by themselves; without any, every cell is
    named in a five-fold cross-validation, and all are clustered. `seed` draws the 80 % or the folds.
    """
    rng = np.random.default_rng(seed)
    if held_out is None:
        fold = rng.permutation(len(labels)) % 5
        splits = [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(5)]
    else:
        train = rng.permutation(np.flatnonzero(~held_out))
        splits = [(train[: round(0.8 * len(train))], np.flatnonzero(held_out))]
    rows = np.concatenate([test for _, test in splits])
    said = np.concatenate([knn_predict(embedding[a], labels[a], embedding[b]) for a, b in splits])
    clusters = clustering(embedding[rows], labels[rows], resolutions=(1.0,), seed=seed)
    return {"knn": accuracy(labels[rows], said), "ari": float(clusters["ari"].iloc[0])}


def results_table(results: pd.DataFrame, column: str, methods: Sequence[str] = METHODS) -> str:
    """Markdown: a row per set, a column per method, mean ± standard deviation over the seeds."""
    lines = ["| cells | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for name, of_set in results.groupby("set", sort=False):
        values = [of_set.loc[of_set["method"] == method, column] for method in methods]
        best = max(v.mean() for v in values)
        shown = [f"{v.mean():.3f} ± {v.std(ddof=0):.3f}" for v in values]
        shown = [f"**{s}**" if v.mean() == best else s for s, v in zip(shown, values, strict=True)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def verdict(results: pd.DataFrame, name: str) -> str:
    """One sentence: where the starter stands against the better of the two PCAs."""
    mean = results[results["set"] == name].groupby("method")["knn"].mean()
    better = max(PCA_ALL, PCA_VOCABULARY, key=lambda method: mean[method])
    gap = mean[STARTER] - mean[better]
    where = "level with" if abs(gap) < 0.005 else "above" if gap > 0 else "below"
    by = "" if where == "level with" else f"by {abs(gap):.3f} "
    untrained = (
        f" An untrained network does better ({mean[RANDOM]:.3f})." if mean[RANDOM] > mean[STARTER] else ""
    )
    return f"- {name}: {mean[STARTER]:.3f}, {by}{where} the better PCA ({better}, {mean[better]:.3f}).{untrained}"


def sources_rows(cells: list[CellSet], held_out: dict[str, np.ndarray]) -> str:
    """Markdown: of each set the cells trained on, where it is from, and its licence."""
    return "\n".join(
        f"| {c.name} | {(~held_out[c.name]).sum()} of {len(c.cells)} "
        f"| {c.provenance['repo']} | {c.provenance['licence']} |"
        for c in cells
    )


def coverage_rows(sets: list[CellSet], results: pd.DataFrame) -> str:
    """Markdown: of each set that was judged, the genes and the share of counts that the vocabulary knows."""
    coverage = results.drop_duplicates("set").set_index("set")
    lines = []
    for c in sets:
        if c.name in coverage.index:
            genes, share = coverage.loc[c.name, ["genes", "counts_share"]]
            lines.append(f"| {c.name} | {genes} of {c.counts.shape[1]} | {share:.2f} |")
    return "\n".join(lines)


def render_card(
    recipe: dict,
    model: PretrainedModel,
    cells: list[CellSet],
    held_out: dict[str, np.ndarray],
    unseen: list[CellSet],
    results: pd.DataFrame,
    extra: pd.DataFrame,
) -> str:
    """The card, in Markdown."""
    size, vocabulary = sum(p.numel() for p in model.module.parameters()), model.genes
    names = results["set"].unique()
    verdicts = "\n".join(verdict(results, name) for name in names)
    renamed = int((vocabulary["previous_symbols"] != "").sum())
    return CARD.read_text(encoding="utf-8").format(
        n_genes=len(vocabulary),
        million=size / 1e6,
        sources=sources_rows(cells, held_out),
        coverage=coverage_rows([*cells, *unseen], results),
        knn=results_table(results, "knn"),
        ari=results_table(results, "ari"),
        extra_knn=results_table(extra, "knn"),
        extra_ari=results_table(extra, "ari"),
        extra_verdicts="\n".join(verdict(extra, name) for name in extra["set"].unique()),
        verdicts=verdicts,
        renamed=renamed,
        confounded=DEPTH_CONFOUNDED,
        equal_depth=next(name for name in names if name.startswith(f"{DEPTH_CONFOUNDED} at")),
        unseen_blood=UNSEEN_BLOOD,
        unseen_tissue=UNSEEN_TISSUE,
        n_sets=len(TRAINING_SETS),
        n_batches=model._network()["n_batches"],
        **{k: v for k, v in recipe.items() if k != "n_genes"},
    )
