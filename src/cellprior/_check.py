"""What is in a data set, what each set of weights would read of it, and which call comes next."""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellprior._matrix import RAW, matrix_of, places
from cellprior._obs import numbered
from cellprior.genes._kinds import GENE, counted, kinds_of
from cellprior.settings import settings

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from cellprior.genes import GeneMatch

N_CELLS = 1000  # that are looked at, spread over the data
FEW_COUNTS = 500  # of a cell, below which an embedding says little
MIN_COVERAGE = 0.25  # of tl.embed
MIN_COUNTS = 0.5  # that weights read, for them to be proposed
COUNTS = "raw counts"
BATCH = re.compile(
    r"(?i)(.*[_. ])?(batch|sample|donor|patient|individual|subject|library|lane|channel|run|replicate|"
    r"orig[._]ident|dataset|study)([_. ](id|key|name))?"
)
LABELS = re.compile(r"(?i).*(cell[_. ]?type|cell[_. ]?label|annotation|bulk_labels|cell[_. ]?identity).*")


@dataclass(frozen=True, eq=False)
class Check:
    """What was found in a data set; it shows itself as text.

    Attributes
    ----------
    matrices
        Place of each matrix, as ``layer=`` names it, and what it holds: ``"raw counts"`` or what else.
    layer
        Where the counts are: ``None`` for ``X``; only if ``has_counts``.
    has_counts
        Whether there are raw counts at all.
    lines
        Label and sentence of each finding, in order.
    weights
        A row per set of weights of which the genes are known on this machine: ``model``; ``genes``, the share of the
        smaller list that matches; ``counts``, the share of the counts of genes that would be read; ``problem``, why
        they would be refused, or "".
    call, command
        The line of Python, and of the shell, that comes next.
    """

    matrices: dict[str | None, str]
    layer: str | None
    has_counts: bool
    lines: list[tuple[str, str]] = field(repr=False)
    weights: pd.DataFrame = field(repr=False)
    call: str = ""
    command: str = ""

    def __repr__(self) -> str:
        width = max(len(label) for label, _ in self.lines)
        found = [f"{label:<{width}}  {text}" for label, text in self.lines]
        if len(self.weights):
            found += ["", "What each set of weights would read", _table(self.weights)]
        return "\n".join([*found, "", "Next", f"  {self.call}", f"  {self.command}"])


def check(adata: AnnData | MuData | str | os.PathLike[str]) -> Check:
    """See :func:`cellprior.tl.check`."""
    path = None
    if isinstance(adata, str | os.PathLike):
        path, adata = Path(adata), _opened(Path(adata))
    data, name, notes = _genes_of(adata)
    if data.n_obs == 0 or data.n_vars == 0:
        msg = f"There are {data.n_obs} cells and {data.n_vars} features; at least one of each is needed."
        raise ValueError(msg)
    rows = np.unique(np.linspace(0, data.n_obs - 1, N_CELLS).astype(np.int64))
    matrices = {layer: _holds(data, layer, rows[:256]) for layer in places(data)}
    with_counts = sorted((layer for layer, what in matrices.items() if what == COUNTS), key=_rank)
    layer = with_counts[0] if with_counts else None
    var = matrix_of(data, layer).var if with_counts else data.var
    lines = [("cells", f"{data.n_obs:,}"), *notes, ("counts", _where(matrices, with_counts))]
    counts = _sample(data, layer, rows) if with_counts else None
    totals = None if counts is None else np.asarray(counts.sum(axis=0)).ravel()
    weights, best, match = _weights(var, totals)
    # antibodies may be told by the names in a column of var, which a match has looked at
    kinds = kinds_of(var) if match is None or match.kind is None else match.kind
    lines += [*_genes(var, match, kinds), *_depth(counts, kinds)]
    genome = _genome_in_front(var) if best is None else None
    if genome is not None:
        lines.append(("genome", f"the names in {genome[0]} begin with {genome[1]!r}, a genome: take it off"))
    # no model takes a batch that is missing
    batches = [found for found in _columns(data.obs, BATCH) if not found[2]]
    labels = _columns(data.obs, LABELS)
    lines.append(("batches", _named(batches) or "no column of obs looks like one"))
    if labels:
        lines.append(("labels", _named(labels)))
    call, command = _next(path, name, layer, bool(with_counts), matrices, best, batches[:1], genome)
    return Check(matrices, layer, bool(with_counts), lines, weights, call, command)


def _opened(path: Path) -> Any:
    """Data on disk, whose matrices stay there."""
    import anndata as ad
    import mudata as md

    from cellprior.model.data._files import refuse_foreign

    refuse_foreign(path)
    try:
        if path.is_dir():
            return ad.read_zarr(path)
        return md.read_h5mu(path) if path.suffix == ".h5mu" else ad.read_h5ad(path, backed="r")
    except (OSError, ValueError, KeyError) as error:
        msg = f"{path} cannot be read as an AnnData or a MuData: {error}"
        raise ValueError(msg) from error


def _genes_of(adata: Any) -> tuple[Any, str | None, list[tuple[str, str]]]:
    """An AnnData; of a MuData, the modality with most genes, and its name."""
    if not hasattr(adata, "mod"):
        return adata, None, []
    n_genes = {name: int((kinds_of(part.var) == GENE).sum()) for name, part in adata.mod.items()}
    name = max(n_genes, key=lambda key: n_genes[key])
    kinds = ", ".join(f"{key!r} ({part.n_vars:,} features)" for key, part in adata.mod.items())
    note = f"{kinds}; below, {name!r}. For RNA and ATAC together: cp.model.MultiomeCLIP."
    return adata.mod[name], name, [("modalities", note)]


def _rank(layer: str | None) -> tuple[bool, bool]:
    """What is called counts, then X, then the others."""
    return str(layer).lower() not in ("counts", "raw_counts"), layer is not None


def _sample(data: Any, layer: str | None, rows: np.ndarray) -> Any:
    from cellprior.model.data._counts import read_rows

    matrix = matrix_of(data, layer)
    return read_rows(matrix.x, rows, where=matrix.where)


def _holds(data: Any, layer: str | None, rows: np.ndarray) -> str:
    """What the values of a matrix are."""
    try:
        values = _sample(data, layer, rows).data
    except (ValueError, TypeError, OSError) as error:
        return f"cannot be read ({error})"
    if not len(values):
        return "zeros"
    if not np.isfinite(values).all():
        return "not finite values among others"
    if (values < 0).any():
        return "negative values: scaled, or corrected"
    if (values == np.rint(values)).all():
        return COUNTS
    return "log-normalised values" if values.max() < 20 else "values that are no whole numbers"


def _say(layer: str | None) -> str:
    return "X" if layer is None else "raw" if layer == RAW else f"layers[{layer!r}]"


def _where(matrices: dict[str | None, str], with_counts: list[str | None]) -> str:
    others = ", ".join(
        f"{_say(layer)}: {what}" for layer, what in matrices.items() if layer not in with_counts
    )
    if not with_counts:
        return f"none found. {others[:1].upper()}{others[1:]}" if others else "none found: there is no matrix"
    also = f" (also in {', '.join(map(_say, with_counts[1:]))})" if with_counts[1:] else ""
    return f"in {_say(with_counts[0])}{also}{'. ' if others else ''}{others}"


def _weights(var: pd.DataFrame, totals: Any) -> tuple[pd.DataFrame, str | None, GeneMatch | None]:
    """What each set of weights would read; the best of those that are here; and one of the matches."""
    from cellprior.genes import GeneMatchError, match
    from cellprior.model import models
    from cellprior.weights._registry import entries

    rows: dict[str, dict[str, Any]] = {}
    by_genes: dict[str, Any] = {}  # several weights have the same list
    best, found = None, None
    classes = {model.__name__: model for model in models()}
    for entry in entries().values():
        model = classes.get(entry.model or "")
        genes = model._genes_on_hand(entry.name, entry.folder) if model else None
        if genes is None:
            continue
        key = str(pd.util.hash_pandas_object(genes, index=False).sum())
        if key not in by_genes:
            try:
                with warnings.catch_warnings(), _without_network():
                    warnings.simplefilter("ignore")  # what they say is in the table
                    by_genes[key] = match(var, genes, gene_counts=totals, min_coverage=0.0)
            except (GeneMatchError, ValueError) as error:
                reason = re.split(r"(?<=[.;]) |\n", str(error))[0].rstrip(".;")
                by_genes[key] = re.sub(r" \([^)]*\)", "", reason)  # without examples
        result = by_genes[key]
        row: dict[str, Any] = {"model": entry.model, "genes": 0.0, "counts": np.nan, "status": entry.status}
        if isinstance(result, str):
            row["problem"] = result
        else:
            row |= {"genes": result.coverage, "problem": "", "counts": result.counts_share}
            if result.coverage < MIN_COVERAGE:
                row["problem"] = f"fewer than {MIN_COVERAGE:.0%} of the genes match"
            elif result.counts_share is not None and result.counts_share < MIN_COUNTS:
                row["problem"] = f"reads less than {MIN_COUNTS:.0%} of the counts"
            found = found or result
        rows[entry.name] = row
        if best is None and not row["problem"] and entry.status == "packaged":
            best = entry.name
    best = best or next((name for name, row in rows.items() if not row["problem"]), None)
    columns = ["model", "genes", "counts", "status", "problem"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("weights"), best, found


@contextmanager
def _without_network() -> Iterator[None]:
    """Look at what is on this machine."""
    before = settings._offline
    settings.offline = True
    try:
        yield
    finally:
        settings._offline = before


def _genes(var: pd.DataFrame, match: Any, kinds: np.ndarray) -> list[tuple[str, str]]:
    """What the features are, and how the genes are called."""
    from cellprior.genes._table import ensembl_id, species_of_most

    is_gene = kinds == GENE
    text = counted(kinds, GENE)
    names = var.index.to_numpy().astype(str)
    where = "var_names"
    if match is not None:
        names = np.asarray(match.names)
        where = "var_names" if match.source == "index" else f"var[{match.source!r}]"
    genes = np.unique(names[is_gene & (names != "")])
    if len(genes):
        ids = np.mean([bool(ensembl_id(str(name))) for name in genes[:: max(1, len(genes) // 200)]])
        kind = "Ensembl ids" if ids > 0.5 else "symbols"
        species = species_of_most(genes, n_rows=len(genes)) or "unknown"
        text += f", named by {kind} in {where}, of species: {species}"
    lines = [("genes", text)]
    if not is_gene.all():
        others = ", ".join(counted(kinds, kind) for kind in dict.fromkeys(kinds[~is_gene].tolist()))
        lines.append(("not genes", f"{others}: left out"))
    return lines


def _genome_in_front(var: pd.DataFrame) -> tuple[str, str] | None:
    """Where names begin with that of a genome, as where reads were mapped to several; and what they begin with."""
    from cellprior.genes._spelling import genome_of_most

    places = {"var_names": var.index, **{f"var[{str(column)!r}]": var[column] for column in var.columns}}
    found = ((place, genome_of_most(names)) for place, names in places.items())
    return next(((place, prefix) for place, prefix in found if prefix is not None), None)


def _depth(counts: Any, kinds: np.ndarray) -> list[tuple[str, str]]:
    """Counts and genes of a cell."""
    if counts is None:
        return []
    counts = counts[:, kinds == GENE] if (kinds == GENE).any() else counts
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    genes = np.diff(counts.tocsr().indptr)
    low, middle, high = np.percentile(totals, [5, 50, 95])
    text = f"{middle:,.0f} counts (5 to 95 %: {low:,.0f} to {high:,.0f}) and {np.median(genes):,.0f} genes in a cell"
    if empty := int((totals == 0).sum()):
        text += f"; {empty:,} of {len(totals):,} cells looked at are empty"
    if middle < FEW_COUNTS:
        text += ". That is little: expect types to blur"
    return [("depth", text)]


def _columns(obs: pd.DataFrame, pattern: re.Pattern[str]) -> list[tuple[str, int, int]]:
    """Columns of obs with such a name that split the cells into groups, how many groups, and how many cells in none."""
    found = []
    for column in obs.columns:
        if not pattern.fullmatch(str(column)) or obs[column].ndim != 1:
            continue
        try:
            codes, _ = numbered(obs[column])
        except (ValueError, TypeError):
            continue
        n = len(np.unique(codes[codes >= 0]))
        if 1 < n <= max(2, len(obs) // 10):
            found.append((str(column), n, int((codes < 0).sum())))
    return found


def _named(columns: list[tuple[str, int, int]]) -> str:
    return ", ".join(
        f"obs[{column!r}] ({n:,}{f'; missing in {missing:,} cells' if missing else ''})"
        for column, n, missing in columns
    )


def _next(
    path: Path | None,
    modality: str | None,
    layer: str | None,
    has_counts: bool,
    matrices: dict[str | None, str],
    weights: str | None,
    batch: list[tuple[str, int, int]],
    genome: tuple[str, str] | None,
) -> tuple[str, str]:
    """The line of Python and the line of the shell that come next."""
    data = "adata" if modality is None else f"mdata[{modality!r}]"
    if not has_counts:
        logs = [place for place, what in matrices.items() if what == "log-normalised values"]
        if logs:
            source = "" if logs[0] is None else f', layer="{logs[0]}"'
            call = f"cp.pp.recover_counts({data}{source})"
            if logs[0] == RAW:  # of other genes, maybe
                call = f"adata = anndata.AnnData({call}, {data}.obs, {data}.raw.var)"
            else:
                call = f'{data}.layers["counts"] = {call}'
            return call, "# write it, adata.write_h5ad(FILE), and look again: cellprior check FILE"
        return "# raw counts are needed: go back to the file that has them", "# cellprior check FILE"
    if genome is not None:
        place = f"{data}.{genome[0]}"
        return f"{place} = {place}.str.removeprefix({genome[1]!r})", "# then look again: cellprior check FILE"
    if weights is None:
        return "# none of the weights on this machine reads these genes", "cellprior list"
    python = [data, repr(weights).replace("'", '"')]
    shell = ["cellprior", "embed", str(path or "cells.h5ad"), "embedded.h5ad", "--weights", weights]
    if layer is not None:
        python.append(f'layer="{layer}"')
        shell += ["--layer", layer]
    if batch:
        python.append(f'batch_key="{batch[0][0]}"')
        shell += ["--batch-key", batch[0][0]]
    return f"cp.tl.embed({', '.join(python)})", shlex.join(shell)


def _table(weights: pd.DataFrame) -> str:
    """Shares in per cent; those that would be refused last, with the reason."""
    lines = [f"  {'':<28}{'genes':>7}{'counts':>8}"]
    for name, row in weights.sort_values(
        "problem", key=lambda column: column != "", kind="stable"
    ).iterrows():
        genes = f"{row['genes']:.0%}" if row["genes"] else "-"
        counts = "-" if pd.isna(row["counts"]) else f"{row['counts']:.0%}"
        note = row["problem"] or ("" if row["status"] != "not downloaded" else "to download")
        lines.append(f"  {name!s:<28}{genes:>7}{counts:>8}  {note}".rstrip())
    return "\n".join(lines)
