"""How MultiomeCLIP gets its weights: from a bundle, for a single embedding, or from a checkpoint of scCLIP."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from mudata import MuData

from cellprior._arguments import flag
from cellprior.model.files._loading import LoadableModel
from cellprior.model.files._strict import load_strictly
from cellprior.model.multiomeclip._cells import codes_of, modality_keys
from cellprior.model.multiomeclip._checkpoint import read_scclip
from cellprior.model.multiomeclip._module import MODALITIES
from cellprior.model.multiomeclip._reading import Data, ReadingModel
from cellprior.model.multiomeclip._training import MAX_FITTED, align
from cellprior.weights import Bundle, InertCheckpoint, WeightsError

# fitted here, or the order of the file
NOT_IN_SCCLIP = re.compile(r"(rna|atac)\.(maximum|order)|alignment\..*")


class OpenedModel(ReadingModel, LoadableModel):
    """The part of :class:`~cellprior.model.multiomeclip._model.MultiomeCLIP` that reads weights."""

    @classmethod
    def from_pretrained(
        cls,
        weights: str | os.PathLike[str],
        adata: MuData | None = None,
        *,
        min_coverage: float = 0.25,
        device: str | int | torch.device = "auto",
        known_hash: str | None = None,
    ) -> Self:
        """Load pretrained weights; data to attach are needed to train on only.

        See :meth:`cellprior.model.files._loading.LoadableModel.from_pretrained`.
        """
        return super().from_pretrained(
            weights, adata, min_coverage=min_coverage, device=device, known_hash=known_hash
        )

    @classmethod
    @contextmanager
    def opened(
        cls,
        weights: str | os.PathLike[str],
        adata: Data,
        *,
        layer: str | Mapping[str, str | None] | None = None,
        gene_key: str | None = None,
        batch_key: str | None = None,
        unlabeled_category: str = "unknown",
        modalities: Mapping[str, str] | None = None,
        min_coverage: float = 0.25,
        device: str | int | torch.device = "auto",
        known_hash: str | None = None,
        setup: Mapping[str, Any] | None = None,
    ) -> Iterator[Self]:
        """A model that embeds some data, for a while; see :func:`cellprior.tl.embed`."""
        layers = _layers(layer)
        model = cls.from_pretrained(weights, min_coverage=min_coverage, device=device, known_hash=known_hash)
        model._read_from(layers, modalities=modalities, gene_key=gene_key)
        model.registry["setup_args"]["unlabeled_category"] = unlabeled_category
        model._opened = adata
        model._attached_match = model.feature_match()
        codes_of(adata.obs, batch_key)
        yield model

    @staticmethod
    def _layers_on_disk(
        layer: str | Mapping[str, str | None] | None, modalities: Mapping[str, str] | None
    ) -> Mapping[str, str | None]:
        """Layer of each modality, by its name in the file."""
        layers = _layers(layer)
        return {key: layers.get(name) for name, key in modality_keys(modalities).items()}

    @classmethod
    def _set_up(cls, adata: MuData | None) -> MuData | None:
        return None if adata is None else super()._set_up(adata)

    def provenance(self, adata: Data | None = None) -> dict[str, Any]:
        """Which weights the model has, and how much of some data, by default the attached, it reads; for the record."""
        found: dict[str, Any] = {"model": type(self).__name__, **(self.pretrained_ or {})}
        matches = self._attached_match if adata is None else self.feature_match(adata)
        for name, match in matches.items():
            found |= {f"{name}_coverage": match.coverage, f"{name}_counts_share": match.counts_share}
        return {**found, "cellprior_version": version("cellprior")}

    @classmethod
    def _blank(
        cls,
        *,
        genes: pd.DataFrame,
        peaks: Sequence[str] | None = None,
        genomic_order: bool = True,
        **network: Any,
    ) -> torch.nn.Module:
        if not isinstance(peaks, list) or not peaks or not all(isinstance(peak, str) for peak in peaks):
            msg = "it needs the names of peaks."
            raise ValueError(msg)
        flag(genomic_order=genomic_order)
        return cls._module_cls(len(genes), len(peaks), **network)

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        msg = (
            f"{path} is not a {cls.__name__} bundle: a folder with config.json and model.safetensors is needed. A "
            "checkpoint of scCLIP is made into one by cellprior.model.convert, or `cellprior convert`."
        )
        raise WeightsError(msg)

    @classmethod
    def from_pickle(
        cls,
        checkpoint: InertCheckpoint,
        content: Any,
        *,
        reference: Data | None,
        layer: str | Mapping[str, str | None] | None,
    ) -> tuple[Self, list[str]] | None:
        """Model of an scCLIP checkpoint; see :func:`cellprior.model.convert`."""
        if (official := read_scclip(checkpoint, content)) is None:
            return None
        if reference is None and official.is_scaled:
            msg = (
                f"{checkpoint.path.name} needs reference=, data with raw counts of RNA: scCLIP divides the expression "
                "of each gene by its largest in the data set at hand, and stores none of these. Best are the data that "
                "it was trained on; else your own, as the original does. From then on they are a part of the weights."
            )
            raise ValueError(msg)
        with torch.random.fork_rng(devices=[]):  # what the network starts from is overwritten
            model = cls(genes=official.genes, peaks=official.peaks, **official.network)
        fitted = {name: x for name, x in model.module.state_dict().items() if NOT_IN_SCCLIP.fullmatch(name)}
        load_strictly(model.module, {**official.tensors, **fitted}, checkpoint.path.name)
        model.is_trained_ = True
        notes = list(official.notes)
        if reference is not None:
            model._read_from(_layers(layer))
            notes += model._fit_to(reference, official.is_scaled)
        return model, notes

    def _fit_to(self, reference: Data, is_scaled: bool) -> list[str]:
        """Find what the original takes from the data set at hand, and what turns the modalities together; in words."""
        cells = self._cells(reference)
        counts = self._counts(reference, cells)
        notes = []
        if is_scaled:
            rows = np.flatnonzero(cells.has("rna"))
            if not len(rows):
                msg = f"reference= needs RNA, of which the largest expression is taken; it has {list(cells.data)}."
                raise ValueError(msg)
            rows = rows[:: -(-len(rows) // MAX_FITTED)]
            self.module.rna.fit(counts["rna"].read(rows), seed=0)
            notes.append(
                f"The largest expression of each gene is that of {len(rows):,} cells given at conversion."
            )
        complete = np.flatnonzero(cells.complete)
        if len(complete) > self.module.n_latent:
            align(self, counts, complete)
            notes.append(f"The modalities are turned together by {len(complete):,} cells that have both.")
        return notes

    def _read_from(
        self,
        layers: Mapping[str, str | None],
        *,
        modalities: Mapping[str, str] | None = None,
        gene_key: str | None = None,
    ) -> None:
        """Where a model without data looks for counts and names."""
        self.registry["setup_args"] |= {
            **{f"{name}_layer": layers.get(name) for name in MODALITIES},
            "modalities": modalities,
            "gene_key": gene_key,
        }


def _layers(layer: str | Mapping[str, str | None] | None) -> Mapping[str, str | None]:
    """Layer of each modality."""
    if not isinstance(layer, Mapping):
        return {"rna": layer, "atac": layer}
    if unknown := layer.keys() - set(MODALITIES):
        msg = (
            f'layer has the keys {sorted(unknown)}; needed: "rna" and "atac", with the names of their layers.'
        )
        raise ValueError(msg)
    return layer
