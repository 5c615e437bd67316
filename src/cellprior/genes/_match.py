"""Match the columns of a data set to the genes of a vocabulary, by name."""

from __future__ import annotations

import html
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellprior.genes._table import TABLES, Names, load, read_vocabulary, species_of, species_of_most

LOW_COVERAGE = 0.5
MIN_GENES = 20
_INDEX = "index"


class GeneMatchError(ValueError):
    """Too few genes of the data belong to the vocabulary, or they are those of another species."""


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Which column of the data is which gene of a vocabulary.

    Attributes
    ----------
    index
        Vocabulary row of each data column, -1 if it has none, shape `(n_vars,)`. Where several columns carry
        the same row (duplicated names, a current and a retired name), their counts are to be summed.
    source
        Where the names were read: "index" or a column of `var`.
    names
        The names as read, shape `(n_vars,)`.
    vocabulary
        One name per vocabulary gene: its symbol, or its Ensembl id if it has none.
    route
        How each column was matched, shape `(n_vars,)`: "ensembl_id" or "symbol" (same on both sides),
        "retired_symbol", "retired_id", "symbol_to_id", "id_to_symbol", or "" if it was not.
    var_names
        Index of `var`.
    gene_counts
        Counts per data column, or None if they were not given.
    notes
        Sentences on what could not be done.
    """

    index: np.ndarray
    source: str
    names: np.ndarray
    vocabulary: np.ndarray
    route: np.ndarray
    var_names: pd.Index
    gene_counts: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_matched(self) -> int:
        """Number of vocabulary genes that the data have."""
        return len(np.unique(self.index[self.index >= 0]))

    @property
    def n_summed(self) -> int:
        """Number of data columns that share their vocabulary gene with an earlier column."""
        return int((self.index >= 0).sum()) - self.n_matched

    @property
    def n_smaller(self) -> int:
        """Length of the smaller list: distinct names of the data, or genes of the vocabulary."""
        return min(_n_genes(self.names), len(self.vocabulary))

    @property
    def coverage(self) -> float:
        """Matched vocabulary genes over the smaller of the two lists: a small panel is judged fairly."""
        return self.n_matched / max(self.n_smaller, 1)

    @property
    def vocabulary_share(self) -> float:
        """Share of the vocabulary that the data have."""
        return self.n_matched / len(self.vocabulary)

    @property
    def counts_share(self) -> float | None:
        """Share of the data's counts in matched columns; None if counts were not given, or hold none."""
        if self.gene_counts is None or not self.gene_counts.sum() > 0:
            return None
        return float(self.gene_counts[self.index >= 0].sum() / self.gene_counts.sum())

    @property
    def routes(self) -> dict[str, int]:
        """Number of matched data columns by route, the most frequent first."""
        return dict(Counter(self.route[self.index >= 0].tolist()).most_common())

    def to_frame(self) -> pd.DataFrame:
        """One row per data column: its name, vocabulary row and gene, route, and counts if known."""
        matched = self.index >= 0
        gene = np.where(matched, self.vocabulary[self.index], "")
        columns = {"name": self.names, "vocabulary_index": self.index, "gene": gene, "route": self.route}
        if self.gene_counts is not None:
            columns["counts"] = self.gene_counts
        return pd.DataFrame(columns, index=self.var_names)

    def lost_genes(self, n: int = 10) -> pd.DataFrame:
        """Rows of `to_frame` without a vocabulary gene, those with most counts first."""
        lost = self.to_frame()[self.index < 0]
        if self.gene_counts is not None:
            lost = lost.sort_values("counts", ascending=False, kind="stable")
        return lost.head(n)

    def _rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the report."""
        smaller = f"{self.n_matched:,} genes of {self.n_smaller:,}, the smaller of the two lists"
        found = f"{self.vocabulary_share:.3f} ({self.n_matched:,} of {len(self.vocabulary):,})"
        rows = [
            ("names", f"{len(self.names):,} data columns, read from {_place(self.source)}"),
            ("coverage", f"{self.coverage:.3f} ({smaller})"),
            ("vocabulary found", found),
        ]
        if self.counts_share is not None:
            rows.append(("counts kept", f"{self.counts_share:.3f}"))
        rows.append(("matched by", ", ".join(f"{name} {n:,}" for name, n in self.routes.items()) or "-"))
        if self.n_summed:
            summed = f"{self.n_summed:,} of {len(self.names):,} columns, into the gene of an earlier column"
            rows.append(("summed", summed))
        lost = self.lost_genes(5)
        if len(lost):
            examples = [name or "(no name)" for name in lost["name"]]
            if self.gene_counts is not None and self.counts_share is not None:
                shares = lost["counts"] / self.gene_counts.sum()
                examples = [f"{name} ({share:.2%})" for name, share in zip(examples, shares, strict=True)]
            n_lost = f"{int((self.index < 0).sum()):,} of {len(self.names):,} columns"
            rows.append(("lost", f"{n_lost}, such as {', '.join(examples)}"))
        return rows + [("note", note) for note in self.notes]

    def __repr__(self) -> str:
        return "\n".join(["GeneMatch", *(f"  {label:<17} {value}" for label, value in self._rows())])

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        rows = "".join(
            f"<tr><th {left}>{label}</th><td {left}>{html.escape(value)}</td></tr>"
            for label, value in self._rows()
        )
        return f"<table><caption>GeneMatch</caption><tbody>{rows}</tbody></table>"


def match(
    var: pd.DataFrame,
    vocabulary: Sequence[str] | pd.DataFrame,
    *,
    gene_key: str | None = None,
    gene_counts: np.ndarray | None = None,
    min_coverage: float = 0.25,
) -> GeneMatch:
    """Match the genes of a data set to those of a vocabulary.

    Names may be symbols or Ensembl ids, with or without version, in the index or any string column of `var`;
    the place that matches most vocabulary genes is used, the index if equal. The same name always wins; then
    a retired symbol counts as the current one and the other way round, as long as it means one gene. What the
    vocabulary does not say about its genes is looked up in GENCODE (human 48 and 38, mouse M37), and only if
    that can help.

    Several columns of one gene (duplicated names, a current and a retired name) get the same row: sum them.

    Parameters
    ----------
    var
        Annotation of the data's genes (`AnnData.var`).
    vocabulary
        Names, or a frame with `ensembl_id`, `symbol` or both, and optionally `previous_symbols` ("A|B").
        A gene that is listed twice is matched to its first row.
    gene_key
        Column of `var` to read the names from, or "index"; found by itself if None.
    gene_counts
        Counts per gene over all cells, shape `(n_vars,)`, to report what is lost.
    min_coverage
        Least share of the smaller list that has to match.

    Raises
    ------
    GeneMatchError
        Coverage below `min_coverage`, fewer than 20 genes in common (or fewer than the whole of a smaller
        vocabulary), or genes of another species.
    ValueError
        Unknown `gene_key`, `gene_counts` of another length, or an unusable vocabulary.

    Warns
    -----
    UserWarning
        Coverage below 0.5.
    """
    genes = read_vocabulary(vocabulary)
    counts = None if gene_counts is None else np.asarray(gene_counts, dtype=np.float64).ravel()
    if counts is not None and len(counts) != len(var):
        msg = f"gene_counts has {len(counts)} values, var has {len(var)} genes. Pass one total per gene."
        raise ValueError(msg)

    sources = [Names.read(label, values) for label, values in _sources(var, gene_key)]
    identities = pd.unique(np.where(genes["ensembl_id"] != "", genes["ensembl_id"], genes["symbol"]))
    species = species_of_most(identities, n_rows=len(genes))
    foreign = [names for names in sources if _is_foreign(names.species, species)]
    own = [names for names in sources if names not in foreign]
    if not own:
        raise GeneMatchError(_other_species(foreign[0], species, genes))

    lookup = _Lookup(genes)
    results = [lookup.find(names) for names in own]
    notes: tuple[str, ...] = ()
    if species in TABLES and _table_may_help(results, genes, species):
        table, notes = load(species)
        if table is not None:
            lookup = _Lookup(table.complete(genes), given=genes)
            results = [lookup.find(names) for names in own]
    found = _best(results)
    result = GeneMatch(
        index=found.rows[found.names.codes],
        source=found.names.source,
        names=found.names.distinct[found.names.codes],
        vocabulary=np.where(genes["symbol"] != "", genes["symbol"], genes["ensembl_id"]).astype(object),
        route=found.routes[found.names.codes],
        var_names=var.index,
        gene_counts=counts,
        notes=notes,
    )
    if result.n_matched < min(MIN_GENES, len(genes)) or result.coverage < min_coverage:
        if foreign:
            raise GeneMatchError(_other_species(foreign[0], species, genes))
        raise GeneMatchError(_too_few(result, found.names, sources, min_coverage))
    if result.coverage < LOW_COVERAGE:
        msg = (
            f"Only {result.n_matched:,} of {result.n_smaller:,} genes match the vocabulary (coverage "
            f"{result.coverage:.2f}). Look at what is lost with `lost_genes()` before relying on the result."
        )
        warnings.warn(" ".join([msg, *notes]), UserWarning, stacklevel=2)
    return result


@dataclass(frozen=True)
class _Found:
    """Vocabulary row (-1 if none) and route of each distinct name."""

    names: Names
    rows: np.ndarray
    routes: np.ndarray

    @property
    def n_matched(self) -> int:
        return len(np.unique(self.rows[self.rows >= 0]))


class _Lookup:
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
            (row, name) for row, joined in enumerate(genes["previous_symbols"]) for name in joined.split("|")
        ]
        identities = [identifier or symbol for identifier, symbol in zip(ids, symbols, strict=True)]
        self.by_id = _first_rows(enumerate(ids), identities)
        self.by_symbol = _first_rows(enumerate(symbols), identities)
        self.by_previous = _first_rows(previous, identities)

    def find(self, names: Names) -> _Found:
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
        return _Found(names, rows, routes)


def _first_rows(pairs: Iterable[tuple[int, str]], identities: list[str]) -> dict[str, int]:
    """First row of each name; a name that means several genes is left out."""
    rows: dict[str, int] = {}
    ambiguous = set()
    for row, name in pairs:
        if identities[rows.setdefault(name, row)] != identities[row]:
            ambiguous.add(name)
    return {name: row for name, row in rows.items() if name and name not in ambiguous}


def _best(results: list[_Found]) -> _Found:
    """The place that matches most vocabulary genes; the first, which is the index, if equal."""
    return max(results, key=lambda found: found.n_matched)


def _table_may_help(results: list[_Found], genes: pd.DataFrame, species: str) -> bool:
    """Whether names are unmatched that look as if the tables could turn them into vocabulary genes."""
    best = _best(results)
    if best.n_matched == len(genes):
        return False
    helps_ids = (genes["ensembl_id"] == "").mean() > 0.5
    # One release knows nothing about retired symbols.
    retired_unknown = len(TABLES[species]) > 1 and (genes["previous_symbols"] == "").all()
    helps_symbols = retired_unknown or (genes["symbol"] == "").mean() > 0.5
    if best.n_matched >= LOW_COVERAGE * min(len(best.names.codes), len(genes)):
        results = [best]  # no other place will do better
    return any(
        row < 0 and (helps_ids if identifier else helps_symbols) and species_of(name) == species
        for found in results
        if found.names.species == species
        for name, identifier, row in zip(found.names.distinct, found.names.ids, found.rows, strict=True)
    )


def _sources(var: pd.DataFrame, gene_key: str | None) -> list[tuple[str, pd.Series]]:
    """The places of `var` that may hold gene names, the index first."""
    places: list[tuple[str, pd.Series]] = [(_INDEX, var.index.to_series())]
    if gene_key is None:
        return places + [(str(label), column) for label, column in var.items() if _is_text(column)]
    if gene_key in var.columns:
        return [(gene_key, var[gene_key])]
    if gene_key == _INDEX:
        return places
    columns = ", ".join(map(repr, var.columns)) or "none"
    msg = f"var has no column {gene_key!r}. Columns: {columns}. Name one of them, or 'index'."
    raise ValueError(msg)


def _is_text(column: pd.Series) -> bool:
    """Whether a column, or the categories of it, holds strings."""
    values: Any = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return pd.api.types.infer_dtype(values, skipna=True) in ("string", "mixed", "mixed-integer")


def _is_foreign(species: str | None, wanted: str | None) -> bool:
    """Whether two known species differ; symbols alone do not tell mouse from rat."""
    return None not in (species, wanted) and species != wanted and "human" in (species, wanted)


def _n_genes(names: np.ndarray) -> int:
    """Number of distinct names, every missing one counted."""
    n_missing = int((names == "").sum())
    return len(set(names)) - bool(n_missing) + n_missing


def _place(source: str) -> str:
    return "the index" if source == _INDEX else f"the column {source!r}"


def _examples(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names if name][:4]
    return ", ".join(shown) or "none"


def _other_species(names: Names, species: str | None, genes: pd.DataFrame) -> str:
    kind = {"mouse": "mouse (or rat)", "other": "another species'"}.get(str(names.species), names.species)
    wanted = genes["symbol"] if (genes["symbol"] != "").any() else genes["ensembl_id"]
    return (
        f"The names in {_place(names.source)} are {kind} gene names ({_examples(names.distinct)}), those of "
        f"the vocabulary are {species} ({_examples(wanted)}). One species is not turned into the other: "
        "changing upper to lower case or back pairs genes that are not the same. Use a model trained on this "
        "species, or map the genes to one-to-one orthologues (Ensembl BioMart has them) in a column of var."
    )


def _too_few(result: GeneMatch, names: Names, sources: list[Names], min_coverage: float) -> str:
    lines = [
        f"{result.n_matched:,} of {result.n_smaller:,} genes match the vocabulary (coverage "
        f"{result.coverage:.3f}); needed: {min(MIN_GENES, len(result.vocabulary))} genes and a coverage of "
        f"{min_coverage}.",
        f"Looked in: {', '.join(other.source for other in sources)}. Best: {_place(result.source)}, with "
        f"{_examples(names.distinct)}; the vocabulary has {_examples(result.vocabulary)}.",
        "Put gene symbols or Ensembl ids into var_names or a column of var (gene_key names the column).",
    ]
    texts = [name for name in names.distinct[:100] if name]
    if texts and all(name.isdecimal() for name in texts):
        lines.append("The names are numbers (rows or Entrez ids), which say nothing about a gene here.")
    elif texts and all(name == name.lower() and not name.startswith("chr") for name in texts):
        lines.append("The names are lower-case: if they are human symbols, upper-case them first.")
    return "\n".join([*lines, *result.notes])
