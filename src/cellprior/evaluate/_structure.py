"""Scores that need no held-out cells: clusters, distances and neighbourhoods."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from threadpoolctl import threadpool_limits

from cellprior._talk import bar
from cellprior.evaluate import _metrics as metrics
from cellprior.evaluate._graph import Neighbors, exact_neighbors
from cellprior.evaluate._inputs import as_embedding
from cellprior.evaluate._leak import batch_leak
from cellprior.evaluate._lisi import mixing, purity
from cellprior.evaluate._preserved import preserved
from cellprior.evaluate._scgraph import scgraph
from cellprior.evaluate._task import Task
from cellprior.model.engine._cores import on_cores

ALL_CELLS = "all cells"
N_NEIGHBORS = 15
N_LISI = 90  # neighbours, of which the perplexity is a third; fewer in data as small
KEPT, MOST_KEPT, N_SUBSAMPLES = 0.8, 1000, 5  # of the jackknife: a share of the cells, or as many
CLUSTERS = ("ari", "nmi", "ari_mean", "nmi_mean", "ari_picked_by_labels", "nmi_picked_by_labels")
RESOLUTIONS = metrics.RESOLUTIONS[1::4]  # 0.2 to 1.8, 1 among them


def structure(task: Task, *, progress: bool | None = None) -> pd.DataFrame:
    """A row per method and score, on all labelled cells; for the columns see :func:`cellprior.evaluate.zero_shot`."""
    rows = np.flatnonzero(task.codes >= 0)
    n_kept = min(round(KEPT * len(rows)), MOST_KEPT)
    parts = [np.sort(np.random.default_rng(i).permutation(rows)[:n_kept]) for i in range(N_SUBSAMPLES)]
    latents, seconds = {}, {}
    for method in task.methods:
        start = time.perf_counter()
        latents[method.name] = method.fit()[0].usual
        seconds[method.name] = time.perf_counter() - start
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in latents}
    reasons: dict[str, str] = {}
    jobs = [(part, name) for part in (rows, *parts) for name in latents]

    def of_one(job: tuple[np.ndarray, str]) -> tuple[dict[str, float], Neighbors, float]:
        part, name = job
        start = time.perf_counter()
        scores, near = _scores(latents[name][part], task, part)
        return scores, near, time.perf_counter() - start

    with (
        bar(len(jobs), ALL_CELLS, unit=" scores", progress=progress) as steps,
        threadpool_limits(1, user_api="blas"),
        torch.no_grad(),
    ):
        for (part, name), (scores, near, took) in zip(
            jobs, on_cores(of_one, jobs, torch.device("cpu")), strict=True
        ):
            start = time.perf_counter()
            # one after the other, as igraph draws from random numbers of the whole process
            samples[name].append(_clusters(near, pd.factorize(task.codes[part])[0]) | scores)
            seconds[name] += took + time.perf_counter() - start
            steps.update()
    if task.batches is not None:
        for i, part in enumerate((rows, *parts)):
            of_part = {name: latent[part] for name, latent in latents.items()}
            graph = scgraph(of_part, task.log[part], task.codes[part], task.batches.iloc[part].to_numpy())
            reasons = reasons or graph["reason"].to_dict()
            for name in latents:
                samples[name][i]["scgraph"] = float(graph.loc[name, "score"])
    batches = None if task.batches is None else task.batches.to_numpy()
    kept = preserved(latents, task.counts, task.codes, batches) if task.counts is not None else {}
    table = []
    for method in task.methods:
        whole, *subsamples = samples[method.name]
        alone = kept.get(method.name, {})  # of a sample of the cells, without an interval
        for metric, value in {**whole, **alone}.items():
            half = (
                np.nan
                if metric in alone
                else _half_width([found[metric] for found in subsamples], n_kept / len(rows))
            )
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
                    "reason": _reason(metric, reasons.get(method.name, "")),
                }
            )
    return pd.DataFrame(table)


def _reason(metric: str, of_scgraph: str) -> str:
    if metric in CLUSTERS and not metrics.can_cluster():
        return metrics.NO_IGRAPH
    return of_scgraph if metric == "scgraph" else ""


def _scores(latent: np.ndarray, task: Task, rows: np.ndarray) -> tuple[dict[str, float], Neighbors]:
    """Those without clusters, and the nearest cells."""
    labels = pd.factorize(task.codes[rows])[0]
    embedding = as_embedding(latent)
    n_neighbors = min(N_LISI, len(rows) - 1)
    near = exact_neighbors(embedding, n_neighbors - 1)  # once for all
    found = {
        "silhouette": metrics.silhouette(embedding, labels),
        "clisi": purity(near, labels, n_neighbors / 3),
    }
    if task.batches is not None:
        batches, names = pd.factorize(task.batches.iloc[rows])
        several = len(names) > 1  # a small batch may not be among cells that were drawn
        found["ilisi"] = mixing(near, batches, n_neighbors / 3) if several else np.nan
        found["batch_leak"] = batch_leak(latent, labels, batches) if several else np.nan
    return {name: float(value) for name, value in found.items()}, near


def _clusters(near: Neighbors, codes: np.ndarray) -> dict[str, float]:
    if not metrics.can_cluster():
        return dict.fromkeys(CLUSTERS, np.nan)
    clusters = metrics.clustering_of(near.first(N_NEIGHBORS - 1), codes, RESOLUTIONS)
    fixed = clusters.loc[clusters["resolution"] == 1.0].iloc[0]
    found: dict[str, float] = {}
    for metric in ("ari", "nmi"):
        of_grid = fixed[metric], clusters[metric].mean(), clusters[metric].max()
        found |= dict(zip((metric, f"{metric}_mean", f"{metric}_picked_by_labels"), of_grid, strict=True))
    return {metric: found[metric] for metric in CLUSTERS}


def _half_width(samples: list[float], kept: float = KEPT) -> float:
    """Of a 95 % interval, from scores of the data without a share of the cells [Shao and Wu, 1989]."""
    spread = np.asarray(samples)
    variance = kept / (1 - kept) * np.mean((spread - spread.mean()) ** 2)
    return float(student.ppf(0.975, len(samples) - 1) * np.sqrt(variance))
