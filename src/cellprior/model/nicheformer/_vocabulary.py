"""Nicheformer's genes and their means: read from the authors' files, or those that come with us."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cellprior.genes._table import read_vocabulary
from cellprior.model.nicheformer._inputs import FIRST_GENE, TECHNOLOGIES
from cellprior.weights import WeightsError

SHIPPED = Path(__file__).parent / "spatialcorpus_110m" / "genes.tsv.gz"
N_GENES = 20_310  # of the corpus
REFERENCE = "model.h5ad"
MEANS = "{}_mean_script.npy"


class Vocabulary(NamedTuple):
    """Genes in the order of their tokens."""

    genes: pd.DataFrame  # ensembl_id, symbol, previous_symbols
    means: np.ndarray  # float64 (technologies, n_genes), 0 where never seen
    files: tuple[Path, ...]  # that it was read from


def find_vocabulary(folder: Path, n_tokens: int) -> Vocabulary:
    """Vocabulary of a network of so many tokens, those that are no genes included, from its folder.

    With ``model.h5ad``, its genes in their order, and ``<technology>_mean_script.npy`` of one technology at least,
    these are read. Without ``model.h5ad``, the network of the authors gets its own. Raises WeightsError if they are
    missing, damaged, or another network's.
    """
    n_genes = n_tokens - FIRST_GENE
    reference = folder / REFERENCE
    if not reference.is_file():
        if n_genes == N_GENES:
            return shipped()
        msg = (
            f"The network in {folder} has {n_genes:,} genes, the authors' {N_GENES:,}, and nothing there says which: "
            f"put {REFERENCE} beside it, whose var_names are its genes in their order, and the means "
            f"{MEANS.format('<technology>')} ({', '.join(TECHNOLOGIES)})."
        )
        raise WeightsError(msg)
    ids = read_reference(reference)
    if len(ids) != n_genes:
        msg = f"{reference} has {len(ids):,} genes, the network {n_genes:,}: they do not belong together."
        raise WeightsError(msg)
    if n_genes == N_GENES and ids == names_of((known := shipped()).genes):
        found = list(folder.glob(MEANS.format("*")))
        if not found:
            return known._replace(files=(*known.files, reference))
        means, files = read_means(folder, n_genes)
        return Vocabulary(known.genes, means, (reference, *files))
    means, files = read_means(folder, n_genes)
    return Vocabulary(read_vocabulary(ids), means, (reference, *files))


def shipped() -> Vocabulary:
    """The vocabulary of the authors' network."""
    table = pd.read_csv(SHIPPED, sep="\t", keep_default_na=False, dtype=str)
    # pandas reads some numbers one bit off, and a stable order wants all of them
    means = np.array([[float(mean or 0) for mean in table[name]] for name in TECHNOLOGIES])
    return Vocabulary(table.drop(columns=list(TECHNOLOGIES)), means, (SHIPPED,))


def names_of(genes: pd.DataFrame) -> list[str]:
    """Names as the authors have them; ``ENSG00000072694-1``, behind the gene itself, is no Ensembl id."""
    return genes["ensembl_id"].where(genes["ensembl_id"] != "", genes["symbol"]).tolist()


def read_reference(path: Path) -> list[str]:
    """Names of the genes of an h5ad file, in their order; nothing else of it is read.

    Raises WeightsError if it cannot be read.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            var = file["var"]
            names = var[var.attrs["_index"]].asstr()[:].tolist()
    except Exception as error:  # a damaged file may raise anything
        msg = f"{path} cannot be read as an h5ad file with the names of genes ({error!r}). Get it again."
        raise WeightsError(msg) from error
    if twice := pd.Index(names)[pd.Index(names).duplicated()].tolist():
        msg = f"{path} has genes twice, the first {twice[0]}: each needs a token of its own."
        raise WeightsError(msg)
    return [str(name) for name in names]


def read_means(folder: Path, n_genes: int) -> tuple[np.ndarray, Sequence[Path]]:
    """Means of the genes in the technologies ``(technologies, n_genes)``, 0 where NaN or without a file; and the files.

    Raises WeightsError if there is none, or one is damaged, or of another vocabulary.
    """
    means, files = np.zeros((len(TECHNOLOGIES), n_genes)), []
    for row, name in enumerate(TECHNOLOGIES):
        path = folder / MEANS.format(name)
        if not path.is_file():
            continue
        try:
            found = np.load(path, allow_pickle=False)
        except Exception as error:  # a damaged file may raise anything
            msg = f"{path} cannot be read as an array of numbers ({error!r}). Get it again."
            raise WeightsError(msg) from error
        if not isinstance(found, np.ndarray) or found.shape != (n_genes,) or found.dtype.kind != "f":
            what = (
                f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
            )
            msg = (
                f"{path} holds {what}, and so belongs to another vocabulary; needed are the means of its {n_genes:,} "
                "genes, in their order."
            )
            raise WeightsError(msg)
        if np.isinf(found).any() or not np.isfinite(found).any():
            msg = f"{path} holds infinite means, or none at all: it is damaged. Get it again."
            raise WeightsError(msg)
        means[row] = np.nan_to_num(found.astype(np.float64))
        files.append(path)
    if not files:
        msg = (
            f"{folder} has none of the means that genes are divided by: put {MEANS.format('dissociated')} there, and "
            f"those of {', '.join(TECHNOLOGIES[1:])} if you have such cells."
        )
        raise WeightsError(msg)
    return means, files
