"""What is compared: embeddings that exist, and baselines that are fitted without labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.linalg import eigh

from cellprior._talk import without_trainer_talk
from cellprior.evaluate._expression import log_normalised

Kind = Literal["embedding", "baseline", "control"]
Seen = Literal["no cell", "training cells", "not known", "these cells", "all cells"]
SEEN: tuple[Seen, ...] = get_args(Seen)  # the later, the less a gain says

ALL = "all genes"
SIZES = (100, 50, 30, 20, 10)  # components among which one is chosen
USUAL = 50  # where none is
N_HIGHLY_VARIABLE = 2000
MOST_CELLS = 6000  # for which products of all cells with all cells, over all genes, are computed
CHUNK = 2000  # genes of these products at a time


class Space(NamedTuple):
    """One of the embeddings that a method offers; which is used is chosen within the training cells."""

    words: str
    """What it is, or "" for the only one."""
    values: np.ndarray
    """``(cells, dimensions)``"""
    sizes: tuple[int, ...]
    """Numbers of leading dimensions to choose from, all of them first."""

    @property
    def usual(self) -> np.ndarray:
        """All dimensions, or the usual number of components, where nothing is chosen ``(cells, n)``."""
        return self.values[:, : USUAL if USUAL in self.sizes else None]


@dataclass(frozen=True, slots=True)
class Method:
    """Embeddings by name."""

    name: str
    kind: Kind
    fit: Callable[[], list[Space]]
    """Embeddings of all cells, made when they are first asked for."""
    seen: Seen
    """What they have learned from, labels aside: weights say, or nobody knows, and an array may have
    learned from all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fit", cache(self.fit))


def fixed(name: str, values: np.ndarray, *, kind: Kind = "embedding", seen: Seen = "all cells") -> Method:
    """An embedding that is there already ``(cells, dimensions)``."""
    return Method(name, kind, lambda: [_only(values)], seen)


def _only(values: np.ndarray) -> Space:
    return Space("", values, values.shape[1:])


class Genes:
    """Log-normalised expression, and products of cells over sets of genes, each computed once.

    Parameters
    ----------
    log
        Log-normalised expression ``(cells, genes)``.
    """

    def __init__(self, log: sp.csr_matrix) -> None:
        self.log = log
        self.rows = np.arange(log.shape[0])
        self.sets: dict[str, np.ndarray] = {}
        """Beside the variable genes, by name; none in large data."""
        if log.shape[0] <= MOST_CELLS and log.shape[1] > N_HIGHLY_VARIABLE:
            self.sets[ALL] = np.arange(log.shape[1])
        self.products = cache(self._products)
        self._of_rows = lru_cache(maxsize=2)(self._variable)  # PCA and the genes themselves ask for the same

    def add(self, name: str, genes: np.ndarray) -> None:
        """A further set, unless it is one of those that are there."""
        known = [np.arange(self.log.shape[1]), *self.sets.values()]
        if self.log.shape[0] <= MOST_CELLS and not any(np.array_equal(genes, others) for others in known):
            self.sets[name] = genes

    def variable(self, rows: np.ndarray) -> np.ndarray:
        """Expression of the genes that vary most among some cells, of all cells ``(cells, genes)``."""
        return self._of_rows(tuple(rows.tolist()))

    def _products(self, name: str) -> np.ndarray:
        """Products of the cells over a set of genes, float32 ``(cells, cells)``."""
        genes = self.sets[name]
        if name != ALL and ALL in self.sets:  # most are in the set, so what it lacks is less to compute
            return np.asarray(self.products(ALL) - self._sum(np.setdiff1d(self.sets[ALL], genes)))
        return self._sum(genes)

    def _sum(self, genes: np.ndarray) -> np.ndarray:
        """Products of the cells over some genes ``(cells, cells)``."""
        by_gene = self.log[:, genes].tocsc()
        found = np.zeros((self.log.shape[0],) * 2, dtype=np.float32)
        for start in range(0, len(genes), CHUNK):
            part = by_gene[:, start : start + CHUNK].toarray()
            found += part @ part.T
        return found

    def _variable(self, rows: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self.log[:, highly_variable(self.log[list(rows)])].toarray())


def pca(name: str, genes: Genes, rows: np.ndarray | None = None) -> Method:
    """Principal components of all cells, or of some rows to learn from; of variable genes, and of each other set."""

    def space(words: str, latent: np.ndarray) -> Space:
        return Space(words, latent, tuple(sorted({min(n, latent.shape[1]) for n in SIZES}, reverse=True)))

    def fit() -> list[Space]:
        learned = genes.rows if rows is None else rows
        expression = genes.variable(learned)
        of_sets = {
            f"{expression.shape[1]:,} variable genes": _components(expression, learned),
            **{words: _components_of_products(genes.products(words), learned) for words in genes.sets},
        }
        return [space(words, latent) for words, latent in of_sets.items()]

    return Method(name, "baseline", fit, "all cells" if rows is None else "training cells")


def _components(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Principal components of some cells, of all cells, from their expression ``(cells, genes)``."""
    train = x[rows]
    mean = train.mean(axis=0)
    train = train - mean
    axes = _leading(train.T @ train, min(SIZES[0], len(rows) - 1, x.shape[1] - 1))[1]
    return np.asarray((x - mean) @ axes, dtype=np.float32)


def _components_of_products(products: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The same from products of cells ``(cells, cells)``."""
    train, test = centred(products, rows)
    values, vectors = _leading(train, min(SIZES[0], len(rows) - 1))
    return np.asarray(test @ (vectors / np.sqrt(np.maximum(values, 1e-6 * values.max()))), dtype=np.float32)


def centred(products: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Products of some cells with each other, and of all cells with them, the mean of these cells made the origin."""
    share = np.zeros(len(products), dtype=products.dtype)
    share[rows] = 1 / len(rows)
    mean = products @ share  # of all cells with the mean
    moved = products[rows]  # (some cells, cells): whole rows are faster to copy, and products are symmetric
    moved -= mean[rows, None]
    moved -= mean - mean[rows].mean()
    return moved[:, rows], moved.T


def _leading(symmetric: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues and their vectors, the largest first."""
    last = len(symmetric) - 1
    values, vectors = eigh(symmetric, subset_by_index=[last - max(n, 1) + 1, last], check_finite=False)
    return values[::-1], vectors[:, ::-1]


def variable_genes(genes: Genes) -> Method:
    """The genes themselves that vary most among the cells, as an embedding."""
    return Method("HVG", "baseline", lambda: [_only(genes.variable(genes.rows))], "all cells")


def highly_variable(log: sp.csr_matrix) -> np.ndarray:
    """Numbers of the 2,000 genes whose dispersion stands out most among genes of their mean [Seurat's way].

    Parameters
    ----------
    log
        Log-normalised expression of the cells to look at ``(cells, genes)``.
    """
    import scanpy as sc

    if log.shape[1] <= N_HIGHLY_VARIABLE:
        return np.arange(log.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of genes that these cells lack
        found = sc.pp.highly_variable_genes(ad.AnnData(log), n_top_genes=N_HIGHLY_VARIABLE, inplace=False)
    return np.flatnonzero(found["highly_variable"])


def scvi(counts: sp.csr_matrix, batches: pd.Series | None, epochs: int) -> Method:
    """scVI, trained once on the highly variable genes of all cells with their batches, as Lopez et al., 2018."""

    def fit() -> list[Space]:
        import scvi as scvi_tools
        import torch

        genes = highly_variable(log_normalised(counts))
        batch = np.zeros(counts.shape[0], dtype=int) if batches is None else pd.factorize(batches)[0]
        cells = ad.AnnData(counts[:, genes], obs={"batch": batch.astype(str)})
        with warnings.catch_warnings(), without_trainer_talk(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of Lightning, on workers and loggers
            torch.manual_seed(0)
            scvi_tools.model.SCVI.setup_anndata(cells, batch_key="batch")
            model = scvi_tools.model.SCVI(cells, n_latent=30, n_layers=2, gene_likelihood="nb")
            model.train(
                max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, logger=False
            )
            latent = np.asarray(model.get_latent_representation())
        return [_only(latent)]

    return Method("scVI", "baseline", fit, "all cells")
