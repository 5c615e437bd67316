"""The cells, labels and methods of one evaluation, and what each method says of held-out cells."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm.auto import tqdm

from cellprior._matrix import matrix_of
from cellprior._obs import read_names
from cellprior.evaluate import _methods as methods
from cellprior.evaluate import _probes as probes
from cellprior.evaluate._expression import log_normalised, of_genes
from cellprior.evaluate._intervals import CLASS_SCORES, Draws, Resampling, compared
from cellprior.evaluate._methods import Kind, Method
from cellprior.evaluate._metrics import knn_predict
from cellprior.evaluate._splits import HELD_OUT, RANDOM, Split, batch_splits, label_codes, random_splits

Embeddings: TypeAlias = str | Sequence[str] | Mapping[str, str | np.ndarray]
Reader: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]
"""From an embedding, labels, and another embedding, and a seed, to labels of the other."""

ON_GENES, MAJORITY = "logistic regression on genes", "largest label"
KNN, LINEAR, CENTROID = "15-NN", "linear probe", "nearest centroid"
SEEN = (
    "Whether {} was pretrained on these very cells is not known here; then a gain says little. See its card."
)
N_NEIGHBORS = 15
READERS: dict[str, Reader] = {
    KNN: lambda train, codes, test, seed: knn_predict(
        train, codes, test, n_neighbors=min(N_NEIGHBORS, len(train))
    ),
    LINEAR: lambda train, codes, test, seed: probes.linear(train, codes, test, seed=seed),
    CENTROID: lambda train, codes, test, seed: probes.nearest_centroid(train, codes, test),
}
FEW_SHOT: dict[str, Reader] = {
    **READERS,
    LINEAR: lambda train, codes, test, seed: probes.linear(train, codes, test, tuned=False),
}
ZERO_SHOT, PROBES = (KNN,), (LINEAR, CENTROID)


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose answer it is, and how it was asked."""

    method: str
    kind: Kind
    reader: str
    n_per_class: int | None = None


@dataclass
class Task:
    """Cells, labels, splits, and what is compared."""

    codes: np.ndarray
    """Label of each cell, -1 for those left out ``(cells,)``."""
    labels: list[str]
    batches: pd.Series | None
    log: sp.csr_matrix
    """Log-normalised expression ``(cells, genes)``."""
    methods: list[Method]
    splits: dict[str, list[Split]]
    """By kind; the headline first."""
    notes: list[str] = field(default_factory=list)
    gene_sets: list[np.ndarray] = field(default_factory=list)
    """Of the weights, each once, for a PCA of the same genes."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def n_obs(self) -> int:
        """Cells, those without a label among them."""
        return len(self.codes)


@dataclass
class Answers:
    """What all methods say of the test cells of some splits, for each split, and the seconds it took."""

    splits: list[Split]
    said: dict[Asked, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def scores(self, codes: np.ndarray) -> dict[Asked, dict[str, Draws]]:
        """Scores by draw, of which all are paired."""
        resampling = Resampling(len(codes), self.splits)
        return {asked: resampling.classification(codes, said) for asked, said in self.said.items()}


def make_task(
    adata: ad.AnnData,
    embeddings: Embeddings,
    *,
    labels_key: str,
    batch_key: str | None = None,
    layer: str | None = None,
    seeds: int = 5,
    test_size: float = 0.2,
    scvi_epochs: int | None = None,
    max_cells: int = 20_000,
    embed_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Task:
    """Read data, load weights, and say what is compared.

    Raises
    ------
    KeyError
        If a column of ``obs``, or an embedding, is missing.
    ValueError
        If there is no embedding, one does not fit the data, or the labels or batches cannot be used.
    NotCountsError
        If the data are not raw counts.
    """
    from cellprior.model.data._counts import check_counts, read_rows

    _refuse_missing(adata, (labels_key, batch_key), layer)
    codes, labels = label_codes(adata.obs[labels_key])
    wanted = _named(embeddings, adata)
    options = embed_options or {}
    if unknown := options.keys() - wanted.keys():
        msg = f"embed_options has {sorted(unknown)}; the embeddings are {list(wanted)}."
        raise ValueError(msg)
    notes = []
    rows = np.arange(adata.n_obs)
    if adata.n_obs > max_cells:
        rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:max_cells])
        codes, labels = label_codes(adata.obs[labels_key].iloc[rows])
        notes.append(f"{max_cells:,} of {adata.n_obs:,} cells, drawn at random (max_cells).")
    if left_out := int((codes < 0).sum()):
        notes.append(
            f"{left_out} cells are not asked about: without a label, or of one with fewer than 5 cells."
        )
    matrix = matrix_of(adata, layer)
    counts = read_rows(matrix.x, rows, where=matrix.where)
    check_counts(counts, rows, adata, layer)
    cells = ad.AnnData(counts, obs=adata.obs.iloc[rows].copy(), var=matrix.var.copy())
    if duplicates := _n_duplicates(counts):
        notes.append(
            f"{duplicates} cells have the same counts as another: a copy on the other side of a split is no test."
        )
    batches = None
    splits = {RANDOM: random_splits(codes, seeds=seeds, test_size=test_size)}
    if batch_key is not None:
        splits = {HELD_OUT: batch_splits(codes, cells.obs[batch_key]), **splits}
        batches = pd.Series(read_names(cells.obs, batch_key))
    expression = of_genes(counts, matrix.var)
    if others := counts.shape[1] - expression.shape[1]:
        notes.append(f"{others:,} columns are no genes (antibodies, guides, ...): left out of the baselines.")
    log = log_normalised(expression)
    task = Task(codes, labels, batches, log, [], splits, notes)
    shared = [methods.pca("PCA", log), methods.variable_genes(log)]
    for name, given in wanted.items():
        if isinstance(given, str) and given not in adata.obsm:
            task.notes.append(SEEN.format(name))
            shared += _from_weights(task, cells, name, given, options.get(name, {}), batch_key=batch_key)
        else:
            values = _checked(name, adata.obsm[given] if isinstance(given, str) else given, adata.n_obs)
            task.methods.append(methods.fixed(name, values[rows]))
            record = adata.uns.get("cellprior", {}).get(given) if isinstance(given, str) else None
            shared += _twin_of_record(task, cells, name, record)
    if scvi_epochs is not None:
        shared.append(methods.scvi(expression, batches, scvi_epochs))
    task.methods += [*shared, methods.random_numbers(task.n_obs)]
    return task


def _refuse_missing(adata: ad.AnnData, keys: Sequence[str | None], layer: str | None) -> None:
    for key in keys:
        if key is not None and key not in adata.obs:
            msg = f"{key!r} not found in adata.obs; its columns are {list(adata.obs.columns)}."
            raise KeyError(msg)
    if layer is not None:
        try:
            matrix_of(adata, layer)
        except ValueError as error:
            raise KeyError(str(error)) from None


def _named(embeddings: Embeddings, adata: ad.AnnData) -> dict[str, str | np.ndarray]:
    if isinstance(embeddings, str | os.PathLike):
        embeddings = [os.fspath(embeddings)]
    if not isinstance(embeddings, Mapping):
        embeddings = {str(name): str(name) for name in embeddings}
    named: dict[str, str | np.ndarray] = dict(embeddings)
    if not named:
        msg = f"No embedding to evaluate: name keys of obsm ({list(adata.obsm)}), weights, or give arrays by name."
        raise ValueError(msg)
    taken = {"PCA", "HVG", "scVI", ON_GENES, MAJORITY} & named.keys()
    if taken:
        msg = f"{sorted(taken)} are names of baselines; call the embeddings otherwise."
        raise ValueError(msg)
    return named


def _checked(name: str, values: Any, n_obs: int) -> np.ndarray:
    """An embedding as float32 array."""
    values = np.asarray(values.toarray() if sp.issparse(values) else values)
    if values.ndim != 2 or len(values) != n_obs:
        msg = (
            f"The embedding {name!r} has shape {values.shape}; needed: one row for each of the {n_obs} cells."
        )
        raise ValueError(msg)
    if not np.isfinite(values.astype(np.float64)).all():
        row = int(np.argmin(np.isfinite(values.astype(np.float64)).all(axis=1)))
        msg = f"The embedding {name!r} is not finite, first in row {row}. Leave such cells out of the data."
        raise ValueError(msg)
    return np.asarray(values.astype(np.float32))


def _from_weights(
    task: Task,
    cells: ad.AnnData,
    name: str,
    weights: str,
    options: Mapping[str, Any],
    *,
    embed: bool = True,
    **setup: str | None,
) -> list[Method]:
    """Add the embedding of some weights, if wanted; give its own baselines: the same genes, the network at random."""
    from cellprior.evaluate._twin import random_twin
    from cellprior.model import model_class

    cls: Any = model_class(weights)
    start = time.perf_counter()
    with cls.opened(weights, cells, **setup) as model:
        if embed:
            task.methods.append(methods.fixed(name, model.get_latent_representation(**options)))
        seconds = round(time.perf_counter() - start, 1)
        task.provenance[name] = {**model.provenance(), "seconds": seconds}
        genes = np.flatnonzero(model.gene_match.index >= 0)
        twin = random_twin(model, cells, seed=0)
        try:
            at_random = twin.get_latent_representation(**options)
        finally:
            twin.release()
    found = [Method(f"random weights of {name}", "baseline", lambda rows, seed: at_random)]
    if not any(np.array_equal(genes, others) for others in task.gene_sets):
        task.gene_sets.append(genes)
        found.insert(0, methods.pca(f"PCA, genes of {name}", task.log, genes))
    return found


def _twin_of_record(
    task: Task, cells: ad.AnnData, name: str, record: Mapping[str, Any] | None
) -> list[Method]:
    """Baselines of an embedding that :func:`cellprior.tl.embed` has written, from what it says of its weights."""
    if record is None or "weights" not in record:
        task.notes.append(
            f"{name} is an array: its genes and its network with random weights are not compared with."
        )
        return []
    from cellprior.weights import WeightsError

    setup = {key: record.get("params", {}).get(key) for key in ("batch_key", "gene_key")}
    try:
        return _from_weights(task, cells, name, record["weights"], {}, embed=False, **setup)
    except WeightsError as error:
        task.notes.append(f"{name}: its weights were not found again, so no baseline has its genes ({error})")
        return []


def _n_duplicates(counts: sp.csr_matrix) -> int:
    """Cells that are not the first with their counts; empty ones do not count."""
    rows = (slice(a, b) for a, b in pairwise(counts.indptr) if b > a)
    keys = [hash((counts.indices[row].tobytes(), counts.data[row].tobytes())) for row in rows]
    return len(keys) - len(set(keys))


def ask(
    task: Task,
    kind: str,
    readers: Sequence[str],
    *,
    n_per_class: Sequence[int] = (),
    whole: bool = True,
    progress: bool = True,
) -> Answers:
    """Let every method name the test cells of every split of a kind.

    Parameters
    ----------
    task
        What is compared.
    kind
        Of the splits.
    readers
        Names of `READERS`, asked with all training cells if ``whole``.
    n_per_class
        Numbers of training cells of a label that the `PROBES` are asked with.
    whole
        Whether to ask with all training cells, and beside the methods the two classifiers that need no embedding.
    progress
        Show a bar.
    """
    answers = Answers(task.splits[kind])
    steps = tqdm(total=len(answers.splits) * (len(task.methods) + whole), desc=kind, disable=not progress)
    for split in answers.splits:
        few = {n: _draw(split, task.codes, n) for n in n_per_class}
        shuffled = np.random.default_rng(split.seed).permutation(task.codes[split.train])
        for method in task.methods:
            start = time.perf_counter()
            latent = method.fit(split.train, split.seed)
            test = latent[split.test]
            for reader in readers if whole else ():
                read, train = READERS[reader], latent[split.train]
                said = read(train, task.codes[split.train], test, split.seed)
                answers.said[Asked(method.name, method.kind, reader)].append(said)
                if method.kind == "embedding":
                    said = read(train, shuffled, test, split.seed)
                    answers.said[Asked(f"permuted labels, {method.name}", "control", reader)].append(said)
            for n, rows in few.items():
                for reader in PROBES:
                    said = FEW_SHOT[reader](latent[rows], task.codes[rows], test, split.seed)
                    answers.said[Asked(method.name, method.kind, reader, n)].append(said)
            answers.seconds[method.name] += time.perf_counter() - start
            steps.update()
        if whole:
            _ask_classifiers(task, split, answers)
            steps.update()
    steps.close()
    return answers


def _ask_classifiers(task: Task, split: Split, answers: Answers) -> None:
    """What needs no embedding: genes themselves, and the largest label."""
    start = time.perf_counter()
    codes = task.codes[split.train]
    said = probes.sparse_on_genes(task.log[split.train], codes, task.log[split.test])
    answers.said[Asked(ON_GENES, "baseline", "")].append(said)
    answers.seconds[ON_GENES] += time.perf_counter() - start
    answers.said[Asked(MAJORITY, "baseline", "")].append(probes.largest(codes, len(split.test)))


def _draw(split: Split, codes: np.ndarray, n: int) -> np.ndarray:
    """``n`` training cells of each label, or as many as it has."""
    rng = np.random.default_rng((split.seed, n, len(split.test)))
    rows = [np.flatnonzero(codes[split.train] == label) for label in np.unique(codes[split.train])]
    return np.sort(np.concatenate([split.train[rng.permutation(found)[:n]] for found in rows]))


def tabulate(
    scores: Mapping[Asked, Mapping[str, Draws]], answers: Answers, readers: Sequence[str]
) -> pd.DataFrame:
    """A row per method, reader and score, each beside the best baseline of the same reader.

    The logistic regression on genes is a baseline of the linear probe; elsewhere it is shown and not compared with.
    """
    tables = []
    for n in sorted({asked.n_per_class for asked in scores}, key=lambda n: n or 0):
        for reader in readers:
            shown = [a for a in scores if a.n_per_class == n and a.reader in (reader, "")]
            rivals = [a for a in shown if a.kind == "baseline" and (a.reader or reader == LINEAR)]
            for metric in CLASS_SCORES:
                best = max(rivals, key=lambda a: scores[a][metric][0]).method
                table = compared({a.method: scores[a][metric] for a in shown}, versus=best)
                said = {"kind": [a.kind for a in shown], "reader": [a.reader for a in shown]}
                tables.append(table.assign(**said, n_per_class=n, metric=metric))
    found = pd.concat(tables, ignore_index=True).drop_duplicates(
        ["method", "reader", "n_per_class", "metric"]
    )
    found["split"], found["n_splits"] = answers.splits[0].kind, len(answers.splits)
    found["seconds"] = found["method"].map(answers.seconds).round(1)
    first = ["method", "kind", "reader", "n_per_class", "metric", "split"]
    found = found[[*first, *found.columns.difference(first, sort=False)]]
    return found if found["n_per_class"].notna().any() else found.drop(columns="n_per_class")
