"""What to do when genes do not match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from cellprior.genes._kinds import PEAK, counted
from cellprior.genes._lookup import Lookup
from cellprior.genes._report import INDEX, GeneMatch, place
from cellprior.genes._spelling import GENOME, in_capitals
from cellprior.genes._table import Names, ensembl_id

MIN_GENES = 20


def examples_of(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names if name][:4]
    return ", ".join(shown) or "none"


def other_species(names: Names, species: str | None, genes: pd.DataFrame) -> str:
    if in_capitals(names.text):
        names = replace(names, species="mouse in capitals")
    kind = {"mouse": "mouse (or rat)", "other": "another species'"}.get(str(names.species), names.species)
    wanted = genes["symbol"] if (genes["symbol"] != "").any() else genes["ensembl_id"]
    return (
        f"The names in {place(names.source)} are {kind} gene names ({examples_of(names.distinct)}), those of "
        f"the vocabulary are {species} ({examples_of(wanted)}). One species is not turned into the other: "
        "changing upper to lower case or back pairs genes that are not the same. Use a model trained on this "
        "species, or map the genes to one-to-one orthologues (Ensembl BioMart has them) in a column of var."
    )


def _genome_in_front(sources: list[Names], lookup: Lookup) -> list[str]:
    """What to do if names begin with that of a genome (`GRCh38_CD3D`), as where reads were mapped to several."""
    for names in sources:
        parts = [found for name in names.distinct if (found := GENOME.fullmatch(name))]
        if not parts or 2 * len(parts) < len(names.distinct):
            continue
        known = [
            found for found in parts if found[2] in lookup.by_symbol or ensembl_id(found[2]) in lookup.by_id
        ]
        prefixes = Counter(found[1] for found in known or parts)
        prefix, n = prefixes.most_common(1)[0]
        examples = (known or parts)[:1][0]
        target = "adata.var_names" if names.source == INDEX else f"adata.var[{names.source!r}]"
        others = sorted({found[1] for found in parts} - {prefix})
        keep = f"adata = adata[:, {target}.str.startswith({prefix!r})].copy(); " if others else ""
        also = f" (others begin with {', '.join(map(repr, others[:3]))})" if others else ""
        return [
            f"{len(parts):,} of {len(names.distinct):,} names in {place(names.source)} begin with that of a genome, "
            f"such as {prefix!r}{also}; without it, {n if known else 0:,} of them are in the vocabulary, as "
            f"{examples[0]!r} is {examples[2]!r}. Take it off: {keep}{target} = {target}.str.removeprefix({prefix!r})."
        ]
    return []


def too_few(
    result: GeneMatch, names: Names, sources: list[Names], lookup: Lookup, min_coverage: float
) -> str:
    lines = [
        f"{result.n_matched:,} of {result.n_smaller:,} genes match the vocabulary (coverage "
        f"{result.coverage:.3f}); needed: {min(MIN_GENES, len(result.vocabulary))} genes and a coverage of "
        f"{min_coverage}.",
        f"Looked in: {', '.join(other.source for other in sources)}. Best: {place(result.source)}, with "
        f"{examples_of(names.distinct)}; the vocabulary has {examples_of(result.vocabulary)}.",
        "Put gene symbols or Ensembl ids into var_names or a column of var (gene_key names the column).",
    ]
    if result.not_genes and result.kind is not None:
        kinds = ", ".join(counted(result.kind, kind) for kind in result.not_genes)
        lines.append(f"Of {len(result.index):,} columns, these are no genes: {kinds}.")
    lines += _genome_in_front(sources, lookup)
    texts = [name for name in names.distinct[:100] if name]
    if texts and all(name.isdecimal() for name in texts):
        lines.append("The names are numbers (rows or Entrez ids), which say nothing about a gene here.")
    elif texts and all(name == name.lower() and not name.startswith("chr") for name in texts):
        lines.append("The names are lower-case: if they are human symbols, upper-case them first.")
    return "\n".join([*lines, *result.notes])


def no_genes(kinds: np.ndarray, by: str, names: pd.Index) -> str:
    """What to do if no column of the data is a gene, as a column of `var` (`by`) or the names say."""
    where = f"var[{by!r}] says so" if by else "the names in the index say so"
    found = ", ".join(counted(kinds, kind) for kind in dict.fromkeys(kinds.tolist()))
    lines = [
        f"The data have no gene: {found}, such as {examples_of(map(str, names))}; {where}. Genes are needed: pass "
        "the AnnData with the counts of RNA."
    ]
    if (kinds == PEAK).all():
        lines.append(
            "Counts of peaks are no expression. If they are sums over genes (gene activity), say which column of var "
            'names the gene of each, as in gene_key="gene_name".'
        )
    elif by:
        lines.append(f'If they are genes all the same: adata.var[{by!r}] = "Gene Expression".')
    return "\n".join(lines)
