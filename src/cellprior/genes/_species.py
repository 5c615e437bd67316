"""Which species the columns of a data set are of, where a vocabulary has several."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellprior.genes._report import place
from cellprior.genes._spelling import GENOME, in_capitals
from cellprior.genes._table import Names, ensembl_id

SPECIES = "species"  # column of a vocabulary that has genes of several
LARGE = 0.1  # share of the names of one species beside those of another, from which on both are there
LEAST = 20  # names of a species

# Beginnings of Ensembl's ids: the species of UCE's weights, and a few that are often asked for.
PREFIXES = {
    "ENSG": "human",
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSMMUG": "macaca_mulatta",
    "ENSMFAG": "macaca_fascicularis",
    "ENSMICG": "mouse_lemur",
    "ENSSSCG": "pig",
    "ENSXETG": "frog",
    "ENSDARG": "zebrafish",
    "ENSGALG": "chicken",
    "ENSPTRG": "chimpanzee",
    "ENSCSAG": "green_monkey",
    "ENSBTAG": "cow",
    "ENSOARG": "sheep",
    "ENSECAG": "horse",
    "ENSOCUG": "rabbit",
    "ENSHGLG": "naked_mole_rat",
}
# How symbols are written; most species have capitals.
TITLE, CAPITALS, LOWER = "Title case", "capitals", "lower case"
SPELLING = {"mouse": TITLE, "rat": TITLE, "hamster": TITLE, "zebrafish": LOWER, "frog": LOWER}
# Columns of var that say it (Cell Ranger's is "genome"), and what their values, and genomes in front of names, mean.
COLUMNS = ("genome", "species", "organism")
_MEANING = {
    "human": r"(?i)grch\d+|hg\d+|t2t|chm13|human|h(omo)?[ _.]?sapiens",
    "mouse": r"(?i)grcm\d+|mm\d+|mouse|m(us)?[ _.]?musculus",
    "rat": r"(?i)rn\d+|rnor.*|mratbn.*|rat|r(attus)?[ _.]?norvegicus",
    "zebrafish": r"(?i)grcz\d+|danrer\d+|zebrafish|d(anio)?[ _.]?rerio",
    "pig": r"(?i)sscrofa.*|susscr\d+|pig|s(us)?[ _.]?scrofa",
}
IN_CAPITALS = "The names are those of mouse genes in capitals: matched within mouse."
_TITLE = re.compile(r"[A-Z]\S*[a-z]\S*|\S+Rik|mt-\S+")  # H2afz, too
_CAPITALS = re.compile(r"[A-Z][A-Z0-9._-]+|C[0-9XY]+orf\S+")
_LOWER = re.compile(r"[a-z][a-z0-9._:-]+")


class UnknownSpeciesError(ValueError):
    """The species of a data set is none of the vocabulary's, or cannot be told."""


@dataclass(frozen=True, eq=False)
class OfColumns:
    """Species of each column of a data set, "" for none or one that cannot be told ``(n_vars,)``.

    ``var`` is the annotation of the columns, genomes in front of names taken off; ``notes`` are sentences on how it
    was found.
    """

    species: np.ndarray
    var: pd.DataFrame
    notes: tuple[str, ...] = ()


def named(text: str, known: Sequence[str]) -> str:
    """Species that a word means: a species, or a genome of it; empty if none that is known."""
    word = text.strip().lower().replace(" ", "_")
    if word in known:
        return word
    return next((name for name, pattern in _MEANING.items() if re.fullmatch(pattern, text.strip())), "")


def species_of_columns(
    var: pd.DataFrame, sources: Sequence[Names], genes: pd.DataFrame, given: str | None
) -> OfColumns:
    """Species of each column of a data set.

    What is given counts; else what a column of ``var`` says of it (``genome``, ``species`` or ``organism``), a genome
    in front of its name, its Ensembl id, and then how most symbols are written. ``given`` is a species, or a column
    of ``var`` with that of each column; ``sources`` are names, from the places of ``var`` that may hold them; the
    vocabulary has a column ``species``. Raises UnknownSpeciesError if it is none of the vocabulary's, or cannot be
    told.
    """
    known = [name for name in dict.fromkeys(genes[SPECIES]) if name]
    if given is not None and given not in var and (word := named(given, known)) in known:
        return OfColumns(np.full(len(var), word, dtype=object), _without_genomes(var)[0])
    column = given if given is not None else _column(var, known)
    if column is not None:
        if column not in var:
            msg = f"species={given!r} is neither one of the weights' ({_listed(known)}) nor a column of var."
            raise UnknownSpeciesError(msg)
        found = np.array([named(str(value), known) for value in var[column]], dtype=object)
        return _known_only(OfColumns(found, var), known, f"var[{column!r}]")
    plain, genomes = _without_genomes(var)
    if genomes is not None:
        found = np.array([named(word, known) for word in genomes], dtype=object)
        return _known_only(OfColumns(found, plain), known, "what stands in front of the names")
    return _by_names(var, sources, genes, known)


def _column(var: pd.DataFrame, known: Sequence[str]) -> str | None:
    """Column of ``var`` that says of which species a gene is; None if no value of such a column means one."""
    for label in var.columns:
        if str(label).lower() in COLUMNS:
            values = pd.unique(var[label].astype(str))
            if len(values) < len(var) and any(named(value, known) for value in values):
                return str(label)
    return None


def _without_genomes(var: pd.DataFrame) -> tuple[pd.DataFrame, list[str] | None]:
    """The names without a genome in front, and the genomes, where most names have one (``GRCh38_CD3D``)."""
    parts = [GENOME.fullmatch(str(name)) for name in var.index]
    if not parts or 2 * sum(part is not None for part in parts) < len(parts):
        return var, None
    names = [str(name) if part is None else part[2] for name, part in zip(var.index, parts, strict=True)]
    words = ["" if part is None else re.sub(r"[^A-Za-z0-9]+$", "", part[1]) for part in parts]
    return var.set_axis(names), words


def _known_only(found: OfColumns, known: Sequence[str], where: str) -> OfColumns:
    """Leave out columns of species that the vocabulary lacks; refuse if none is left."""
    of_other = Counter(name for name in found.species if name and name not in known)
    if not np.isin(found.species, known).any():
        others = f"{_listed(list(of_other))} genes" if of_other else "of no species that is known here"
        raise UnknownSpeciesError(f"The columns are {others}, by {where}. {refusal(known)}")
    notes = found.notes
    if of_other:
        n = sum(of_other.values())
        notes += (f"{n:,} columns are {_listed(list(of_other))} genes, which the weights lack: left out.",)
    species = np.where(np.isin(found.species, known), found.species, "").astype(object)
    return OfColumns(species, found.var, notes)


def _by_names(
    var: pd.DataFrame, sources: Sequence[Names], genes: pd.DataFrame, known: Sequence[str]
) -> OfColumns:
    """Species by Ensembl ids, and else by how symbols are written."""
    for names in sources:
        prefix = np.array([identifier[:-11] for identifier in names.ids], dtype=object)
        if 3 * (prefix != "").sum() >= len(prefix) > 0:
            return _by_prefix(var, names, prefix, known)
    symbols = {name: set(genes["symbol"][genes[SPECIES] == name].str.upper()) for name in known}
    capital = {names.source: [name.upper() for name in names.distinct] for names in sources}
    every = set().union(*symbols.values())
    names = max(sources, key=lambda each: sum(name in every for name in capital[each.source]))
    votes = np.array([_spelling(name) for name in names.distinct], dtype=object)
    # species with each spelling, and which of the names that are spelled so they have
    of_vote = {
        vote: [name for name in known if SPELLING.get(name, CAPITALS) == vote]
        for vote in (CAPITALS, TITLE, LOWER)
    }
    seen = {}
    for vote, species in of_vote.items():
        theirs = set().union(*(symbols[name] for name in species))
        seen[vote] = (votes == vote) & np.array(
            [name in theirs for name in capital[names.source]], dtype=bool
        )
    n_seen = {vote: int(mask.sum()) for vote, mask in seen.items()}
    most = max(n_seen, key=n_seen.__getitem__)
    mixed = [v for v, n in n_seen.items() if n >= max(LEAST, LARGE * n_seen[most])]
    n_votes = Counter(vote for vote in votes if vote)
    if len(mixed) > 1:
        return _mixed(var, names, votes, {vote: of_vote[vote] for vote in mixed}, genes, symbols)
    written = n_votes.most_common(1)[0][0] if n_votes else None
    if written == CAPITALS and in_capitals(names.text):
        if "mouse" not in known:
            raise UnknownSpeciesError(f"{in_capitals(names.text)} {refusal(known)}")
        return OfColumns(
            np.full(len(var), "mouse", dtype=object),
            var,
            (IN_CAPITALS,),
        )
    candidates = of_vote[written] if written in of_vote else list(known)
    if not candidates:
        examples = ", ".join(map(repr, names.distinct[:4]))
        what = {
            TITLE: "mouse (or rat)",
            CAPITALS: "human (or another species')",
            LOWER: "zebrafish (or frog)",
        }
        raise UnknownSpeciesError(
            f"The names are {what[str(written)]} gene names ({examples}). {refusal(known)}"
        )
    n = {name: sum(each in symbols[name] for each in capital[names.source]) for name in candidates}
    found = max(n, key=n.__getitem__)
    notes: tuple[str, ...] = ()
    if len(candidates) > 1:
        others = ", ".join(f"{name} {n[name]:,}" for name in candidates if name != found)
        notes = (
            f"The names were taken for those of {found}, which has {n[found]:,} of them; {others} are written alike. "
            f'If that is wrong, say so: species="{next(name for name in candidates if name != found)}".',
        )
    return OfColumns(np.full(len(var), found, dtype=object), var, notes)


def _by_prefix(var: pd.DataFrame, names: Names, prefix: np.ndarray, known: Sequence[str]) -> OfColumns:
    """Species by Ensembl ids; columns without one go with the others where these are of one species."""
    of_name = np.array([PREFIXES.get(each, each) if each else "" for each in prefix], dtype=object)
    n = Counter(name for name in of_name if name)
    here = [name for name, count in n.items() if count >= LARGE * max(n.values())]
    if len(here) == 1 and here[0] in known:
        return OfColumns(np.full(len(var), here[0], dtype=object), var)
    return _known_only(
        OfColumns(of_name[names.codes], var), known, f"the Ensembl ids in {place(names.source)}"
    )


def _mixed(
    var: pd.DataFrame,
    names: Names,
    votes: np.ndarray,
    of_vote: Mapping[str, Sequence[str]],
    genes: pd.DataFrame,
    symbols: Mapping[str, set[str]],
) -> OfColumns:
    """Species of each name by how it is written, where two ways are there; one that two species share is left out."""
    of_name = np.full(len(names.distinct), "", dtype=object)
    chosen = {}
    for vote, species in of_vote.items():
        own = [name.upper() for name in names.distinct[votes == vote]]
        chosen[vote] = max(species, key=lambda s: sum(name in symbols[s] for name in own))
        of_name[votes == vote] = chosen[vote]
    shared = np.array(
        [vote == CAPITALS and _no_case(name) and all(name.upper() in symbols[s] for s in chosen.values())
         for name, vote in zip(names.distinct, votes, strict=True)],
        dtype=bool,
    )  # fmt: skip
    for (
        species
    ) in chosen.values():  # H2-K1 is a gene of mouse, if the vocabulary writes mouse's in Title case
        theirs = set(genes["symbol"][genes[SPECIES] == species])
        theirs -= set().union(*(symbols[other] for other in chosen.values() if other != species))
        if SPELLING.get(species) == TITLE and 2 * sum(_spelling(name) == TITLE for name in theirs) > len(
            theirs
        ):
            of_name[
                [
                    vote == CAPITALS and name in theirs
                    for name, vote in zip(names.distinct, votes, strict=True)
                ]
            ] = species
    of_name[shared] = ""
    note = (
        f"Genes of {_listed(list(chosen.values()))}, told apart by how their symbols are written; a column of var "
        f"named {COLUMNS[0]!r} would say so."
    )
    notes = [note]
    if shared.any():
        examples = ", ".join(names.distinct[shared][:4])
        notes.append(f"{int(shared.sum()):,} names are written alike in both, such as {examples}: left out.")
    return OfColumns(of_name[names.codes], var, tuple(notes))


def _no_case(name: str) -> bool:
    """Whether a symbol has a single letter in front, so that Title case and capitals are the same (``C3``)."""
    return sum(sign.isalpha() for sign in name) == 1


def _spelling(name: str) -> str:
    if ensembl_id(name):
        return ""
    if _CAPITALS.fullmatch(name):
        return CAPITALS
    if _TITLE.fullmatch(name):
        return TITLE
    return LOWER if _LOWER.fullmatch(name) else ""


def refusal(known: Sequence[str]) -> str:
    """What can be done where a species is not known."""
    return (
        f"The weights know {_listed(known)}. One species is not turned into another: use weights that know it, add it "
        "from vectors of its proteins (UCE.add_species), or map the genes to one-to-one orthologues of a species that "
        'is known and say so (species="...").'
    )


def _listed(names: Sequence[str]) -> str:
    *others, last = names or ["none"]
    return f"{', '.join(others)} and {last}" if others else str(last)
