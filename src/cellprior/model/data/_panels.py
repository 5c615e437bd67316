"""Genes by name: their rows in a model's vocabulary, and in which batches they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cellprior._obs import text_of
from cellprior.genes import GeneMatch
from cellprior.model.data._cells import Cells


def distinct(genes: pd.DataFrame) -> pd.DataFrame:
    """Genes of a vocabulary that have a name, the first of each; what the data have twice is added up when it is read.

    Parameters
    ----------
    genes
        As :func:`cellprior.genes._table.read_vocabulary` gives them.
    """
    name = genes["ensembl_id"].where(genes["ensembl_id"] != "", genes["symbol"])
    if "species" in genes:
        name = name.where(name == "", genes["species"] + " " + name)
    return genes[(name != "") & ~name.duplicated()].reset_index(drop=True)


def gene_rows(names: Sequence[str], genes: pd.DataFrame, match: GeneMatch) -> np.ndarray:
    """Vocabulary rows of genes, by names of the data, symbols or Ensembl ids.

    Raises KeyError if a gene is not in the vocabulary; TypeError if ``names`` is a text.
    """
    if isinstance(names, str):
        msg = f"genes={names!r} is one text; a list of names is needed: genes=[{names!r}]."
        raise TypeError(msg)
    row: dict[str, int] = {}
    for column in ("ensembl_id", "symbol"):
        once = ~genes[column].duplicated(keep=False)  # what two species have is known by the data alone
        row |= {name: i for i, name in enumerate(genes[column]) if name and once.iloc[i]}
    row.update({name: i for name, i in zip(match.var_names, match.index, strict=True) if i >= 0})
    if unknown := [name for name in names if name not in row]:
        msg = (
            f"Not in the model's vocabulary: {', '.join(unknown[:10])}{' ...' if len(unknown) > 10 else ''}."
        )
        raise KeyError(msg)
    return np.array([row[name] for name in names], dtype=np.int64)


def measured_genes(
    measured: Mapping[str, Sequence[str]] | None,
    genes: pd.DataFrame,
    match: GeneMatch,
    cells: Cells | None = None,
) -> np.ndarray:
    """Which vocabulary genes were measured, by category of ``batch_key`` ``(n_batches, n_genes)``.

    Without ``measured``, those of the data were, in all cells ``(1, n_genes)``. Names that the data have and the
    vocabulary lacks are passed over; the ``cells`` with their batches are needed with ``measured``. Raises KeyError
    if a gene is neither in the data nor in the vocabulary, or a batch of the data not in ``measured``; ValueError if
    ``measured`` is given without a ``batch_key``.
    """
    if measured is None:
        seen = np.zeros((1, len(genes)), dtype=bool)
        seen[0, match.index[match.index >= 0]] = True
        return seen
    if cells is None or cells.batch is None:
        msg = "measured= names genes by batch, but setup_anndata() was not given a batch_key."
        raise ValueError(msg)
    names, panels = cells.batches, {text_of(name): panel for name, panel in measured.items()}
    present = np.unique(cells.batch)
    if missing := [names[code] for code in present if names[code] not in panels]:
        msg = f"measured= says nothing about the batches {', '.join(missing)}."
        raise KeyError(msg)
    lost = set(match.var_names[match.index < 0])  # the gene match has reported these
    seen = np.zeros((len(names), len(genes)), dtype=bool)
    for code in present:
        panel = [name for name in panels[names[code]] if name not in lost]
        seen[code, gene_rows(panel, genes, match)] = True
    return seen


def refuse_unmeasured(counts: np.ndarray, known: np.ndarray, genes: pd.DataFrame) -> None:
    """Refuse counts ``(cells, n_genes)`` of genes that were not measured, in all cells or in each.

    Raises ValueError, with the name of a gene.
    """
    found = ((counts != 0) & ~known).any(axis=0)
    if found.any():
        gene = genes.iloc[int(np.argmax(found))]
        msg = (
            f"{int(found.sum())} genes have counts in a batch where measured= does not list them, the first "
            f"{gene['symbol'] or gene['ensembl_id']}. List them, or set their counts to 0."
        )
        raise ValueError(msg)
