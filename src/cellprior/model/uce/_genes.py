"""Genes of UCE: by name, as vectors, and whether a cell expresses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellprior.genes import GeneMatch


def rows_of_genes(
    names: Sequence[str], genes: pd.DataFrame, match: GeneMatch | None, species: str | None
) -> np.ndarray:
    """Vocabulary rows of genes by name, of any species.

    Of names of the data, or symbols of the vocabulary, capitals do not count where that is no question. What the
    ``match`` of the data's genes, if there are data, says of a name counts first, unless ``species`` is given. Raises
    KeyError if a name means no gene, or genes of several species; TypeError if ``names`` is a text.
    """
    if isinstance(names, str):
        msg = f"genes={names!r} is one text; a list of names is needed: genes=[{names!r}]."
        raise TypeError(msg)
    rows = rows_of_species(genes, species)
    of_data: dict[str, int] = {}
    if match is not None and species is None:
        of_data = {name: i for name, i in zip(match.var_names, match.index, strict=True) if i >= 0}
    symbols = genes["symbol"].to_numpy()[rows]
    exact, capital = (_by_name(rows, spelled) for spelled in (symbols, [name.upper() for name in symbols]))
    found = []
    for name in names:
        where = [of_data[name]] if name in of_data else exact.get(name) or capital.get(name.upper()) or []
        if len(where) != 1:
            what = "no gene of the vocabulary"
            if where:
                several = ", ".join(genes["species"].iloc[where])
                what = f"a gene of {several}: say which species, species={genes['species'].iloc[where[0]]!r}"
            raise KeyError(f"{name!r} is {what}.")
        found += where
    return np.array(found, dtype=np.int64)


def rows_of_species(genes: pd.DataFrame, species: str | None) -> np.ndarray:
    """Vocabulary rows of one species, or all.

    Raises KeyError if there is none.
    """
    if species is None:
        return np.arange(len(genes))
    known = genes["species"] if "species" in genes else pd.Series("", index=genes.index)
    rows = np.flatnonzero(known == species)
    if not len(rows):
        names = ", ".join(filter(None, known.unique())) or "one, without a name"
        msg = f"species={species!r}: the weights know {names}."
        raise KeyError(msg)
    return rows


def _by_name(rows: np.ndarray, names: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, name in zip(rows.tolist(), names, strict=True):
        found.setdefault(name, []).append(row)
    return found


@torch.no_grad()
def gene_vectors(model: Any, adata: Any, species: str | None) -> pd.DataFrame:
    """What the network sees of genes; see :meth:`~cellprior.model.UCE.get_gene_representation`."""
    if adata is None and (model.adata is None or species is not None):
        rows = rows_of_species(model.genes, species)
        names = pd.Index(model.genes["symbol"].to_numpy()[rows])
    else:
        rows, names = model._known_genes(adata)
        kept = np.isin(rows, rows_of_species(model.genes, species))
        rows, names = rows[kept], names[kept]
    table = model.module.token_table.weight
    return pd.DataFrame(table[torch.from_numpy(rows).to(table.device)].cpu().numpy(), index=names)


def expressed(rows: np.ndarray) -> Any:
    """What gives the probability that genes are expressed ``(cells, genes)``, of the chunks of one unit."""

    def encode(encoder: Any, chunks: Iterable[Tensor], covariates: Any) -> Iterator[Tensor]:
        genes = torch.from_numpy(rows).to(encoder.module.device)
        for latent in encoder.encode(chunks, covariates):
            yield encoder.module.predict(latent, genes).sigmoid()

    return encode
