"""How the ScBERT starter is judged, and the card that tells it. Every number on the card is computed here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from _starter_card import (
    METHODS,
    SEEDS,
    STARTER,
    coverage_rows,
    results_table,
    sources_rows,
    verdict,
)
from _starter_data import DEPTH_CONFOUNDED, UNSEEN_BLOOD, UNSEEN_TISSUE, CellSet, subset
from _starter_fit import as_anndata

from cellprior.evaluate import masked_prediction
from cellprior.model import ScBERT

MASK_SHARE = 0.15
RANDOM_ZERO_GENES = 300  # of the approximation that the random weights are judged with, to save time
EXPRESSED = "starter, expressed"
VARIANTS = {STARTER: {}, EXPRESSED: {"pooling": "expressed"}}
CARD = Path(__file__).with_suffix(".md")


def judge_masked(folder: Path, sets: list[CellSet], held_out: dict[str, np.ndarray]) -> pd.DataFrame:
    """Prediction of hidden genes in held-out cells, see :func:`cellprior.evaluate.masked_prediction`."""
    tables = []
    for cells in sets:
        part = subset(cells, held_out[cells.name]) if cells.name in held_out else cells
        model = ScBERT.from_pretrained(folder, as_anndata(part))
        table = masked_prediction(model, mask_shares=(MASK_SHARE,), seeds=len(SEEDS), progress=False)
        tables.append(table.assign(set=cells.name))
        model.release()
    return pd.concat(tables, ignore_index=True)


def masked_table(masked: pd.DataFrame, metric: str) -> str:
    """Markdown: a row per set, a column per predictor, the best in bold."""
    wide = masked[masked["metric"] == metric].pivot(index="set", columns="method", values="value")
    wide = wide.dropna(axis=1, how="all").loc[masked["set"].unique(), lambda t: sorted(t, key="model".__ne__)]
    lines = ["| cells | " + " | ".join(name.replace("_", " ") for name in wide) + " |"]
    lines.append("|---|" + "---|" * wide.shape[1])
    for name, values in wide.iterrows():
        best = values.max() if metric == "accuracy" else values.min()
        shown = ["-" if np.isnan(v) else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def masked_verdict(masked: pd.DataFrame, name: str) -> str:
    """One sentence: where the starter stands against the best of the others, with the interval of the difference."""
    rows = masked[(masked["set"] == name) & (masked["method"] == "model")]
    parts = [
        f"{row.metric.replace('_', ' ')} {row.value:.3f}, {row.difference:+.3f} [{row.difference_low:+.3f}, "
        f"{row.difference_high:+.3f}] against {row.versus.replace('_', ' ')}"
        for row in rows.itertuples()
    ]
    return f"- {name}: " + "; ".join(parts) + "."


def render_card(
    recipe: dict,
    model: ScBERT,
    cells: list[CellSet],
    held_out: dict[str, np.ndarray],
    unseen: list[CellSet],
    masked: pd.DataFrame,
    results: pd.DataFrame,
) -> str:
    """The card, in Markdown."""
    methods = (STARTER, EXPRESSED, *METHODS[1:])
    return CARD.read_text(encoding="utf-8").format(
        million=sum(p.numel() for p in model.module.parameters()) / 1e6,
        sources=sources_rows(cells, held_out),
        coverage=coverage_rows([*cells, *unseen], results),
        masked_loss=masked_table(masked, "cross_entropy"),
        masked_accuracy=masked_table(masked, "accuracy"),
        masked_verdicts="\n".join(masked_verdict(masked, name) for name in masked["set"].unique()),
        knn=results_table(results, "knn", methods),
        ari=results_table(results, "ari", methods),
        verdicts="\n".join(verdict(results, name) for name in results["set"].unique()),
        confounded=DEPTH_CONFOUNDED,
        unseen_blood=UNSEEN_BLOOD,
        unseen_tissue=UNSEEN_TISSUE,
        n_sets=len(cells),
        mask_share=MASK_SHARE,
        random_zero_genes=RANDOM_ZERO_GENES,
        **recipe,
    )
