"""MultiomeCLIP on a paired multiome: matching of held-out cells beside a linear map, sequencing depth and MULTIVI.

    python benchmarks/multiome.py cells.h5mu [--labels-key cell_type] [--seeds 3] [--plain] [--multivi]
        [--pretrain-atac]

The file is a MuData of raw counts of RNA and ATAC. Markdown tables on stdout, progress on stderr. A split and a run per
seed: 80 % of the cells are trained on, the others tested.

matching
    FOSCTTM (0 is perfect, 0.5 chance), recall among N held-out cells, and accuracy of labels that ATAC cells get from
    the RNA of the training cells, by 30 neighbours. With ``labels_key``, training cells of one label are no negatives
    of each other. ``PLS`` is partial least squares on the components that
    MultiomeCLIP reads, the linear bar, with 15 dimensions; and with the number of dimensions that is best on the test
    cells, which favours it. ``depth only`` matches the ranks of the total counts. MULTIVI embeds RNA and ATAC of the
    held-out cells each by itself; by cosine and by distance, whichever finds more on the test cells, which favours it.
    It reads the peaks that are open in ``--multivi-min-cells`` training cells or more.
ATAC alone
    With ``--pretrain-atac``, a second model whose encoder of ATAC is pretrained on the ATAC of the training cells, in
    the same tables; and how well a linear probe reads labels of held-out cells off the components of TF-IDF (LSI), and
    off those that pretraining has moved.
mixing
    The embedding as it is for plots (``center=True``), RNA and ATAC of the held-out cells as points of their own: share
    of the other modality among the 15 nearest (0.5 is perfect), and share of the same label among them. A model that
    holds out some cells in training, as it does unless told otherwise, mixes better: ``--train-size 0.9``.
imputation
    RNA of held-out cells from their ATAC: correlation with the observed log-normalised expression, over the genes of a
    cell and over the cells of a gene.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch are read

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import scvi
import torch
from mudata import MuData
from scipy import sparse as sp
from scipy.spatial.distance import cdist
from sklearn.cross_decomposition import PLSRegression

from cellprior._compat import without_pulled_columns
from cellprior.evaluate import accuracy, balanced_accuracy
from cellprior.evaluate._probes import linear as linear_probe
from cellprior.model.data._counts import csr_tensor
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.model.multiomeclip._inputs import log_share
from cellprior.model.multiomeclip._matching import nearest
from cellprior.model.multiomeclip._metrics import depth_scores, latent_metrics, matching_metrics

START = time.perf_counter()
METRICS = ["foscttm_atac_to_rna", "foscttm_rna_to_atac", "foscttm", "recall_at_1", "recall_at_10"]
METRICS += ["modality_gap", "labels"]
N_NEIGHBORS = 30
N_NEAR = 15
PLAIN, LABELLED, PRETRAINED = "MultiomeCLIP", "MultiomeCLIP, labels_key", "MultiomeCLIP, ATAC pretrained"


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def read(args: argparse.Namespace) -> MuData:
    """The file's two modalities, counts in X, cells with both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mudata announces other defaults
        with without_pulled_columns():
            mdata = md.read(args.file)
    parts = {}
    common = mdata.mod[args.rna].obs_names.intersection(mdata.mod[args.atac].obs_names)
    for name, key, layer in (("rna", args.rna, args.rna_layer), ("atac", args.atac, args.atac_layer)):
        adata = mdata.mod[key][common]
        x = adata.X if layer is None else adata.layers[layer]
        parts[name] = ad.AnnData(sp.csr_matrix(x, dtype=np.float32), obs=adata.obs[[]], var=adata.var)
    result = MuData(parts)
    for obs in (mdata.obs, mdata.mod[args.rna].obs, mdata.mod[args.atac].obs):
        if args.labels_key in obs:
            result.obs["label"] = obs[args.labels_key].astype(str).reindex(result.obs_names)
            break
    return result


def subset(mdata: MuData, rows: np.ndarray) -> MuData:
    parts = MuData({name: adata[rows].copy() for name, adata in mdata.mod.items()})
    parts.obs = mdata.obs.iloc[rows].copy()
    return parts


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def label_accuracy(rna: np.ndarray, names: np.ndarray, atac: np.ndarray, truth: np.ndarray) -> float:
    """Of ATAC cells that are named after the nearest RNA cells."""
    index, _ = nearest(unit(atac).astype(np.float32), unit(rna).astype(np.float32), N_NEIGHBORS)
    return label_share(index, names, truth)


def label_share(index: np.ndarray, names: np.ndarray, truth: np.ndarray) -> float:
    """Share of the cells whose neighbours mostly have their label."""
    named = [pd.Series(names[row]).mode()[0] for row in index]
    return float(np.mean(np.array(named) == truth))


def scores(rna: np.ndarray, atac: np.ndarray, train_rna: np.ndarray, names: tuple | None) -> dict[str, float]:
    found = latent_metrics(torch.from_numpy(np.asarray(rna)), torch.from_numpy(np.asarray(atac)))
    if names is not None:
        found["labels"] = label_accuracy(train_rna, names[0], atac, names[1])
    return found


def linear(
    model: MultiomeCLIP, train: MuData, test: MuData, names: tuple | None
) -> dict[str, dict[str, float]]:
    """PLS from the components of ATAC to those of RNA."""
    inputs = {
        (part, name): model.module.encoder_of(name)
        .inputs(csr_tensor(sp.csr_matrix(mdata.mod[name].X)))
        .numpy()
        for part, mdata in (("train", train), ("test", test))
        for name in ("rna", "atac")
    }
    by_size = {}
    for k in (2, 5, 10, 15, 25):
        pls = PLSRegression(k, scale=False).fit(inputs["train", "atac"], inputs["train", "rna"])
        atac, rna = pls.transform(inputs["test", "atac"], inputs["test", "rna"])
        train_rna = pls.transform(inputs["train", "atac"], inputs["train", "rna"])[1]
        by_size[k] = scores(rna, atac, train_rna, names)
    best = min(by_size, key=lambda k: by_size[k]["foscttm"])
    return {"PLS, 15 dimensions": by_size[15], "PLS, best on test": by_size[best]}


def multivi(train: MuData, test: MuData, args: argparse.Namespace, names: tuple | None) -> dict[str, float]:
    """MULTIVI of scvi-tools, trained on the same pairs."""
    often = np.asarray((train["atac"].X > 0).sum(axis=0)).ravel() >= args.multivi_min_cells
    train, test = (multiome(mdata["rna"].copy(), mdata["atac"][:, often].copy()) for mdata in (train, test))
    start = time.process_time()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        for mdata in (train, test):
            mdata.obs["_indices"] = np.arange(mdata.n_obs)  # a column that MULTIVI looks for
        scvi.model.MULTIVI.setup_mudata(train, modalities={"rna_layer": "rna", "atac_layer": "atac"})
        model = scvi.model.MULTIVI(train, n_genes=train["rna"].n_vars, n_regions=train["atac"].n_vars)
        model.train(max_epochs=args.multivi_epochs, accelerator=args.accelerator, enable_progress_bar=False)
        latents = [
            model.get_latent_representation(mdata, modality=name)
            for mdata, name in ((test, "expression"), (test, "accessibility"), (train, "expression"))
        ]
    progress(
        f"MULTIVI: {often.sum()} peaks, {len(model.history['elbo_train'])} epochs, "
        f"{time.process_time() - start:.0f} s of CPU"
    )
    found = [scores(*latents, names), by_distance(*latents, names)]
    return min(found, key=lambda each: each["foscttm"])


def by_distance(rna: np.ndarray, atac: np.ndarray, train_rna: np.ndarray, names: tuple | None) -> dict:
    """As :func:`scores`, of points that are near, not those in one direction."""
    found = matching_metrics(-torch.from_numpy(cdist(atac, rna)))
    if names is not None:
        index = np.argsort(cdist(atac, train_rna), axis=1)[:, :N_NEIGHBORS]
        found["labels"] = label_share(index, *names)
    return found


def multiome(rna: ad.AnnData, atac: ad.AnnData) -> MuData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mudata announces other defaults
        return MuData({"rna": rna, "atac": atac})


def imputed(model: MultiomeCLIP, train: MuData, test: MuData) -> dict[str, tuple[float, float]]:
    """Mean correlation over genes and over cells, of neighbours' means and of the mean of all cells."""
    truth = log_share(torch.from_numpy(test["rna"].X.toarray())).numpy()
    seen = log_share(torch.from_numpy(train["rna"].X.toarray())).numpy()
    kept = (truth > 0).mean(axis=0) > 0.02
    predicted = {
        "neighbours' mean": model.predict_modality(test["atac"], train).X.toarray(),
        "mean of all cells": np.repeat(seen.mean(axis=0, keepdims=True), len(truth), axis=0),
    }
    return {
        name: (correlation(x[:, kept], truth[:, kept]), correlation(x[:, kept].T, truth[:, kept].T))
        for name, x in predicted.items()
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Mean correlation of the rows, 0 where one does not vary."""
    x, y = (z - z.mean(axis=1, keepdims=True) for z in (x, y))
    norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.mean((x * y).sum(axis=1) / np.where(norm > 1e-6, norm, np.inf)))


def fitted(what: str, train: MuData, seed: int, args: argparse.Namespace) -> MultiomeCLIP:
    """MultiomeCLIP, trained on all of these cells."""
    scvi.settings.seed = seed
    MultiomeCLIP.setup_mudata(train, labels_key="label" if what == LABELLED else None)
    model = MultiomeCLIP(train, **args.network)
    options = {"train_size": args.train_size, "accelerator": args.accelerator, "enable_progress_bar": False}
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, on workers and logging
        if what == PRETRAINED:
            model.pretrain_atac(**options)
        model.train(max_epochs=args.max_epochs, batch_size=args.batch_size, **options)
    progress(f"seed {seed}: {what}, {time.perf_counter() - start:.0f} s")
    return model


def matched(model: MultiomeCLIP, train: MuData, test: MuData, names: tuple | None) -> dict[str, float]:
    def latent(data: MuData, name: str) -> np.ndarray:
        return model.get_latent_representation(data, modality=name, center=False)

    return scores(latent(test, "rna"), latent(test, "atac"), latent(train, "rna"), names)


def probed(model: MultiomeCLIP, train: MuData, test: MuData, names: tuple) -> tuple[float, float]:
    """Accuracy and balanced accuracy of labels that are read off what is known of ATAC."""
    seen, asked = (model.get_atac_representation(mdata["atac"]) for mdata in (train, test))
    found = linear_probe(seen, names[0], asked)
    return accuracy(names[1], found), balanced_accuracy(names[1], found)


def mixed(model: MultiomeCLIP, test: MuData, names: tuple | None) -> tuple[float, float]:
    """Share of the other modality, and of the same label, among the nearest of RNA and ATAC together."""
    points = np.concatenate(
        [model.get_latent_representation(test, modality=name) for name in ("rna", "atac")]
    )
    near = nearest(points, points, N_NEAR + 1)[0][:, 1:]
    is_atac = np.arange(len(points)) >= test.n_obs
    label = np.tile(names[1], 2) if names is not None else np.full(len(points), np.nan)
    same = (label[near] == label[:, None]).mean() if names is not None else np.nan
    return float((is_atac[near] != is_atac[:, None]).mean()), float(same)


def run(mdata: MuData, seed: int, args: argparse.Namespace) -> tuple[dict[str, dict], int]:
    """Numbers of one split by table, and how many cells were tested."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(mdata.n_obs)
    n_test = round(args.test_size * mdata.n_obs) if args.test_size < 1 else int(args.test_size)
    test, train = subset(mdata, np.sort(order[:n_test])), subset(mdata, np.sort(order[n_test:]))
    names = None
    if "label" in mdata.obs:
        names = (train.obs["label"].to_numpy(), test.obs["label"].to_numpy())
    if args.multivi_only:
        return {"matching": {"MULTIVI": multivi(train, test, args, names)}}, n_test
    is_mlp = args.network["encoder"] != "vit"
    kinds = [PLAIN, LABELLED] if names is not None and not args.plain else [PLAIN]
    kinds += [PRETRAINED] if args.pretrain_atac else []
    models = {what: fitted(what, train, seed, args) for what in kinds}
    model = models[PLAIN]
    found = {name: matched(each, train, test, names) for name, each in models.items()}
    if is_mlp:
        found |= linear(model, train, test, names)
    depth = (np.asarray(test[name].X.sum(axis=1)).ravel() for name in ("rna", "atac"))
    found["depth only"] = matching_metrics(depth_scores(*depth))
    if names is not None:
        found["largest type"] = {"labels": float(np.mean(names[1] == pd.Series(names[0]).mode()[0]))}
    tables = {"matching": found, "imputation": imputed(model, train, test)}
    tables["mixing"] = {name: mixed(each, test, names) for name, each in models.items()}
    if args.pretrain_atac and names is not None:
        of = {"LSI": model, "LSI, pretrained": models[PRETRAINED]}
        tables["probe"] = {name: probed(each, train, test, names) for name, each in of.items()}
        guess = np.full(n_test, pd.Series(names[0]).mode()[0])
        tables["probe"]["largest type"] = (
            accuracy(names[1], guess),
            balanced_accuracy(names[1], guess),
        )
    for each in models.values():
        each.release()
    if args.multivi:
        found["MULTIVI"] = multivi(train, test, args, names)
        progress(f"seed {seed}: MULTIVI")
    return tables, n_test


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--rna", default="rna", help="name of the RNA modality")
    parser.add_argument("--atac", default="atac", help="name of the ATAC modality")
    parser.add_argument("--rna-layer", help="layer with raw counts, X if not given")
    parser.add_argument("--atac-layer", help="layer with raw counts, X if not given")
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-size", type=float, default=0.2, help="share of the cells, or their number")
    parser.add_argument("--plain", action="store_true", help="no second model that is told the labels")
    parser.add_argument(
        "--train-size", type=float, default=1.0, help="share of the others that is trained on"
    )
    parser.add_argument("--encoder", choices=("mlp-depth", "mlp", "vit"), default="mlp-depth")
    parser.add_argument("--max-epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument(
        "--multivi", action="store_true", help="train MULTIVI on the same cells, which takes longer"
    )
    parser.add_argument("--multivi-only", action="store_true", help="its row alone, of the same splits")
    parser.add_argument("--multivi-epochs", type=int, default=100)
    parser.add_argument(
        "--multivi-min-cells", type=int, default=1, help="cells a peak that it reads is open in"
    )
    parser.add_argument(
        "--pretrain-atac", action="store_true", help="and a model whose encoder of ATAC is pretrained"
    )
    args = parser.parse_args()
    if args.pretrain_atac and args.encoder == "vit":
        parser.error("--pretrain-atac needs another encoder than vit")
    args.network = {"encoder": args.encoder}
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mdata = read(args)
    runs = [run(mdata, seed, args) for seed in range(args.seeds)]
    tables = [found for found, _ in runs]
    n = runs[0][1]
    columns = [
        "FOSCTTM ATAC→RNA",
        "RNA→ATAC",
        "mean",
        f"recall@1, N={n}",
        f"recall@10, N={n}",
        "gap",
        "labels",
    ]
    of = f"of held-out cells, mean and standard deviation of {args.seeds} seeds"
    print_means(f"Matching {of}", dict(zip(METRICS, columns, strict=True)), tables, "matching")
    if args.multivi_only:
        return
    if "probe" in tables[0]:
        columns = ["accuracy", "balanced accuracy"]
        print_means(f"Labels read off ATAC alone {of}", dict(enumerate(columns)), tables, "probe")
    columns = [f"of the other modality among {N_NEAR}", "of the same label"]
    print_means(f"Neighbours {of}", dict(enumerate(columns)), tables, "mixing")
    columns = ["genes of a cell", "cells of a gene"]
    print_means("RNA of held-out cells from their ATAC", dict(enumerate(columns)), tables, "imputation")


def print_means(title: str, columns: dict, tables: list[dict], which: str) -> None:
    """A row per method: mean and standard deviation over the seeds of each column."""
    rows = []
    for name in tables[0][which]:
        values = pd.DataFrame([found[which][name] for found in tables]).reindex(columns=list(columns))
        mean, spread = values.mean(), values.std()
        rows.append(
            [name, *("-" if np.isnan(m) else f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))]
        )
    print_table(title, ["", *columns.values()], rows)


if __name__ == "__main__":
    main()
