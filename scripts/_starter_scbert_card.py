"""How `scbert-starter` is judged, and its card. Every number on the card is computed here, by `cellprior.evaluate`.

    python scripts/_starter_scbert_card.py --data <folder of .h5ad> --bundle <folder> [--seeds <folder> <folder>]

On the studies, with the measures and beside the baselines of `_starter_judge.py`, which judges `cellplm-starter`.
`--seeds` are bundles of the same recipe with other seeds: their scores stand beside those of the bundle.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd
from _starter_corpus import UNSEEN_STUDIES
from _starter_data import UNSEEN_BLOOD, UNSEEN_TISSUE, CellSet
from _starter_fit import as_anndata
from _starter_judge import (
    METHODS,
    PCA_L2,
    STARTER,
    arguments,
    judge_all,
    plain,
    read_judged,
    some_cells,
    sources,
    table,
)

from cellprior.evaluate import masked_prediction
from cellprior.model import ScBERT

BLOOD = ("pbmc3k_seurat", "pbmc_kang_ifnb_muscat", UNSEEN_BLOOD)
MASK_SHARE = 0.15
MASKED_CELLS = 40  # of a set, for which hidden genes are predicted
NEAR = 0.03
CARD = Path(__file__).with_suffix(".md")
log = logging.getLogger("judge")


def judge_masked(model: ScBERT, cells: CellSet) -> pd.DataFrame:
    """Prediction of hidden genes, see :func:`cellprior.evaluate.masked_prediction`."""
    found = ScBERT.from_pretrained(model.pretrained_["weights"], as_anndata(some_cells(cells, 200, seed=0)))
    rows = masked_prediction(
        found, mask_shares=(MASK_SHARE,), seeds=2, max_cells=MASKED_CELLS, progress=False
    )
    found.release()
    wide = rows.pivot(index="metric", columns="method", values="value")
    return wide.reset_index().assign(set=cells.name)


def milliseconds(model: ScBERT, cells: CellSet) -> tuple[float, float]:
    """CPU time of a cell on one core, reading and matching included, and its expressed genes (median)."""
    adata = as_anndata(cells)
    model.get_latent_representation(adata)
    start = time.process_time()
    model.get_latent_representation(adata)
    expressed = float(np.median(np.diff(cells.counts.indptr)))
    return 1e3 * (time.process_time() - start) / adata.n_obs, expressed


def verdicts(knn: pd.DataFrame) -> str:
    """Where the starter stands beside the better PCA on each set, in a line."""
    lines = []
    mean = knn.groupby(["set", "method"], sort=False)["knn"].mean().unstack()
    for name, row in mean.iterrows():
        of_pca = row.drop([STARTER, "random weights"])
        best = of_pca.idxmax()
        beside = f"{row[STARTER] - row[PCA_L2]:+.3f} to {PCA_L2}"
        if best != PCA_L2:
            beside += f", {row[STARTER] - of_pca[best]:+.3f} to {best}"
        lines.append(f"- {name}: {row[STARTER]:.3f}, {beside}.")
    of_blood = mean.loc[list(BLOOD)]
    difference = of_blood[STARTER] - of_blood[PCA_L2]
    level = "is level" if difference.min() >= -NEAR else "is not level"
    lines.append(
        f"- On blood, mean of {len(BLOOD)} sets: {of_blood[STARTER].mean():.3f} beside {of_blood[PCA_L2].mean():.3f} "
        f"of {PCA_L2}; the worst set is {difference.min():+.3f}, so that it {level} within {NEAR} on each."
    )
    return "\n".join(lines)


def main() -> None:
    """Judge, and write the card into the bundle."""
    args = arguments(__doc__)
    sets = read_judged(args.data)
    by_name = {cells.name: cells for cells in sets}
    blood, pancreas = by_name["pbmc3k_seurat"], by_name[UNSEEN_TISSUE]
    model = ScBERT.from_pretrained(args.bundle)
    parts = judge_all(model, sets, (blood, pancreas), args.seeds)
    masked = pd.concat([judge_masked(model, by_name[name]) for name in (*UNSEEN_STUDIES[:1], *BLOOD)])
    columns = ["set", "metric", "model", *sorted(set(masked) - {"set", "metric", "model"})]
    parts["masked"] = masked[columns]
    speed, expressed = milliseconds(model, blood)
    for name, frame in parts.items():
        log.info("%s\n%s", name, frame.round(4).to_csv(index=False))
    network = model._network()
    card = CARD.read_text(encoding="utf-8").format(
        n_genes=f"{len(model.genes):,}",
        million=sum(p.numel() for p in model.module.parameters()) / 1e6,
        knn=table(parts["knn"], "knn", METHODS),
        ari=table(parts["knn"], "ari", METHODS),
        hard=table(parts["hard"], "knn", METHODS),
        verdicts=verdicts(parts["knn"]),
        masked=plain(parts["masked"]),
        masked_share=MASK_SHARE,
        masked_cells=MASKED_CELLS,
        runs=plain(parts["runs"]),
        speed=f"{speed:.1f}",
        expressed=f"{expressed:,.0f}",
        sources=sources(args.data),
        renamed=int((model.genes["previous_symbols"] != "").sum()),
        **{name: network[name] for name in ("n_hidden", "n_heads", "head_dim", "n_bins")},
    )
    (args.bundle / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
