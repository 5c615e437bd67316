"""Cost of an embedding that is streamed from disk to disk, by number of cells, beside what the machine allows.

    python benchmarks/scale.py [--models cellplm-starter scbert-starter ...] [--cells 1000 3000 10000 20000 100000]
        [--folder scale] [--plot scale.png] [--hidden] [--threads 1]

One table per model, one process per row, so that peak memory is its own. Counts are made up, 2,000 values per cell with
genes as unevenly found as in real cells, and stay in a zarr folder. ``cellplm-85m`` is a network of the size of the
released CellPLM with random weights, ``multiomeclip`` a small one with random weights on genes and peaks.

"floor" is the time of a cell's products at the rate of a large matrix product on this machine, plus the time to move a
cell's counts and hidden states once per use at the speed of a copy; both are measured at the start. "fixed s" is what
comes before the first cell: opening, weights, matching genes, knowing the file again. It is not in the cost per cell.
``--hidden`` leaves the hidden states of CellPLM in files. Where there is a CUDA device, a second table gives cells per
second by batch size and precision, with torch.compile and without.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

N_GENES, N_PEAKS, N_EXPRESSED = 19_374, 60_000, 2_000
N_PROFILES = 2_000  # different cells; the others are copies of them
ROWS = 10_000  # cells that are written at a time
LARGEST = {"cellplm-85m": 20_000}  # cells, of what takes hours on a CPU
MODELS = ("cellplm-starter", "cellplm-85m", "scbert-starter", "multiomeclip")
BATCH_SIZES = (256, 1024, 4096, 8192)


# data


def profiles(n_features: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and counts of different cells ``(profiles, 2000)`` each: the largest of noisy, uneven rates."""
    rng = np.random.default_rng(seed)
    log_rate = rng.normal(0, 2, n_features)
    features = np.empty((N_PROFILES, N_EXPRESSED), dtype=np.int32)
    for i in range(N_PROFILES):
        score = log_rate + rng.gumbel(size=n_features)
        features[i] = np.sort(np.argpartition(-score, N_EXPRESSED)[:N_EXPRESSED])
    return features, 1 + rng.poisson(np.exp(log_rate - log_rate.max() + 3)[features]).astype(np.float32)


def write_cells(path: Path, n_cells: int, names: list[str], *, seed: int = 0) -> None:
    """An AnnData of made-up cells in zarr, written a few at a time; what is there already is kept."""
    import anndata as ad
    import pandas as pd
    import zarr

    if (path / "complete").exists():
        return
    shutil.rmtree(path, ignore_errors=True)
    features, counts = profiles(len(names), seed)
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    ad.io.write_elem(root, "obs", pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]))
    ad.io.write_elem(root, "var", pd.DataFrame(index=names))
    x = root.create_group("X")
    x.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, len(names)]}
    )
    size = n_cells * N_EXPRESSED
    stored = {
        name: x.create_array(name, shape=(size,), chunks=(1_000_000,), dtype=dtype)
        for name, dtype in (("data", "float32"), ("indices", "int32"))
    }
    indptr = np.arange(n_cells + 1, dtype=np.int64) * N_EXPRESSED
    x.create_array("indptr", shape=indptr.shape, chunks=indptr.shape, dtype="int64")[:] = indptr
    rng = np.random.default_rng(seed + 1)
    for start in range(0, n_cells, ROWS):
        cells = rng.integers(0, N_PROFILES, min(ROWS, n_cells - start))
        place = slice(start * N_EXPRESSED, (start + len(cells)) * N_EXPRESSED)
        stored["data"][place], stored["indices"][place] = counts[cells].ravel(), features[cells].ravel()
    (path / "complete").touch()


def names_for(model: str) -> list[str]:
    """Names of as many genes as the released CellPLM has, those of the model first."""
    from cellprior.weights import fetch, read_bundle

    known = (
        [] if model in ("cellplm-85m", "multiomeclip") else list(read_bundle(fetch(model)).genes["symbol"])
    )
    return (known + [f"GENE{i}" for i in range(N_GENES)])[:N_GENES]


# one row


def attach(model: str, folder: Path, n_cells: int) -> Any:
    """The model with the cells attached."""
    import torch

    from cellprior.model import CellPLM, MultiomeCLIP, ScBERT
    from cellprior.model.data._files import open_counts

    adata = open_counts(folder / f"{model}-{n_cells}.zarr", None)
    torch.manual_seed(0)
    if model == "multiomeclip":
        from mudata import MuData

        from cellprior._compat import without_pulled_columns

        peaks = open_counts(folder / f"{model}-{n_cells}-atac.zarr", None)
        with without_pulled_columns():
            mdata = MuData({"rna": adata, "atac": peaks})
        MultiomeCLIP.setup_mudata(mdata)
        found: Any = MultiomeCLIP(mdata)
    else:
        cls = ScBERT if model.startswith("scbert") else CellPLM
        cls.setup_anndata(adata)
        found = (
            CellPLM(adata, size="released") if model == "cellplm-85m" else cls.from_pretrained(model, adata)
        )
    found.is_trained_ = True  # random weights are as fast as trained ones
    found.module.eval()
    return found


def memory_mb(which: str) -> float:
    """Memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def run(args: argparse.Namespace) -> dict[str, float]:
    """Stream one embedding; times without what comes before the first cell."""
    import torch

    from cellprior.model.engine._stream import LatentStore

    torch.set_num_threads(args.threads)
    model, n_cells = args.model, args.cells[0]
    out = args.folder / f"{model}-{n_cells}-latent.zarr"
    for left in (out, out.with_name(out.name + ".part")):
        shutil.rmtree(left, ignore_errors=True)
    began = time.perf_counter()
    attached = attach(model, args.folder, n_cells)
    before, first, begin = memory_mb("VmRSS"), [], LatentStore.begin

    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    def noted(self: LatentStore, **how: Any) -> None:
        begin(self, **how)
        first.extend([time.perf_counter(), cpu_seconds()])

    LatentStore.begin = noted  # type: ignore[method-assign]
    hidden = args.folder / "hidden" if args.hidden and model.startswith("cellplm") else "memory"
    options = {"hidden": hidden, "progress": args.progress, "batch_size": args.batch_size, "client": None}
    attached._stream(out, key="X", params={}, **options)
    wall, cpu = time.perf_counter() - first[0], cpu_seconds() - first[1]
    peak = memory_mb("VmHWM")
    shutil.rmtree(out)
    flops, n_bytes = work(attached)
    return {
        "cells/s": n_cells / wall,
        "CPU ms/cell": 1000 * cpu / n_cells,
        "peak MB": peak,
        "added MB": peak - before,
        "fixed s": first[0] - began,
        "MFLOP/cell": flops / 1e6,
        "KB/cell": n_bytes / 1e3,
    }


def work(attached: Any) -> tuple[float, float]:
    """Products, as additions and multiplications, and bytes that are moved, of one cell."""
    module = attached.module
    if attached.peaks is not None:  # MultiomeCLIP
        flops = n_bytes = 0.0
        for encoder in (module.rna, module.atac):
            widths = [p.shape for p in encoder.parameters() if p.ndim == 2]
            flops += 2 * N_EXPRESSED * encoder.components.shape[1] + 2 * sum(a * b for a, b in widths)
            n_bytes += 8 * N_EXPRESSED
        return flops, n_bytes
    found = attached.gene_match.index >= 0
    expressed = np.asarray(attached.adata.X[:1000].sum(axis=0) > 0).ravel()
    n_expressed = N_EXPRESSED * (found & expressed).sum() / max(expressed.sum(), 1)
    h = module.n_hidden
    if hasattr(
        module, "decoder"
    ):  # CellPLM: gene sum; linear; per layer projections, feed-forward, attention
        n_layers, head = len(module.encoder), h // module.encoder[0].attention.n_heads
        flops = 2 * n_expressed * h + 2 * h * h + n_layers * (8 * h * h + 8 * h * h + 4 * h * head)
        return flops + 2 * h * module.n_latent, 8 * N_EXPRESSED + 4 * h * (1 + 5 * n_layers)
    if module.pooling == "cls" and len(module.encoder) == 1:  # looked up by gene and bin: hardly a product
        return np.nan, np.nan
    attention = module.encoder[0].attention  # ScBERT: the same of each gene, with random features
    n_positions, width = module.n_genes + 1, attention.n_heads * attention.head_dim
    features = attention.projection.shape[0]
    per_position = 8 * h * width + 4 * width * features + 4 * width * features + 16 * h * h
    flops = len(module.encoder) * n_positions * per_position
    return flops, 8 * N_EXPRESSED + 4 * n_positions * h * 5 * len(module.encoder)


# the machine


def measured_rates(threads: int) -> tuple[float, float]:
    """FLOP/s of a float32 matrix product, and bytes/s of a copy, read and written; best of several."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2, 2048, 2048)
    x = torch.zeros(2**26)
    product, copy = [], []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        product.append(time.perf_counter() - start)
        start = time.perf_counter()
        x.clone()
        copy.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(product), 2 * 4 * 2**26 / min(copy)


def on_cuda(model: str, folder: Path, n_cells: int) -> None:
    """Cells per second by batch size."""
    import pandas as pd
    import torch

    rows = {}
    for precision in ("float32", "bfloat16"):
        for compiled in (False, True):
            attached = attach(model, folder, n_cells)
            attached.to_device("cuda")
            if compiled:
                for layer in attached.module.encoder:
                    for part in (layer.ff if hasattr(layer, "ff") else layer,):
                        part.compile(dynamic=True)
            row: dict[Any, float] = {}
            for size in BATCH_SIZES:
                attached.get_latent_representation(indices=range(size), batch_size=size, precision=precision)
                torch.cuda.synchronize()
                start = time.perf_counter()
                attached.get_latent_representation(batch_size=size, precision=precision)
                torch.cuda.synchronize()
                row[size] = n_cells / (time.perf_counter() - start)
            row["peak MB"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            rows[f"{precision}{', compiled' if compiled else ''}"] = row
    print(f"\n{model}, {n_cells:,} cells: cells/s by batch size on {torch.cuda.get_device_name()}")
    print(pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="{:.1f}".format))


# all rows


def in_process(args: argparse.Namespace, model: str, n_cells: int) -> dict[str, float]:
    write_cells(args.folder / f"{model}-{n_cells}.zarr", n_cells, names_for(model))
    if model == "multiomeclip":
        peaks = [f"chr{1 + i % 22}:{1000 * i + 100}-{1000 * i + 600}" for i in range(N_PEAKS)]
        write_cells(args.folder / f"{model}-{n_cells}-atac.zarr", n_cells, peaks, seed=5)
    command = [sys.executable, "-W", "ignore", __file__, "--model", model, "--cells", str(n_cells)]
    command += ["--folder", str(args.folder), "--threads", str(args.threads)]
    command += ["--hidden"] if args.hidden else []
    command += ["--progress"] if args.progress else []
    command += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(shown.splitlines()[-1])


def draw(tables: dict[str, Any], path: Path) -> None:
    """Cost per cell and peak memory against the number of cells."""
    import matplotlib.pyplot as plt

    figure, (cost, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for model, table in tables.items():
        (line,) = cost.loglog(table.index, table["CPU ms/cell"], marker="o", label=model)
        cost.loglog(table.index, table["floor ms/cell"], linestyle=":", color=line.get_color())
        memory.semilogx(table.index, table["peak MB"], marker="o", label=model)
    cost.set(xlabel="cells", ylabel="CPU milliseconds per cell", title="cost (dotted: floor)")
    memory.set(xlabel="cells", ylabel="MB", title="peak memory of the process")
    memory.set_ylim(0)
    cost.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    import pandas as pd
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000, 3_000, 10_000, 20_000, 100_000])
    parser.add_argument("--folder", type=Path, default=Path("scale"), help="for the made-up cells; gigabytes")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--hidden", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--progress", action="store_true", help="draw a bar for each row")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        print(json.dumps(run(args)))
        return
    args.folder.mkdir(exist_ok=True)
    flops, bandwidth = measured_rates(args.threads)
    print(f"{args.threads} threads: {flops / 1e9:.1f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    tables = {}
    for model in args.models:
        sizes = [n_cells for n_cells in args.cells if n_cells <= LARGEST.get(model, n_cells)]
        rows = {n_cells: in_process(args, model, n_cells) for n_cells in sizes}
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("cells")
        floor = 1e9 * table.pop("MFLOP/cell") / flops + 1e6 * table.pop("KB/cell") / bandwidth
        table["floor ms/cell"] = floor
        table["times the floor"] = table["CPU ms/cell"] / floor
        tables[model] = table
        print(f"\n{model}\n{table.to_string(float_format='{:.4g}'.format)}", flush=True)
    if args.plot:
        draw(tables, args.plot)
    if torch.cuda.is_available():
        for model in args.models:
            if model != "multiomeclip":
                on_cuda(model, args.folder, min(max(args.cells), 100_000))


if __name__ == "__main__":
    main()
