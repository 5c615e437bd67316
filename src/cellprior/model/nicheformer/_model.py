"""Nicheformer's face to AnnData."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior._arguments import flag, one_of
from cellprior.model._base import Precision, PretrainedModel, Size
from cellprior.model.data._cells import Cells
from cellprior.model.data._fields import CountsManager
from cellprior.model.data._minibatches import first_cells
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.nicheformer._checkpoint import is_official, read_hub, read_lightning
from cellprior.model.nicheformer._context import KINDS, ContextField, codes_of, explained, warn_without_assay
from cellprior.model.nicheformer._floors import TechnologyFloors
from cellprior.model.nicheformer._inputs import (
    CONTEXT_KEY,
    CONTEXT_TECHNOLOGY,
    GeneScale,
    nonzero_means,
)
from cellprior.model.nicheformer._loss import context_of, masked_scores
from cellprior.model.nicheformer._module import POOLINGS, NicheformerModule, Pooling
from cellprior.model.nicheformer._vocabulary import shipped
from cellprior.weights import Bundle, InertCheckpoint

SCALE_CELLS = 10_000  # training cells that means are taken over, at least, where there are so many


class Nicheformer(PretrainedModel):
    """Nicheformer: a cell's genes by rank, behind its species, assay and modality, in a transformer [Schaar25]_.

    For dissociated and spatial cells, whose panels measure a few hundred genes. A cell's embedding depends on that cell
    only: neither coordinates nor neighbours enter the network, in this model as in the original.

    Parameters
    ----------
    <built>
    n_hidden, n_layers, n_heads, n_feedforward, n_positions, dropout_rate, gene_scale
        Of the network, see :class:`~cellprior.model.nicheformer._module.NicheformerModule`.

    Examples
    --------
    >>> Nicheformer.setup_anndata(adata, layer="counts", assay_key="assay")
    >>> model = Nicheformer.from_pretrained("nicheformer", adata)
    >>> adata.obsm["X_nicheformer"] = model.get_latent_representation()

    References
    ----------
    .. [Schaar25] Tejada-Lapuerta, Schaar et al., Nicheformer: a foundation model for single-cell and spatial omics,
       Nature Methods 22:2525, 2025.
    """

    _module_cls = NicheformerModule
    obsm_key = "X_nicheformer"
    default_batch_size = 512
    _alike = True  # most of a mean over hundreds of genes is the same in all cells
    _input_buffers = ("gene_means",)
    objectives = {"masked": {}}

    sizes = {
        "small": {"n_hidden": 128, "n_layers": 3, "n_heads": 4, "n_feedforward": 256},
        "released": {"n_hidden": 512, "n_layers": 12, "n_heads": 16, "n_feedforward": 1024},
    }

    def __init__(
        self,
        adata: ad.AnnData | None = None,
        registry: dict | None = None,
        *,
        genes: pd.DataFrame | Sequence[str] | None = None,
        min_coverage: float = 0.25,
        size: Size | None = None,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        n_heads: int | None = None,
        n_feedforward: int | None = None,
        n_positions: int = 1500,
        dropout_rate: float = 0.0,
        gene_scale: GeneScale = "clean",
    ) -> None:
        super().__init__(adata, registry, genes, min_coverage)
        self._finish_init(locals())
        self.module = NicheformerModule(len(self.genes), **self._network())

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
        assay: str | None = None,
        assay_key: str | None = None,
        species: str | None = None,
        species_key: str | None = None,
        modality: str | None = None,
        modality_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData, and say how its cells were made: all alike, or each as a column of ``obs`` has it.

        Data that are given to a method later are read in the same way: with the same names, or the same columns.

        Parameters
        ----------
        adata
            Annotated data ``(cells, genes)``; not a view.
        <layer>
        gene_key
            Column of ``var`` with gene symbols or Ensembl ids; by default the place that matches best. For mouse, the
            one-to-one orthologues of human.
        batch_key
            Column of ``obs`` with the batch of each cell; nothing that the network sees.
        labels_key
            Column of ``obs`` with labels, of cell types, niches or regions, for annotation.
        unlabeled_category
            Label that stands for "not labelled".
        assay, assay_key
            ``"MERFISH"``, ``"CosMx"``, ``"Xenium"``, ``"ISS"``, ``"10x 3' v3"``, ``"10x 3' v2"``, ``"10x 3' v1"``,
            ``"10x 5' v2"``, ``"10x 5' v1"``, ``"10x 3' transcription profiling"``, ``"10x 5' transcription
            profiling"``, ``"CITE-seq"`` or ``"Smart-seq v4"``. It decides the modality, and by which means genes are
            ranked. Without, cells are dissociated ones of some assay, with a warning.
        species, species_key
            ``"human"``, the default, or ``"mouse"``.
        modality, modality_key
            ``"dissociated"`` or ``"spatial"``; by default that of the assay, which it must not contradict.

        Raises
        ------
        NotCountsError
            If the first cells do not hold raw counts.
        ValueError
            If a name is not known, a cell has none, or there is no cell, no gene, no such layer, or ``adata`` is a
            view.
        KeyError
            If a column of ``obs`` is missing.

        Warns
        -----
        UserWarning
            If no assay is named.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        if not kwargs:
            warn_without_assay(setup_method_args["setup_args"], stacklevel=2)
        cls.register_manager(cls._manager(adata, setup_method_args, **kwargs))

    @staticmethod
    def _manager(adata: ad.AnnData, setup_method_args: dict[str, Any], **kwargs: Any) -> CountsManager:
        args = setup_method_args["setup_args"]
        codes = codes_of(adata, args)  # which are refused before anything is registered
        with explained(codes):
            manager = PretrainedModel._manager(adata, setup_method_args, **kwargs)
        manager.register_new_fields([ContextField(args)])
        return manager

    @classmethod
    def _genes_on_hand(cls, name: str, folder: Path) -> pd.DataFrame | None:
        return shipped().genes if name == "nicheformer" else super()._genes_on_hand(name, folder)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a folder, or the file of weights in it, is the hub's copy of Nicheformer."""
        return is_official(path)

    @classmethod
    def _files_beside(cls, name: str) -> Sequence[str]:
        return ["config.json"] if name == "model.safetensors" else []

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        return read_hub(path)

    @classmethod
    def from_pickle(
        cls, checkpoint: InertCheckpoint, content: Any, **_: Any
    ) -> tuple[Bundle, list[str]] | None:
        """Bundle of the authors' checkpoint; see :func:`cellprior.model.convert`."""
        bundle = read_lightning(checkpoint, content)
        return None if bundle is None else (bundle, [])

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        batch_size: int | None = None,
        *,
        pooling: Pooling = "all",
        with_context: bool = False,
        layer: int = -1,
        gene_scale: GeneScale | None = None,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Data to embed, by default the attached. Its genes are matched by name, and its cells read as
            :meth:`setup_anndata` was told; it is not kept.
        indices
            Cells to embed, as numbers or a mask; the result is in this order.
        batch_size
            Cells that are read at a time, at least 16; a few of them, of nearly equal length, go through the network
            together. Never changes the result.
        pooling
            Mean over ``"all"`` positions, as the original: over the padding behind a cell's genes too, of which a
            shallow cell has more. Or over the ``"genes"``, several times faster where cells have few.
        with_context
            Over the positions of species, assay and modality too.
        layer
            As the authors count: 0 is the output of the first layer, -1, their choice, that of the last.
        gene_scale
            Genes are ranked by count over their mean in the technology, ``"clean"``; or, as for the tokens that the
            authors trained on, over that mean rounded, ``"rounded"``, where most genes of a cell are equal to others,
            and stand in the order of an unstable sort. By default that of the network.
        precision
            ``"bfloat16"`` computes the large products in half the bits, faster on recent hardware.

        Returns
        -------
        Float32 array ``(n_cells, n_hidden)``. A mean over no genes, of a cell without counts, is zeros.

        Raises
        ------
        <not_embedded>
        ValueError
            If an argument is not one of those above.
        """
        self.module.checked_layer(layer)
        self.module.checked_scale(gene_scale)
        one_of(POOLINGS, pooling=pooling)
        flag(with_context=with_context)
        options: dict[str, Any] = {"pooling": pooling, "with_context": with_context}
        options |= {"layer": layer, "gene_scale": gene_scale}
        return self._embed(adata, indices, batch_size, precision, **options)

    def fine_tune(self, labels_key: str | None = None, **options: Any) -> None:
        """Learn the labels of the attached data, see :meth:`cellprior.model.CellPLM.fine_tune`.

        The head reads the mean over the genes behind the last layer.

        Parameters
        ----------
        labels_key
            Column of ``obs``, of cell types, niches or regions; by default the one given to ``setup_anndata``.
        <options>
        """
        if not self.is_trained_ and self.adata is not None:
            cells, _ = self._attached_cells(None, train_size=1.0, validation_size=None, batch_size=512)
            self._learn_scale(cells.train_dataloader())
        super().fine_tune(labels_key, **options)

    @property
    def _species_of_genes(self) -> str | None:
        """Found by the names, which are those of human also where the cells are of mouse."""
        return None

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> TechnologyFloors:
        batches = self._of_known_context(batches)
        if not self.is_trained_:
            batches = self._learn_scale(batches)
        module = self.module

        def cells() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches:
                context = context_of(batch)
                yield module.tokens(batch[REGISTRY_KEYS.X_KEY].to(module.device), context=context), context

        return TechnologyFloors.fit(cells(), n_genes=module.n_genes, n_positions=module.n_positions)

    def _of_known_context(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
        """The same; refuses minibatches of a datamodule where the setup says how cells were made."""
        args = self.registry["setup_args"]
        said = [f"{kind}{of}" for kind in KINDS for of in ("", "_key") if args.get(f"{kind}{of}") is not None]
        for batch in batches:
            if said and CONTEXT_KEY not in batch:
                msg = (
                    f"The setup gives {', '.join(said)}, and the minibatches of a datamodule do not say how cells "
                    "were made: train on attached data, a backed AnnData if they are large."
                )
                raise ValueError(msg)
            yield batch

    def _learn_scale(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterable[Mapping[str, Tensor]]:
        """Take each gene's mean in each technology from the first minibatches; gives all of them back."""
        read, everything = first_cells(batches, SCALE_CELLS)
        technology = [CONTEXT_TECHNOLOGY[context_of(batch)] for batch in read]
        means = nonzero_means([batch[REGISTRY_KEYS.X_KEY] for batch in read], technology, len(self.genes))
        self.module.gene_means.copy_(means)
        return everything

    def _masked_scores(
        self, counts: Tensor, fitted: Any, *, context: Tensor | None = None, **how: Any
    ) -> MaskedScores:
        batch = {REGISTRY_KEYS.X_KEY: counts} | ({} if context is None else {CONTEXT_KEY: context})
        return masked_scores(self.module, counts, fitted, context_of(batch), **how)

    def _find_cells(self, data: Any) -> Cells:
        args = self.registry["setup_args"]
        if data is self.adata:
            codes = self.adata_manager.get_from_registry(CONTEXT_KEY).ravel()  # as at the setup
            return replace(super()._find_cells(data), covariates={CONTEXT_KEY: codes})
        codes = codes_of(data, args)
        with explained(codes):
            return replace(super()._find_cells(data), covariates={CONTEXT_KEY: codes})
