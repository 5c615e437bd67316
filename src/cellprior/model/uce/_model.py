"""UCE's face to AnnData."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellprior._arguments import one_of, whole
from cellprior.model._base import Indices, Precision, PretrainedModel, Size
from cellprior.model.data._counts import row_numbers
from cellprior.model.data._minibatches import pieces_of
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.uce._checkpoint import files_beside, find_official, read_official, recognises
from cellprior.model.uce._encoder import UCEEncoder
from cellprior.model.uce._floors import PresenceFloors
from cellprior.model.uce._genes import expressed, gene_vectors, rows_of_genes
from cellprior.model.uce._inputs import SAMPLINGS, SENTENCE_LENGTH
from cellprior.model.uce._masked import masked_scores
from cellprior.model.uce._module import PADDINGS, Padding, UCEModule
from cellprior.model.uce._released import released_latents
from cellprior.model.uce._species import Proteins, Table, with_species
from cellprior.weights import Bundle, resolve, sha256, write_bundle

Sampling = Literal["keyed", "systematic", "released"]
RELEASED_BATCH = 25  # cells, of the original's script


class UCE(PretrainedModel):
    """UCE: a cell of any species as a sentence of its genes, each known by its protein [Rosen26]_.

    A cell's embedding depends on that cell only. The original draws its sentence from one stream over all cells; here
    the draws belong to the cell, so that it has the same vector in any file, order and batch. Weights know genes of
    several species, and cells of all of them lie in one space; a cell is of the species that most of its counts are of.

    Parameters
    ----------
    <registered>
    genes
        Vocabulary: names, or a frame with ``ensembl_id``, ``symbol``, ``previous_symbols``, ``species``; by default
        that of the data. Without pretrained weights nothing is known of where genes lie: all are on one chromosome, in
        the order given.
    min_coverage
        Least share of genes that must match, of each species, see :func:`cellprior.genes.match`.
    <size>
    n_chromosomes, n_hidden, n_layers, n_heads, n_feedforward, n_protein, n_latent, dropout_rate
    decoder_width, binary_widths, sentence_length
        Of the network, see :class:`~cellprior.model.uce._module.UCEModule`.

    Examples
    --------
    >>> UCE.setup_anndata(adata, layer="counts")
    >>> model = UCE.from_pretrained("uce-4layer", adata)
    >>> adata.obsm["X_uce"] = model.get_latent_representation()

    References
    ----------
    .. [Rosen26] Rosen et al., Universal cell embedding provides a foundation model for cell biology, Nature 2026,
       doi 10.1038/s41586-026-10689-z.
    """

    _module_cls = UCEModule
    _encoder_cls = UCEEncoder
    obsm_key = "X_uce"
    default_batch_size = 256
    _input_buffers = ("gene_number", "gene_chromosome", "gene_start", "gene_species", "chromosome_code")
    objectives = {"presence": {"lr": 1e-4}}

    sizes = {
        "small": {
            "n_hidden": 256,
            "n_layers": 2,
            "n_heads": 8,
            "n_feedforward": 1024,
            "n_latent": 256,
            "decoder_width": 256,
        },
        "released": {
            "n_hidden": 1280,
            "n_layers": 4,
            "n_heads": 20,
            "n_feedforward": 5120,
            "n_latent": 1280,
            "decoder_width": 1024,
        },
    }

    def __init__(
        self,
        adata: ad.AnnData | None = None,
        registry: dict | None = None,
        *,
        genes: pd.DataFrame | Sequence[str] | None = None,
        min_coverage: float = 0.25,
        size: Size | None = None,
        n_chromosomes: int = 1,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        n_heads: int | None = None,
        n_feedforward: int | None = None,
        n_protein: int | None = None,
        n_latent: int | None = None,
        dropout_rate: float = 0.05,
        decoder_width: int | None = None,
        binary_widths: Sequence[int] = (2048, 512, 128),
        sentence_length: int = SENTENCE_LENGTH,
    ) -> None:
        super().__init__(adata, registry, genes, min_coverage)
        self._finish_init(locals())
        self.module = UCEModule(len(self.genes), **self._network())
        if "species" in self.genes:
            self.module.gene_species.copy_(torch.from_numpy(pd.factorize(self.genes["species"])[0]))

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
        species: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData.

        Parameters
        ----------
        adata, layer, gene_key, batch_key, labels_key, unlabeled_category
            See :meth:`cellprior.model.CellPLM.setup_anndata`.
        species
            Species of the data, such as ``"mouse"``, or the column of ``var`` with that of each gene; by default found,
            see :func:`cellprior.genes.match`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        cls.register_manager(cls._manager(adata, setup_method_args, **kwargs))

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file or folder holds an official UCE checkpoint."""
        return recognises(path)

    @classmethod
    def _files_beside(cls, name: str) -> Sequence[str]:
        return files_beside(name)

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        checkpoint = find_official(path)
        return read_official(checkpoint), checkpoint

    @classmethod
    def convert(
        cls,
        path: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        species: Collection[str] = ("human", "mouse"),
        dtype: Literal["float16", "float32"] = "float16",
        n_heads: int | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write an official checkpoint as a bundle of some species, a tenth of its size.

        Parameters
        ----------
        path
            Registry name, checkpoint file, or the folder that it is in, see :doc:`/user_guide/uce`.
        folder
            Bundle to write.
        species
            Those of the eight in the checkpoint that are wanted; the draws of a cell do not depend on it.
        dtype
            Of the numbers on disk.
        n_heads
            Attention heads, of a checkpoint whose heads are not of 64 numbers.
        overwrite
            Replace a bundle that is already there.

        Returns
        -------
        The folder.

        Raises
        ------
        WeightsError
            If a file is missing or broken, or a species is not in it.
        """
        one_of(("float16", "float32"), dtype=dtype)
        checkpoint = find_official(resolve(path))
        bundle = read_official(
            checkpoint, [species] if isinstance(species, str) else species, n_heads=n_heads
        )
        card = (
            f"# UCE\n\nConverted by cellprior {version('cellprior')} from `{checkpoint.name}` (sha256 "
            f"{sha256(checkpoint)}), weights CC BY 4.0, Rosen et al., Nature 2026.\n\n{bundle.card}\n"
        )
        parts: dict[str, Any] = {"config": bundle.config, "genes": bundle.genes, "card": card}
        kind = getattr(torch, dtype)
        return write_bundle(folder, state_dict=bundle.state_dict, dtype=kind, overwrite=overwrite, **parts)

    @classmethod
    def add_species(
        cls,
        weights: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        species: str,
        proteins: Proteins,
        positions: Table,
        taxon: int,
        overwrite: bool = False,
    ) -> Path:
        """Write weights that know one more species, from vectors of its proteins; the others stay as they were.

        Parameters
        ----------
        weights
            Registry name, bundle or checkpoint.
        folder
            Bundle to write.
        species
            A name for it.
        proteins
            Vectors of its genes by symbol, as the original makes them (ESM-2 15B, mean over residues and over the
            proteins of a gene): a frame ``(genes, 5120)``, a mapping, or a file that ``torch.save`` wrote of one.
        positions
            Where genes lie: a frame or a CSV file with ``gene_symbol``, ``chromosome`` and ``start``.
        taxon
            Number of the species in NCBI's taxonomy, of which the vectors of its chromosomes are drawn, as in the
            original.
        overwrite
            Replace a bundle that is already there.

        Returns
        -------
        The folder.

        Raises
        ------
        WeightsError
            If the weights cannot take it, or a table is not as needed.
        ValueError
            If the species is there already.

        Warns
        -----
        UserWarning
            Of genes without a position, and of more chromosomes than a sentence has room for.
        """
        bundle, _ = cls._read_weights(resolve(weights))
        found = with_species(bundle, species=species, proteins=proteins, positions=positions, taxon=taxon)
        parts: dict[str, Any] = {"config": found.config, "genes": found.genes, "card": found.card}
        return write_bundle(folder, state_dict=found.state_dict, overwrite=overwrite, **parts)

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        batch_size: int | None = None,
        *,
        n_draws: int = 1,
        sampling: Sampling = "keyed",
        padding: Padding = "masked",
        seed: int = 0,
        return_spread: bool = False,
        precision: Precision = "float32",
    ) -> Any:
        """Embed cells.

        Parameters
        ----------
        <embedded>
        batch_size
            Cells that are read at a time, at least 16; of these, a few go through the network together. Never changes
            the result, but with ``padding="released"``.
        n_draws
            Sentences of each cell, whose vectors are averaged; the time is that of so many cells.
        sampling
            ``"keyed"``, draws as the original's, by ``seed`` and the cell's own genes and counts; ``"systematic"``,
            each gene as often as its share says, to within one draw; ``"released"``, the original's very draws:
            from one stream, cell after cell, in the order of the columns, so that a cell depends on those before it.
        padding
            ``"masked"``, not seen; ``"released"``, seen as in the original, where a cell depends on the longest
            sentence of its batch of ``batch_size`` cells (by default 25, as there).
        seed
            Of the draws.
        return_spread
            Give beside the vectors how far they may be from those of endlessly many draws.
        <precision>

        Returns
        -------
        Float32 array ``(n_cells, n_latent)``, rows of length 1. With ``return_spread``, that and the spread of each
        cell ``(n_cells,)``: the expected ``1 - cos`` to the vector of endlessly many draws, NaN for one draw.

        Raises
        ------
        RuntimeError
            If the model has neither been trained nor loaded from weights.
        NotCountsError, GeneMatchError
            If the data are not raw counts, too few of their genes are known, or they are of a species that is not.
        ValueError
            If an argument is not one of those above, or a cell's genes lie on too many chromosomes.
        """
        whole(n_draws=n_draws)
        whole(least=-(2**63), most=2**63 - 1, seed=seed)
        one_of((*SAMPLINGS, "released"), sampling=sampling)
        one_of(PADDINGS, padding=padding)
        if sampling == "released" or padding == "released":
            if n_draws > 1 or return_spread or sampling == "systematic":
                msg = 'The original\'s way has one draw: leave out n_draws, return_spread and sampling="systematic".'
                raise ValueError(msg)
            return self._released(adata, indices, batch_size, sampling=sampling, padding=padding, seed=seed)
        how: dict[str, Any] = {"n_draws": n_draws, "sampling": sampling, "seed": seed}
        if not return_spread:
            return self._embed(adata, indices, batch_size, precision, **how)
        if n_draws == 1:
            vectors = self._embed(adata, indices, batch_size, precision, **how)
            return vectors, np.full(len(vectors), np.nan, dtype=np.float32)
        both = self._embed(adata, indices, batch_size, precision, **how, with_spread=True)
        return both[:, :-1].copy(), both[:, -1].copy()

    def predict_expressed(
        self,
        genes: Sequence[str],
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        batch_size: int | None = None,
        *,
        species: str | None = None,
        n_draws: int = 1,
        seed: int = 0,
        precision: Precision = "float32",
    ) -> pd.DataFrame:
        """Probability that cells express genes, measured or not, of any species that the weights know.

        It is of the kind that training asks for, where as many genes are expressed as not: compare cells, or genes in a
        cell, and take no number for a frequency.

        Parameters
        ----------
        genes
            Names of the data, or symbols; capitals do not count.
        adata, indices, batch_size, n_draws, seed, precision
            See :meth:`get_latent_representation`.
        species
            Of the genes, where several have their names.

        Returns
        -------
        Cells by genes.

        Raises
        ------
        KeyError
            If a name means no gene, or genes of several species.
        """
        whole(n_draws=n_draws)
        cells = self._cells(adata)
        rows = rows_of_genes(genes, self.genes, cells.counts["rna"].match, species)
        names = cells.obs.index[row_numbers(indices, cells.n_obs)]
        how: dict[str, Any] = {
            "encode": expressed(rows),
            "width": len(rows),
            "n_draws": n_draws,
            "seed": seed,
        }
        found = self._embed(cells, indices, batch_size, precision, **how)
        return pd.DataFrame(found, index=names, columns=list(genes))

    def get_gene_representation(
        self, adata: ad.AnnData | None = None, *, species: str | None = None
    ) -> pd.DataFrame:
        """Vectors that genes have in every cell: what the first layer makes of those of their proteins.

        Parameters
        ----------
        adata
            Data, by default the attached; without any, or with ``species``, the vocabulary.
        species
            Genes of this one only.

        Returns
        -------
        Genes, under the names of the data or their symbols, by ``n_hidden``; float32.

        Raises
        ------
        KeyError
            If the weights do not know the species.
        """
        return gene_vectors(self, adata, species)

    def fine_tune(
        self, labels_key: str | None = None, *, batch_size: int = 32, lr: float = 1e-4, **options: Any
    ) -> None:
        """Learn the labels of the attached data, see :meth:`cellprior.model.CellPLM.fine_tune`.

        The head reads the class token behind the last layer. Labels that are learned from one species can be given to
        cells of another: :meth:`predict` takes any data that the weights can read.

        Parameters
        ----------
        <labels_key>
        batch_size, lr
            Smaller than for other models, as a cell is a thousand tokens.
        <options>
        """
        super().fine_tune(labels_key, batch_size=batch_size, lr=lr, **options)

    def _released(
        self,
        adata: Any,
        indices: Indices,
        batch_size: int | None,
        *,
        sampling: str,
        padding: Padding,
        seed: int,
    ) -> np.ndarray:
        """The original's way, see :mod:`~cellprior.model.uce._released`."""
        self._check_if_trained(warn=False)
        size = RELEASED_BATCH if batch_size is None else batch_size
        whole(batch_size=size)
        if sampling == "released":
            whole(least=0, most=2**32 - 1, seed=seed)
        self.module.eval()
        cells = self._cells(adata)
        match, rows = cells.counts["rna"].match, row_numbers(indices, cells.n_obs)
        order = np.zeros(len(self.genes), dtype=np.int64)
        known = np.flatnonzero(match.index >= 0)[::-1]
        order[match.index[known]] = known  # the first column of a gene
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        found = released_latents(
            self.module,
            pieces_of(cells, pieces),
            torch.from_numpy(np.unique(match.index[match.index >= 0])),
            order=order,
            stream=np.random.RandomState(seed) if sampling == "released" else None,
            seed=seed,
            padding=padding,
        )
        return np.concatenate([np.empty((0, self.module.n_latent), dtype=np.float32), *found])

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> PresenceFloors:
        return PresenceFloors.fit(self.module, batches, measured)

    def _masked_scores(self, counts: Tensor, fitted: Any, **how: Any) -> MaskedScores:
        return masked_scores(self.module, counts, fitted, **how)
