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
            names, columns = self._vocabulary_rows(gene_list, manager)
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
            If a gene is not in the vocabulary, or a batch not in ``measured``.
        ValueError
            If ``measured`` is given without a ``batch_key``.
        """
        latent = self._embed(adata, indices, batch_size, "float32")
        with self._attached(adata) as manager:
            names, columns = self._vocabulary_rows(genes, manager)
            rows = row_numbers(indices, manager.adata.n_obs)
            panel, seen = self._panels(measured, manager, rows)
            match = self._match_of(manager)
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
                known = seen[panel[cells]]  # (cells, n_genes)
                depth = (batch[REGISTRY_KEYS.X_KEY].numpy() * known).sum(axis=1, keepdims=True)
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

    def _vocabulary_rows(
        self, names: Sequence[str] | None, manager: CountsManager
    ) -> tuple[list[str], np.ndarray]:
        """Names of genes, and their rows in the vocabulary."""
        symbols, ids = (self.genes[column].tolist() for column in ("symbol", "ensembl_id"))
        if names is None:
            return [symbol or identifier for symbol, identifier in zip(symbols, ids, strict=True)], np.arange(
                len(ids)
            )
        row = {name: i for column in (ids, symbols) for i, name in enumerate(column) if name}
        match = self._match_of(manager)
        row.update({name: i for name, i in zip(manager.adata.var_names, match.index, strict=True) if i >= 0})
        if unknown := [name for name in names if name not in row]:
            msg = f"Not in the model's vocabulary: {', '.join(unknown[:10])}{' ...' if len(unknown) > 10 else ''}."
            raise KeyError(msg)
        return list(names), np.array([row[name] for name in names], dtype=np.int64)

    def _panels(
        self, measured: Mapping[str, Sequence[str]] | None, manager: CountsManager, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Number of each cell's panel, and which vocabulary genes each panel measures ``(panels, n_genes)``."""
        if measured is None:
            index = self._match_of(manager).index
            seen = np.zeros((1, len(self.genes)), dtype=bool)
            seen[0, index[index >= 0]] = True
            return np.zeros(len(rows), dtype=np.int64), seen
        batch_key = manager.registry["setup_args"]["batch_key"]
        if batch_key is None:
            msg = "measured= names genes by batch, but setup_anndata() was not given a batch_key."
            raise ValueError(msg)
        batch = manager.adata.obs[batch_key].astype(str).to_numpy()[rows]
        if missing := sorted(set(batch) - set(measured)):
            msg = f"measured= says nothing about the batches {', '.join(missing)}."
            raise KeyError(msg)
        seen = np.zeros((len(measured), len(self.genes)), dtype=bool)
        for i, names in enumerate(measured.values()):
            seen[i, self._vocabulary_rows(names, manager)[1]] = True
        number = {name: i for i, name in enumerate(measured)}
        return np.array([number[name] for name in batch], dtype=np.int64), seen
