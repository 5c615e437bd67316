"""How much slower embedding becomes where other programs run on the same cores.

    python benchmarks/contention.py FOLDER [--models ScBERT ...] [--rounds 3]

FOLDER holds pbmc3k_seurat.h5ad. Cells of it are embedded beside no, one and two processes that keep a core busy, in two
ways in turn: as this package does, several cells or chunks at a time with one core each; and with each product divided
between all cores, as PyTorch does by itself. Networks are of the released sizes with random weights, and the starters.
Printed are seconds a cell (the median of the rounds), and each as a multiple of the same way without neighbours. The
machine should be quiet otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

import cellprior as cp
from cellprior.model.engine import _cores

CELLS = {
    "CellPLM starter": 2048,
    "ScBERT starter": 512,
    "CellPLM": 1024,
    "ScBERT": 4,
    "Geneformer": 64,
    "ScGPT": 16,
}
NEIGHBOURS = (0, 1, 2)


def models(adata: ad.AnnData) -> Iterator[tuple[str, Any]]:
    """Each network with a name."""
    yield "CellPLM starter", lambda: cp.model.CellPLM.from_pretrained("cellplm-starter")
    yield "ScBERT starter", lambda: cp.model.ScBERT.from_pretrained("scbert-starter")
    for name in ("CellPLM", "ScBERT", "Geneformer", "ScGPT"):
        yield name, lambda name=name: _random(getattr(cp.model, name), adata)


def _random(cls: Any, adata: ad.AnnData) -> Any:
    torch.manual_seed(0)
    model = cls(genes=list(adata.var_names))
    model.is_trained_ = True
    model.module.eval()
    return model


def plain(function: Callable[[Any], Any], items: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """One item after the other; PyTorch divides each product between all cores."""
    return map(function, items)


def busy() -> None:
    """Keep a core busy."""
    while True:
        pass


@contextmanager
def neighbours(n: int) -> Iterator[None]:
    """Processes that keep a core busy each."""
    processes = [multiprocessing.get_context("spawn").Process(target=busy, daemon=True) for _ in range(n)]
    for process in processes:
        process.start()
    time.sleep(1.0 if n else 0.0)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def divided_products() -> Iterator[None]:
    """The plain way, wherever a network asks for cores."""
    ours = _cores.on_cores.__code__
    _cores.on_cores.__code__ = plain.__code__
    try:
        yield
    finally:
        _cores.on_cores.__code__ = ours


def seconds(model: Any, cells: ad.AnnData) -> float:
    """Wall time of an embedding."""
    start = time.perf_counter()
    model.get_latent_representation(cells)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="*", default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = ad.read_h5ad(args.folder / "pbmc3k_seurat.h5ad")
    rows = []
    for name, make in models(adata):
        if name not in args.models:
            continue
        model = make()
        cells = adata[: CELLS[name]].copy()
        model.get_latent_representation(cells[:16].copy())  # threads are there, and memory
        for n in NEIGHBOURS:
            taken: dict[str, list[float]] = {"cores": [], "products": []}
            with neighbours(n):
                for _ in range(args.rounds):
                    taken["cores"].append(seconds(model, cells))
                    with divided_products():
                        taken["products"].append(seconds(model, cells))
            for way, of in taken.items():
                rows.append(
                    {"model": name, "way": way, "neighbours": n, "s/cell": np.median(of) / cells.n_obs}
                )
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).pivot(index=["model", "way"], columns="neighbours", values="s/cell")
    for n in NEIGHBOURS[1:]:
        table[f"{n} / 0"] = table[n] / table[0]
    print(f"{torch.get_num_threads()} threads, {_cores.n_cores_used()} cores used")
    print(table.to_markdown(floatfmt=".3g"))


if __name__ == "__main__":
    main()
