"""CellPLM's face to AnnData."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior._arguments import positive
from cellprior._obs import older_text, text_of
from cellprior.model._base import Indices, Precision, PretrainedModel, Size
from cellprior.model.cellplm._checkpoint import (
    CHECKPOINT_SUFFIX,
    config_name,
    find_official,
    read_official,
)
from cellprior.model.cellplm._encoder import SentenceEncoder
from cellprior.model.cellplm._expression import Covariates, impute, normalized_expression
from cellprior.model.cellplm._loss import GeneMeans
from cellprior.model.cellplm._masked import Fitted, fit_covariates, masked_scores
from cellprior.model.cellplm._module import Absent, CellPLMModule, Kind, Latent, Mixture
from cellprior.model.learning._masked import MaskedScores
from cellprior.weights import Bundle


class CellPLM(PretrainedModel):
    """CellPLM: cells as tokens, linear attention between the cells of a sentence [Wen24]_.

    A cell's embedding depends on the cells it shares a sentence with, by design. A sentence is one category of
    ``batch_key``, all cells without one; it is evaluated whole and exactly, in chunks of ``batch_size`` cells, so
    that the embedding does not depend on ``batch_size`` (the original makes each chunk a sentence of its own).

    Parameters
    ----------
    <built>
    n_hidden, n_layers, n_heads, n_latent, dropout_rate, latent, n_clusters, n_batches, n_datasets, target_sum
        Of the network, see :class:`~cellprior.model.cellplm._module.CellPLMModule`.
    absent, embedding, decoder_rank
        Of the network, see :class:`~cellprior.model.cellplm._module.CellPLMModule`.

    Examples
    --------
    >>> CellPLM.setup_anndata(adata, layer="counts", batch_key="sample")
    >>> model = CellPLM.from_pretrained("cellplm-starter", adata)
    >>> adata.obsm["X_cellplm"] = model.get_latent_representation()

    References
    ----------
    .. [Wen24] Wen et al., CellPLM: Pre-training of Cell Language Model Beyond Single Cells, ICLR 2024.
    """

    _module_cls = CellPLMModule
    obsm_key = "X_cellplm"
    default_batch_size = 512  # of these, several are worked on at a time, a core each
    _encoder_cls = SentenceEncoder
    # imputation: rates of the original's fine-tuning pipeline
    objectives = {
        "masked": {},
        "imputation": {"imputation": True, "cell_rate": 0.95, "lr": 5e-4, "weight_decay": 1e-6},
        "views": {"views": True, "lr": 5e-4},
    }

    sizes = {
        "small": {"n_hidden": 256, "n_layers": 2, "n_heads": 8, "n_latent": 48},
        "released": {"n_hidden": 1024, "n_layers": 4, "n_heads": 8, "n_latent": 512},
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
        n_latent: int | None = None,
        dropout_rate: float = 0.2,
        latent: Latent = "vae",
        n_clusters: int = 16,
        n_batches: int = 0,
        n_datasets: int = 0,
        target_sum: float | None = None,
        absent: Absent = "zero",
        embedding: Kind = "latent",
        decoder_rank: int = 128,
    ) -> None:
        super().__init__(adata, registry, genes, min_coverage)
        self._finish_init(locals())
        self._batches: list[str] = []
        self.module = CellPLMModule(len(self.genes), **self._network())

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file or folder holds an official CellPLM checkpoint."""
        return (
            any(path.glob("*" + CHECKPOINT_SUFFIX))
            if path.is_dir()
            else path.name.endswith(CHECKPOINT_SUFFIX)
        )

    @classmethod
    def _files_beside(cls, name: str) -> Sequence[str]:
        return [config_name(name)] if name.endswith(CHECKPOINT_SUFFIX) else []

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        checkpoint = find_official(path)
        return read_official(checkpoint), checkpoint

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        batch_size: int | None = None,
        *,
        mixture: Mixture = "expected",
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Data to embed, by default the attached. Its genes are matched by name; it is not kept.
        indices
            Cells to embed, as numbers or a mask; the result is in this order. Other cells are not in their sentences.
        batch_size
            Cells in memory at a time, at least 16, apart from ``4 * n_hidden`` bytes for each cell of a sentence; by
            default what fits a quarter of a GPU's free memory, and 1,024 on a CPU. Never changes the result.
        mixture
            For ``latent="gmvae"``: ``"expected"`` averages the components' means over the cell's probabilities,
            ``"argmax"`` takes the most likely component, ``"sampled"`` draws one, as the original does (seed torch).
        <precision>

        Returns
        -------
        Float32 array ``(n_cells, n_latent)``: the means of the latent, or their directions in the
        sentence, see ``embedding`` of :class:`~cellprior.model.cellplm._module.CellPLMModule`.

        Raises
        ------
        <not_embedded>
        """
        if mixture not in ("expected", "argmax", "sampled"):
            msg = f'mixture={mixture!r} is not known; choose "expected", "argmax" or "sampled".'
            raise ValueError(msg)
        return self._embed(adata, indices, batch_size, precision, mixture=mixture)

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
        <some_cells>
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
        return normalized_expression(
            self,
            adata,
            indices,
            gene_list,
            library_size=library_size,
            covariates=covariates,
            batch_size=batch_size,
        )

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
        <some_cells>
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
        options: dict[str, Any] = {"covariates": covariates, "batch_size": batch_size}
        return impute(self, genes, adata, indices, measured=measured, **options)

    @property
    def training_state_(self) -> dict[str, Any]:
        """How far the KL term of a VAE has been warmed up, and the batches that the decoder has learned."""
        return {"kl_weight": self.module.kl_weight, "batches": self._batches}

    @training_state_.setter
    def training_state_(self, state: dict[str, Any]) -> None:
        kl_weight = state.get("kl_weight", 1.0)  # released weights are past the warm-up
        batches = state.get("batches", [])
        if kl_weight:
            positive(kl_weight=kl_weight)
        if not isinstance(batches, list) or not all(isinstance(name, str) for name in batches):
            msg = f"batches={ascii(batches)[:60]}; needed: a list of names."
            raise ValueError(msg)
        self.module.kl_weight, self._batches = float(kl_weight), batches

    @property
    def _input_buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """What an average cell looks like, of a network that knows it."""
        knows = self.module.embedder.knows_average
        return ("embedder.share", "embedder.average") if knows else ()

    def _objective(self, name: str | None) -> dict[str, Any]:
        return super()._objective(name) | {"covariate": self._covariate()}

    def _covariate(self) -> list[int | None]:
        """Category of the decoder's batch covariate of each attached batch, None for one that it has not learned."""
        n_batches = self.init_params_["non_kwargs"]["n_batches"]
        if not n_batches or REGISTRY_KEYS.BATCH_KEY not in self.adata_manager.data_registry:
            return [None]
        state = self.adata_manager.get_state_registry(REGISTRY_KEYS.BATCH_KEY)
        names = [text_of(name) for name in state.categorical_mapping]
        if not self.is_trained_:
            if len(names) > n_batches:
                msg = f"The data have {len(names)} batches, the model n_batches={n_batches}: build it with as many."
                raise ValueError(msg)
            self._batches = names
        learned = {older_text(name): code for code, name in enumerate(self._batches)}
        learned |= {name: code for code, name in enumerate(self._batches)}
        return [learned.get(name) for name in names]

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> GeneMeans:
        return GeneMeans.fit(batches, measured)

    def _fit_predictors(
        self, batches: Callable[[], Iterable[Mapping[str, Tensor]]], measured: Tensor
    ) -> Fitted:
        floor = super()._fit_predictors(batches, measured)
        return Fitted(floor, fit_covariates(self.module, batches(), measured[0].to(self.module.device)))

    def _masked_scores(self, counts: Tensor, fitted: Any, **how: Any) -> MaskedScores:
        return masked_scores(self.module, counts, fitted, **how)
