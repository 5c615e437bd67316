"""How the starter weights are judged, and the card that tells it. Every number on the card is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _starter_data import DEPTH_CONFOUNDED, TRAINING_SETS, UNSEEN_BLOOD, UNSEEN_TISSUE, CellSet, to_vocabulary
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier

from cellprior.model.cellplm._module import CellPLMModule

SEEDS = (0, 1, 2)
N_NEIGHBORS = 15
N_COMPONENTS = 50
STARTER = "starter"
PCA_ALL = "PCA, all genes"
PCA_VOCABULARY = "PCA, vocabulary"
RANDOM = "random weights"
DEPTH = "depth alone"
CARD = Path(__file__).with_suffix(".md")
METHODS = (STARTER, PCA_ALL, PCA_VOCABULARY, RANDOM, DEPTH)


def evaluate(
    module: CellPLMModule,
    network: dict,
    vocabulary: pd.DataFrame,
    names: pd.DataFrame,
    sets: list[CellSet],
    held_out: dict[str, np.ndarray],
) -> pd.DataFrame:
    """Score every method on every labelled set.

    Returns
    -------
    One row per set, method and seed: `knn` (accuracy), `ari`, and how much of the set the vocabulary covers.
    """
    rows = []
    for cells in sets:
        if cells.labels is None:
            continue
        moved, measured = to_vocabulary(cells, vocabulary, names)
        known = {"genes": int(measured.sum()), "counts_share": float(moved.counts.sum() / cells.counts.sum())}
        test = held_out.get(cells.name)
        starter = embed(module, moved)
        for seed in SEEDS:
            embeddings = {
                STARTER: starter,
                PCA_ALL: pca(cells, seed),
                PCA_VOCABULARY: pca(moved, seed),
                RANDOM: embed(random_weights(len(vocabulary), network, seed), moved),
                DEPTH: np.log1p(np.asarray(cells.counts.sum(axis=1))),
            }
            rows += [row | known for row in scores(cells, embeddings, test, seed)]
    return pd.DataFrame(rows)


def scores(
    cells: CellSet, embeddings: dict[str, np.ndarray], test: np.ndarray | None, seed: int
) -> Iterator[dict[str, object]]:
    """A row per method: accuracy of neighbours and agreement of clusters, see the functions of these."""
    for method, embedding in embeddings.items():
        yield {
            "set": cells.name,
            "method": method,
            "seed": seed,
            "knn": knn_accuracy(embedding, cells.labels, test, seed),
            "ari": clustering_ari(embedding, cells.labels, test, seed),
        }


def random_weights(n_genes: int, network: dict, seed: int) -> CellPLMModule:
    """The same network as it is before any training."""
    torch.manual_seed(seed)
    return CellPLMModule(n_genes, **network).eval()


@torch.no_grad()
def embed(module: CellPLMModule, cells: CellSet) -> np.ndarray:
    """Latent means of all cells of a set, as one sentence."""
    return module.encode(torch.from_numpy(cells.counts.toarray())).numpy()


def pca(cells: CellSet, seed: int) -> np.ndarray:
    """Scanpy's usual way: counts to 10,000 per cell, log1p, 50 components; centred, not scaled."""
    counts = cells.counts.toarray().astype(np.float64)
    depth = np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    return PCA(N_COMPONENTS, random_state=seed).fit_transform(np.log1p(counts * (1e4 / depth)))


def knn_accuracy(embedding: np.ndarray, labels: np.ndarray, test: np.ndarray | None, seed: int) -> float:
    """Share of cells whose label is the most frequent one among their 15 nearest labelled cells.

    With `test` (held-out cells), those are looked up among a random 80 % of the other cells; without it, every cell is
    looked up in a five-fold cross-validation. `seed` draws the 80 % or the folds.
    """
    rng = np.random.default_rng(seed)
    if test is not None:
        train = np.flatnonzero(~test)
        train = rng.permutation(train)[: round(0.8 * len(train))]
        folds = [(train, np.flatnonzero(test))]
    else:
        fold = rng.permutation(len(labels)) % 5
        folds = [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(5)]
    right = [
        KNeighborsClassifier(N_NEIGHBORS).fit(embedding[a], labels[a]).predict(embedding[b]) == labels[b]
        for a, b in folds
    ]
    return float(np.concatenate(right).mean())


def clustering_ari(embedding: np.ndarray, labels: np.ndarray, test: np.ndarray | None, seed: int) -> float:
    """Adjusted Rand index of k-means with as many clusters as labels; all cells are clustered, `test` ones count."""
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(embedding)
    judged = slice(None) if test is None else test
    return float(adjusted_rand_score(labels[judged], clusters[judged]))


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
    network: dict,
    module: CellPLMModule,
    vocabulary: pd.DataFrame,
    cells: list[CellSet],
    held_out: dict[str, np.ndarray],
    unseen: list[CellSet],
    results: pd.DataFrame,
    extra: pd.DataFrame,
) -> str:
    """The card, in Markdown."""
    size = sum(p.numel() for p in module.parameters())
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
        n_batches=network["n_batches"],
        **{k: v for k, v in recipe.items() if k != "n_genes"},
    )
