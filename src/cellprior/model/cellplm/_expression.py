"""Expression from CellPLM's decoder: denoised values, and genes that were not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.genes import GeneMatch
from cellprior.model._base import PretrainedModel
from cellprior.model.cellplm._masked import MAX_CELLS, decoded, fit_covariates
from cellprior.model.data._counts import row_numbers
from cellprior.model.data._fields import CountsManager
from cellprior.model.data._panels import gene_rows, measured_genes, refuse_unmeasured

Covariates: TypeAlias = Literal["fitted", "mean"]
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
        covariates: Covariates = "fitted",
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Decoder means, scaled to the same total in every cell.

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
        covariates
            What the decoder is told of the data set and batch, of which it has learned a vector each: ``"fitted"``, for
            each category of ``batch_key`` what predicts hidden genes of some of its cells best; or ``"mean"``, the mean
            of all, the same for all cells. That takes differences between batches out, but the decoder knows the mean
            only if :meth:`train` has trained it on batches that it has no vector for: else counts are predicted worse.
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
            match = self._match_of(manager)
            names, columns = self._named(gene_list, match)
            rows = row_numbers(indices, manager.adata.n_obs)
            seen = measured_genes(None, None, self.genes, match)
            groups = self._decoder_groups(covariates, manager, match.index, rows, seen)
            values = np.empty((len(latent), len(names)), dtype=np.float32)
            for cells, mean in self._decoder_means(latent, groups, batch_size):
                values[cells] = mean[:, columns] * (library_size / mean.sum(axis=1, keepdims=True))
            return pd.DataFrame(values, index=manager.adata.obs_names[rows], columns=names)

    def impute(
        self,
        genes: Sequence[str],
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        *,
        measured: Mapping[str, Sequence[str]] | None = None,
        covariates: Covariates = "fitted",
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Expected counts of genes, measured or not, at the depth of each cell.

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
        covariates
            See :meth:`get_normalized_expression`.
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
            match = self._match_of(manager)
            names, columns = self._named(genes, match)
            rows = row_numbers(indices, manager.adata.n_obs)
            seen = measured_genes(measured, manager, self.genes, match)
            panel = np.zeros(len(rows), dtype=np.int64)
            if measured is not None:
                panel = manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()[rows]
            values = np.empty((len(latent), len(names)), dtype=np.float32)
            groups = self._decoder_groups(covariates, manager, match.index, rows, seen)
            for cells, mean in self._decoder_means(latent, groups, batch_size):
                counts = self._dense_counts(manager, match.index, rows[cells]).numpy()  # (cells, n_genes)
                known = seen[panel[cells]]
                refuse_unmeasured(counts, known, self.genes)
                depth = counts.sum(axis=1, keepdims=True)
                values[cells] = mean[:, columns] * (depth / (mean * known).sum(axis=1, keepdims=True))
            return pd.DataFrame(values, index=manager.adata.obs_names[rows], columns=names)

    def _dense_counts(self, manager: CountsManager, column: np.ndarray, rows: np.ndarray) -> Tensor:
        """Raw counts of cells over the vocabulary ``(cells, n_genes)``; ``column`` is the index of the gene match."""
        loader = self._data_loader_cls(
            manager,
            indices=rows,
            batch_size=len(rows),
            data_and_attributes=[REGISTRY_KEYS.X_KEY],
            column=column,
            n_columns=len(self.genes),
            dense=True,
        )
        (batch,) = loader
        return batch[REGISTRY_KEYS.X_KEY]

    def _decoder_groups(
        self,
        covariates: Covariates,
        manager: CountsManager,
        column: np.ndarray,
        rows: np.ndarray,
        seen: np.ndarray,
    ) -> list[tuple[np.ndarray, dict[str, int]]]:
        """Positions of the cells that are decoded with the same covariates, and these; none where it is their mean."""
        if covariates not in get_args(Covariates):
            msg = f'covariates={covariates!r} is not known; choose "fitted" or "mean".'
            raise ValueError(msg)
        decoder = self.module.decoder
        if covariates == "mean" or (decoder.dataset is None and decoder.batch is None):
            return [(np.arange(len(rows)), {})]
        batch = np.zeros(manager.adata.n_obs, dtype=np.int64)
        if REGISTRY_KEYS.BATCH_KEY in manager.data_registry:
            batch = manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()
        groups = []
        for code in np.unique(batch[rows]):
            # of all cells, so that the choice does not depend on those asked for
            cells = np.flatnonzero(batch == code)
            cells = cells[np.unique(np.linspace(0, len(cells) - 1, MAX_CELLS).astype(np.int64))]
            counts = {REGISTRY_KEYS.X_KEY: self._dense_counts(manager, column, cells)}
            known = torch.from_numpy(seen[code if len(seen) > 1 else 0]).to(self.module.device)
            fitted = fit_covariates(self.module, [counts], known)
            groups.append((np.flatnonzero(batch[rows] == code), fitted.get(0, {})))
        return groups

    @torch.inference_mode()
    def _decoder_means(
        self, latent: np.ndarray, groups: list[tuple[np.ndarray, dict[str, int]]], batch_size: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decoder means ``(cells, n_genes)`` of a few cells at a time, and their positions."""
        step = batch_size or self.default_batch_size
        for positions, covariates in groups:
            for cells in np.array_split(positions, -(-len(positions) // step)):
                z = torch.from_numpy(latent[cells]).to(self.module.device)
                mean, _ = decoded(self.module, z, covariates)
                yield cells, mean.cpu().numpy()

    def _named(self, names: Sequence[str] | None, match: GeneMatch) -> tuple[list[str], np.ndarray]:
        """Names of genes, by default all of the vocabulary, and their rows in it."""
        if names is not None:
            return list(names), gene_rows(names, self.genes, match)
        symbols, ids = self.genes["symbol"], self.genes["ensembl_id"]
        return symbols.where(symbols != "", ids).tolist(), np.arange(len(ids))
