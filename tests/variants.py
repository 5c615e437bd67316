"""The same counts in many guises, drawn at random, and what they are: a float64 array, made up before the guise.

Nothing here asks the package what a name, a type or a layout means: the drawing knows it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp

SIGNS = str.maketrans(dict.fromkeys("._\u2010\u2011", "-"))
LARGEST = {"bool": 1, "int8": 100, "uint8": 200, "float16": 2047}  # of a count that the type holds exactly
DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split()
FORMATS = (
    "dense|Fortran order|big-endian|strided|csr|csr array|csc|csc array|csr unsorted|csr with zeros|csr in pieces|"
    "csr of 64 bits|dask|dask csr"
).split("|")
TYPES = {
    "gene": ["Gene Expression", "gene expression", "GEX", "rna"],
    "antibody": ["Antibody Capture", "antibody capture", "ADT", "protein"],
    "guide": ["CRISPR Guide Capture", "sgRNA", "CRISPR guide capture"],
    "peak": ["Peaks", "peaks", "ATAC"],
    "tag": ["Multiplexing Capture", "HTO"],
    "other": ["Custom", "VDJ Capture"],
}


@dataclass(frozen=True)
class Refusal:
    """What may be raised instead of a result, by the name of its class, and what its message has to name."""

    error: str
    words: tuple[str, ...] = ()
    must: bool = True

    def fits(self, error: Exception) -> bool:
        return type(error).__name__ == self.error and all(word in str(error) for word in self.words)


@dataclass
class Draw:
    """Random choices, each of which is noted."""

    seed: str
    said: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.np = np.random.default_rng(self.rng.randrange(2**32))

    def pick(self, what: str, usual: Any, others: Any = (), *, odd: float = 0.5) -> Any:
        """One of the others, with the probability ``odd``, else the usual one."""
        found = self.rng.choice(list(others)) if others and self.rng.random() < odd else usual
        self.said.append(f"{what}: {found}")
        return found

    def some(self, items: Any, n: int) -> list[Any]:
        items = list(items)
        return self.rng.sample(items, min(n, len(items)))


class Known:
    """Genes of a vocabulary whose names mean one gene, however they are spelled."""

    def __init__(self, genes: pd.DataFrame) -> None:
        self.symbol, self.id = genes["symbol"].tolist(), genes["ensembl_id"].tolist()
        previous = [[name for name in text.split("|") if name] for text in genes["previous_symbols"]]
        spelled = Counter(
            name.upper().translate(SIGNS)
            for names in zip(self.symbol, previous, strict=True)
            for name in {names[0], *names[1]}
        )
        self.rows = [
            i
            for i, symbol in enumerate(self.symbol)
            if symbol and self.id[i] and spelled[symbol.upper().translate(SIGNS)] == 1
        ]
        single = {i: [n for n in previous[i] if spelled[n.upper().translate(SIGNS)] == 1] for i in self.rows}
        self.retired = {i: names for i, names in single.items() if names}
        self.signed = [i for i in self.rows if "-" in self.symbol[i]]
        self.all = {*self.symbol, *self.id, *(name for names in previous for name in names)}


@dataclass
class Table:
    """Columns of counts.

    Attributes
    ----------
    row
        Vocabulary row that a column is, -1 if it is none ``(n_vars,)``.
    x
        Counts ``(cells, n_vars)``, float64.
    var
        Names, and what else stands in `var`.
    """

    row: np.ndarray
    x: np.ndarray
    var: pd.DataFrame
    gene_key: str | None = None

    @property
    def rows(self) -> np.ndarray:
        return np.unique(self.row[self.row >= 0])

    def truth(self, cells: np.ndarray) -> np.ndarray:
        """Counts of the vocabulary rows that there are, for some cells, in float64."""
        found = np.zeros((len(cells), len(self.rows)))
        for j, row in enumerate(self.row):
            if row >= 0:
                found[:, np.searchsorted(self.rows, row)] += self.x[cells, j]
        return found

    def in_order(self, order: np.ndarray) -> Table:
        return Table(self.row[order], self.x[:, order], self.var.iloc[order], self.gene_key)


def draw_counts(d: Draw, shape: tuple[int, int], largest: int) -> np.ndarray:
    """Many zeros, some ones, few large ones, and a cell without any."""
    x = d.np.poisson(d.np.gamma(0.3, 3.0, size=shape)).astype(np.float64)
    x[d.np.random(shape) < 0.01] = largest
    x[d.np.integers(shape[0])] = 0
    return np.minimum(x, largest)


# --- genes -----------------------------------------------------------------------------------------------------------

STYLES = (
    "Ensembl|version|mixed|dots|underscores|typographic|retired|spaces|column|ids in a column|categories|gene_key|"
    "joined|GRCh38_|lower case"
).split("|")
OTHERS = ["antibody", "guide", "peak", "tag", "other"]


def spell(d: Draw, known: Known, row: int, style: str) -> str:
    """A name of a gene."""
    symbol, identifier = known.symbol[row], known.id[row]
    if style == "mixed":
        style = d.rng.choice(["symbol", "Ensembl", "version", "joined"])
    elif style == "retired" and row in known.retired:
        return d.rng.choice(known.retired[row])
    return {
        "Ensembl": identifier,
        "version": f"{identifier}.{d.rng.randrange(1, 20)}",
        "dots": symbol.replace("-", "."),
        "underscores": symbol.replace("-", "_"),
        "typographic": symbol.replace("-", "\u2011"),
        "spaces": f" {symbol} ",
        "joined": f"{symbol}_{identifier}",
        "GRCh38_": f"GRCh38_{symbol}",
        "lower case": symbol.lower(),
    }.get(style, symbol)


def draw_genes(
    d: Draw,
    known: Known,
    n_cells: int,
    largest: int,
    *,
    styles: Any = STYLES,
    others: Any = OTHERS,
    typed: str | None = "",
    fewest: int = 12,
) -> Table:
    """Genes under some names, and among them what is none; ``typed`` names the column that says so, if given."""
    style = d.pick("names", "symbols", styles, odd=0.7)
    n = d.pick("genes", 70, [fewest, 25, 150], odd=0.4)
    rows = d.some(known.signed, n // 3) if style in ("dots", "underscores", "typographic") else []
    rows = rows or (d.some(known.retired, n // 3) if style == "retired" else [])
    rows = rows + d.some(set(known.rows) - set(rows), n - len(rows))
    n_twice = 0 if style == "ids in a column" else d.pick("columns of the same gene", 0, [1, 8], odd=0.4)
    twice = d.some(rows, n_twice)
    columns = [(row, spell(d, known, row, style)) for row in [*rows, *twice]]
    if style in ("GRCh38_", "lower case"):
        columns = [(-1, name) for _, name in columns]
    n_extra = d.pick("unknown genes", 0, [1, 30, 700], odd=0.4)
    columns += [(-1, f"{d.rng.choice(['FAKE', 'NOGENE'])}{i}") for i in range(n_extra)]
    kinds = ["gene"] * len(columns)
    if typed == "":
        typed = d.pick("feature types", None, ["feature_types", "feature_type", "modality"])
    for kind in d.some(others, d.pick("kinds beside genes", 0, [1, 2], odd=0.5)):
        for _ in range(d.rng.choice([1, 5])):
            columns.append((-1, name_of_other(d, known, d.rng.choice(rows), kind, typed, style)))
            kinds.append(kind)
    order = np.array(d.some(range(len(columns)), len(columns)))
    names = pd.Index([columns[i][1] for i in order], dtype=object)
    row = np.array([columns[i][0] for i in order])
    gene = np.array([kinds[i] == "gene" for i in order])
    if style not in ("column", "ids in a column", "categories", "gene_key") and d.pick(
        "names made unique", False, [True], odd=0.3
    ):
        row = np.where(names.duplicated(), -1, row)  # what the number makes of a name is no name
        names = pd.Index(made_unique(names), dtype=object)
    var, gene_key = stand(d, known, names, row, style)
    if typed:
        words = {kind: d.rng.choice(words) for kind, words in TYPES.items()}
        var[typed] = [words[kinds[i]] for i in order]
        if d.rng.random() < 0.5:
            var[typed] = var[typed].astype("category")
    distinct = {name.strip() for name in names[gene]}
    refuse_few(d, len(set(row) - {-1}), len(distinct), len(known.symbol))
    return Table(row, draw_counts(d, (n_cells, len(row)), largest), var, gene_key)


def refuse_few(d: Draw, n: int, n_distinct: int, n_vocabulary: int) -> None:
    """Genes are refused of which too few are known."""
    if n < min(20, n_vocabulary) or n / min(n_distinct, n_vocabulary) < 0.25:
        d.refusals.append(Refusal("GeneMatchError", (f"{n:,} of",)))


def made_unique(names: Iterable[str]) -> list[str]:
    """As ``var_names_make_unique`` has it: a number behind the second of a name."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        found.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def name_of_other(d: Draw, known: Known, row: int, kind: str, typed: str | None, style: str) -> str:
    """A name of what is no gene; that of a gene, where a column tells."""
    if typed and kind != "peak":
        return spell(d, known, row, style)
    symbol, number = known.symbol[row], d.rng.randrange(10, 99)
    start = d.rng.randrange(10**6)
    names = {
        "antibody": [f"{symbol}_TotalSeqB", f"ADT-{symbol}", f"{symbol}-TotalSeqC"],
        "guide": [f"sgRNA_{symbol}", f"{symbol}_gRNA{number}", "Non-Targeting-1"],
        "peak": [f"chr{number % 22 + 1}:{start}-{start + 500}", f"chrX-{start}-{start + 500}"],
        "tag": [f"HTO_{number}", f"Hashtag{number}"],
        "other": [f"ERCC-{start % 10**5:05d}", f"NegControlProbe_{number:05d}"],
    }
    return d.rng.choice(names[kind])


def stand(
    d: Draw, known: Known, names: pd.Index, row: np.ndarray, style: str
) -> tuple[pd.DataFrame, str | None]:
    """`var` with the names where the style has them."""
    if style not in ("column", "ids in a column", "categories", "gene_key"):
        return pd.DataFrame(index=names), None
    var = pd.DataFrame(index=[f"f{i}" for i in range(len(names))])
    if style == "ids in a column":  # the symbols in the index, each with a number from the second on
        var.index = pd.Index(made_unique(names), dtype=object)
        var["gene_ids"] = [known.id[r] if r >= 0 else name for r, name in zip(row, names, strict=True)]
        return var, None
    var["gene_name"] = names.to_numpy()
    if style == "categories":
        var["gene_name"] = var["gene_name"].astype("category")
    if style == "gene_key":  # other genes in the index
        var.index = pd.Index(
            made_unique([known.symbol[d.rng.choice(known.rows)] for _ in names]), dtype=object
        )
        return var, "gene_name"
    return var, None


# --- peaks -----------------------------------------------------------------------------------------------------------


PEAK_STYLES = ["-", "_", "no chr", "columns", "interval", "numbers"]


def draw_peaks(
    d: Draw,
    known: list[tuple[int, int, int]],
    n_cells: int,
    largest: int,
    *,
    styles: Any = PEAK_STYLES,
    fewest: int = 15,
) -> Table:
    """Peaks of a vocabulary, given as chromosome, start and end, under some names."""
    style = d.pick("peaks", ":", styles, odd=0.7)
    rows = d.some(range(len(known)), d.pick("known peaks", 150, [fewest, 60, len(known)], odd=0.4))
    rows += d.some(rows, d.pick("columns of the same peak", 0, [1, 10], odd=0.3))
    places = [(row, known[row]) for row in rows]
    places += [
        (-1, (7, start, start + 300))
        for start in range(10**6, 10**6 + 10**4 * d.pick("others", 0, [20]), 10**4)
    ]
    d.rng.shuffle(places)
    row = np.array([each for each, _ in places])
    frame = pd.DataFrame([place for _, place in places], columns=["chromosome", "start", "end"])
    chromosome = frame["chromosome"].map(str if style == "no chr" else "chr{}".format)
    signs = style if style in ("-", "_") else ":"
    text = (
        chromosome + signs + frame["start"].astype(str) + signs.replace(":", "-") + frame["end"].astype(str)
    )
    var = pd.DataFrame(index=pd.Index(text, dtype=object))
    if style in ("columns", "interval"):
        var.index = [f"peak_{i}" for i in range(len(text))]
        if style == "interval":
            var["interval"] = text.to_numpy()
        else:
            var = var.assign(
                chromosome=chromosome.to_numpy(), start=frame.start.to_numpy(), end=frame.end.to_numpy()
            )
    elif style == "numbers":
        var.index = [f"peak_{i}" for i in range(len(text))]
    elif d.rng.random() < 0.5:
        var.index = pd.Index(made_unique(var.index), dtype=object)
    n = len(set(rows))
    if style == "numbers":
        d.refusals.append(Refusal("PeakMatchError", ("peak_0",)))
    elif n < 20:  # a second column of a peak counts as one that is not found, if it has a name of its own
        must = n < min(20, len(set(places)))
        d.refusals.append(Refusal("PeakMatchError", (f"{n:,} of", "needed"), must=must))
    return Table(row, draw_counts(d, (n_cells, len(row)), largest), var)


# --- where and how the counts stand ----------------------------------------------------------------------------------


def draw_layout(d: Draw, label: str) -> tuple[str, str]:
    """A type and a layout; scipy has no sparse matrix of half precision."""
    dtype = d.pick(f"dtype of {label}", "float32", DTYPES, odd=0.8)
    of_half = [form for form in FORMATS if "cs" not in form]
    usual, forms = ("dense", of_half) if dtype == "float16" else ("csr", FORMATS)
    return dtype, d.pick(f"layout of {label}", usual, forms, odd=0.8)


def as_format(x: np.ndarray, form: str, dtype: str) -> Any:
    """The same values, in a type and a layout."""
    dense = x.astype(dtype)
    if form == "Fortran order":
        return np.asfortranarray(dense)
    if form == "big-endian":
        return dense.astype(dense.dtype.newbyteorder(">"))
    if form == "strided":
        return np.repeat(dense, 2, axis=0)[::2, ::-1][:, ::-1]
    if form == "dask":
        return da.from_array(dense, chunks=(7, dense.shape[1]))
    if form == "dense":
        return dense
    csr = sp.csr_matrix(x)
    if form == "csr with zeros":
        columns = np.tile(np.arange(x.shape[1], dtype=np.int32), len(x))
        csr = sp.csr_matrix(
            (x.ravel(), columns, np.arange(0, x.size + 1, x.shape[1], dtype=np.int32)), x.shape
        )
    elif form == "csr in pieces":  # each count as a part and the rest, in two entries
        part = np.floor(csr.data / 2)
        indptr = (csr.indptr * 2).astype(np.int32)
        data = np.stack([csr.data - part, part], axis=1).ravel()
        csr = sp.csr_matrix((data, np.repeat(csr.indices, 2), indptr), x.shape)
    data, indices, indptr = csr.data.astype(dtype), csr.indices, csr.indptr
    if form in ("csc", "csc array"):
        csc = csr.tocsc()
        kind: Any = sp.csc_matrix if form == "csc" else sp.csc_array
        return kind((csc.data.astype(dtype), csc.indices, csc.indptr), x.shape)
    if form == "csr unsorted":
        order = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(indptr, indptr[1:], strict=False)])
        data, indices = data[order], indices[order]
    if form == "csr of 64 bits":
        indices, indptr = indices.astype(np.int64), indptr.astype(np.int64)
    kind = sp.csr_array if form == "csr array" else sp.csr_matrix
    found = kind((data, indices, indptr), x.shape)
    return da.from_array(found, chunks=(7, x.shape[1]), asarray=False) if form == "dask csr" else found


PLACES = ["layer", "layer without X", "raw", "raw unsaid", "layer unsaid", "no X", "no such layer", "spoiled"]


class Placed(NamedTuple):
    """An AnnData in which counts stand somewhere, and what to name as their layer."""

    adata: ad.AnnData
    layer: str | None


def place(d: Draw, table: Table, obs: pd.DataFrame, form: str, dtype: str, places: Any, label: str) -> Placed:
    """Put counts into an AnnData, and say which refusal there has to be if they cannot be found."""
    where = d.pick(f"place of {label}", "X", places, odd=0.6)
    x = table.x
    log = np.log1p(x).astype(np.float32)
    if where == "spoiled":
        return spoiled(d, table, obs, form)
    counts = as_format(x, form, dtype)
    if where == "X":
        layers = {"log": log} if d.rng.random() < 0.3 else None
        return Placed(ad.AnnData(counts, obs=obs, var=table.var, layers=layers), None)
    if where in ("raw", "raw unsaid"):
        adata = ad.AnnData(counts, obs=obs, var=table.var)
        kept = np.array(sorted(d.some(range(len(table.row)), 10)))
        raw = adata
        adata = ad.AnnData(log[:, kept] + 0.25, obs=obs, var=table.var.iloc[kept])
        adata.raw = raw
        if where == "raw unsaid":
            d.refusals.append(Refusal("NotCountsError", ("adata.raw", "'raw'")))
            d.refusals += [
                Refusal(f"{kind}MatchError", ("needed",)) for kind in ("Gene", "Peak")
            ]  # X has few features
        return Placed(adata, "raw" if where == "raw" else None)
    with_x = where in ("layer", "layer unsaid", "no such layer")
    adata = ad.AnnData(log + 0.25 if with_x else None, obs=obs, var=table.var, layers={"counts": counts})
    if where == "layer unsaid":
        d.refusals.append(Refusal("NotCountsError", ("layers['counts']",)))
    if where == "no X":
        d.refusals.append(Refusal("ValueError", ("no X", "counts")))
    if where == "no such layer":
        del adata.layers["counts"]
        d.refusals.append(Refusal("ValueError", ("counts",)))
    return Placed(adata, "counts" if where in ("layer", "layer without X", "no such layer") else None)


def spoiled(d: Draw, table: Table, obs: pd.DataFrame, form: str) -> Placed:
    """Counts of which one is none."""
    bad = d.pick("value", 0.5, [-1.0, np.nan, np.inf, 1e17, 2.00001])
    x = table.x.copy()
    i, j = d.rng.randrange(len(x) // 2), d.rng.randrange(x.shape[1])
    x[i, j] = bad
    if form == "csr in pieces":
        form = "csr"
    name = str(table.var.index[j])
    d.refusals.append(Refusal("NotCountsError", (repr(str(obs.index[i])), repr(name))))
    return Placed(ad.AnnData(as_format(x, form, "float64"), obs=obs, var=table.var), None)


# --- batches ---------------------------------------------------------------------------------------------------------

BATCHES = {
    "int": lambda i, rng: i,
    "text": lambda i, rng: f"b{i}",
    "whole float": lambda i, rng: float(i),
    "float": lambda i, rng: i + 0.5,
    "bool": lambda i, rng: bool(i % 2),
    "number or text": lambda i, rng: rng.choice([i, str(i), float(i)]),
    "mixed": lambda i, rng: i if i % 2 else f"b{i}",
}


def draw_batches(d: Draw, n_cells: int) -> tuple[pd.Series | None, np.ndarray]:
    """A column of `obs`, and the group of each cell; without a column all are one."""
    kind = d.pick(
        "batches", None, [*BATCHES, "category", "category of int", "string", "Int64", "missing"], odd=0.7
    )
    group = d.np.integers(0, d.rng.choice([2, 3, 4]), n_cells)
    if kind is None:
        return None, np.zeros(n_cells, dtype=int)
    if kind == "bool":
        group %= 2
    if kind == "category":
        return pd.Series(
            pd.Categorical([f"b{i}" for i in group], ["b9", "b2", "b0", "b3", "b1", "ref"])
        ), group
    if kind == "category of int":
        return pd.Series(pd.Categorical(group, [7, 3, 2, 1, 0])), group
    if kind == "Int64":
        return pd.Series(group, dtype="Int64"), group
    if kind == "string":
        return pd.Series([f"b{i}" for i in group], dtype="string"), group
    if kind == "missing":
        values = pd.Series([f"b{i}" for i in group], dtype=object)
        values.iloc[d.some(range(n_cells // 2), 3)] = d.rng.choice([None, np.nan])
        d.refusals.append(Refusal("ValueError", ("'batch'", "missing")))
        return values, group
    values = [BATCHES[kind](int(i), d.rng) for i in group]
    return pd.Series(values, dtype=object if kind in ("mixed", "number or text") else None), group
