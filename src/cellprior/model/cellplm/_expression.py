"""Expression from CellPLM's decoder: denoised values, and genes that were not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

from cellprior.model._base import PretrainedModel
from cellprior.model._data import CountsManager, row_numbers
from cellprior.model._genes import gene_rows, measured_genes, refuse_unmeasured

if TYPE_CHECKING:
    import anndata as ad

Indices = Sequence[int] | Sequence[bool] | np.ndarray | None


class ExpressionMixin(PretrainedModel):
    """``get_normalized_expression`` and ``impute``, for a module with ``decode``."""

    def get_normalized_expression(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        *,
        gene_list: Sequence[str] | None = None,
        library_size: float = 1.0,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Decoder means, scaled to the same total in every cell; covariates are averaged over.

        Parameters
        ----------
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask.
        gene_list
            Names of the data, symbols or Ensembl ids; by default the whole vocabulary.
        library_size
            Total over all vocabulary genes.
        batch_size
            Cells in memory at a time.

        Returns
        -------
        Cells by genes, float32.

        Raises
        ------
        KeyError
            If a gene is not in the vocabulary.
        """
        latent = self._embed(adata, indices, batch_size, "float32")
        with self._attached(adata) as manager:
            names, columns = self._named(gene_list, manager)
            values = np.empty((len(latent), len(names)), dtype=np.float32)
            for cells, mean in self._decoder_means(latent, batch_size):
                values[cells] = mean[:, columns] * (library_size / mean.sum(axis=1, keepdims=True))
            rows = row_numbers(indices, manager.adata.n_obs)
            return pd.DataFrame(values, index=manager.adata.obs_names[rows], columns=names)

    def impute(
        self,
        genes: Sequence[str],
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        *,
        measured: Mapping[str, Sequence[str]] | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Expected counts of genes, measured or not, at the depth of each cell; covariates are averaged over.

        The decoder's means of a cell are scaled so that those of its measured genes add up to its counts of them.

        Parameters
        ----------
        genes
            Names of the data, symbols or Ensembl ids.
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask.
        measured
            For panels that differ between batches: the genes measured in each category of ``batch_key``. The counts of
            the others must be 0 there. By default all genes of the data were measured everywhere.
        batch_size
            Cells in memory at a time.

        Returns
        -------
        Cells by ``genes``, float32.

        Raises
        ------
        KeyError
            If one of ``genes`` is not in the vocabulary, or ``measured`` lacks a batch.
        ValueError
            If ``measured`` is given without a ``batch_key``, or an unmeasured gene has counts.
        """
        latent = self._embed(adata, indices, batch_size, "float32")
        with self._attached(adata) as manager:
            names, columns = self._named(genes, manager)
            rows = row_numbers(indices, manager.adata.n_obs)
            match = self._match_of(manager)
            seen = measured_genes(measured, manager, self.genes, match)
            panel = np.zeros(len(rows), dtype=np.int64)
            if measured is not None:
                panel = manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()[rows]
            values = np.empty((len(latent), len(names)), dtype=np.float32)
            for cells, mean in self._decoder_means(latent, batch_size):
                loader = self._data_loader_cls(
                    manager,
                    indices=rows[cells],
                    batch_size=len(mean),
                    data_and_attributes=[REGISTRY_KEYS.X_KEY],
                    column=match.index,
                    n_columns=len(self.genes),
                    dense=True,
                )
                (batch,) = loader
                counts, known = batch[REGISTRY_KEYS.X_KEY].numpy(), seen[panel[cells]]  # (cells, n_genes)
                refuse_unmeasured(counts, known, self.genes)
                depth = counts.sum(axis=1, keepdims=True)
                values[cells] = mean[:, columns] * (depth / (mean * known).sum(axis=1, keepdims=True))
            return pd.DataFrame(values, index=manager.adata.obs_names[rows], columns=names)

    @torch.inference_mode()
    def _decoder_means(
        self, latent: np.ndarray, batch_size: int | None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Decoder means ``(cells, n_genes)`` of a few cells at a time."""
        step = batch_size or self.default_batch_size
        for start in range(0, len(latent), step):
            cells = slice(start, start + step)
            mean, _ = self.module.decode(torch.from_numpy(latent[cells]).to(self.module.device))
            yield cells, mean.cpu().numpy()

    def _named(self, names: Sequence[str] | None, manager: CountsManager) -> tuple[list[str], np.ndarray]:
        """Names of genes, by default all of the vocabulary, and their rows in it."""
        if names is not None:
            return list(names), gene_rows(names, self.genes, self._match_of(manager))
        symbols, ids = self.genes["symbol"], self.genes["ensembl_id"]
        return symbols.where(symbols != "", ids).tolist(), np.arange(len(ids))
