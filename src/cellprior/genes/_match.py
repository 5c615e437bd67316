"""Match the columns of a data set to the genes of a vocabulary, by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cellprior.genes._advice import MIN_GENES, no_genes, other_species, too_few
from cellprior.genes._intervals import are_peaks, which_are_peaks
from cellprior.genes._kinds import GENE, PEAK, kinds_by_type, kinds_of
from cellprior.genes._lookup import Found, Lookup, best
from cellprior.genes._report import INDEX, GeneMatch
from cellprior.genes._species import (
    SPECIES,
    UnknownSpeciesError,
    refusal,
    species_of_columns,
)
from cellprior.genes._spelling import in_capitals
from cellprior.genes._table import (
    TABLES,
    Names,
    load,
    read_vocabulary,
    species_of,
    species_of_most,
)

LOW_COVERAGE = 0.5


class GeneMatchError(ValueError):
    """Too few genes of the data belong to the vocabulary, or they are those of another species."""


def match(
    var: pd.DataFrame,
    vocabulary: Sequence[str] | pd.DataFrame,
    *,
    gene_key: str | None = None,
    gene_counts: np.ndarray | None = None,
    min_coverage: float = 0.25,
    species: str | None = None,
) -> GeneMatch:
    """Match the genes of a data set to those of a vocabulary.

    Names may be symbols or Ensembl ids, with or without version, in the index or any string column of `var`;
    the place that matches most vocabulary genes is used, the index if equal. The same name always wins; then
    a retired symbol counts as the current one and the other way round, as long as it means one gene. What the
    vocabulary does not say about its genes is looked up in GENCODE (human 48 and 38, mouse M37), and only if
    that can help.

    Several columns of one gene (duplicated names, a current and a retired name) get the same row: sum them.

    Only genes are matched. What a column is stands in `var["feature_types"]` or a column like it (Cell Ranger's
    values, and others); where it does not, its name tells (`CD4_TotalSeqB`, `sgRNA_CD4`, `ERCC-00002`,
    `chr1:100-200`, ...), unless the vocabulary has this very name. Peaks alone are refused, unless `gene_key` names
    their genes.

    A symbol whose signs were changed, as R's `make.names` does (`HLA.DRA`, `MT_ND1`, `X7SK`), is found if it means
    one gene.

    Where a vocabulary has genes of several species, each column is matched within its own: the one that is given,
    that a column of `var` says (`genome`, `species` or `organism`), or that its genome prefix, its Ensembl id or the
    spelling of most symbols tells. Capitals then do not count. No gene is taken for that of another species, and
    orthologues are not guessed.

    Parameters
    ----------
    var
        Annotation of the data's features (`AnnData.var`).
    vocabulary
        Names, or a frame with `ensembl_id`, `symbol` or both, and optionally `previous_symbols` ("A|B") and `species`.
        A gene that is listed twice is matched to its first row.
    gene_key
        Column of `var` to read the names from, or "index"; found by itself if None.
    gene_counts
        Counts per gene over all cells, shape `(n_vars,)`, to report what is lost.
    min_coverage
        Least share of the smaller list that has to match, of each species.
    species
        Species of the data, or the column of `var` with that of each gene; found by itself if None.

    Raises
    ------
    GeneMatchError
        Coverage below `min_coverage`, fewer than 20 genes in common (or fewer than the whole of a smaller
        vocabulary), genes of another species, or no genes at all.
    ValueError
        Unknown `gene_key`, `gene_counts` of another length, or an unusable vocabulary.

    Warns
    -----
    UserWarning
        Coverage below 0.5, or names that are those of mouse genes in capitals.
    """
    genes = read_vocabulary(vocabulary)
    if SPECIES in genes:
        return _match_by_species(var, genes, species, gene_key, gene_counts, min_coverage)
    if species is not None:
        identities = _identities(genes)
        own = species_of_most(identities, n_rows=len(genes))
        if own is not None and own != species.lower():
            raise GeneMatchError(f"species={species!r} is asked for. {refusal([own])}")
    return _match(var, genes, gene_key=gene_key, gene_counts=gene_counts, min_coverage=min_coverage)


def _match_by_species(
    var: pd.DataFrame,
    genes: pd.DataFrame,
    given: str | None,
    gene_key: str | None,
    gene_counts: np.ndarray | None,
    min_coverage: float,
) -> GeneMatch:
    """Match each column within its species; see :func:`match`."""
    sources = [Names.read(label, values) for label, values in _sources(var, gene_key)]
    try:
        found = species_of_columns(var, sources, genes, given)
    except UnknownSpeciesError as error:
        raise GeneMatchError(str(error)) from error
    here = [name for name in dict.fromkeys(genes[SPECIES]) if (found.species == name).any()]
    index, route = np.full(len(var), -1, dtype=np.int64), np.full(len(var), "", dtype=object)
    read, kind = var.index.to_numpy(dtype=object).astype(str).astype(object), kinds_of(found.var)
    notes, places, sizes = list(found.notes), [], {}
    for name in here:
        columns = np.flatnonzero(found.species == name)
        rows = np.flatnonzero(genes[SPECIES] == name)
        part = _match(
            found.var.iloc[columns],
            genes.iloc[rows].drop(columns=SPECIES).reset_index(drop=True),
            gene_key=gene_key,
            gene_counts=None if gene_counts is None else np.asarray(gene_counts).ravel()[columns],
            min_coverage=min_coverage,
            within=name,
        )
        index[columns] = np.where(part.index >= 0, rows[part.index], -1)
        route[columns], read[columns], kind[columns] = part.route, part.names, part.kind
        notes += [note for note in part.notes if note not in notes]
        places.append(part.source)
        sizes[name] = len(rows)
    return GeneMatch(
        index=index,
        source=places[0],
        names=read,
        vocabulary=np.where(genes["symbol"] != "", genes["symbol"], genes["ensembl_id"]).astype(object),
        route=route,
        var_names=var.index,
        gene_counts=None if gene_counts is None else np.asarray(gene_counts, dtype=np.float64).ravel(),
        notes=tuple(notes),
        kind=kind,
        species=sizes,
    )


def _match(
    var: pd.DataFrame,
    genes: pd.DataFrame,
    *,
    gene_key: str | None,
    gene_counts: np.ndarray | None,
    min_coverage: float,
    within: str | None = None,
) -> GeneMatch:
    """Match to genes of one species; ``within`` is its name, where it has been found what the columns are of."""
    counts = None if gene_counts is None else np.asarray(gene_counts, dtype=np.float64).ravel()
    if counts is not None and len(counts) != len(var):
        msg = f"gene_counts has {len(counts)} values, var has {len(var)} genes. Pass one total per gene."
        raise ValueError(msg)

    kind, said = _kinds(var, gene_key)
    columns = np.flatnonzero(kind == GENE)
    part = var if len(columns) == len(var) else var.iloc[columns]
    sources = [Names.read(label, values) for label, values in _sources(part, gene_key)]
    species = within or species_of_most(_identities(genes), n_rows=len(genes))
    foreign = [
        names
        for names in sources
        if _is_foreign(names.species, species) and not _capitals_may_do(names, within)
    ]
    own = [names for names in sources if names not in foreign]
    if not own:
        raise GeneMatchError(other_species(foreign[0], species, genes))

    lookup = Lookup(genes)
    results = [lookup.find(names) for names in own]
    notes: tuple[str, ...] = ()
    if species in TABLES and _table_may_help(results, genes, species):
        table, notes = load(species)
        if table is not None:
            spelled = genes if within is None else table.spelled(genes)
            lookup = Lookup(table.complete(spelled), given=genes)
            results = [lookup.find(names) for names in own]
    if within is not None:
        results = [lookup.find_in_capitals(found) for found in results]
    results = [lookup.find_with_other_signs(found) for found in results]
    found = best(results)
    if gene_key not in (None, INDEX):
        results.append(lookup.find(Names.read(INDEX, part.index.to_series())))
    for names, kinds in ((each.names, lookup.kinds_by_name(each)) for each in results):
        for code, other in kinds.items():
            rows = columns[names.codes == code]
            # what var calls a gene is one, though its control is none
            kind[rows[~said[rows] | (other in ("spike-in", "control"))]] = other
    index, route = np.full(len(var), -1, dtype=np.int64), np.full(len(var), "", dtype=object)
    read = var.index.to_numpy(dtype=object).astype(str).astype(object) if part is not var else route.copy()
    index[columns], route[columns] = found.rows[found.names.codes], found.routes[found.names.codes]
    read[columns] = found.names.distinct[found.names.codes]
    index[kind != GENE], route[kind != GENE] = -1, ""
    capitals = in_capitals(found.names.text) if species == "human" else ""
    result = GeneMatch(
        index=index,
        source=found.names.source,
        names=read,
        vocabulary=np.where(genes["symbol"] != "", genes["symbol"], genes["ensembl_id"]).astype(object),
        route=route,
        var_names=var.index,
        gene_counts=counts,
        notes=(*notes, capitals) if capitals else notes,
        kind=kind,
    )
    if result.n_matched < min(MIN_GENES, len(genes)) or result.coverage < min_coverage:
        if foreign:
            raise GeneMatchError(other_species(foreign[0], species, genes))
        raise GeneMatchError(too_few(result, found.names, sources, lookup, min_coverage))
    if result.coverage < LOW_COVERAGE:
        msg = (
            f"Only {result.n_matched:,} of {result.n_smaller:,} genes match the vocabulary (coverage "
            f"{result.coverage:.2f}). Look at what is lost with `lost_genes()` before relying on the result."
        )
        warnings.warn(" ".join([msg, *result.notes]), UserWarning, stacklevel=2)
    elif capitals:
        warnings.warn(capitals, UserWarning, stacklevel=2)
    return result


def _identities(genes: pd.DataFrame) -> np.ndarray:
    names = genes["ensembl_id"].where(genes["ensembl_id"] != "", genes["symbol"])
    return np.asarray(names.unique(), dtype=object)


def _capitals_may_do(names: Names, within: str | None) -> bool:
    """Whether symbols are in capitals, which another spelling of the species' own may be, or which it has."""
    n_ids = sum(map(bool, names.ids))
    return within not in (None, "human") and names.species == "human" and 3 * n_ids < len(names.ids)


def _kinds(var: pd.DataFrame, gene_key: str | None) -> tuple[np.ndarray, np.ndarray]:
    """What each column of the data is, before names are looked at that may be symbols, and where var says so.

    Raises GeneMatchError if none is a gene.
    """
    kinds, by = kinds_by_type(var)
    unsaid = kinds == ""
    peaks = which_are_peaks(var.index) & unsaid
    kinds[unsaid] = GENE
    kinds[peaks] = PEAK
    if (kinds == GENE).any() or len(kinds) == 0:
        if gene_key is None and by == "" and peaks.any() and are_peaks(var.index[~peaks]):
            kinds[:] = PEAK  # the others lie on contigs with names of their own
        else:
            return kinds, ~unsaid
    if gene_key is not None and gene_key != INDEX and (kinds == PEAK).all():
        kinds[:] = GENE  # of which the user names the genes
        return kinds, ~unsaid
    raise GeneMatchError(no_genes(kinds, by, var.index))


def _table_may_help(results: list[Found], genes: pd.DataFrame, species: str) -> bool:
    """Whether names are unmatched that look as if the tables could turn them into vocabulary genes."""
    most = best(results)
    if most.n_matched == len(genes):
        return False
    helps_ids = (genes["ensembl_id"] == "").mean() > 0.5
    # One release knows nothing about retired symbols.
    retired_unknown = len(TABLES[species]) > 1 and (genes["previous_symbols"] == "").all()
    helps_symbols = retired_unknown or (genes["symbol"] == "").mean() > 0.5
    if most.n_matched >= LOW_COVERAGE * min(len(most.names.codes), len(genes)):
        results = [most]  # no other place will do better
    return any(
        (helps_ids if identifier else helps_symbols) and species_of(name) == species
        for found in results
        if found.names.species == species
        for name, identifier in (
            (found.names.distinct[i], found.names.ids[i]) for i in np.flatnonzero(found.rows < 0).tolist()
        )
    )


def _sources(var: pd.DataFrame, gene_key: str | None) -> list[tuple[str, pd.Series]]:
    """The places of `var` that may hold gene names, the index first."""
    places: list[tuple[str, pd.Series]] = [(INDEX, var.index.to_series())]
    if gene_key is None:
        return places + [(str(label), column) for label, column in var.items() if _is_text(column)]
    if gene_key in var.columns:
        return [(gene_key, var[gene_key])]
    if gene_key == INDEX:
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
