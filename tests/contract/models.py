"""The models that the contract holds for: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scanpy as sc
from anndata import AnnData

from cellprior import pp
from cellprior.model import CellPLM
from cellprior.model._base import PretrainedModel


@dataclass(frozen=True)
class Entry:
    """A model class, weights that a plain clone has, and data that they can embed."""

    model: type[PretrainedModel]
    weights: str
    make_data: Callable[[], AnnData]

    def attach(self, adata: AnnData, **setup: Any) -> PretrainedModel:
        """The pretrained model with data attached; without ``setup``, from_pretrained sets the data up."""
        if setup:
            self.model.setup_anndata(adata, **setup)
        return self.model.from_pretrained(self.weights, adata)

    def embed(self, adata: AnnData, *, setup: dict[str, Any] | None = None, **options: Any) -> np.ndarray:
        model = self.attach(adata, **(setup or {}))
        try:
            return model.get_latent_representation(**options)
        finally:
            model.release()


def blood_cells() -> AnnData:
    """700 blood cells that come with scanpy: raw counts of 765 genes, two interleaved batches."""
    return _blood_cells().copy()


@cache
def _blood_cells() -> AnnData:
    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    counts = pp.recover_counts(adata)
    obs = adata.obs[["bulk_labels"]].assign(batch=np.where(np.arange(adata.n_obs) % 3, "a", "b"))
    return AnnData(counts, obs=obs, var=adata.var, layers={"log": adata.X})


MODELS = [
    Entry(CellPLM, "cellplm-starter", blood_cells),
]
