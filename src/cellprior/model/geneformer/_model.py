"""Geneformer's face to AnnData."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model._base import Indices, Precision, PretrainedModel, Size
from cellprior.model.data._minibatches import first_cells
from cellprior.model.geneformer._checkpoint import FILES, find_official, read_official
from cellprior.model.geneformer._context import attention_between, gene_vectors
from cellprior.model.geneformer._inputs import nonzero_medians
from cellprior.model.geneformer._loss import masked_scores
from cellprior.model.geneformer._module import GeneformerModule, Pooling
from cellprior.model.geneformer._perturb import How, Request, perturb
from cellprior.model.geneformer._vocabulary import shipped
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.learning._rank_floors import RankFloors
from cellprior.weights import Bundle, WeightsError

SCALE_CELLS = 10_000  # training cells that medians are taken over, at least, where there are so many

OF_V1 = ("geneformer-v1-10m", "geneformer-gf-12l-30m")  # weights whose vocabulary comes with us


class Geneformer(PretrainedModel):
    """Geneformer: a cell is the list of its genes, most remarkable first, read by a BERT [Theodoris23]_.

    A gene's place is that of its count over its median in the corpus. A cell's embedding depends on that cell only.

    Parameters
    ----------
    <built>
    n_hidden, n_layers, n_heads, n_feedforward, n_positions, special_tokens, dropout_rate
        Of the network, see :class:`~cellprior.model.geneformer._module.GeneformerModule`.

    Examples
    --------
    >>> Geneformer.setup_anndata(adata, layer="counts")
    >>> model = Geneformer.from_pretrained("geneformer-v1-10m", adata)
    >>> adata.obsm["X_geneformer"] = model.get_latent_representation()

    References
    ----------
    .. [Theodoris23] Theodoris et al., Transfer learning enables predictions in network biology, Nature 618:616, 2023.
    """

    _module_cls = GeneformerModule
    obsm_key = "X_geneformer"
    default_batch_size = 512
    _alike = True  # most of a mean over hundreds of genes is the same in all cells
    _input_buffers = ("gene_scale",)
    objectives = {"masked": {}}

    sizes = {
        "small": {"n_hidden": 128, "n_layers": 3, "n_heads": 4, "n_feedforward": 256},
        "released": {"n_hidden": 256, "n_layers": 6, "n_heads": 4, "n_feedforward": 512},
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
        n_positions: int = 2048,
        special_tokens: bool = False,
        dropout_rate: float = 0.02,
    ) -> None:
        super().__init__(adata, registry, genes, min_coverage)
        self._finish_init(locals())
        self.module = GeneformerModule(len(self.genes), **self._network())

    @classmethod
    def _genes_on_hand(cls, name: str, folder: Path) -> pd.DataFrame | None:
        return shipped().genes if name in OF_V1 else super()._genes_on_hand(name, folder)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a folder, or the file of weights in it, is one that the authors' code has written."""
        return find_official(path) is not None

    @classmethod
    def _files_beside(cls, name: str) -> Sequence[str]:
        return ["config.json"] if name in FILES else []

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        checkpoint = find_official(path)
        if checkpoint is None:
            msg = (
                f"{path} holds no Geneformer: needed is a bundle, or a folder with config.json (model_type bert) and "
                "model.safetensors or pytorch_model.bin, as the authors release them."
            )
            raise WeightsError(msg)
        return read_official(checkpoint), checkpoint

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        batch_size: int | None = None,
        *,
        pooling: Pooling | None = None,
        layer: int = -1,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        <embedded>
        batch_size
            Cells that are read at a time, at least 16; a few of them, of nearly equal length, go through the network
            together. Never changes the result.
        pooling
            ``"mean"`` over the genes of a cell, or ``"cls"``, the first token of V2; by default the authors' choice,
            the mean for V1 and the token for V2.
        layer
            As the authors count: 0 is the output of the last layer, which is closest to what pretraining asks for; -1,
            their choice, that of the layer before it. ``-n_layers`` is what goes into the first.
        precision
            ``"bfloat16"`` computes the large products in half the bits, faster on recent hardware.

        Returns
        -------
        Float32 array ``(n_cells, n_hidden)``. A mean over no genes, of a cell without counts, is zeros.

        Raises
        ------
        <not_embedded>
        ValueError
            If there is no such layer, or no such token.
        """
        self.module.checked_layer(layer)
        pooling = self.module.checked_pooling(pooling)
        return self._embed(adata, indices, batch_size, precision, pooling=pooling, layer=layer)

    def get_gene_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        *,
        layer: int = -1,
        precision: Precision = "float32",
    ) -> pd.DataFrame:
        """Vectors of genes in context: each gene's hidden state, mean over the cells that have it among their tokens.

        Parameters
        ----------
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask; a type of cells gives the genes' vectors in that type.
        layer, precision
            See :meth:`get_latent_representation`.

        Returns
        -------
        Genes of the data that are in the vocabulary, under the data's names, by ``n_hidden``; float32, NaN for a gene
        that none of the cells has.

        Raises
        ------
        ValueError
            If there are no cells.
        """
        return gene_vectors(self, adata, indices, layer=layer, precision=precision)

    def get_attention(
        self, adata: ad.AnnData | None = None, indices: Indices = None, *, genes: Sequence[str] | None = None
    ) -> pd.DataFrame | pd.Series:
        """Attention between genes, mean over heads, layers, and the cells that have them.

        Parameters
        ----------
        adata
            Data, by default the attached.
        indices
            Cells, as numbers or a mask. Each is computed by itself.
        genes
            Names of the data, symbols or Ensembl ids.

        Returns
        -------
        With ``genes``, what these (rows) pay to each other (columns), as shares of all that they pay. Without, what
        each gene of the data receives, mean over all positions of a cell. NaN where no cell has them.

        Raises
        ------
        <genes_in_cells>
        """
        return attention_between(self, adata, indices, genes)

    def perturb(
        self,
        genes: Sequence[str | Sequence[str]],
        how: How = "delete",
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        *,
        shift_of: Sequence[str] = (),
        n_controls: int = 10,
        pooling: Pooling | None = None,
        layer: int = -1,
        batch_size: int | None = None,
        seed: int = 0,
        out: str | os.PathLike[str] | None = None,
    ) -> pd.DataFrame | None:
        """Delete or overexpress genes in silico, and see how far each cell moves, beside random genes.

        A shift alone says nothing: any gene that is taken out moves a cell. A gene means something to the network
        where its ``shift`` is larger than ``expression_control``; and expression does where that is larger than
        ``count_control``. What a cell would do in the laboratory is another question.

        Parameters
        ----------
        genes
            Names of the data, symbols or Ensembl ids; a tuple of names is perturbed together.
        how
            ``"delete"`` takes the genes out of a cell's list, so that the others move up; ``"overexpress"`` puts them
            to the top, also where the cell lacks them; ``"inhibit"`` puts them to the end. What is not among the
            tokens of a cell cannot be deleted or inhibited there: such a cell has no row.
        <some_cells>
        shift_of
            Genes whose own vectors are compared too, in the cells that have them.
        n_controls
            Random genes, or tuples of them, of each kind and cell; 0 for none. The time is that of
            ``1 + 2 * n_controls`` embeddings for each perturbation.
        pooling, layer
            See :meth:`get_latent_representation`.
        batch_size
            Cells that are read at a time.
        seed
            Of the random genes. They depend on it and on the number of the cell only.
        out
            CSV file that the result is written to, a few cells at a time, instead of being returned.

        Returns
        -------
        A row per cell, perturbation and what has moved: ``cell``; ``genes``, joined by ``+``; ``how``; ``of``,
        ``"cell"`` or a gene of ``shift_of``; ``rank``, the mean place of the genes before, from 1, NaN if the cell
        lacks them; ``n_tokens`` and ``n_tokens_after``, its genes; ``shift``, one minus the cosine of the vectors
        before and after, the mean over a cell's genes without the perturbed ones; the mean ``shift`` of random genes of
        equal expression, ``expression_control``: near in rank, or where the cell lacks them, near in median; and of
        any genes, ``count_control``, which knows no more than how the number of tokens changes.

        Raises
        ------
        KeyError
            If a gene is not in the vocabulary.
        ValueError
            If there are no cells, or an argument is not one of those above.
        FileExistsError
            If ``out`` is there already.
        """
        self.module.checked_layer(layer)
        options: dict[str, Any] = {"n_controls": n_controls, "seed": seed, "pooling": pooling, "layer": layer}
        request = Request.of(self, adata, genes, shift_of, how, **options)
        return perturb(
            self, adata, indices, request, batch_size=batch_size, out=None if out is None else Path(out)
        )

    def fine_tune(self, labels_key: str | None = None, **options: Any) -> None:
        """Learn the labels of the attached data, see :meth:`cellprior.model.CellPLM.fine_tune`.

        The head reads the mean over the genes behind the last layer but one, as the embedding does; ``"last"`` trains
        that layer, ``"lora"`` the projections of it and of those before it.

        Parameters
        ----------
        <labels_key>
        <options>
        """
        if not self.is_trained_ and self.adata is not None:
            cells, _ = self._attached_cells(None, train_size=1.0, validation_size=None, batch_size=512)
            self._learn_scale(cells.train_dataloader())
        super().fine_tune(labels_key, **options)

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> RankFloors:
        if not self.is_trained_:
            batches = self._learn_scale(batches)
        module = self.module
        tokens = (module.tokens(batch[REGISTRY_KEYS.X_KEY].to(module.device)) for batch in batches)
        return RankFloors.fit(
            tokens, n_genes=module.n_genes, n_positions=module.n_positions, first=module.first_gene
        )

    def _learn_scale(self, batches: Iterable[Mapping[str, Tensor]]) -> Iterable[Mapping[str, Tensor]]:
        """Take each gene's median from the first minibatches; gives all of them back."""
        read, everything = first_cells(batches, SCALE_CELLS)
        medians = nonzero_medians([batch[REGISTRY_KEYS.X_KEY] for batch in read], len(self.genes))
        self.module.gene_scale.copy_(torch.from_numpy(medians))
        return everything

    def _masked_scores(self, counts: Tensor, fitted: Any, **how: Any) -> MaskedScores:
        return masked_scores(self.module, counts, fitted, **how)
