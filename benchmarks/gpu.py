"""What a GPU does with every model; see gpu.sh.

    python benchmarks/gpu.py --out gpu [--minutes 7.5] [--device cuda] [--small] [--models ScBERT ...]

Cells are made up, with 2,000 expressed genes each, and networks have the released sizes and random weights. For each
network are written: the largest difference to the CPU in 32 cells, as a share of the largest number; cells a second
and peak memory by precision and cells at a time; with the layers compiled; with each kernel for attention that there
is; seconds of an epoch of training; and what happens when the memory runs out. What has not begun when the minutes
are over is left out, and the last line says so. ``--small`` has small networks, to see whether the script is sound.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import cellprior as cp

N_GENES, N_EXPRESSED = 20_000, 2_000
NETWORKS: dict[str, dict[str, Any]] = {
    "CellPLM": {},
    "Geneformer": {},
    "ScGPT": {"expression": None, "mvc": None},
    "ScBERT": {},
    "Nicheformer": {},
    "UCE": {"n_layers": 4},
}
OPTIONS = {"ScGPT": {"max_genes": 1200}}
SMALL: dict[str, dict[str, Any]] = {
    "CellPLM": {"n_hidden": 32, "n_layers": 1, "n_latent": 8},
    "Geneformer": {"n_hidden": 16, "n_layers": 2, "n_heads": 2, "n_feedforward": 16, "n_positions": 64},
    "ScGPT": {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_ff": 16},
    "ScBERT": {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8},
    "Nicheformer": {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_feedforward": 16, "n_positions": 64},
    "UCE": {
        "n_hidden": 16,
        "n_layers": 1,
        "n_heads": 2,
        "n_feedforward": 16,
        "n_latent": 8,
        "sentence_length": 64,
    },
}
BATCH_SIZES = (64, 512, 4096)
PRECISIONS = {
    "float32": ("highest", "float32"),
    "TF32": ("high", "float32"),
    "bfloat16": ("highest", "bfloat16"),
}
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
FIRST = np.arange(32)  # cells that the CPU embeds too
TRAINED = 512  # cells
TOO_SLOW = 10.0  # seconds: larger batches are not tried


class Table:
    """Rows that are written as they are measured, until the time is over."""

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.end = folder / "gpu.md", time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.left_out = 0

    def measure(self, what: dict[str, Any], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add a row; what cannot be done is a row too."""
        if time.monotonic() > self.end:
            self.left_out += 1
            return {}
        try:
            found = function()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            found = {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}
        self.rows.append(what | found)
        print(self.rows[-1], flush=True)
        table = pd.DataFrame(self.rows).fillna("").to_markdown(index=False, floatfmt=".4g")
        self.path.write_text(f"{_device_name()}, PyTorch {torch.__version__}\n\n{table}\n{self._rest()}")
        return found

    def _rest(self) -> str:
        return f"\n{self.left_out} rows were left out, as the time was over.\n" if self.left_out else ""


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def made_up_cells(n_cells: int) -> ad.AnnData:
    """Cells of 64 kinds with as many expressed genes as real ones."""
    rng = np.random.default_rng(0)
    common = rng.gamma(0.3, 1.0, N_GENES) + 1e-3
    profiles = []
    for _ in range(64):
        rate = common * rng.lognormal(0.0, 1.0, N_GENES)
        found = rng.choice(N_GENES, N_EXPRESSED, replace=False, p=rate / rate.sum())
        profile = np.zeros(N_GENES, dtype=np.float32)
        profile[found] = 1 + rng.poisson(2.0, N_EXPRESSED)
        profiles.append(sp.csr_matrix(profile))
    kind = rng.integers(0, 64, n_cells)
    genes = [f"GENE{i}" for i in range(N_GENES)]
    obs = pd.DataFrame({"kind": kind.astype(str)}, index=[f"cell{i}" for i in range(n_cells)])
    return ad.AnnData(sp.vstack(profiles, "csr")[kind], obs=obs, var=pd.DataFrame(index=genes))


def models(args: argparse.Namespace, adata: ad.AnnData) -> Iterator[tuple[str, Any]]:
    """Each network, with random weights that are the same on any machine."""
    for name in args.models:
        torch.manual_seed(0)
        genes = pd.DataFrame({"ensembl_id": "", "symbol": adata.var_names, "previous_symbols": ""})
        if name == "UCE":
            genes["species"] = "human"
        network = SMALL[name] if args.small else NETWORKS[name]
        cls = getattr(cp.model, name)
        cls.setup_anndata(adata)
        model = cls(adata, genes=genes, **network)
        model.is_trained_ = True
        model.module.eval()
        yield name, model
        model.release()


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def speed(model: Any, n_cells: int, device: torch.device, **how: Any) -> dict[str, Any]:
    """Cells a second of the second call, and peak memory."""
    n_cells = min(n_cells, model.adata.n_obs)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = 0.0
    for _ in range(2):
        start = synchronised(device)
        model.get_latent_representation(indices=np.arange(n_cells), **how)
        taken = synchronised(device) - start
        if taken > TOO_SLOW:
            break
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
    return {"cells/s": n_cells / taken, "peak MB": peak, "seconds": taken}


def embed_all_ways(table: Table, name: str, model: Any, device: torch.device) -> None:
    """Precisions, batch sizes, compiled layers, kernels for attention."""
    options = OPTIONS.get(name, {})
    for precision, (products, dtype) in PRECISIONS.items():
        torch.set_float32_matmul_precision(products)
        for size in BATCH_SIZES:
            what = {"model": name, "what": "embed", "precision": precision, "at a time": size}
            how = {"batch_size": size, "precision": dtype, **options}
            found = table.measure(what, lambda how=how, size=size: speed(model, size, device, **how))
            if found.get("seconds", 0.0) > TOO_SLOW:
                break
    torch.set_float32_matmul_precision("highest")
    best = {"batch_size": 512, "precision": "bfloat16", **options}
    if name not in ("CellPLM", "ScBERT"):
        for backend in BACKENDS:
            what = {
                "model": name,
                "what": f"attention {backend.lower()}",
                "precision": "bfloat16",
                "at a time": 512,
            }

            def with_kernel(backend: str = backend) -> dict[str, Any]:
                with sdpa_kernel([getattr(SDPBackend, backend)]):
                    return speed(model, 512, device, **best)

            table.measure(what, with_kernel)
    if device.type == "cpu":
        return
    for layer in model.module.encoder:
        layer.compile(dynamic=True)
    what = {"model": name, "what": "compiled", "precision": "bfloat16", "at a time": 512}
    table.measure(what, lambda: speed(model, 512, device, **best))


class Clock(pl.Callback):
    """When each epoch ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ends.append(synchronised(pl_module.device))


def train(cls: Any, network: dict[str, Any], adata: ad.AnnData, device: torch.device) -> dict[str, Any]:
    """Seconds of the second epoch."""
    cells, clock = adata[:TRAINED].copy(), Clock()
    cls.setup_anndata(cells)
    model = cls(cells, **network)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    model.train(max_epochs=2, batch_size=64, accelerator=accelerator, callbacks=[clock], **quiet)
    model.release()
    seconds = clock.ends[1] - clock.ends[0]
    return {"cells/s": 0.9 * TRAINED / seconds, "seconds": seconds, "at a time": 64}


def without_memory(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Embed where 1.5 GB are left: the same numbers, fewer cells at a time, and a warning."""
    reference = model.get_latent_representation(indices=np.arange(512), batch_size=64, **options)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(free - 3 * 2**29, 0), dtype=torch.uint8, device="cuda")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = model.get_latent_representation(batch_size=model.adata.n_obs, **options)[:512]
    finally:
        del ballast
        torch.cuda.empty_cache()
    notes = [str(w.message) for w in said if "ran out of memory" in str(w.message)]
    return {
        "difference": _difference(found, reference),
        "note": notes[0][:80] if notes else "memory was enough",
    }


def _difference(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(NETWORKS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device, table = torch.device(args.device), Table(args.out, args.minutes)
    adata = made_up_cells(max(BATCH_SIZES) if not args.small else 64)
    for name, model in models(args, adata):
        options = OPTIONS.get(name, {})
        on_cpu = model.get_latent_representation(indices=FIRST, **options)
        model.to_device(device)

        def agree(model: Any = model, on_cpu: np.ndarray = on_cpu, options: Any = options) -> dict[str, Any]:
            found = model.get_latent_representation(indices=FIRST, **options)
            return {"difference": _difference(found, on_cpu)}

        table.measure({"model": name, "what": "agrees with the CPU", "precision": "float32"}, agree)
        embed_all_ways(table, name, model, device)
    for name, model in models(args, adata):  # what may take memory from the others comes last
        network = SMALL[name] if args.small else NETWORKS[name]
        what = {"model": name, "what": "epoch of training", "precision": "float32"}

        def epoch(model: Any = model, network: dict[str, Any] = network) -> dict[str, Any]:
            return train(type(model), network, adata, device)

        table.measure(what, epoch)
        if device.type == "cuda":
            model.to_device(device)
            out_of = {
                "model": name,
                "what": "memory runs out",
                "precision": "float32",
                "at a time": adata.n_obs,
            }
            table.measure(out_of, lambda model=model, name=name: without_memory(model, OPTIONS.get(name, {})))
            model.to_device("cpu")
            torch.cuda.empty_cache()
    print(table.path.read_text())


if __name__ == "__main__":
    main()
