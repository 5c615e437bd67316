"""Scores that need no held-out cells: clusters, distances and neighbourhoods."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student
from tqdm.auto import tqdm

from cellprior.evaluate import _metrics as metrics
from cellprior.evaluate._leak import batch_leak
from cellprior.evaluate._lisi import clisi, ilisi
from cellprior.evaluate._scgraph import scgraph
from cellprior.evaluate._task import N_NEIGHBORS, Task

ALL_CELLS = "all cells"
N_LISI = 90  # neighbours, of which the perplexity is a third; fewer in data as small
KEPT, N_SUBSAMPLES = 0.8, 5  # of the jackknife
RESOLUTIONS = metrics.RESOLUTIONS[1::2]  # 0.2 to 2, 1 among them


def structure(task: Task, *, progress: bool = True) -> pd.DataFrame:
    """A row per method and score, on all labelled cells; for the columns see :func:`cellprior.evaluate.zero_shot`."""
    rows = np.flatnonzero(task.codes >= 0)
    n_kept = round(KEPT * len(rows))
    parts = [np.sort(np.random.default_rng(i).permutation(rows)[:n_kept]) for i in range(N_SUBSAMPLES)]
    latents, seconds = {}, {}
    for method in task.methods:
        start = time.perf_counter()
        latents[method.name] = method.fit(rows, 0)
        seconds[method.name] = time.perf_counter() - start
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in latents}
    reasons: dict[str, str] = {}
    with tqdm(total=len(latents) * (1 + len(parts)), desc=ALL_CELLS, disable=not progress) as bar:
        for part in (rows, *parts):
            graph = None
            if task.batches is not None:
                of_part = {name: latent[part] for name, latent in latents.items()}
                graph = scgraph(of_part, task.log[part], task.codes[part], task.batches.iloc[part].to_numpy())
                reasons = reasons or graph["reason"].to_dict()
            for name, latent in latents.items():
                start = time.perf_counter()
                found = _scores(latent[part], task, part)
                if graph is not None:
                    found["scgraph"] = float(graph.loc[name, "score"])
                samples[name].append(found)
                seconds[name] += time.perf_counter() - start
                bar.update()
    table = []
    for method in task.methods:
        whole, *subsamples = samples[method.name]
        for metric, value in whole.items():
            half = _half_width([found[metric] for found in subsamples])
            table.append(
                {
                    "method": method.name,
                    "kind": method.kind,
                    "reader": "",
                    "metric": metric,
                    "split": ALL_CELLS,
                    "value": value,
                    "low": value - half,
                    "high": value + half,
                    "seconds": round(seconds[method.name], 1),
                    "reason": reasons.get(method.name, "") if metric == "scgraph" else "",
                }
            )
    return pd.DataFrame(table)


def _scores(latent: np.ndarray, task: Task, rows: np.ndarray) -> dict[str, float]:
    codes = task.codes[rows]
    n_neighbors = min(N_LISI, len(rows) - 1)
    size: dict[str, Any] = {"n_neighbors": n_neighbors, "perplexity": n_neighbors / 3}
    clusters = metrics.clustering(
        latent, codes, resolutions=RESOLUTIONS, n_neighbors=min(N_NEIGHBORS, len(rows) - 1)
    )
    fixed = clusters.loc[clusters["resolution"] == 1.0].iloc[0]
    picked = clusters.loc[clusters["picked_by_labels"]].iloc[0]
    found = {
        "ari": fixed["ari"],
        "nmi": fixed["nmi"],
        "ari_mean": clusters["ari"].mean(),
        "nmi_mean": clusters["nmi"].mean(),
        "ari_picked_by_labels": picked["ari"],
        "nmi_picked_by_labels": picked["nmi"],
        "silhouette": metrics.silhouette(latent, codes),
        "clisi": clisi(latent, codes, **size),
    }
    if task.batches is not None:
        batches = task.batches.iloc[rows].to_numpy()
        found["ilisi"] = ilisi(latent, batches, **size)
        found["batch_leak"] = batch_leak(latent, codes, batches)
    return {name: float(value) for name, value in found.items()}


def _half_width(samples: list[float]) -> float:
    """Of a 95 % interval, from scores of the data without a share of the cells [Shao and Wu, 1989]."""
    spread = np.asarray(samples)
    variance = KEPT / (1 - KEPT) * np.mean((spread - spread.mean()) ** 2)
    return float(student.ppf(0.975, len(samples) - 1) * np.sqrt(variance))
