"""What is compared: embeddings that exist, and baselines that are fitted on training cells."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA

from cellprior.evaluate._expression import log_normalised

Kind = Literal["embedding", "baseline", "control"]
Fit: TypeAlias = Callable[[np.ndarray, int], np.ndarray]
"""From the rows that may be learned from and a seed to an embedding of all cells ``(cells, dimensions)``."""

N_COMPONENTS = 50
N_HIGHLY_VARIABLE = 2000


@dataclass(frozen=True, slots=True)
class Method:
    """An embedding by name."""

    name: str
    kind: Kind
    fit: Fit


def fixed(name: str, values: np.ndarray) -> Method:
    """An embedding that is there already ``(cells, dimensions)``."""
    return Method(name, "embedding", lambda rows, seed: values)


def pca(name: str, log: sp.csr_matrix, genes: np.ndarray | None = None) -> Method:
    """Principal components of training cells; of some genes, or of those that vary most among these cells."""

    def fit(rows: np.ndarray, seed: int) -> np.ndarray:
        used = highly_variable(log[rows]) if genes is None else genes
        chosen = log[:, used]
        n = min(N_COMPONENTS, len(rows) - 1, chosen.shape[1] - 1)
        return np.asarray(PCA(n, svd_solver="arpack", random_state=seed).fit(chosen[rows]).transform(chosen))

    return Method(name, "baseline", fit)


def variable_genes(log: sp.csr_matrix) -> Method:
    """The genes themselves that vary most among training cells, as an embedding."""
    return Method("HVG", "baseline", lambda rows, seed: log[:, highly_variable(log[rows])].toarray())


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


def random_numbers(n_obs: int) -> Method:
    """No information at all: a normal variable for each cell and dimension."""

    def fit(rows: np.ndarray, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((n_obs, N_COMPONENTS), dtype=np.float32)

    return Method("random numbers", "control", fit)


def scvi(counts: sp.csr_matrix, batches: pd.Series | None, epochs: int) -> Method:
    """scVI, trained on the highly variable genes of training cells with their batches, as Lopez et al., 2018.

    Its encoder does not read the batch, so that cells of a batch that it has not seen are embedded, too.
    """
    log = log_normalised(counts)

    def fit(rows: np.ndarray, seed: int) -> np.ndarray:
        import scvi as scvi_tools
        import torch

        genes = highly_variable(log[rows])
        batch = np.zeros(counts.shape[0], dtype=int) if batches is None else pd.factorize(batches)[0]
        seen = batch[rows].astype(str)
        train = ad.AnnData(counts[rows][:, genes], obs={"batch": seen})
        query = ad.AnnData(counts[:, genes], obs={"batch": np.full(counts.shape[0], seen[0])})
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of Lightning, on workers and loggers
            torch.manual_seed(seed)
            scvi_tools.model.SCVI.setup_anndata(train, batch_key="batch")
            model = scvi_tools.model.SCVI(train, n_latent=30, n_layers=2, gene_likelihood="nb")
            model.train(
                max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, logger=False
            )
            return np.asarray(model.get_latent_representation(query))

    return Method("scVI", "baseline", fit)
