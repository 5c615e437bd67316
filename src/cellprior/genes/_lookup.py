"""From a name to the row of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from cellprior.genes._kinds import kinds_by_name
from cellprior.genes._spelling import plain
from cellprior.genes._table import Names


@dataclass(frozen=True)
class Found:
    """Vocabulary row (-1 if none) and route of each distinct name."""

    names: Names
    rows: np.ndarray
    routes: np.ndarray

    @property
    def n_matched(self) -> int:
        return len(np.unique(self.rows[self.rows >= 0]))


class Lookup:
    """Name to vocabulary row.

    Parameters
    ----------
    genes
        The vocabulary, as `read_vocabulary` returns it.
    given
        The same before a table completed it, to tell a name of the vocabulary from a translated one.
    """

    def __init__(self, genes: pd.DataFrame, *, given: pd.DataFrame | None = None) -> None:
        given = genes if given is None else given
        self.gives_id = (given["ensembl_id"] != "").to_numpy()
        self.gives_symbol = (given["symbol"] != "").to_numpy()
        ids, symbols = genes["ensembl_id"].tolist(), genes["symbol"].tolist()
        previous = [
            (row, name)
            for row, joined in enumerate(genes["previous_symbols"])
            if joined
            for name in joined.split("|")
        ]
        identities = [identifier or symbol for identifier, symbol in zip(ids, symbols, strict=True)]
        self.by_id = _first_rows(enumerate(ids), identities)
        self.by_symbol = _first_rows(enumerate(symbols), identities)
        self.by_previous = _first_rows(previous, identities)
        self._spelled = (symbols, previous, identities)

    def find(self, names: Names) -> Found:
        rows = np.full(len(names.distinct), -1, dtype=np.int64)
        routes = np.full(len(names.distinct), "", dtype=object)
        for i, (name, identifier) in enumerate(zip(names.distinct, names.ids, strict=True)):
            if identifier:
                row = self.by_id.get(identifier, -1)
                route = "ensembl_id" if self.gives_id[row] else "id_to_symbol"
                if row < 0:  # among the former names of a gene may be ids
                    row, route = self.by_previous.get(identifier, -1), "retired_id"
            elif (row := self.by_symbol.get(name, -1)) >= 0:
                route = "symbol" if self.gives_symbol[row] else "symbol_to_id"
            else:
                row, route = self.by_previous.get(name, -1), "retired_symbol"
            if row >= 0:
                rows[i], routes[i] = row, route
        return Found(names, rows, routes)

    def find_with_other_signs(self, found: Found) -> Found:
        """Add what is found if signs in the names do not count."""
        lost = np.flatnonzero(found.rows < 0)
        spelled = plain(found.names.distinct[lost])
        more = [
            (i, row) for i, name in zip(lost, spelled, strict=True) if (row := self.by_spelling.get(name))
        ]
        for i, row in more:
            found.rows[i], found.routes[i] = row - 1, "punctuation"
        return found

    @cached_property
    def by_spelling(self) -> dict[str, int]:
        """Row + 1 of each symbol with signs in it, current or retired, whatever the signs."""
        symbols, previous, identities = self._spelled
        rows = [*range(len(symbols)), *(row for row, _ in previous)]
        names = plain([*symbols, *(name for _, name in previous)])
        pairs = [(row, name) for row, name in zip(rows, names, strict=True) if "-" in name]
        # R puts an X before a digit: 7SK becomes X7SK
        pairs += [(row, f"X{name}") for row, name in zip(rows, names, strict=True) if name[:1].isdigit()]
        return {name: row + 1 for name, row in _first_rows(pairs, identities).items()}

    def kinds_by_name(self, names: Names) -> dict[int, str]:
        """What names are that are those of no gene, by their number; one that the vocabulary has is a gene."""
        found = kinds_by_name(names.distinct, names.text)
        return {
            i: kind
            for i, kind in found.items()
            if names.distinct[i] not in self.by_symbol and names.distinct[i] not in self.by_id
        }


def _first_rows(pairs: Iterable[tuple[int, str]], identities: list[str]) -> dict[str, int]:
    """First row of each name; a name that means several genes is left out."""
    rows: dict[str, int] = {}
    ambiguous = set()
    for row, name in pairs:
        if identities[rows.setdefault(name, row)] != identities[row]:
            ambiguous.add(name)
    return {name: row for name, row in rows.items() if name and name not in ambiguous}


def best(results: list[Found]) -> Found:
    """The place that matches most vocabulary genes; the first, which is the index, if equal."""
    return max(results, key=lambda found: found.n_matched)
