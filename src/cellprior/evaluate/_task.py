"""The cells, labels, splits and methods of one evaluation."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellprior._matrix import matrix_of
from cellprior._obs import means_no_label, numbered, read_names
from cellprior.evaluate import _methods as methods
from cellprior.evaluate._expression import log_normalised, of_genes
from cellprior.evaluate._inputs import record_of
from cellprior.evaluate._methods import Genes, Method, Seen
from cellprior.evaluate._splits import (
    HELD_OUT,
    MIN_HELD_OUT,
    MIN_LEARNED,
    RANDOM,
    Split,
    batch_splits,
    label_codes,
    random_folds,
)

Embeddings: TypeAlias = str | Sequence[str] | Mapping[str, str | np.ndarray]

MIN_ASKED = 10  # cells of a label: of five folds, four have the 8 that make a majority of 15 neighbours
ON_GENES, RIDGE, MAJORITY = "logistic regression on genes", "ridge on all genes", "largest label"
CHOSEN, AT_RANDOM = "chosen baseline", "random weights of "
FAR = 1e4  # times its spread an embedding may be from 0, and its spread from 1
FEW_KNOWN = 0.01  # of the cells: two files may have a cell by chance, or a control
NOT_KNOWN = (
    "Whether {} was trained on these very cells is not known here; then a gain says little. See its card."
)


@dataclass
class Task:
    """Cells, labels, splits, and what is compared."""

    codes: np.ndarray
    """Label of each cell, -1 for those left out ``(cells,)``."""
    labels: list[str]
    batches: pd.Series | None
    genes: Genes
    copies: np.ndarray
    """Number of each cell, the same for cells with the same counts ``(cells,)``."""
    methods: list[Method]
    splits: dict[str, list[Split]]
    """By kind; the headline first."""
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    counts: sp.csr_matrix | None = None
    """Raw, of genes ``(cells, genes)``."""
    n_trained_on: dict[str, int] = field(default_factory=dict)
    """Of the labelled cells, those that an embedding's weights were trained on, by name, if the weights say."""

    @property
    def n_obs(self) -> int:
        """Cells, those without a label among them."""
        return len(self.codes)

    @property
    def n_asked(self) -> int:
        """Cells with a label."""
        return int((self.codes >= 0).sum())

    def seen_by(self, name: str) -> Seen:
        """What an embedding by some weights has learned from."""
        return seen_by_weights(self.n_trained_on.get(name), self.n_asked)

    @property
    def log(self) -> sp.csr_matrix:
        """Log-normalised expression ``(cells, genes)``."""
        return self.genes.log


def make_task(
    adata: ad.AnnData,
    embeddings: Embeddings,
    *,
    labels_key: str,
    batch_key: str | None = None,
    layer: str | None = None,
    seeds: int | None = None,
    test_size: float = 0.2,
    scvi_epochs: int | None = None,
    max_cells: int = 20_000,
    embed_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Task:
    """Read data, load weights, and say what is compared.

    Raises TypeError if the data are no AnnData; KeyError if a column of ``obs``, or an embedding, is missing;
    ValueError if there is no embedding, one does not fit the data, or the labels or batches cannot be used;
    NotCountsError if the data are not raw counts.
    """
    from cellprior.model.data._counts import check_counts, read_rows

    refuse_others(adata)
    _refuse_missing(adata, (labels_key, batch_key), layer)
    codes, labels = label_codes(adata.obs[labels_key], MIN_ASKED)
    wanted = _named(embeddings, adata)
    options = embed_options or {}
    if unknown := options.keys() - wanted.keys():
        msg = f"embed_options has {sorted(unknown)}; the embeddings are {list(wanted)}."
        raise ValueError(msg)
    notes = []
    rows = np.arange(adata.n_obs)
    if max_cells < 2:
        msg = f"max_cells={max_cells}; at least two are needed."
        raise ValueError(msg)
    if adata.n_obs > max_cells:
        rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:max_cells])
        codes, labels = label_codes(adata.obs[labels_key].iloc[rows], MIN_ASKED)
        notes.append(f"{max_cells:,} of {adata.n_obs:,} cells, drawn at random (max_cells).")
    matrix = matrix_of(adata, layer)
    counts = read_rows(matrix.x, rows, where=matrix.where)
    check_counts(counts, rows, adata, layer)
    cells = ad.AnnData(counts, obs=adata.obs.iloc[rows].copy(), var=matrix.var.copy())
    notes += _left_out(codes, labels, numbered(adata.obs[labels_key].iloc[rows]))
    copies = copies_of(counts)
    if n_copies := len(copies) - len(np.unique(copies)):
        notes.append(
            f"{n_copies} cells have the same counts as another; copies are on one side of every split."
        )
    batches = None
    divisions = None if batch_key is None else 1  # they come second
    splits = {
        RANDOM: random_folds(codes, seeds=seeds, test_size=test_size, divisions=divisions, copies=copies)
    }
    if batch_key is not None:
        held_out = batch_splits(
            codes, cells.obs[batch_key], copies=copies, least=MIN_LEARNED, least_asked=MIN_HELD_OUT
        )
        batches = pd.Series(read_names(cells.obs, batch_key))
        notes += _not_held_out(held_out, batches[codes >= 0])
        splits = {HELD_OUT: held_out, **splits}
    notes += _not_learned(next(iter(splits.values())), codes, labels)
    expression = of_genes(counts, matrix.var)
    if others := counts.shape[1] - expression.shape[1]:
        notes.append(f"{others:,} columns are no genes (antibodies, guides, ...): left out of the baselines.")
    genes = methods.Genes(log_normalised(expression))
    task = Task(codes, labels, batches, genes, copies, [], splits, notes, counts=expression)
    twins: list[Method] = []
    for name, given in wanted.items():
        if isinstance(given, str) and given not in adata.obsm:
            twins += _from_weights(task, cells, name, given, options.get(name, {}), batch_key=batch_key)
        else:
            values = _checked(name, adata.obsm[given] if isinstance(given, str) else given, adata.n_obs)
            record = record_of(adata, given) if isinstance(given, str) else {}
            twins += _twin_of_record(task, cells, name, record)
            known = "weights" in record
            task.methods.append(
                methods.fixed(name, values[rows], seen=task.seen_by(name) if known else "all cells")
            )
    if expression.shape[0] > methods.MOST_CELLS:
        task.notes.append(f"More than {methods.MOST_CELLS:,} cells: no baseline reads all genes at once.")
    baselines = [methods.pca("PCA", genes), methods.variable_genes(genes), *twins]
    if scvi_epochs is not None:
        baselines.append(methods.scvi(expression, batches, scvi_epochs))
    task.methods += baselines
    return task


def _left_out(codes: np.ndarray, labels: Sequence[str], given: tuple[np.ndarray, list[str]]) -> list[str]:
    """Which cells and types are not asked about, in words."""
    if not (n_cells := int((codes < 0).sum())):
        return []
    of_cell, names = given
    others = {names[code] for code in np.unique(of_cell[of_cell >= 0])} - set(labels)
    called = ", ".join(sorted(name for name in others if means_no_label(name)))
    small = sorted(name for name in others if not means_no_label(name))
    without = f"without a label (also {called})" if called else "without a label"
    named = f", or of types with fewer than {MIN_ASKED} cells: {_some(small)}" if small else ""
    return [f"{n_cells:,} cells are not asked about: {without}{named}."]


def _not_learned(splits: Sequence[Split], codes: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Types that have too few cells outside the batch that is held out, in words."""
    asked = np.unique(np.concatenate([split.test for split in splits]))
    missing = np.setdiff1d(np.unique(codes[codes >= 0]), np.unique(codes[asked]))
    if not len(missing):
        return []
    named = _some([labels[code] for code in missing])
    why = (
        f"fewer than {MIN_LEARNED} other cells have it"
        if splits[0].kind == HELD_OUT
        else "all of it are copies"
    )
    return [f"Never asked about, as {why}: {named}."]


def _not_held_out(splits: Sequence[Split], batches: pd.Series) -> list[str]:
    """Batches that are never held out, in words."""
    held_out = {name for split in splits for name in split.batches}
    lost = sorted(set(batches) - held_out)
    if not lost:
        return []
    return [
        f"Never held out, as fewer than {MIN_HELD_OUT} of its cells are of types that {MIN_LEARNED} other cells have: "
        f"{_some(lost, 'batches')}."
    ]


def _some(names: Sequence[str], what: str = "types") -> str:
    """The first ten names, and how many there are if there are more."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} {what})" if len(names) > 10 else "")


def refuse_others(adata: Any) -> None:
    """Refuse with a TypeError what is no AnnData: baselines are made of genes, and a MuData has more than these."""
    if not isinstance(adata, ad.AnnData):
        way = ""
        if hasattr(adata, "mod"):
            way = (
                " Of a MuData the genes are compared: embed it, cp.tl.embed(mdata, weights), put the embedding beside "
                'the genes, rna = mdata["rna"].copy() and rna.obsm[key] = mdata[rna.obs_names].obsm[key], and name its '
                "key; or give rna and the weights, of which its genes are then read."
            )
        msg = f"An AnnData with raw counts of genes is needed; found a {type(adata).__name__}.{way}"
        raise TypeError(msg)


def _refuse_missing(adata: ad.AnnData, keys: Sequence[str | None], layer: str | None) -> None:
    for key in keys:
        if key is not None and key not in adata.obs:
            msg = f"{key!r} not found in adata.obs; its columns are {list(adata.obs.columns)}."
            raise KeyError(msg)
        if key is not None and adata.obs[key].ndim != 1:
            msg = f"adata.obs has several columns that are called {key!r}: rename or drop all but one."
            raise ValueError(msg)
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
    baselines = {"PCA", "HVG", "scVI", ON_GENES, RIDGE, MAJORITY, CHOSEN}
    taken = {name for name in named if name in baselines or name.startswith(AT_RANDOM)}
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
    if values.dtype.kind not in "fiub":
        msg = f"The embedding {name!r} holds {values.dtype}; real numbers are needed."
        raise ValueError(msg)
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        msg = f"The embedding {name!r} is not finite, first in row {row}. Leave such cells out of the data."
        raise ValueError(msg)
    middle = values.mean(axis=0)
    spread = np.abs(values - middle).max(initial=0)
    if spread == 0:
        msg = f"The embedding {name!r} is the same for all cells."
        raise ValueError(msg)
    if np.abs(values).max() > FAR * spread or not 1 / FAR < spread < FAR:  # more than few bits can hold
        values = (values - middle) / spread
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
        if model.gene_match is None:  # before anything is embedded
            msg = (
                f"{name} ({cls.__name__}) reads no genes of these data, and the baselines are made of genes. Give it "
                "cells with genes; an embedding of peaks can be compared with them as a key of obsm."
            )
            raise ValueError(msg)
        _note_trained_on(task, name, trained_on(model, cells.X[task.codes >= 0]))
        if embed:
            latent = model.get_latent_representation(**options)
            task.methods.append(methods.fixed(name, latent, seen=task.seen_by(name)))
        seconds = round(time.perf_counter() - start, 1)
        task.provenance[name] = {**model.provenance(), "seconds": seconds}
        genes = np.flatnonzero(model.gene_match.index >= 0)
        twin = random_twin(model, cells, seed=0)
        try:
            at_random = twin.get_latent_representation(**options)
        finally:
            twin.release()
    task.genes.add(f"the genes of {name}", genes)
    return [methods.fixed(f"{AT_RANDOM}{name}", at_random, kind="baseline", seen="no cell")]


def trained_on(model: Any, counts: sp.csr_matrix) -> int | None:
    """How many cells the weights of a model were trained on; None if that cannot be known.

    No cell can be told from another of which most genes are missing, and those that are most of the counts.
    """
    from cellprior.weights import fingerprints

    if model.trained_on_ is None:
        return None
    cells = fingerprints(counts, model.gene_match.index)
    if n_known := int(np.isin(cells, model.trained_on_).sum()):
        return n_known
    there = np.isin(np.arange(len(model.genes)), model.gene_match.index)
    ribosomal = model.genes["symbol"].str.contains(r"^RP[LS]\d", case=False).to_numpy()
    whole = there.mean() > 0.5 and (not ribosomal.any() or there[ribosomal].mean() > 0.5)
    return 0 if whole and np.mean(cells > 0) > 0.5 else None


def _note_trained_on(task: Task, name: str, n_known: int | None) -> None:
    if n_known is None:
        task.notes.append(NOT_KNOWN.format(name))
        return
    task.n_trained_on[name] = n_known
    some = f"{n_known:,}" if n_known else "none"
    task.notes.append(
        f"{name} was trained on {some} of the {task.n_asked:,} cells, as far as their counts tell."
    )


def seen_by_weights(n_known: int | None, n_cells: int) -> Seen:
    """What an embedding has learned from, by how many of the cells its weights were trained on."""
    if n_known is None:
        return "not known"
    return "these cells" if n_known > FEW_KNOWN * n_cells else "no cell"


def _twin_of_record(task: Task, cells: ad.AnnData, name: str, record: Mapping[str, Any]) -> list[Method]:
    """Baselines of an embedding that :func:`cellprior.tl.embed` has written, from what it says of its weights."""
    if "weights" not in record:
        task.notes.append(
            f"{name} is an array: its genes and its network with random weights are not compared with. If it was made "
            "with these labels, its scores prove nothing."
        )
        return []
    from cellprior.weights import WeightsError

    setup = {key: record.get("params", {}).get(key) for key in ("batch_key", "gene_key")}
    try:
        return _from_weights(task, cells, name, record["weights"], {}, embed=False, **setup)
    except WeightsError as error:
        task.notes.append(f"{name}: its weights were not found again, so no baseline has its genes ({error})")
        return []


def copies_of(counts: sp.csr_matrix) -> np.ndarray:
    """Number of each cell, the same for cells with the same counts ``(cells,)``; empty cells are no copies."""
    seen: dict[object, int] = {}
    numbers = np.empty(counts.shape[0], dtype=np.int64)
    for i, (a, b) in enumerate(pairwise(counts.indptr)):
        key = (counts.indices[a:b].tobytes(), counts.data[a:b].tobytes()) if b > a else i
        numbers[i] = seen.setdefault(key, len(seen))
    return numbers
