"""CellPLM's face to AnnData."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior._arguments import positive
from cellprior._obs import older_text, text_of
from cellprior.model._base import Precision
from cellprior.model.cellplm._checkpoint import (
    CHECKPOINT_SUFFIX,
    config_name,
    find_official,
    read_official,
)
from cellprior.model.cellplm._cluster import submit_sentence
from cellprior.model.cellplm._expression import ExpressionMixin
from cellprior.model.cellplm._hidden import HiddenStates, StoredStates
from cellprior.model.cellplm._inputs import sentences
from cellprior.model.cellplm._loss import GeneMeans
from cellprior.model.cellplm._masked import Fitted, fit_covariates, masked_scores
from cellprior.model.cellplm._module import CellPLMModule, Latent, Mixture
from cellprior.model.data._fields import CountsManager
from cellprior.model.engine._dask import Blocks
from cellprior.model.engine._sizes import Chunks
from cellprior.model.learning._masked import MaskedScores
from cellprior.weights import Bundle


class CellPLM(ExpressionMixin):
    """CellPLM: cells as tokens, linear attention between the cells of a sentence [Wen24]_.

    A cell's embedding depends on the cells it shares a sentence with, by design. A sentence is one category of
    ``batch_key``, all cells without one; it is evaluated whole and exactly, in chunks of ``batch_size`` cells, so
    that the embedding does not depend on ``batch_size`` (the original makes each chunk a sentence of its own).

    Parameters
    ----------
    adata
        AnnData registered with :meth:`setup_anndata`.
    registry
        Registry of a saved model, instead of data.
    genes
        Vocabulary: names, or a frame with ``ensembl_id``, ``symbol``, ``previous_symbols``; by default that of the
        data.
    min_coverage
        Least share of genes that must match, see :func:`cellprior.genes.match`.
    n_hidden, n_layers, n_heads, n_latent, dropout_rate, latent, n_clusters, n_batches, n_datasets, target_sum
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
    _sentences = True
    # imputation: rates of the original's fine-tuning pipeline
    objectives = {
        "masked": {},
        "imputation": {"imputation": True, "cell_rate": 0.95, "lr": 5e-4, "weight_decay": 1e-6},
    }

    def __init__(
        self,
        adata: ad.AnnData | None = None,
        registry: dict | None = None,
        *,
        genes: pd.DataFrame | Sequence[str] | None = None,
        min_coverage: float = 0.25,
        n_hidden: int = 1024,
        n_layers: int = 4,
        n_heads: int = 8,
        n_latent: int = 512,
        dropout_rate: float = 0.2,
        latent: Latent = "vae",
        n_clusters: int = 16,
        n_batches: int = 0,
        n_datasets: int = 0,
        target_sum: float | None = None,
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
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
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
        precision
            ``"bfloat16"`` computes the large products in half the bits, several times faster on recent hardware.

        Returns
        -------
        Float32 array ``(n_cells, n_latent)``: the means of the latent.

        Raises
        ------
        RuntimeError
            If the model has neither been trained nor loaded from weights.
        NotCountsError, GeneMatchError
            If the data are not raw counts, or too few of their genes are known.
        """
        if mixture not in ("expected", "argmax", "sampled"):
            msg = f'mixture={mixture!r} is not known; choose "expected", "argmax" or "sampled".'
            raise ValueError(msg)
        return self._embed(adata, indices, batch_size, precision, mixture=mixture)

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

    def _masked_scores(
        self,
        counts: Tensor,
        fitted: Any,
        *,
        share: float,
        rng: np.random.Generator,
        measured: Tensor,
        batch: int,
    ) -> MaskedScores:
        return masked_scores(
            self.module, counts, fitted, share=share, rng=rng, measured=measured, batch=batch
        )

    @property
    def _n_stages(self) -> int:
        return len(self.module.encoder) + 3  # embedder, layers, norm and latent

    def _units(self, manager: CountsManager, rows: np.ndarray, size: int) -> list[np.ndarray]:
        if REGISTRY_KEYS.BATCH_KEY not in manager.data_registry:
            return list(sentences(rows, None))
        return list(sentences(rows, manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()[rows]))

    def _encode(
        self,
        chunks: Iterable[Tensor],
        gene_index: Tensor | None,
        *,
        scratch: Path | None = None,
        step: Callable[[int], None] = lambda n_cells: None,
        **options: Any,
    ) -> Iterator[Tensor]:
        if scratch is None:
            states = HiddenStates(step=step)
            return self.module.encode_chunks(chunks, gene_index=gene_index, states=states, **options)
        assert isinstance(chunks, Chunks)  # for the type checker
        width, device = self.module.n_hidden, self.module.device
        stored = StoredStates(scratch, chunks.sizes, width, device=device, step=step)
        missing = chunks.read(stored.n_filled)
        return self.module.encode_chunks(missing, gene_index=gene_index, states=stored, **options)

    def _submit(
        self, client: Any, worker: Any, blocks: Blocks, cells: np.ndarray
    ) -> list[tuple[Any, np.ndarray]]:
        return submit_sentence(client, worker, blocks, cells, len(self.module.encoder))

    def _hidden(self, chunks: Iterable[Tensor], gene_index: Tensor | None) -> Iterable[Tensor]:
        return self.module.hidden_chunks(chunks, gene_index=gene_index)
