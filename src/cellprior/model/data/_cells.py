"""Cells that are read: where the counts of each are, of one modality or two, and who they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from torch import Tensor

from cellprior._matrix import Matrix, matrix_of
from cellprior._obs import read_column
from cellprior.genes import GeneMatch, PeakMatch
from cellprior.model.data._counts import (
    N_CHECKED,
    by_cell,
    check_counts,
    csr_tensor,
    read_rows,
    refuse_by_gene,
    select_columns,
)
from cellprior.model.data._fingerprint import digest, digest_of_counts

FEATURE = {"rna": "gene", "atac": "peak"}
MODALITIES = tuple(FEATURE)


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts of one modality, which are checked and brought into vocabulary order as they are read.

    Attributes
    ----------
    adata
        What names cells, features and layers.
    layer
        Layer with the counts, None for `X`.
    modality
        Which one.
    argument
        What names the layer, for errors.
    x
        The counts, a row per cell of the modality.
    row
        Row of each cell in it, -1 if it has none ``(cells,)``.
    match
        Of the features and a vocabulary; None as long as they are not matched.
    column
        Place of each feature among those that are read, -1 for none.
    n_columns
        Number of those.
    """

    adata: Any
    layer: str | None
    modality: str
    argument: str
    x: Any
    row: np.ndarray
    match: Any = None
    column: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    n_columns: int = 0

    @property
    def matrix(self) -> Matrix:
        """The counts as they are stored, and their features."""
        return matrix_of(self.adata, self.layer, argument=self.argument)

    def matched(self, match: GeneMatch | PeakMatch, column: np.ndarray, n_columns: int) -> Counts:
        """The same, ready to be read."""
        return replace(self, match=match, column=column, n_columns=n_columns)

    @cached_property
    def _by_cell(self) -> Any:
        return by_cell(self.x, f"of {self.modality}")

    def read(self, cells: np.ndarray) -> sp.csr_matrix:
        """Raw counts of some cells, all of which have the modality, float32 ``(cells, n_columns)``.

        Raises NotCountsError if they are not counts.
        """
        return select_columns(self.read_all(cells), self.column, self.n_columns)

    def over_vocabulary(self, cells: np.ndarray, n_features: int) -> np.ndarray:
        """The same of all features of the vocabulary, dense ``(cells, n_features)``; 0 of those that the data lack."""
        return select_columns(self.read_all(cells), self.match.index, n_features).toarray()

    def read_all(self, cells: np.ndarray) -> sp.csr_matrix:
        """The same of all features of the data, in their order."""
        rows = self.row[cells]
        counts = read_rows(self._by_cell, rows)
        of: dict[str, Any] = {"argument": self.argument, "feature": FEATURE[self.modality]}
        check_counts(counts, rows, self.adata, self.layer, **of)
        return counts


class Joint(NamedTuple):
    """Counts of some cells with up to two modalities.

    By modality, the positions of the cells that have it, and their counts ``(positions, features)``.
    """

    n_cells: int
    counts: dict[str, tuple[np.ndarray, Tensor]]


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells, and where the counts of each are found.

    Attributes
    ----------
    obs
        Annotation, a row per cell.
    counts
        By modality: ``"rna"`` alone of an AnnData.
    joint
        Whether a cell may have two modalities.
    batch, batches
        Code of the batch of each cell, None without one ``(cells,)``; and the names of the codes.
    covariates
        Further numbers that a network is told of each cell, by name ``(cells,)``.
    """

    obs: pd.DataFrame
    counts: dict[str, Counts]
    joint: bool = False
    batch: np.ndarray | None = None
    batches: Sequence[str] = ()
    covariates: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self.obs)

    @property
    def n_columns(self) -> int:
        """Features of a cell that are read."""
        return sum(counts.n_columns for counts in self.counts.values())

    def has(self, modality: str) -> np.ndarray:
        """Which cells have a modality ``(cells,)``."""
        counts = self.counts.get(modality)
        return np.zeros(self.n_obs, dtype=bool) if counts is None else counts.row >= 0

    @property
    def complete(self) -> np.ndarray:
        """Which cells have both modalities ``(cells,)``."""
        return np.all([self.has(name) for name in MODALITIES], axis=0)

    @property
    def known(self) -> np.ndarray:
        """Which cells have any of the modalities ``(cells,)``."""
        return np.any([self.has(name) for name in self.counts], axis=0)

    def only(self, modalities: Sequence[str]) -> Cells:
        """The same cells, with some of their modalities."""
        return replace(self, counts={name: self.counts[name] for name in modalities})

    def read(self, cells: np.ndarray) -> Tensor | Joint:
        """Counts of some cells ``(cells, n_columns)``, sparse CSR."""
        if not self.joint:
            (counts,) = self.counts.values()
            return csr_tensor(counts.read(cells))
        found = {}
        for name, counts in self.counts.items():
            at = np.flatnonzero(counts.row[cells] >= 0)
            if len(at):
                found[name] = at, csr_tensor(counts.read(cells[at]))
        return Joint(len(cells), found)

    def matrices(self) -> Iterator[Any]:
        """Counts as they are stored, where they are."""
        return (counts.x for counts in self.counts.values())

    def fingerprint(self) -> dict[str, str]:
        """What the cells are known again by.

        Raises ValueError if the counts cannot be read cell by cell.
        """
        found = {"cells": digest(self.obs.index)}
        for name, counts in self.counts.items():
            refuse_by_gene(counts.x)
            prefix = f"{name} " if self.joint else ""
            found[f"{prefix}counts"] = digest_of_counts(counts.x)
            row = [counts.row] if self.joint else []
            names = counts.matrix.var.index
            found[f"{prefix}{FEATURE[name]}s"] = digest(names, counts.match.index, *row)
        if self.batch is not None:
            found["batches"] = digest(self.batch)
        for name, values in self.covariates.items():
            found[name] = digest(values)
        return found


def refuse_no_counts(
    adata: ad.AnnData, layer: str | None, *, argument: str = "layer", feature: str = "gene"
) -> None:
    """Refuse data without cells, and data whose first cells are not counts.

    Raises ValueError if there is no cell, no feature, or no such layer; NotCountsError if they are not counts.
    """
    matrix = matrix_of(adata, layer, argument=argument)
    if adata.n_obs == 0 or len(matrix.var) == 0:
        msg = f"The AnnData has {adata.n_obs} cells and {len(matrix.var)} {feature}s; at least one of each is needed."
        raise ValueError(msg)
    rows = np.arange(min(N_CHECKED, adata.n_obs))
    counts = read_rows(matrix.x, rows, where=matrix.where)
    check_counts(counts, rows, adata, layer, argument=argument, feature=feature)


def cells_of_anndata(adata: ad.AnnData, setup_args: Mapping[str, Any]) -> Cells:
    """Cells of an AnnData with one matrix of counts, not matched yet, by ``layer`` and ``batch_key`` of the setup.

    Raises ValueError if there is no such layer, or a cell has no batch; KeyError if ``batch_key`` is not in ``obs``.
    """
    layer, key = setup_args["layer"], setup_args["batch_key"]
    counts = Counts(adata, layer, "rna", "layer", matrix_of(adata, layer).x, np.arange(adata.n_obs))
    batch, batches = (None, []) if key is None else read_column(adata.obs, key)
    return Cells(adata.obs, {"rna": counts}, batch=batch, batches=batches)
