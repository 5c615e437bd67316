"""Can the verdict be believed? How often it says that an embedding helps when it does not, and misses one that does.

    python benchmarks/verdict.py FOLDER KEPT [--repetitions 200] [--first 0] [--sizes 150 500 2000] [--donors 2 3 5 10]

FOLDER holds pbmc_facs_zheng2017.h5ad, raw counts of 3,874 blood cells with labels in ``obs["cell_type"]``. The counts
of each cell are split in two at random, gene by gene (a binomial draw of each count). Components of one half are the
candidate, those of the other the baseline: two methods of which neither is better, read exactly as in a report. For a
true gain, the counts of the baseline are thinned further. With donors, cells are dealt to them at random, and each
donor's counts are thinned for each method by as much as chance says, so that gains differ from donor to donor.

What both say of each cell is written to the folder KEPT, a file for each repetition; what is there already is not drawn
again. Printed, from all files with numbers of the range that is asked for, are the rates of the outcomes, how often the
interval holds the true difference (the mean over all repetitions where there is a gain, 0 where there is none), and its
mean half-width. With fewer than four donors, "helps" and "worse" are said of these donors only.
"""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is read

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from cellprior.evaluate import _methods as methods
from cellprior.evaluate._ask import KNN, LINEAR, Answers, Asked, Fold
from cellprior.evaluate._expression import log_normalised
from cellprior.evaluate._intervals import Resampling
from cellprior.evaluate._neighbors import Chosen
from cellprior.evaluate._splits import HELD_OUT, MIN_LEARNED, RANDOM, batch_splits, label_codes, random_folds
from cellprior.evaluate._task import CHOSEN, Task
from cellprior.evaluate._verdict import compare

N_GENES = 600  # the most variable of all cells: what is simulated are rates, not the best embedding
SIZES, DONORS = (150, 500, 2000), (2, 3, 5, 10)
PER_DONOR = 80
# share of its counts that a baseline keeps for the candidate to gain .02, .03 and .05, found by --calibrate
KEPT = {150: (0.8, 0.7, 0.6), 500: (0.8, 0.7, 0.6), 2000: (0.8, 0.7, 0.6)}
KEPT_OF_DONORS = (0.6,)
EQUAL = 1.0


def thinned(counts: sp.csr_matrix, share: float | np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """A binomial part of each count; ``share`` is one number, or one of each cell."""
    kept = counts.copy()
    of = share if np.isscalar(share) else np.repeat(share, np.diff(counts.indptr))
    kept.data = rng.binomial(counts.data.astype(np.int64), of).astype(np.float32)
    kept.eliminate_zeros()
    return kept


def components(name: str, kind: methods.Kind, counts: sp.csr_matrix) -> methods.Method:
    """The PCA of a report on given counts."""
    genes = methods.Genes(log_normalised(counts))
    return replace(methods.pca(name, genes), kind=kind)


def one(
    counts: sp.csr_matrix, codes: np.ndarray, seed: int, *, n: int, donors: int, kept: tuple[float, ...]
) -> dict[str, Any]:
    """What candidate and baselines say of the cells of one draw, without gain and for each gain."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng((seed, n, donors))
    rows = rng.permutation(len(codes))[:n]
    drawn, labels = label_codes(codes[rows].astype(str), 10)
    x = counts[rows]
    first = thinned(x, 0.5, rng)
    second = sp.csr_matrix(x - first)
    second.eliminate_zeros()
    batches = None
    if donors:
        of = rng.integers(0, donors, n)
        batches = pd.Series([f"donor {d}" for d in of])
        first, second = (thinned(half, rng.uniform(0.4, 1.0, donors)[of], rng) for half in (first, second))
        splits = batch_splits(drawn, batches, least=MIN_LEARNED)
    else:
        splits = random_folds(drawn)
    made = [components("candidate", "embedding", first)]
    made += [
        components(str(share), "baseline", second if share == EQUAL else thinned(second, share, rng))
        for share in (EQUAL, *kept)
    ]
    kind = HELD_OUT if donors else RANDOM
    task = Task(
        drawn, labels, batches, methods.Genes(log_normalised(first)), np.arange(n), made, {kind: splits}
    )
    said: dict[tuple[str, str], list[np.ndarray]] = {}
    for split in splits:
        fold = Fold(task, split, None)
        for method in made:
            for reader in (KNN, LINEAR):
                if reader == KNN or not kept:  # gains are of neighbours only, and draws without them of both
                    said.setdefault((method.name, reader), []).append(fold.read(reader, method.fit())[0].said)
    return {"n": n, "donors": donors, "seed": seed, "codes": drawn, "splits": splits, "said": said}


def judged(drawn: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The verdicts on one draw."""
    codes, splits = drawn["codes"], drawn["splits"]
    resampling = Resampling(len(codes), splits)
    for name, reader in drawn["said"]:
        if name == "candidate":
            continue
        answers = Answers(splits, np.arange(len(codes)))
        answers.resampling = resampling  # drawn once
        for role, of in (("candidate", "candidate"), (CHOSEN, name)):
            for names in drawn["said"][of, reader]:
                kind: methods.Kind = "embedding" if role == "candidate" else "baseline"
                answers.add(Asked(role, kind, reader), Chosen(names, np.nan, ""))
        scores = {asked: of["macro_f1"] for asked, of in answers.scores(codes).items()}
        own, other = scores.values()
        difference, low, high = resampling.interval(own - other)
        yield {
            **{key: drawn[key] for key in ("n", "donors", "seed")},
            "reader": reader,
            "kept": float(name),
            "outcome": compare(answers, scores, "candidate", reader).outcome,
            "difference": difference,
            "low": low,
            "high": high,
        }


def rates(found: pd.DataFrame) -> pd.DataFrame:
    """A row per cell of the table."""
    rows = []
    for (donors, n, reader, kept), of in found.groupby(["donors", "n", "reader", "kept"], sort=False):
        truth = 0.0 if kept == EQUAL else of["difference"].mean()
        rows.append(
            {
                "cells": n,
                "donors": donors or "-",
                "reader": reader,
                "true gain": f"{truth:+.3f}",
                "helps": of["outcome"].str.startswith("helps").mean(),
                "worse": of["outcome"].str.startswith("worse").mean(),
                "no better": of["outcome"].eq("no better").mean(),
                "cannot tell": of["outcome"].eq("cannot tell").mean(),
                "interval holds it": ((of["low"] <= truth) & (truth <= of["high"])).mean(),
                "half-width": ((of["high"] - of["low"]) / 2).mean(),
                "spread": of["difference"].std(),
                "repetitions": len(of),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("kept", type=Path)
    parser.add_argument("--first", type=int, default=0, help="number of the first repetition")
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument(
        "--gains-every", type=int, default=2, help="simulate gains in every so many, by neighbours"
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--donors", type=int, nargs="*", default=DONORS)
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    numbers = range(args.first, args.first + args.repetitions)
    plans = [(n, 0, KEPT[n]) for n in args.sizes]
    plans += [(PER_DONOR * k, k, KEPT_OF_DONORS) for k in args.donors]
    data = None
    found: list[dict[str, Any]] = []
    for seed in tqdm(numbers, desc="repetitions"):
        for n, donors, kept in plans:
            path = args.kept / f"{n}_{donors}_{seed}.pkl"
            if not path.exists():
                data = data or read(args.folder)
                gains = kept if seed % args.gains_every == 0 else ()
                drawn = one(*data, seed, n=n, donors=donors, kept=gains)
                part = path.with_suffix(".part")
                part.write_bytes(pickle.dumps(drawn))
                part.rename(path)
            found += judged(pickle.loads(path.read_bytes()))
    print(rates(pd.DataFrame(found)).to_markdown(index=False, floatfmt=".3f", disable_numparse=True))


def read(folder: Path) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts of the genes that vary most ``(cells, genes)``, and labels."""
    import scanpy as sc

    adata = ad.read_h5ad(folder / "pbmc_facs_zheng2017.h5ad")
    counts = sp.csr_matrix(adata.X)
    cells = ad.AnnData(log_normalised(counts))
    variable = sc.pp.highly_variable_genes(cells, n_top_genes=N_GENES, inplace=False)["highly_variable"]
    return sp.csr_matrix(counts[:, np.flatnonzero(variable)]), label_codes(adata.obs["cell_type"])[0]


if __name__ == "__main__":
    main()
