"""Annotation with cellplm-starter on real cells: how good the names are, and what ``reject=`` keeps and finds.

    python benchmarks/annotation.py FOLDER [--part accuracy promise unseen] [--seeds 3] [--max-epochs 60]

FOLDER holds AnnData files of raw counts with labels in ``obs``; their names and columns are options. Four markdown
tables on stdout, progress on stderr, about ten minutes on one core for all of it.

accuracy
    Fine-tuning beside logistic regression and the largest class, on the same split (70 % training cells, by class). The
    regressions get all training cells and log1p of counts per 10,000: L2 with scikit-learn's defaults, on all genes
    (stronger than on variable or vocabulary genes, or with L1) and on those that the model reads; L1 with C=0.1, one
    class against the rest, as in published comparisons with language models. Fine-tuning spends 15 % of the training
    cells on choosing the epoch.
promise
    Error among the named cells, which ``reject`` promises to be at most that, with 90 % confidence. First many splits
    of cells that one model has not seen into calibration and test cells; then whole runs of ``fine_tune`` and
    ``predict``, a split and a seed each.
unseen
    One type left out of training at a time: which cells are called unknown, in 30 % of the cells, and in a query of all
    unseen cells among these and as many known ones.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch are read

import anndata as ad
import numpy as np
import scvi
import torch
from scipy import sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from sklearn.multiclass import OneVsRestClassifier

from cellprior.model import CellPLM
from cellprior.model.learning._annotation import scores_of
from cellprior.model.learning._rejection import find_limits

WEIGHTS = "cellplm-starter"
PARTS = ("accuracy", "promise", "unseen")
TRAINABLE = ("last", "all", "head")
START = time.perf_counter()


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def labels_of(adata: ad.AnnData, args: argparse.Namespace) -> np.ndarray:
    return adata.obs[args.labels_key].astype(str).to_numpy()


def fine_tuned(
    train: ad.AnnData, args: argparse.Namespace, seed: int, *, max_epochs: int | None = None, **options
) -> CellPLM:
    scvi.settings.seed = seed
    batch_key = args.batch_key if train.obs[args.batch_key].nunique() > 1 else None
    CellPLM.setup_anndata(train, batch_key=batch_key, labels_key=args.labels_key)
    model = CellPLM.from_pretrained(WEIGHTS, train, device="cpu")
    with contextlib.redirect_stdout(sys.stderr):  # what the trainer has to say is no part of the tables
        model.fine_tune(
            max_epochs=max_epochs or args.max_epochs,
            patience=12,
            accelerator="cpu",
            enable_progress_bar=False,
            **options,
        )
    return model


# accuracy


def log_normalised(adata: ad.AnnData) -> sp.csr_matrix:
    """log1p of counts per 10,000, ``(cells, genes)``."""
    x = sp.csr_matrix(adata.X, dtype=np.float64)
    x = sp.diags_array(1e4 / np.asarray(x.sum(axis=1)).ravel()) @ x
    return sp.csr_matrix(x).log1p()


def names_by_regression(
    adata: ad.AnnData, truth: np.ndarray, train: np.ndarray, test: np.ndarray, in_vocabulary: np.ndarray
) -> dict[str, np.ndarray]:
    """Names of the test cells by method."""
    x = log_normalised(adata)
    largest, n_cells = np.unique(truth[train], return_counts=True)
    l2 = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another name for the L1 penalty in new scikit-learn
        l1 = OneVsRestClassifier(LogisticRegression(C=0.1, penalty="l1", solver="liblinear"))
        return {
            "logistic regression, L2": l2.fit(x[train], truth[train]).predict(x[test]),
            "logistic regression, L2, genes of the model": l2.fit(
                x[train][:, in_vocabulary], truth[train]
            ).predict(x[test][:, in_vocabulary]),
            "logistic regression, L1": l1.fit(x[train], truth[train]).predict(x[test]),
            "largest class": np.full(len(test), largest[n_cells.argmax()]),
        }


def accuracy(files: dict[str, ad.AnnData], args: argparse.Namespace) -> None:
    scores: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, adata in files.items():
        truth = labels_of(adata, args)
        for seed in range(args.seeds):
            train, test = train_test_split(
                np.arange(adata.n_obs), test_size=0.3, stratify=truth, random_state=seed
            )
            names: dict[str, np.ndarray] = {}
            for trainable in TRAINABLE:
                model = fine_tuned(adata[train].copy(), args, seed, trainable=trainable, calibration_size=0)
                names[f'cellplm-starter, trainable="{trainable}"'] = model.predict(adata[test].copy())
                in_vocabulary = model.gene_match.index >= 0
                progress(f"{name}, seed {seed}, {trainable}")
            names |= names_by_regression(adata, truth, train, test, in_vocabulary)
            for method, named in names.items():
                both = (
                    f1_score(truth[test], named, average="macro"),
                    accuracy_score(truth[test], named),
                )
                scores.setdefault(method, {}).setdefault(name, []).append(both)
            progress(f"{name}, seed {seed}, regressions")
    columns = [f"{name}: {score}" for name in files for score in ("macro-F1", "accuracy")]
    rows = []
    for method, by_file in scores.items():
        values = [np.array(by_file[name]) for name in files]  # (seeds, 2) each
        rows.append([method, *(f"{v.mean():.3f} ± {v.std():.3f}" for pair in values for v in pair.T)])
    print_table(f"Names of held-out cells, mean ± sd over {args.seeds} splits", ["method", *columns], rows)


# the promise of reject


def promise_of_one_model(files: dict[str, ad.AnnData], args: argparse.Namespace) -> None:
    """Train on half of the cells; split the others into calibration and test cells, many times."""
    rows = []
    for name, adata in files.items():
        truth = labels_of(adata, args)
        train, rest = train_test_split(np.arange(adata.n_obs), test_size=0.5, random_state=0)
        model = fine_tuned(adata[train].copy(), args, 0, calibration_size=0)
        logits, novelty = scores_of(model, adata[rest].copy(), None, None)
        probability = torch.from_numpy(logits).double().softmax(1).numpy()
        confidence = probability.max(axis=1)
        correct = np.array(model.annotation_["labels"])[probability.argmax(axis=1)] == truth[rest]
        for reject in args.reject:
            errors, unknown = [], []
            rng = np.random.default_rng(0)
            for _ in range(args.resplits):
                order = rng.permutation(len(rest))
                calibration, test = order[: len(rest) // 3], order[len(rest) // 3 :]
                limits = find_limits(
                    novelty[calibration], confidence[calibration], correct[calibration], reject=reject
                )
                is_unknown = (novelty[test] >= limits.novelty) | (confidence[test] <= limits.confidence)
                errors.append(np.mean(~correct[test][~is_unknown]) if (~is_unknown).any() else 0.0)
                unknown.append(is_unknown.mean())
            kept = np.array(errors) <= reject
            rows.append(
                [
                    name,
                    f"{reject:g}",
                    f"{1 - correct.mean():.3f}",
                    f"{np.mean(errors):.3f}",
                    f"{kept[:10].sum()} of 10",
                    f"{kept.sum()} of {len(kept)}",
                    f"{np.mean(unknown):.3f}",
                ]
            )
        progress(f"{name}, splits of held-out cells")
    columns = [
        "data",
        "reject",
        "error if all are named",
        "error of the named",
        "kept, first 10 splits",
        "kept",
    ]
    print_table("One model, many splits of held-out cells", [*columns, "unknown"], rows)


def promise_of_whole_runs(name: str, adata: ad.AnnData, args: argparse.Namespace) -> None:
    """``fine_tune`` and ``predict`` as a user calls them."""
    truth = labels_of(adata, args)
    rows, kept = [], 0
    for seed in range(10):
        train, test = train_test_split(np.arange(adata.n_obs), test_size=0.3, random_state=seed)
        model = fine_tuned(adata[train].copy(), args, seed, max_epochs=args.short_epochs)
        query = adata[test].copy()
        names, all_named = model.predict(query, reject=0.1), model.predict(query)
        unknown = names == args.unknown
        error = np.mean(names[~unknown] != truth[test][~unknown])
        kept += error <= 0.1
        before = np.mean(all_named != truth[test])
        rows.append([str(seed), f"{before:.3f}", f"{error:.3f}", f"{unknown.mean():.3f}"])
        progress(f"{name}, whole run {seed}")
    columns = ["seed", "error if all are named", "error of the named", "unknown"]
    print_table(f"{name}, whole runs, reject=0.1: kept in {kept} of 10", columns, rows)


# unseen types


def unseen(files: dict[str, ad.AnnData], args: argparse.Namespace) -> None:
    for name, adata in files.items():
        truth = labels_of(adata, args)
        in_query = np.random.default_rng(0).random(adata.n_obs) < 0.3
        query, rows = adata[in_query].copy(), []
        for left_out in np.unique(truth):
            model = fine_tuned(adata[~in_query & (truth != left_out)].copy(), args, 0)
            new = truth[in_query] == left_out
            known = np.random.default_rng(1).permutation(np.flatnonzero(~new))[: new.sum()]
            half = np.sort(np.append(known, np.flatnonzero(new)))
            shares = [new.mean()]
            for cells in (np.arange(len(new)), half):
                unknown = model.predict(query[cells].copy(), reject=0.1) == args.unknown
                shares += [unknown[new[cells]].mean(), unknown[~new[cells]].mean()]
            rows.append([left_out, *(f"{share:.0%}" for share in shares)])
            progress(f"{name} without {left_out}")
        columns = ["left out", "share of the query", "called unknown", "known cells called unknown"]
        columns += [f"{column}, half of the query unseen" for column in columns[2:]]
        print_table(f"{name}, one type left out of training, reject=0.1", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the data are")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pbmc3k", default="pbmc3k_seurat.h5ad")
    parser.add_argument("--sorted", default="pbmc_facs_zheng2017.h5ad", help="sorted blood cells")
    parser.add_argument("--lines", default="celllines_sc_mixology.h5ad", help="cell lines")
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--seeds", type=int, default=3, help="splits for the accuracy")
    parser.add_argument("--max-epochs", type=int, default=60)
    parser.add_argument("--short-epochs", type=int, default=15, help="of the ten whole runs")
    parser.add_argument("--reject", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--resplits", type=int, default=100)
    args = parser.parse_args()
    args.unknown = "unknown"  # unlabeled_category of setup_anndata
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    files = {
        Path(file).stem: ad.read_h5ad(args.folder / file) for file in (args.pbmc3k, args.sorted, args.lines)
    }
    pbmc3k, sorted_cells, lines = files
    if "accuracy" in args.part:
        accuracy({name: files[name] for name in (sorted_cells, lines)}, args)
    if "promise" in args.part:
        promise_of_one_model({name: files[name] for name in (pbmc3k, sorted_cells)}, args)
        promise_of_whole_runs(pbmc3k, files[pbmc3k], args)
    if "unseen" in args.part:
        unseen({name: files[name] for name in (pbmc3k, sorted_cells)}, args)


if __name__ == "__main__":
    main()
