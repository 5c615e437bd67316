"""Pretrain a model on a collection of cells that annbatch reads from disk, and write a bundle with a card.

    python scripts/pretrain.py --model cellplm --data collection.zarr --out folder --strategy ddp --devices 8

The same command again goes on after the last checkpoint. `--data` is what `annbatch.DatasetCollection` writes; the
page "Does pretraining help?" of the documentation says how to make one of CELLxGENE cells, and what it costs. Python
3.12 or newer, `pip install "cellprior[annbatch]"`.

In `--out`:

last.ckpt, plan.json
    All that is needed to go on, written after each section; and what was asked for, which must not change on the way.
training.csv
    A row for each section: losses of the training cells and of the held-out cells, each beside its floors, cells
    per second.
bundle
    What `from_pretrained` loads; its card has the losses beside their floors, hidden genes beside predictors that
    know no biology, and with `--evaluate`, how well labels are read off the embedding, beside PCA and random weights.

A pass over the cells is cut into sections (`--section`, cells). After each the held-out cells are looked at, and a
checkpoint is written. The order of the cells, what is drawn and dropout follow from `--seed`, the section and the
process: a run that was interrupted ends with the weights of one that was not, on the same machine and with as many
processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import scvi
import torch

import cellprior as cp
from cellprior.model.data._collection import CollectionCells
from cellprior.model.data._ranks import rank_and_count

MODELS = {"cellplm": "CellPLM", "scbert": "ScBERT", "geneformer": "Geneformer", "scgpt": "ScGPT"}
CHECKPOINT, PLAN, LOG = "last.ckpt", "plan.json", "training.csv"
FREE = {"out", "resume", "devices", "accelerator", "evaluate", "labels_key", "progress"}
log = logging.getLogger("pretrain")


class Sections(pl.Callback):
    """Reads section after section, logs each, and writes a checkpoint after it."""

    def __init__(self, cells: CollectionCells, folder: Path, seed: int) -> None:
        self.cells, self.folder, self.seed = cells, folder, seed
        self.rows: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """What was logged, for who goes on."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the log."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Another section, and draws that depend on its number and the process only."""
        self.cells.number = trainer.current_epoch
        seeds = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and save."""
        n_cells = trainer.num_training_batches * self.cells.batch_size * trainer.world_size
        seconds = time.perf_counter() - self.start
        losses = {name: float(value) for name, value in trainer.callback_metrics.items()}
        n_before = self.rows[-1]["cells"] if self.rows else 0
        row = {"section": trainer.current_epoch, "step": trainer.global_step, "cells": n_before + n_cells}
        self.rows.append(row | losses | {"cells_per_second": n_cells / seconds})
        trainer.save_checkpoint(self.folder / (CHECKPOINT + ".new"))  # of all processes together
        if trainer.is_global_zero:
            os.replace(self.folder / (CHECKPOINT + ".new"), self.folder / CHECKPOINT)
            pd.DataFrame(self.rows).to_csv(self.folder / LOG, index=False)
            log.info(
                "section %d: %s", trainer.current_epoch, ", ".join(f"{k} {v:.4g}" for k, v in losses.items())
            )


def build(args: argparse.Namespace, cells: CollectionCells) -> Any:
    """A model with random weights, whose vocabulary is that of the collection, or the file that is named."""
    cls = getattr(cp.model, MODELS[args.model])
    few = cells.held_out(50)
    few.X = few.X.astype(np.float32)
    cls.setup_anndata(few)
    if args.genes is None:
        columns = cells.var.rename(columns=str.lower)
        genes = pd.DataFrame(
            {"ensembl_id": "", "symbol": cells.var.index.astype(str), "previous_symbols": ""}
        )
        if cells.var.index.str.startswith("ENS").mean() > 0.5:
            symbol = next((columns[k] for k in ("feature_name", "gene_symbol", "symbol") if k in columns), "")
            genes = pd.DataFrame({"ensembl_id": cells.var.index, "symbol": symbol, "previous_symbols": ""})
    else:
        genes = pd.read_csv(args.genes, sep="\t", dtype=str, keep_default_na=False)
    return cls(few, genes=genes.reset_index(drop=True), **{"size": "released", **dict(args.network)})


def train(args: argparse.Namespace) -> tuple[Any, CollectionCells, Sections]:
    """Train, or go on, until all passes are over."""
    scvi.settings.seed = args.seed
    cells = CollectionCells(args.data, section=args.section, seed=args.seed)
    cells.set_split(validation_size=args.held_out, batch_size=args.batch_size)
    model = build(args, cells)
    sections = Sections(cells, args.out, args.seed)
    checkpoint = args.out / CHECKPOINT
    n_sections = args.passes * cells.sections.n_sections
    log.info("%s", describe(model, cells, n_sections))
    model.train(
        max_epochs=n_sections,
        accelerator=args.accelerator,
        devices=args.devices,
        train_size=1 - args.held_out,
        validation_size=args.held_out,
        batch_size=args.batch_size,
        objective=args.objective,
        plan_kwargs=dict(args.plan) or None,
        datamodule=cells,
        callbacks=[sections],
        ckpt_path=checkpoint if checkpoint.exists() else None,
        strategy=args.strategy,
        precision=args.precision,
        enable_progress_bar=args.progress,
        enable_model_summary=False,
    )
    return model, cells, sections


def describe(model: Any, cells: CollectionCells, n_sections: int) -> str:
    """What is trained on what, in a line."""
    million = sum(p.numel() for p in model.module.parameters()) / 1e6
    return (
        f"{type(model).__name__}, {million:.2f} million parameters, {len(model.genes):,} genes; {cells.n_train:,} "
        f"cells to train on, {cells.n_val:,} held out; {n_sections} sections"
    )


def judge(args: argparse.Namespace, bundle: Path, cells: CollectionCells) -> dict[str, pd.DataFrame]:
    """How good the bundle is on cells that it was not trained on, by the title of the table."""
    cls, found = getattr(cp.model, MODELS[args.model]), {}
    held_out = cells.held_out(2_000)
    cls.setup_anndata(held_out)
    model = cls.from_pretrained(bundle, held_out)
    if model.can("predict hidden genes"):
        table = cp.evaluate.masked_prediction(
            model, mask_shares=(0.15,), seeds=2, max_cells=200, progress=False
        )
        found["Hidden genes of held-out cells"] = table[
            ["metric", "better", "method", "value", "low", "high"]
        ]
    for path in args.evaluate:
        adata = ad.read_h5ad(path)
        scores = cp.evaluate.linear_probe(
            adata, str(bundle), labels_key=args.labels_key, seeds=3, progress=False
        )
        scores = scores[scores["metric"].isin(["accuracy", "macro_f1"])]
        table = (
            scores.groupby(["method", "reader", "metric"], sort=False)["value"].mean().unstack().reset_index()
        )
        table["method"] = table["method"].str.replace(str(bundle), args.out.name, regex=False)
        found[f"Labels of {path.stem}, which was not trained on"] = table
    return found


def card(
    args: argparse.Namespace, what: str, rows: Sequence[dict[str, Any]], tables: dict[str, pd.DataFrame]
) -> str:
    """The card of the bundle; each number on it is computed here."""
    last = {
        name: value for name, value in sorted(rows[-1].items()) if name.startswith(("train_", "validation_"))
    }
    losses = pd.DataFrame({"after the last section": last}).rename_axis("loss, or its floor").reset_index()
    seconds = np.median([row["cells_per_second"] for row in rows])
    parts = [
        f"# {args.out.name}\n\nPretrained by `scripts/pretrain.py` of cellprior {version('cellprior')}: {what}.",
        "## Losses\n\nA loss is worth something below its floors, which know nothing of the single cell.\n\n"
        + markdown(losses),
        *(f"## {title}\n\n{markdown(table)}" for title, table in tables.items()),
        f"## How\n\n{rows[-1]['cells']:,} cells were read, in {rows[-1]['step']:,} steps; {seconds:.0f} cells a second "
        f"(median of the sections). What was asked for:\n\n```json\n{json.dumps(asked(args), indent=1)}\n```",
        "## Licence\n\nSay here what the cells' terms allow.",
    ]
    return "\n\n".join(parts) + "\n"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [
        [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in table.itertuples(index=False)
    ]
    lines = [list(map(str, table.columns)), ["---"] * table.shape[1], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change while a training goes on."""
    kept = {name: value for name, value in sorted(vars(args).items()) if name not in FREE}
    kept |= {"network": dict(args.network), "plan": dict(args.plan)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def pair(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON or as it is."""
    name, is_pair, value = text.partition("=")
    if not is_pair:
        msg = f"{text!r}: name=value is needed, such as n_layers=6."
        raise argparse.ArgumentTypeError(msg)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="collection of annbatch, of raw counts")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and bundle")
    parser.add_argument(
        "--genes", type=Path, help="genes.tsv of a bundle as vocabulary; by default the collection's"
    )
    parser.add_argument(
        "--network",
        type=pair,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="others than the released size has",
    )
    parser.add_argument("--objective", help="one of the model's objectives; by default the first")
    parser.add_argument(
        "--plan", type=pair, nargs="*", default=[], metavar="NAME=VALUE", help="such as lr=1e-4"
    )
    parser.add_argument("--passes", type=int, default=1, help="over all training cells")
    parser.add_argument("--section", type=int, help="cells between two checkpoints; by default all")
    parser.add_argument("--batch-size", type=int, default=256, help="of each process")
    parser.add_argument(
        "--held-out", type=float, default=0.01, help="share of the cells, the first of the collection"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="auto", help="ddp for several processes")
    parser.add_argument("--devices", default="auto", help="how many processes")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed on a GPU")
    parser.add_argument(
        "--evaluate", type=Path, nargs="*", default=[], help="labelled .h5ad that were not trained on"
    )
    parser.add_argument("--labels-key", default="cell_type", help="of these")
    parser.add_argument("--progress", action="store_true", help="draw a bar")
    args = parser.parse_args(argv)
    args.devices = int(args.devices) if args.devices.isdigit() else args.devices
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train or go on, write the bundle, and judge it."""
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    plan = args.out / PLAN
    if (args.out / CHECKPOINT).exists() and (before := json.loads(plan.read_text())) != (
        now := as_json(args)
    ):
        changed = [f"{k}: {before.get(k)!r}, now {now.get(k)!r}" for k in now if now[k] != before.get(k)]
        log.error("%s was begun with other arguments (%s). Take another --out.", args.out, "; ".join(changed))
        return 2
    if not plan.exists():
        plan.write_text(json.dumps(as_json(args), indent=1) + "\n")
    model, cells, sections = train(args)
    if rank_and_count()[0]:
        return 0  # the first process does the rest
    bundle = args.out / "bundle"
    what = describe(model, cells, len(sections.rows))
    model.save_pretrained(bundle, card=card(args, what, sections.rows, {}), overwrite=True)
    tables = judge(args, bundle, cells)
    model.save_pretrained(bundle, card=card(args, what, sections.rows, tables), overwrite=True)
    log.info("%s", (bundle / "README.md").read_text())
    return 0


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as it is read back."""
    return json.loads(json.dumps(asked(args)))


if __name__ == "__main__":
    sys.exit(main())
