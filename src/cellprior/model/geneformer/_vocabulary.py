"""Geneformer's genes: its dictionaries, read without running them, and the vocabulary of V1 that comes with us."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cellprior.genes._table import ensembl_id
from cellprior.model.geneformer._inputs import first_gene
from cellprior.weights import WeightsError
from cellprior.weights._dictionary import read_dictionary

SHIPPED = Path(__file__).parent / "genecorpus_30m" / "genes.tsv.gz"
V1_TOKENS, V2_TOKENS = 25_426, 20_275
SPECIAL = ("<pad>", "<mask>", "<cls>", "<eos>")


class Vocabulary(NamedTuple):
    """Genes in the order of their tokens."""

    genes: pd.DataFrame  # ensembl_id, symbol, previous_symbols; these with retired ids
    scale: np.ndarray  # median of each, float64 (n_genes,)
    special: bool  # whether there are <cls> and <eos>
    files: tuple[Path, ...]  # that it was read from


def find_vocabulary(folder: Path, n_tokens: int) -> Vocabulary:
    """Vocabulary of a network of so many tokens, from the folder of its weights.

    ``token_dictionary*.pkl`` and ``gene_median_dictionary*.pkl`` are in it, in its ``dictionaries`` or, as in the
    authors' repository, in the folder ``geneformer`` beside it. So may be ``ensembl_mapping_dict*.pkl`` and
    ``gene_name_id_dict*.pkl``. Without any, a network of V1 gets its own. Raises WeightsError if they are missing,
    damaged, or another network's.
    """
    places = [folder, folder / "dictionaries"]
    if n_tokens != V1_TOKENS:  # whose own are in the package
        places.append(folder.parent / "geneformer")
    for place in places:
        if tokens := _only(place, "token_dictionary*.pkl"):
            medians = _only(place, "gene_median_dictionary*.pkl")
            if medians is None:
                msg = (
                    f"{place} has {tokens.name}, but not the medians that genes are divided by: put "
                    f"{tokens.name.replace('token', 'gene_median')} beside it."
                )
                raise WeightsError(msg)
            found = read_tokens(tokens, medians, _only(place, "gene_name_id_dict*.pkl"))
            break
    else:
        if n_tokens != V1_TOKENS:
            raise WeightsError(_no_dictionaries(folder, n_tokens))
        place, found = folder, shipped()
    n_found = len(found.genes) + first_gene(found.special)
    if n_found != n_tokens:
        version = {V1_TOKENS: " (V1)", V2_TOKENS: " (V2)"}
        msg = (
            f"The network in {folder} has {n_tokens:,} tokens{version.get(n_tokens, '')}, the dictionary in {place} "
            f"{n_found:,}{version.get(n_found, '')}: they do not belong together, and every gene would be taken for "
            "another. V1 goes with the dictionaries of gc30M, V2 with those of gc104M (or gc95M, which are the same)."
        )
        raise WeightsError(msg)
    if mapping := _only(place, "ensembl_mapping_dict*.pkl"):
        genes = with_retired_ids(found.genes, read_dictionary(mapping))
        found = found._replace(genes=genes, files=(*found.files, mapping))
    return found


def shipped() -> Vocabulary:
    """The vocabulary of V1, of Genecorpus-30M."""
    table = pd.read_csv(SHIPPED, sep="\t", keep_default_na=False, dtype=str)
    # pandas reads some numbers one bit off, and a stable order wants all of them
    scale = np.array([float(median) for median in table["median"]])
    return Vocabulary(table.drop(columns="median"), scale, False, (SHIPPED,))


def read_tokens(tokens: Path, medians: Path, names: Path | None = None) -> Vocabulary:
    """Read the authors' dictionaries: gene to token, gene to median, and symbol to gene.

    Raises WeightsError if a file is not such a dictionary, or a gene has no token or no median.
    """
    token = read_dictionary(tokens)
    special = "<cls>" in token
    first = first_gene(special)
    expected = [*SPECIAL[:first], *sorted(name for name in token if not name.startswith("<"))]
    found = sorted(token, key=lambda name: (not isinstance(token[name], int), token[name]))
    if found != expected or [token[name] for name in found] != list(range(len(token))):
        msg = (
            f"{tokens} is not Geneformer's: needed are <pad> 0, <mask> 1, for V2 <cls> 2 and <eos> 3, and then all "
            f"genes in the order of their names; found {len(token):,} entries that begin with "
            f"{', '.join(f'{name} {token[name]}' for name in found[:5])}."
        )
        raise WeightsError(msg)
    ids = found[first:]
    median = read_dictionary(medians)
    scale = np.array([_positive(median.get(name)) for name in ids], dtype=np.float64)
    if not (scale > 0).all():
        wrong = ids[int(np.argmin(scale > 0))]
        msg = (
            f"{medians} gives {int((scale <= 0).sum()):,} genes of {tokens.name} no median above 0, the first {wrong} "
            f"({median.get(wrong)}): they are not of the same version."
        )
        raise WeightsError(msg)
    genes = _genes(ids, {} if names is None else read_dictionary(names))
    return Vocabulary(genes, scale, special, tuple(filter(None, (tokens, medians, names))))


def with_retired_ids(genes: pd.DataFrame, mapping: Mapping[str, Any]) -> pd.DataFrame:
    """Genes that also go by the ids that the authors' mapping counts under them.

    An id that is a gene of the vocabulary itself stays that gene.
    """
    row = {name: i for i, name in enumerate(genes["ensembl_id"]) if name}
    retired: dict[int, list[str]] = {}
    for name, current in mapping.items():
        if name not in row and current in row:
            retired.setdefault(row[current], []).append(name)
    previous = genes["previous_symbols"].tolist()
    for i, names in retired.items():
        previous[i] = "|".join(filter(None, [previous[i], *names]))
    return genes.assign(previous_symbols=previous)


def _genes(ids: list[str], names: Mapping[str, Any]) -> pd.DataFrame:
    symbols: dict[str, list[str]] = {}
    for symbol, identifier in names.items():
        if symbol and "|" not in symbol:
            symbols.setdefault(str(identifier), []).append(symbol)
    rows = []
    for name in ids:
        known = symbols.get(name, [])
        if not ensembl_id(name):  # an id of another kind, such as ENSGR..., is found as it stands
            rows.append(("", name, "|".join(known)))
        else:
            rows.append((name, known[0] if known else "", "|".join(known[1:])))
    return pd.DataFrame(rows, columns=["ensembl_id", "symbol", "previous_symbols"])


def _positive(value: Any) -> float:
    """A median; 0 where it is none."""
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else 0.0


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        msg = f"{folder} has {', '.join(path.name for path in found)}: leave the one that the network was trained with."
        raise WeightsError(msg)
    return found[0] if found else None


def _no_dictionaries(folder: Path, n_tokens: int) -> str:
    advice = "token_dictionary*.pkl and gene_median_dictionary*.pkl, which it was trained with,"
    if n_tokens == V2_TOKENS:
        advice = (
            "token_dictionary_gc104M.pkl, gene_median_dictionary_gc104M.pkl and, for retired ids and symbols, "
            "ensembl_mapping_dict_gc104M.pkl and gene_name_id_dict_gc104M.pkl from the authors' repository"
        )
    return (
        f"The network in {folder} has {n_tokens:,} tokens, and nothing there says which genes they are: put {advice} "
        "beside config.json."
    )
