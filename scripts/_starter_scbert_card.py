"""How the ScBERT starter is judged, and the card that tells it. Every number on the card is computed here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _starter_card import (
    DEPTH,
    PCA_ALL,
    PCA_VOCABULARY,
    RANDOM,
    SEEDS,
    STARTER,
    coverage_rows,
    pca,
    results_table,
    scores,
    sources_rows,
    verdict,
)
from _starter_data import DEPTH_CONFOUNDED, UNSEEN_BLOOD, UNSEEN_TISSUE, CellSet, to_vocabulary

from cellprior.model.scbert._floors import BinFloors
from cellprior.model.scbert._inputs import counts_to_bins, sample_mask
from cellprior.model.scbert._loss import masked_floors, masked_losses
from cellprior.model.scbert._module import ScBERTModule

MASK_RATE = 0.15
RANDOM_ZERO_GENES = 300  # of the approximation that the random weights are judged with, to save time
PREDICTORS = {
    "starter": "starter",
    "uniform": "uniform",
    "all_genes": "all genes",
    "per_gene": "per gene",
    "per_cell": "per cell",
    "rate_and_depth": "gene rate x depth",
}
EXPRESSED = "starter, expressed"
METHODS = (STARTER, EXPRESSED, PCA_ALL, PCA_VOCABULARY, RANDOM, DEPTH)
CARD = Path(__file__).with_suffix(".md")


def evaluate_masked(
    module: ScBERTModule,
    vocabulary: pd.DataFrame,
    names: pd.DataFrame,
    sets: list[CellSet],
    held_out: dict[str, np.ndarray],
) -> pd.DataFrame:
    """Prediction of hidden genes in held-out cells: 15 % of the expressed genes, all of them truly hidden.

    The floors are fitted to the other cells of the same set. Of a set that was not trained on, a fifth is held out.

    Returns
    -------
    One row per set and predictor: `loss` (cross-entropy in nats) and `accuracy`.
    """
    rows = []
    for cells in sets:
        moved, measured = to_vocabulary(cells, vocabulary, names)
        test = held_out.get(cells.name)
        if test is None:
            test = np.random.default_rng(0).random(len(cells.cells)) < 0.2
        floors = BinFloors.fit(minibatches(moved, ~test), torch.from_numpy(measured)[None], module.n_bins)
        rng = np.random.default_rng(0)
        found, n_selected = [], []
        for batch in minibatches(moved, test, size=16):
            counts = batch["X"]
            tokens = counts_to_bins(counts)
            mask = sample_mask(tokens.numpy(), rng, rate=MASK_RATE, replace=1.0)
            selected = torch.from_numpy(mask.selected)
            with torch.no_grad():
                losses = masked_losses(module, tokens, selected, selected)
            losses |= masked_floors(floors.predict(counts, tokens, selected), tokens[selected])
            found.append({name: float(value) for name, value in losses.items()})
            n_selected.append(int(selected.sum()))
        mean = dict(zip(found[0], np.average(pd.DataFrame(found), axis=0, weights=n_selected), strict=True))
        for predictor in PREDICTORS:
            suffix = "" if predictor == "starter" else f"_floor_{predictor}"
            score = {"loss": mean[f"masked{suffix}"], "accuracy": mean[f"masked_accuracy{suffix}"]}
            rows.append({"set": cells.name, "method": predictor, **score})
    return pd.DataFrame(rows)


def minibatches(cells: CellSet, which: np.ndarray, size: int = 256) -> Iterator[dict[str, torch.Tensor]]:
    """Counts of some cells of a set."""
    rows = np.flatnonzero(which)
    for start in range(0, len(rows), size):
        yield {"X": torch.from_numpy(cells.counts[rows[start : start + size]].toarray())}


def evaluate(
    module: ScBERTModule,
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
    torch.manual_seed(0)
    untrained = ScBERTModule(len(vocabulary), **network).eval()
    rows = []
    for cells in sets:
        if cells.labels is None:
            continue
        moved, measured = to_vocabulary(cells, vocabulary, names)
        known = {"genes": int(measured.sum()), "counts_share": float(moved.counts.sum() / cells.counts.sum())}
        test = held_out.get(cells.name)
        mean, expressed = embed(module, moved)
        embeddings = {
            STARTER: mean,
            EXPRESSED: expressed,
            PCA_ALL: pca(cells, seed=0),
            PCA_VOCABULARY: pca(moved, seed=0),
            RANDOM: embed_roughly(untrained, moved),
            DEPTH: np.log1p(np.asarray(cells.counts.sum(axis=1))),
        }
        for seed in SEEDS:
            rows += [row | known for row in scores(cells, embeddings, test, seed)]
    return pd.DataFrame(rows)


@torch.no_grad()
def embed(module: ScBERTModule, cells: CellSet) -> tuple[np.ndarray, np.ndarray]:
    """Means over all genes and over the expressed ones, of all cells of a set."""
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for batch in minibatches(cells, np.ones(len(cells.cells), bool), size=16):
        tokens = counts_to_bins(batch["X"])
        hidden = module.encode(tokens)[:, :-1]
        for pooled, weight in zip(found, (torch.ones(tokens.shape), (tokens > 0).float()), strict=True):
            share = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
            pooled.append(torch.bmm(share[:, None], hidden).squeeze(1))
    return torch.cat(found[0]).numpy(), torch.cat(found[1]).numpy()


@torch.no_grad()
def embed_roughly(module: ScBERTModule, cells: CellSet) -> np.ndarray:
    """Means over all genes of all cells of a set, from a part of the unexpressed ones."""
    everything = minibatches(cells, np.ones(len(cells.cells), bool))
    pooled = [module.pool(counts_to_bins(b["X"]), n_zero_genes=RANDOM_ZERO_GENES) for b in everything]
    return torch.cat(pooled).numpy()


def masked_table(masked: pd.DataFrame, column: str) -> str:
    """Markdown: a row per set, a column per predictor, the best in bold."""
    lines = ["| cells | " + " | ".join(PREDICTORS.values()) + " |", "|---|" + "---|" * len(PREDICTORS)]
    for name, of_set in masked.groupby("set", sort=False):
        values = of_set.set_index("method")[column].reindex(list(PREDICTORS))
        best = values.max() if column == "accuracy" else values.min()
        shown = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def masked_verdict(masked: pd.DataFrame, name: str) -> str:
    """One sentence: where the starter stands against the best floor."""
    values = masked[masked["set"] == name].set_index("method")
    floors = values.drop(index="starter")
    best = {"loss": floors["loss"].idxmin(), "accuracy": floors["accuracy"].idxmax()}
    parts = [
        f"{column} {values.loc['starter', column]:.3f} against {floors.loc[of, column]:.3f} ({PREDICTORS[of]})"
        for column, of in best.items()
    ]
    return f"- {name}: " + "; ".join(parts) + "."


def render_card(
    recipe: dict,
    module: ScBERTModule,
    vocabulary: pd.DataFrame,
    cells: list[CellSet],
    held_out: dict[str, np.ndarray],
    unseen: list[CellSet],
    masked: pd.DataFrame,
    results: pd.DataFrame,
) -> str:
    """The card, in Markdown."""
    return CARD.read_text(encoding="utf-8").format(
        million=sum(p.numel() for p in module.parameters()) / 1e6,
        sources=sources_rows(cells, held_out),
        coverage=coverage_rows([*cells, *unseen], results),
        masked_loss=masked_table(masked, "loss"),
        masked_accuracy=masked_table(masked, "accuracy"),
        masked_verdicts="\n".join(masked_verdict(masked, name) for name in masked["set"].unique()),
        knn=results_table(results, "knn", METHODS),
        ari=results_table(results, "ari", METHODS),
        verdicts="\n".join(verdict(results, name) for name in results["set"].unique()),
        confounded=DEPTH_CONFOUNDED,
        unseen_blood=UNSEEN_BLOOD,
        unseen_tissue=UNSEEN_TISSUE,
        n_sets=len(cells),
        mask_share=MASK_RATE,
        random_zero_genes=RANDOM_ZERO_GENES,
        **recipe,
    )
