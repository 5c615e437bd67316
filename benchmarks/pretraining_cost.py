"""What a pass over a million cells costs: operations counted, a rate measured to check them, and an estimate for a GPU.

    python benchmarks/pretraining_cost.py [--cells 4] [--expressed 2000] [--collection cells.zarr]

For each model at the size that its authors released: the floating-point operations of the matrix products of a
training step (forward and backward, counted by PyTorch), the CPU time of that step on one thread, and the rate of the
two beside that of a large matrix product on the same machine. The last columns are an estimate and no measurement:
hours for 1, 10 and 50 million cells on a card with 989 TFLOP/s in bfloat16 (the data sheet of an H100 SXM, dense), of
which 40 % and 10 % are reached. Made-up cells, `--expressed` genes each. Markdown on stdout.

With `--collection`, cells per second that one process reads from an annbatch collection on this machine, into counts
over the vocabulary.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch are read

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cellprior as cp
from cellprior.model.data._collection import CollectionCells
from cellprior.model.data._datamodule import StreamedCells

N_GENES = {"CellPLM": 19_374, "ScBERT": 16_906, "Geneformer": 25_424, "ScGPT": 60_694}
PEAK, HIGH, LOW = 989e12, 0.4, 0.1  # FLOP/s of the card, and the shares of it that are assumed
MILLIONS = (1, 10, 50)


class Meter(pl.Callback):
    """Operations and CPU time of a training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counter = FlopCounterMode(display=False)
        self.start = time.process_time()

    def on_train_batch_start(self, *args: Any) -> None:
        self.counter.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.counter.__exit__(None, None, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds, self.operations = time.process_time() - self.start, self.counter.get_total_flops()


def made_up(n_cells: int, n_genes: int, n_expressed: int) -> ad.AnnData:
    """Cells with so many expressed genes, a few counts each."""
    rng = np.random.default_rng(0)
    columns = np.concatenate([rng.choice(n_genes, n_expressed, replace=False) for _ in range(n_cells)])
    counts = 1 + rng.poisson(1.0, len(columns))
    x = sp.csr_matrix(
        (counts.astype(np.float32), columns, np.arange(n_cells + 1) * n_expressed), (n_cells, n_genes)
    )
    return ad.AnnData(x, var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]))


def measured(name: str, n_cells: int, n_expressed: int) -> tuple[float, float, float]:
    """Millions of parameters; operations and CPU seconds of a cell in training."""
    adata = made_up(n_cells, N_GENES[name], n_expressed)
    cls = getattr(cp.model, name)
    cls.setup_anndata(adata)
    model, meter = cls(adata, size="released"), Meter()
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        warnings.simplefilter("ignore")
        model.train(
            max_epochs=1,
            train_size=1.0,
            batch_size=n_cells,
            accelerator="cpu",
            callbacks=[meter],
            enable_progress_bar=False,
        )
    size = sum(p.numel() for p in model.module.parameters()) / 1e6
    return size, meter.operations / n_cells, meter.seconds / n_cells


def rate_of_products() -> float:
    """FLOP/s of a large matrix product, one thread."""
    x = torch.randn(1024, 1024)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        x @ x
        seconds.append(time.process_time() - start)
    return 2 * 1024**3 / min(seconds)


def hours(operations: float, millions: int, share: float) -> str:
    found = operations * millions * 1e6 / (PEAK * share) / 3600
    return f"{found:.2g}" if found < 100 else f"{found:,.0f}"


def read_rate(path: Path) -> float:
    """Cells per second that one process reads, its own CPU time."""
    cells = CollectionCells(path)
    names = cells.var.index.astype(str)
    genes = pd.DataFrame({"ensembl_id": "", "symbol": names, "previous_symbols": ""})
    split = {"train_size": 1.0, "validation_size": 0.0, "shuffle_set_split": True, "batch_size": 256}
    start, n_cells = time.process_time(), 0
    for batch in StreamedCells(cells, genes, 0.25, **split).train_dataloader():
        n_cells += len(batch["X"])
    return n_cells / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=4, help="of the step that is measured")
    parser.add_argument("--expressed", type=int, default=2_000, help="genes of a cell")
    parser.add_argument("--collection", type=Path, help="an annbatch collection, to measure reading")
    parser.add_argument("--models", nargs="*", default=list(N_GENES), choices=N_GENES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = rate_of_products()
    print(f"Large matrix product: {rate / 1e9:.0f} GFLOP/s on one thread.\n")
    columns = [
        "model",
        "million parameters",
        "GFLOP per cell",
        "CPU s per cell",
        "share of the product's rate",
    ]
    columns += [f"H100 hours, {n} million cells" for n in MILLIONS]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in args.models:
        size, operations, seconds = measured(name, args.cells, args.expressed)
        cost = [f"{hours(operations, n, HIGH)} to {hours(operations, n, LOW)}" for n in MILLIONS]
        numbers = [
            f"{size:.1f}",
            f"{operations / 1e9:.2g}",
            f"{seconds:.2g}",
            f"{operations / seconds / rate:.0%}",
        ]
        print("| " + " | ".join([name, *numbers, *cost]) + " |", flush=True)
    if args.collection is not None:
        print(f"\nReading: {read_rate(args.collection):,.0f} cells per CPU second of one process.")


if __name__ == "__main__":
    main()
