"""What all pretrained models share: setup, gene matching, the embedding loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from uuid import uuid4

import anndata as ad
import numpy as np
import pandas as pd
import rich.pretty  # noqa: F401  scvi-tools 1.4.2 uses it without importing it
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior import genes as gene_matching
from cellprior._matrix import matrix_of, totals
from cellprior.genes._kinds import which_are_genes
from cellprior.genes._table import read_vocabulary
from cellprior.model.data._counts import refuse_by_gene, row_numbers
from cellprior.model.data._fields import BatchField, CountsField, CountsManager, without_view
from cellprior.model.data._fingerprint import digest, digest_of_counts
from cellprior.model.data._minibatches import VocabularyLoader
from cellprior.model.data._panels import distinct
from cellprior.model.engine._dask import Blocks, embed_unit
from cellprior.model.engine._embedding import Embedding, in_memory
from cellprior.model.files._loading import LoadableModel
from cellprior.model.learning._annotation import AnnotatingModel
from cellprior.model.learning._fitting import NOT_FINITE, DivergedError
from cellprior.model.learning._training import TrainableModel

Precision = Literal["float32", "bfloat16"]


class PretrainedModel(LoadableModel, TrainableModel, AnnotatingModel):
    """Base of the model classes.

    A subclass gives ``_module_cls``, ``obsm_key``, an ``__init__`` that ends in :meth:`_finish_init`, and, for
    checkpoints in its authors' layout, :meth:`_read_official`. A model whose cells see each other also gives
    ``_sentences``, ``_n_stages``, :meth:`_units` and :meth:`_encode`.
    """

    _data_loader_cls = VocabularyLoader
    _sentences = False  # whether cells see each other
    # buffers of the module: how counts become its input, which no training changes
    _input_buffers: tuple[str, ...] = ()
    default_batch_size = 1024
    _unit_size = (
        1024  # cells after which a stream to disk can be cut short, where cells do not see each other
    )

    def __init__(
        self,
        adata: ad.AnnData | None,
        registry: dict | None,
        genes: pd.DataFrame | Sequence[str] | None,
        min_coverage: float,
    ) -> None:
        super().__init__(adata, registry)
        gene_key = self.registry["setup_args"]["gene_key"]
        if genes is None:
            if adata is None:
                msg = "A model without data needs its vocabulary: pass genes=."
                raise ValueError(msg)
            var = self.adata_manager.counts.var
            names = (var.index if gene_key is None else var[gene_key])[which_are_genes(var)]
            genes = distinct(read_vocabulary(list(names)))
        self.genes = read_vocabulary(genes)
        self.min_coverage = min_coverage
        self.gene_match: gene_matching.GeneMatch | None = (
            None if adata is None else self._match(self.adata_manager)
        )

    def _finish_init(self, init_locals: dict[str, Any]) -> None:
        """Last line of a subclass's ``__init__``: keep what is needed to build the model again."""
        self.init_params_ = self._get_init_params({**init_locals, "genes": self.genes})
        self._model_summary_string = f"{type(self).__name__}: {len(self.genes):,} genes, " + ", ".join(
            f"{name}={value!r}" for name, value in self._network().items()
        )

    def _network(self) -> dict[str, Any]:
        """Arguments of the network."""
        params = self.init_params_["non_kwargs"]
        return {name: value for name, value in params.items() if name not in ("genes", "min_coverage")}

    @classmethod
    def setup_anndata(
        cls,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str = "unknown",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData.

        Parameters
        ----------
        adata
            Annotated data ``(cells, genes)``; not a view.
        layer
            Layer with raw counts; ``None`` for ``X``; ``"raw"`` for ``adata.raw`` and its genes, unless a layer has
            this name.
        gene_key
            Column of ``var`` with gene symbols or Ensembl ids; by default the place that matches best.
        batch_key
            Column of ``obs`` with the batch of each cell.
        labels_key
            Column of ``obs`` with cell-type labels, for annotation.
        unlabeled_category
            Label that stands for "not labelled".

        Raises
        ------
        NotCountsError
            If the first cells do not hold raw counts.
        ValueError
            If there is no cell, no gene, no such layer, or ``adata`` is a view.
        KeyError
            If a column of ``obs`` is missing.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        cls.register_manager(cls._manager(adata, setup_method_args, **kwargs))

    @staticmethod
    def _manager(adata: ad.AnnData, setup_method_args: dict[str, Any], **kwargs: Any) -> CountsManager:
        """Manager of an AnnData, or of a query, for which ``source_registry`` is given."""
        args = setup_method_args["setup_args"]
        if args["gene_key"] is not None:
            var = matrix_of(adata, args["layer"]).var
            if args["gene_key"] not in var:
                frame = "adata.var" if var is adata.var else "adata.raw.var"
                msg = f"{args['gene_key']!r} not found in {frame}; its columns are {list(var.columns)}."
                raise KeyError(msg)
        fields: list[Any] = [CountsField(REGISTRY_KEYS.X_KEY, args["layer"])]
        if args["batch_key"] is not None:
            fields.append(BatchField(REGISTRY_KEYS.BATCH_KEY, args["batch_key"]))
        # labels are no field: they are read when they are learned, and a query need not have them
        if args["labels_key"] not in (None, *adata.obs) and "source_registry" not in kwargs:
            columns = list(adata.obs.columns)
            msg = f"{args['labels_key']!r} not found in adata.obs; its columns are {columns}."
            raise KeyError(msg)
        manager = CountsManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        return manager

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        batch_size: int | None = None,
        *,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Data to embed, by default the attached. Its genes are matched by name; it is not kept.
        indices
            Cells to embed, as numbers or a mask; the result is in this order.
        batch_size
            Cells in memory at a time, at least 16; by default what fits a quarter of a GPU's free memory, and 1,024 on
            a CPU. Bounds the memory and never changes the result.
        precision
            ``"bfloat16"`` computes the large products in half the bits, several times faster on recent hardware.

        Returns
        -------
        Float32 array ``(n_cells, n_latent)``.

        Raises
        ------
        RuntimeError
            If the model has neither been trained nor loaded from weights.
        NotCountsError, GeneMatchError
            If the data are not raw counts, or too few of their genes are known.
        """
        return self._embed(adata, indices, batch_size, precision)

    def _embed(
        self,
        adata: ad.AnnData | None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None,
        batch_size: int | None,
        precision: Precision,
        **options: Any,
    ) -> np.ndarray:
        """Embed cells into memory; ``options`` as of :class:`~cellprior.model.engine._embedding.Embedding`."""
        self._check_if_trained(warn=False)
        with self._attached(adata) as manager:
            rows = row_numbers(indices, manager.adata.n_obs)
            sizes: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
            found = in_memory(Embedding(self, manager, rows, **sizes, **options))
        if not np.isfinite(found).all():
            raise DivergedError(NOT_FINITE)
        return found

    def _embedding(self, **options: Any) -> Embedding:
        """All attached cells, to be embedded."""
        self._check_if_trained(warn=False)
        with self._attached(None) as manager:
            return Embedding(self, manager, np.arange(manager.adata.n_obs), **options)

    def _fingerprint(self) -> dict[str, str]:
        """What the attached data are known again by; refuses what cannot be read cell by cell."""
        with self._attached(None) as manager:
            match, x = self._match_of(manager), manager.get_from_registry(REGISTRY_KEYS.X_KEY)
            refuse_by_gene(x)
            found = {
                "counts": digest_of_counts(x),
                "cells": digest(manager.adata.obs_names),
                "genes": digest(match.var_names, match.index),
            }
            if REGISTRY_KEYS.BATCH_KEY in manager.data_registry:
                found["batches"] = digest(manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY))
            return found

    def _matrices(self) -> list[Any]:
        """Counts of the attached data, where they are."""
        with self._attached(None) as manager:
            return [manager.get_from_registry(REGISTRY_KEYS.X_KEY)]

    @staticmethod
    def _columns(match: gene_matching.GeneMatch) -> tuple[np.ndarray, np.ndarray]:
        """Vocabulary rows that the data have, increasing, and which of them each column of the data is, -1 for none."""
        used, position = np.unique(match.index[match.index >= 0], return_inverse=True)
        column = np.full(len(match.index), -1, dtype=np.int32)
        column[match.index >= 0] = position
        return used, column

    def _units(self, manager: CountsManager, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """Positions in ``rows`` of cells that are encoded together: ``size``, where cells do not see each other."""
        n_units = -(-len(rows) // size)
        return np.array_split(np.arange(len(rows)), n_units) if n_units else []

    def _submit(
        self, client: Any, worker: Any, blocks: Blocks, cells: np.ndarray
    ) -> list[tuple[Any, np.ndarray]]:
        """Futures of the latents of one unit on a cluster, and the cells of each."""
        return [(blocks.submit(client, embed_unit, worker, cells), cells)]

    @property
    def _n_stages(self) -> int:
        """Times that a cell is worked on; for the bar of progress."""
        return 1

    def _encode(
        self, chunks: Iterable[Tensor], gene_index: Tensor | None, **options: Any
    ) -> Iterator[Tensor]:
        """Latents ``(cells, n_latent)`` of each chunk of one unit."""
        return (self.module.encode(counts, gene_index=gene_index, **options) for counts in chunks)

    def _hidden(self, chunks: Iterable[Tensor], gene_index: Tensor | None) -> Iterable[Tensor]:
        """Hidden states ``(cells, n_hidden)`` of each chunk of one unit, what the annotation head reads."""
        return (self.module.hidden(counts, gene_index=gene_index) for counts in chunks)

    def _counts(self, loader: Iterable[dict[str, Tensor]]) -> Iterator[Tensor]:
        device = self.module.device
        for batch in loader:
            counts = batch[REGISTRY_KEYS.X_KEY]
            # Apple's GPUs have no sparse tensors
            yield counts.to_dense().to(device) if device.type == "mps" else counts.to(device)

    def _match(self, manager: CountsManager) -> gene_matching.GeneMatch:
        """Match the genes of an AnnData to the vocabulary."""
        counts = manager.counts
        return gene_matching.match(
            counts.var,
            self.genes,
            gene_key=manager.registry["setup_args"]["gene_key"],
            gene_counts=totals(counts),
            min_coverage=self.min_coverage,
        )

    def _match_of(self, manager: CountsManager) -> gene_matching.GeneMatch:
        """Genes of a query, or of the attached data, matched already unless they have changed since."""
        if manager is not self.adata_manager:
            return self._match(manager)
        if self.gene_match is None or not self.gene_match.var_names.equals(manager.counts.var.index):
            self.gene_match = self._match(manager)
        return self.gene_match

    def _known_genes(self, adata: ad.AnnData | None) -> tuple[np.ndarray, pd.Index]:
        """Vocabulary rows and names of the genes of the data that are in the vocabulary."""
        with self._attached(adata) as manager:
            match = self._match_of(manager)
        known = match.index >= 0
        return match.index[known], match.var_names[known]

    @contextmanager
    def _attached(self, adata: ad.AnnData | None) -> Iterator[CountsManager]:
        """Manager of some data for the time of one call, so that a query does not stay in memory."""
        if adata is None and self.adata is None:
            msg = "The model was loaded without data: pass adata=."
            raise ValueError(msg)
        adata = self._validate_anndata(adata)
        try:
            yield self.get_anndata_manager(adata, required=True)
        finally:
            if adata is not self.adata:
                self._per_instance_manager_store[self.id].pop(adata.uns["_scvi_uuid"], None)

    def _validate_anndata(self, adata: ad.AnnData | None = None, copy_if_view: bool = True) -> ad.AnnData:
        """Register other data than the attached as a query: its genes, batches and labels may differ."""
        if adata is None or adata is self.adata:
            return super()._validate_anndata(adata, copy_if_view)
        adata = without_view(adata)
        if self.adata is not None and adata.uns.get("_scvi_uuid") == self.adata.uns["_scvi_uuid"]:
            adata.uns["_scvi_uuid"] = str(uuid4())  # a copy of the attached data
        setup_method_args = {
            key: self.registry[key] for key in ("model_name", "setup_method_name", "setup_args")
        }
        manager = self._manager(
            adata, setup_method_args, source_registry=self.registry, extend_categories=True
        )
        self._register_manager_for_instance(manager)
        return adata
