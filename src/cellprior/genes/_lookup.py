"""From a name to the row of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from cellprior.genes._kinds import kinds_by_name
from cellprior.genes._spelling import plain, signed
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
    """Name to row of the vocabulary, as `read_vocabulary` returns it.

    ``given`` is the same before a table completed it, to tell a name of the vocabulary from a translated one.
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
        for i, name in signed(found.names.distinct[lost]):
            if (row := self.by_spelling.get(name, -1)) >= 0:
                found.rows[lost[i]], found.routes[lost[i]] = row, "punctuation"
        return found

    def find_in_capitals(self, found: Found) -> Found:
        """Add what is found if capitals do not count."""
        for i in np.flatnonzero(found.rows < 0):
            if (row := self.by_capitals.get(found.names.distinct[i].upper(), -1)) >= 0:
                found.rows[i], found.routes[i] = row, "capitals"
        return found

    @cached_property
    def by_capitals(self) -> dict[str, int]:
        """Row of each symbol, current or retired, in capitals."""
        symbols, previous, identities = self._spelled
        current = _first_rows(((row, name.upper()) for row, name in enumerate(symbols)), identities)
        retired = _first_rows(((row, name.upper()) for row, name in previous), identities)
        return {**retired, **current}

    @cached_property
    def by_spelling(self) -> dict[str, int]:
        """Row of each symbol with signs in it, current or retired, whatever the signs."""
        symbols, previous, identities = self._spelled
        pairs = []
        for rows, names in (
            (range(len(symbols)), plain(symbols)),
            ([row for row, _ in previous], plain([name for _, name in previous])),
        ):
            # R puts an X before a digit: 7SK becomes X7SK
            pairs += [
                (row, name if "-" in name else f"X{name}")
                for row, name in zip(rows, names, strict=True)
                if "-" in name or name[:1].isdigit()
            ]
        pairs += [(row, f"X{name}") for row, name in pairs if name[:1].isdigit()]
        return _first_rows(pairs, identities)

    def kinds_by_name(self, found: Found) -> dict[int, str]:
        """What names are that are those of no gene, by their number; one that the vocabulary has is a gene."""
        names = found.names
        if 3 * len(names.distinct) < len(names.codes):
            return {}  # few values for many rows say something else (protein_coding)
        rest = np.flatnonzero(found.rows < 0)
        if any(names.ids):  # one may stand behind another word (antisense_ENSG00000000003)
            ids = enumerate(zip(names.ids, names.distinct, strict=True))
            more = [
                i for i, (identifier, name) in ids if identifier and name[:3] != "ENS" and found.rows[i] >= 0
            ]
            rest = np.concatenate([rest, np.array(more, dtype=np.int64)])
        return {int(rest[i]): kind for i, kind in kinds_by_name(names.distinct[rest]).items()}


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
