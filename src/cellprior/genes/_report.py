"""What was found of the genes of a data set, and what was lost."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

import numpy as np
import pandas as pd

from cellprior.genes._kinds import GENE, counted

INDEX = "index"


class Report:
    """What the reports on genes and on peaks share."""

    index: np.ndarray
    route: np.ndarray
    _label_width: ClassVar[int]  # of the text

    @property
    def n_smaller(self) -> int:
        """Length of the smaller list."""
        raise NotImplementedError

    @property
    def n_matched(self) -> int:
        """Number of genes, or peaks, of the vocabulary that the data have."""
        return len(np.unique(self.index[self.index >= 0]))

    @property
    def n_summed(self) -> int:
        """Number of data columns that share their gene, or peak, of the vocabulary with an earlier column."""
        return int((self.index >= 0).sum()) - self.n_matched

    @property
    def coverage(self) -> float:
        """Matched genes, or peaks, over the smaller of the two lists: a small panel is judged fairly."""
        return self.n_matched / max(self.n_smaller, 1)

    @property
    def routes(self) -> dict[str, int]:
        """Number of matched data columns by route, the most frequent first."""
        return dict(Counter(self.route[self.index >= 0].tolist()).most_common())

    def _rows(self) -> list[tuple[str, str]]:
        """Label and value of each line."""
        raise NotImplementedError

    def __repr__(self) -> str:
        lines = (f"  {label:<{self._label_width}} {value}" for label, value in self._rows())
        return "\n".join([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        rows = "".join(
            f"<tr><th {left}>{label}</th><td {left}>{html.escape(value)}</td></tr>"
            for label, value in self._rows()
        )
        return f"<table><caption>{type(self).__name__}</caption><tbody>{rows}</tbody></table>"


@dataclass(frozen=True, eq=False, repr=False)
class GeneMatch(Report):
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
        "retired_symbol", "retired_id", "symbol_to_id", "id_to_symbol", "punctuation" (a symbol
        with other signs in it, such as `HLA.DRA`), "capitals" (a symbol of this very species, in other capitals), or
        "" if it was not.
    var_names
        Index of `var`.
    gene_counts
        Counts per data column, or None if they were not given.
    notes
        Sentences on what is remarkable, and on what could not be done.
    kind
        What each column is, shape `(n_vars,)`: "gene", or "antibody", "guide", "peak", "tag", "spike-in", "control",
        "custom" or "other", of which none has a vocabulary row. None stands for genes only.
    species
        Species that the data have genes of, and how many genes the vocabulary has of each; empty if it is of one.
    """

    _label_width: ClassVar[int] = 17
    index: np.ndarray
    source: str
    names: np.ndarray
    vocabulary: np.ndarray
    route: np.ndarray
    var_names: pd.Index
    gene_counts: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    kind: np.ndarray | None = None
    species: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_vocabulary(self) -> int:
        """Genes of the vocabulary, of the species that the data have."""
        return sum(self.species.values()) if self.species else len(self.vocabulary)

    @property
    def is_gene(self) -> np.ndarray:
        """Which data columns are genes, known to the vocabulary or not; shape `(n_vars,)`."""
        return np.ones(len(self.index), dtype=bool) if self.kind is None else self.kind == GENE

    @property
    def not_genes(self) -> dict[str, int]:
        """Number of data columns that are no genes, by kind, the most frequent first."""
        return {} if self.kind is None else dict(Counter(self.kind[~self.is_gene].tolist()).most_common())

    @property
    def n_smaller(self) -> int:
        """Length of the smaller list: distinct genes of the data, or of the vocabulary."""
        return min(_n_genes(self.names[self.is_gene]), self.n_vocabulary)

    @property
    def vocabulary_share(self) -> float:
        """Share of the vocabulary that the data have."""
        return self.n_matched / self.n_vocabulary

    @property
    def counts_share(self) -> float | None:
        """Share of the counts of genes in matched columns; None if counts were not given, or hold none."""
        if self.gene_counts is None or not (total := self.gene_counts[self.is_gene].sum()) > 0:
            return None
        return float(self.gene_counts[self.index >= 0].sum() / total)

    def to_frame(self) -> pd.DataFrame:
        """One row per data column: name, vocabulary row and gene, route, counts if known, and kind."""
        matched = self.index >= 0
        gene = np.where(matched, self.vocabulary[self.index], "")
        columns = {"name": self.names, "vocabulary_index": self.index, "gene": gene, "route": self.route}
        if self.gene_counts is not None:
            columns["counts"] = self.gene_counts
        columns["kind"] = np.full(len(self.index), GENE, dtype=object) if self.kind is None else self.kind
        return pd.DataFrame(columns, index=self.var_names)

    def summed_genes(self) -> dict[str, list[str]]:
        """Vocabulary genes that several data columns are added to, and the names of these."""
        rows, n = np.unique(self.index[self.index >= 0], return_counts=True)
        shared = np.flatnonzero(np.isin(self.index, rows[n > 1]))
        found: dict[str, list[str]] = {}
        for i in shared:
            found.setdefault(str(self.vocabulary[self.index[i]]), []).append(str(self.names[i]))
        return found

    def lost_genes(self, n: int = 10) -> pd.DataFrame:
        """Genes, as rows of `to_frame`, that the vocabulary lacks, those with most counts first."""
        lost = self.to_frame()[(self.index < 0) & self.is_gene]
        if self.gene_counts is not None:
            lost = lost.sort_values("counts", ascending=False, kind="stable")
        return lost.head(n)

    def _rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the report."""
        smaller = f"{self.n_matched:,} genes of {self.n_smaller:,}, the smaller of the two lists"
        found = f"{self.vocabulary_share:.3f} ({self.n_matched:,} of {self.n_vocabulary:,})"
        rows = [
            ("names", f"{len(self.names):,} data columns, read from {place(self.source)}"),
            ("coverage", f"{self.coverage:.3f} ({smaller})"),
            ("vocabulary found", found),
        ]
        if self.species:
            rows.insert(1, ("species", ", ".join(self.species)))
        if self.counts_share is not None:
            rows.append(("counts kept", f"{self.counts_share:.3f}"))
        rows.append(("matched by", ", ".join(f"{name} {n:,}" for name, n in self.routes.items()) or "-"))
        if self.n_summed:
            summed = f"{self.n_summed:,} of {len(self.names):,} columns, into the gene of an earlier column"
            some = (f"{' + '.join(names[:4])} into {gene}" for gene, names in self.summed_genes().items())
            rows.append(("summed", f"{summed}, such as {', '.join(islice(some, 3))}"))
        if self.kind is not None and self.not_genes:
            kinds = (f"{counted(self.kind, kind)} ({self._names_of(kind)})" for kind in self.not_genes)
            rows.append(("not genes", f"{', '.join(kinds)}: left out"))
        lost = self.lost_genes(5)
        if len(lost):
            examples = [name or "(no name)" for name in lost["name"]]
            if self.gene_counts is not None and self.counts_share is not None:
                shares = lost["counts"] / self.gene_counts[self.is_gene].sum()
                examples = [f"{name} ({share:.2%})" for name, share in zip(examples, shares, strict=True)]
            n_lost = (
                f"{int(((self.index < 0) & self.is_gene).sum()):,} of {int(self.is_gene.sum()):,} columns"
            )
            rows.append(("lost", f"{n_lost}, such as {', '.join(examples)}"))
        return rows + [("note", note) for note in self.notes]

    def _names_of(self, kind: str) -> str:
        """A few columns of a kind, by the names that were read, or else by those of the index."""
        some = np.flatnonzero(self.kind == kind)
        shown = (str(self.names[i]) or str(self.var_names[i]) for i in some[:3])
        return ", ".join(shown) + (", ..." if len(some) > 3 else "")


def _n_genes(names: np.ndarray) -> int:
    """Number of distinct names, every missing one counted."""
    n_missing = int((names == "").sum())
    return len(set(names)) - bool(n_missing) + n_missing


def place(source: str) -> str:
    return "the index" if source == INDEX else f"the column {source!r}"
