"""Does pretraining help? The ablation, masked prediction and stability of the starter weights, on real cells.

    python benchmarks/pretraining_ablation.py FOLDER [--part ablation masked stability] [--weights cellplm-starter ...]

FOLDER holds AnnData files of raw counts with labels in ``obs``; their names and columns are options. Markdown tables on
stdout, progress on stderr. Where the data have several batches, each is held out in turn, else random cells are.

The ablation fine-tunes the same network from pretrained and from random weights, the same learning rates to choose
from, see ``cellprior.evaluate.pretraining_ablation``: some 15 fits for each split. They take minutes of one core for
cellplm-starter. For scbert-starter they take hours: it keeps 50 unexpressed genes of each cell in place of all
(``n_zero_genes``), leaves out the arms that train a part of the network, and is best given few training cells
(``--cells 400 --test-size 0.6``).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch are read

import anndata as ad
import numpy as np
import pandas as pd
import torch

from cellprior.evaluate._ablation import pretraining_ablation
from cellprior.evaluate._arms import ARMS, CONTROL, GENES, RANDOM_FEATURES
from cellprior.evaluate._masked import masked_prediction
from cellprior.evaluate._stability import stability
from cellprior.model import model_class
from cellprior.model._base import PretrainedModel
from cellprior.model.learning._masked import MODEL

PARTS = ("ablation", "masked", "stability")
WEIGHTS = ("cellplm-starter", "scbert-starter")
FEW_ZEROS = {"n_zero_genes": 50}
EMBED: dict[str, dict[str, Any]] = {"cellplm-starter": {}, "scbert-starter": FEW_ZEROS}
ABLATION: dict[str, dict[str, Any]] = {
    "cellplm-starter": {"max_epochs": 25, "patience": 6, "batch_size": 128},
    "scbert-starter": {  # random weights are slow to start: many small steps, and no early stopping
        "max_epochs": 20,
        "patience": 20,
        "batch_size": 4,
        "lrs": (1e-3, 3e-3, 1e-2),
        "arms": [arm for arm in ARMS if not arm.endswith(("+ head", "+ last", "+ last only"))],
        **FEW_ZEROS,
    },
}


def attach(weights: str, file: Path, n_cells: int, args: argparse.Namespace) -> PretrainedModel:
    """The model with a random part of the cells."""
    adata = ad.read_h5ad(file)
    rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:n_cells])
    adata = adata[rows].copy()
    cls = model_class(weights)
    batch_key = args.batch_key if adata.obs[args.batch_key].nunique() > 1 else None
    cls.setup_anndata(adata, labels_key=args.labels_key, batch_key=batch_key)
    return cls.from_pretrained(weights, adata, device="cpu")


def with_interval(value: float, low: float, high: float, sign: str = "") -> str:
    return "" if np.isnan(value) else f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def print_markdown(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def ablation(name: str, model: PretrainedModel, weights: str, args: argparse.Namespace) -> pd.DataFrame:
    held_out = model.registry["setup_args"]["batch_key"] is not None
    seeds = args.fits_per_batch if held_out else args.seeds
    table = pretraining_ablation(
        model, seeds=seeds, test_size=args.test_size, embed_options=EMBED[weights], **ABLATION[weights]
    )
    rows = []
    for arm, of_arm in table[table["metric"] == "macro_f1"].groupby("arm", sort=False):
        first = of_arm.iloc[0]
        by_versus = of_arm.set_index("versus")

        def difference(*others: str) -> str:
            found = [versus for versus in others if versus in by_versus.index]  # noqa: B023  called here
            if not found:
                return ""
            of = by_versus.loc[found[0]]  # noqa: B023
            return with_interval(of["difference"], of["difference_low"], of["difference_high"], sign="+")

        accuracy = table[(table["metric"] == "accuracy") & (table["arm"] == arm)]["value"].iloc[0]
        rows.append(
            [
                str(arm),
                with_interval(first["value"], first["low"], first["high"]),
                f"{accuracy:.3f}",
                difference(CONTROL, RANDOM_FEATURES),
                difference(GENES),
                f"{first['train_accuracy']:.2f}",
                "" if np.isnan(first["lr"]) else f"{first['lr']:g}",
                "" if np.isnan(first["epochs"]) else f"{first['epochs']:.0f}",
                first["note"],
            ]
        )
    n_splits = f"{seeds} fits of each" if held_out else f"{seeds} splits"
    title = f"{weights}, {name}: {model.adata.n_obs} cells, {table['split'].iloc[0]}, {n_splits}; macro-F1"
    columns = ["arm", "macro-F1", "accuracy", "gain over random weights", "gain over genes"]
    print_markdown(title, [*columns, "training accuracy", "lr", "epochs", "note"], rows)
    return table


def masked(name: str, model: PretrainedModel, weights: str, args: argparse.Namespace) -> pd.DataFrame:
    table = masked_prediction(model, seeds=args.seeds, max_cells=args.masked_cells)
    by = ["mask_share", "metric"]
    columns = [f"{metric}, {share:.0%} hidden" for (share, metric), _ in table.groupby(by, sort=False)]
    rows = []
    for method in table["method"].unique():
        cells = []
        for _, of_measure in table.groupby(by, sort=False):
            of_method = of_measure[of_measure["method"] == method]
            found = of_method.iloc[0] if len(of_method) else None
            cells.append("" if found is None else with_interval(found["value"], found["low"], found["high"]))
        rows.append([str(method), *cells])
    gains = []
    for _, of_measure in table[table["method"] == MODEL].groupby(by, sort=False):
        found = of_measure.iloc[0]
        of = with_interval(found["difference"], found["difference_low"], found["difference_high"], sign="+")
        gains.append(f"{of} to {found['versus']}")
    rows.append(["model minus the best other", *gains])
    print_markdown(f"{weights}, {name}: hidden genes, {args.seeds} splits", ["predictor", *columns], rows)
    return table


def moved(name: str, model: PretrainedModel, weights: str, args: argparse.Namespace) -> pd.DataFrame:
    table = stability(model, seeds=args.seeds, embed_options=EMBED[weights])
    metrics = table["metric"].unique()
    methods = table["method"].unique()
    rows = []
    for what, of_kind in table.groupby("perturbation", sort=False):
        by_row = of_kind.set_index(["metric", "method"])[["value", "low", "high"]]
        keys = [(metric, method) for metric in metrics for method in methods]
        rows.append(
            [str(what), *(with_interval(*by_row.loc[key]) if key in by_row.index else "" for key in keys)]
        )
    columns = [f"{metric}, {method}" for metric in metrics for method in methods]
    n_cells = table["n_cells"].iloc[0]
    print_markdown(f"{weights}, {name}: {n_cells} cells, {args.seeds} draws", ["change", *columns], rows)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the data are")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--data", nargs="+", default=["pbmc_facs_zheng2017", "pancreas_5tech_panc8small"])
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--seeds", type=int, default=3, help="splits, where there are no batches")
    parser.add_argument("--fits-per-batch", type=int, default=1)
    parser.add_argument("--cells", type=int, default=1000, help="at most, drawn at random")
    parser.add_argument(
        "--test-size", type=float, default=0.2, help="share of the cells, where there are no batches"
    )
    parser.add_argument("--masked-cells", type=int, default=100, help="test cells of a split, at most")
    parser.add_argument("--out", type=Path, help="folder for the whole tables as CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    for part in args.part:
        for weights in args.weights:
            for name in args.data:
                model = attach(weights, args.folder / f"{name}.h5ad", args.cells, args)
                table = {"ablation": ablation, "masked": masked, "stability": moved}[part](
                    name, model, weights, args
                )
                model.release()
                if args.out is not None:
                    args.out.mkdir(parents=True, exist_ok=True)
                    table.to_csv(args.out / f"{part}_{weights}_{name}.csv", index=False)


if __name__ == "__main__":
    main()
