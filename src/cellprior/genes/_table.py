"""What a gene name says by itself, and what the GENCODE tables add to it."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

# Newest release first: a symbol belongs to the gene that carries it now.
TABLES = {
    "human": {
        "gencode-human-48": "genes_homo_sapiens.gencode48.csv.gz",
        "gencode-human-38": "genes_homo_sapiens.gencode38.csv.gz",
    },
    "mouse": {"gencode-mouse-M37": "genes_mus_musculus.gencodeM37.csv.gz"},
}

# Alone, with a version (.3, .3_PAR_Y), or joined to a symbol (CLN3_ENSG00000188603, to make names unique).
_ENSEMBL_ID = re.compile(r"(?:\S+[_|])?(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:[_|]\S+)?")
_ID_FIRST = re.compile(r"(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:[_|]\S+)?")  # most of them, and found faster
_MOUSE_SYMBOL = re.compile(r"[A-Z][a-z]\S*|\S+Rik|mt-\S+")
_HUMAN_SYMBOL = re.compile(r"[A-Z][A-Z0-9._-]+|[A-Z0-9]+orf\S+")
_SPECIES_OF_PREFIX = {"ENSG": "human", "ENSMUSG": "mouse"}
_NAMES_LOOKED_AT = 2000


def ensembl_id(name: str) -> str:
    """Ensembl gene id in a name, without version; empty if there is none."""
    found = (_ID_FIRST.fullmatch(name) or _ENSEMBL_ID.fullmatch(name)) if "ENS" in name else None
    return found[1] if found else ""


def species_of(name: str) -> str | None:
    """Species that the spelling of a name suggests: "human", "mouse", "other" or None (no opinion)."""
    if identifier := ensembl_id(name):
        return _SPECIES_OF_PREFIX.get(identifier[:-11], "other")
    if _MOUSE_SYMBOL.fullmatch(name):
        return "mouse"
    return "human" if _HUMAN_SYMBOL.fullmatch(name) else None


def species_of_most(names: np.ndarray, *, n_rows: int) -> str | None:
    """Species of a list of distinct names, judged by an even sample; None if few of them say anything.

    A column with few values for many rows, ``n_rows``, names no genes.
    """
    if 3 * len(names) < n_rows:
        return None
    sample = names[:: max(1, len(names) // _NAMES_LOOKED_AT)]
    votes = Counter(vote for vote in map(species_of, sample) if vote)
    species, n_votes = votes.most_common(1)[0] if votes else (None, 0)
    return species if 3 * n_votes >= len(sample) else None


@dataclass(frozen=True, eq=False)
class Names:
    """Gene names from one place of a data set, the ``source``.

    ``codes`` says which of the ``distinct`` names each row has ``(n_rows,)``: these are stripped, a missing one is
    empty, and ``text`` has them between line breaks. ``ids`` has the Ensembl id in each, or "". For ``species`` see
    `species_of_most`.
    """

    source: str
    codes: np.ndarray
    distinct: np.ndarray
    ids: list[str]
    species: str | None
    text: str

    @classmethod
    def read(cls, source: str, values: pd.Series) -> Names:
        """Read them from an index or a column."""
        codes, distinct = pd.factorize(_text(values))
        ids = [ensembl_id(name) if "ENS" in name else "" for name in distinct]
        text = "\n" + "\n".join(distinct) + "\n"
        return cls(source, codes, distinct, ids, species_of_most(distinct, n_rows=len(codes)), text)


def _text(values: pd.Series) -> np.ndarray:
    """Values as stripped strings; a missing one is empty."""
    text = [
        value.strip() if value.__class__ is str else "" if pd.isna(value) else str(value).strip()
        for value in values.to_numpy(dtype=object)
    ]
    found = np.empty(len(text), dtype=object)
    found[:] = text
    return found


def read_vocabulary(vocabulary: Sequence[str] | pd.DataFrame) -> pd.DataFrame:
    """Vocabulary as string columns `ensembl_id`, `symbol`, `previous_symbols`; a missing value is empty.

    Ids lose their version; one that stands among the symbols is moved to where ids belong. A column `species` is kept
    where it says something.

    Raises ValueError if there is no gene, or neither ids nor symbols; TypeError if it is one text.
    """
    if isinstance(vocabulary, str):
        msg = f"genes={vocabulary!r} is one text; a list of names is needed: genes=[{vocabulary!r}]."
        raise TypeError(msg)
    given = vocabulary if isinstance(vocabulary, pd.DataFrame) else pd.DataFrame({"symbol": list(vocabulary)})
    if len(given) == 0 or not {"ensembl_id", "symbol"} & set(given.columns):
        msg = (
            f"The vocabulary has {len(given)} rows and the columns {', '.join(map(repr, given.columns))}; it "
            "needs at least one gene and a column 'ensembl_id' or 'symbol'. Pass names, or such a frame."
        )
        raise ValueError(msg)
    columns = ["ensembl_id", "symbol", "previous_symbols"]
    text = {name: _text(given[name]) if name in given else [""] * len(given) for name in columns}
    genes = pd.DataFrame(text, dtype=object)
    in_symbol = pd.Series(
        [ensembl_id(name) if "ENS" in name else "" for name in text["symbol"]], dtype=object
    )
    genes["symbol"] = genes["symbol"].where(in_symbol == "", "")
    genes["ensembl_id"] = genes["ensembl_id"].map(ensembl_id).where(genes["ensembl_id"] != "", in_symbol)
    if "species" in given and (of_gene := _text(given["species"])).any():
        genes["species"] = of_gene
    return genes


@dataclass(frozen=True)
class GeneTable:
    """Which gene a symbol means.

    Attributes
    ----------
    id_of
        Ensembl id of every symbol that means one gene.
    symbols_of
        The symbols of an id, the current one first: `id_of` the other way round.
    """

    id_of: dict[str, str]
    symbols_of: dict[str, list[str]]

    def complete(self, genes: pd.DataFrame) -> pd.DataFrame:
        """Fill in what is missing of a vocabulary, as `read_vocabulary` returns it, in a new frame.

        `previous_symbols` are all other symbols of the same id: where `symbol` is retired, the current one is among
        them.
        """
        filled = []
        columns = ["ensembl_id", "symbol", "previous_symbols"]
        for identifier, symbol, previous in genes[columns].itertuples(index=False):
            identifier = identifier or self.id_of.get(symbol, "")
            known = self.symbols_of.get(identifier, [])
            symbol = symbol or (known[0] if known else "")
            others = "|".join(name for name in known if name != symbol)
            filled.append((identifier, symbol, previous or others))
        return pd.DataFrame(filled, columns=columns, index=genes.index)

    def spelled(self, genes: pd.DataFrame) -> pd.DataFrame:
        """A vocabulary whose symbols are written as here, where they differ in capitals only, from one gene's."""
        by_capitals: dict[str, str] = {}
        for symbol in self.id_of:
            by_capitals[symbol.upper()] = "" if symbol.upper() in by_capitals else symbol
        symbols = [
            symbol if symbol in self.id_of else by_capitals.get(symbol.upper()) or symbol
            for symbol in genes["symbol"]
        ]
        return genes.assign(symbol=symbols)


def load(species: str) -> tuple[GeneTable | None, tuple[str, ...]]:
    """Read the gene tables of a species, fetching them if needed.

    Returns
    -------
    The table, or None if no release could be had, and sentences about what is missing.
    """
    from cellprior.weights import WeightsError, fetch

    paths, missing, reason = [], [], ""
    for name, file in TABLES[species].items():
        try:
            paths.append(fetch(name, progressbar=False) / file)
        except (WeightsError, OSError) as error:
            missing.append(name)
            reason = reason or str(error).partition("\n")[0].rstrip(".: ")
    notes: tuple[str, ...] = ()
    if missing:
        commands = " and ".join(f"`cellprior download {name}`" for name in missing)
        notes = (
            f"Gene names were matched without {' and '.join(missing)}: retired symbols are lost, and symbols "
            f"are not translated to Ensembl ids or back ({reason}). Get what is missing with {commands}, "
            "or set CELLPRIOR_MIRROR to a folder that holds it.",
        )
    return (_read(tuple(paths)) if paths else None), notes


@functools.cache
def _read(paths: tuple[Path, ...]) -> GeneTable:
    """Read releases of one species, newest first; columns Ensembl id, symbol and others, no header."""
    columns = ["id", "symbol"]
    releases = [
        pd.read_csv(path, header=None, usecols=[0, 1], names=columns, dtype=str, keep_default_na=False)
        for path in paths
    ]
    # A gene without a symbol carries its id as symbol.
    newest, *older = [release[release["id"] != release["symbol"]].drop_duplicates() for release in releases]
    owned = [_of_one_gene(newest)]
    for release in older:
        # Where two ids carry a symbol now, it means the one that carried it before (pseudo-autosomal genes
        # got a second id for their copy on Y); if both or neither did, it means nothing.
        owned.append(_of_one_gene(newest.merge(release)))
        owned.append(_of_one_gene(release[~release["symbol"].isin(newest["symbol"])]))
    pairs = pd.concat(owned).drop_duplicates("symbol")
    id_of = dict(zip(pairs["symbol"], pairs["id"], strict=True))
    symbols_of: dict[str, list[str]] = {}
    for symbol, identifier in id_of.items():
        symbols_of.setdefault(identifier, []).append(symbol)
    return GeneTable(id_of=id_of, symbols_of=symbols_of)


def _of_one_gene(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs whose symbol belongs to one id only."""
    return pairs[~np.asarray(pairs["symbol"].duplicated(keep=False))]
