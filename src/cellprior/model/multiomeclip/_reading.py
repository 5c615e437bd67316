"""How MultiomeCLIP reads data, attached or not."""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
from mudata import MuData
from scvi.model.base import BaseModelClass

from cellprior import genes as matching
from cellprior._matrix import matrix_of, totals
from cellprior.genes._kinds import kinds_of
from cellprior.model.multiomeclip._barcodes import differ_by_suffix
from cellprior.model.multiomeclip._cells import Cells, CountsOf, cells_of
from cellprior.model.multiomeclip._embedding import Encoder
from cellprior.model.multiomeclip._module import MODALITIES, Modality

Data: TypeAlias = MuData | ad.AnnData
Features: TypeAlias = matching.GeneMatch | matching.PeakMatch


class ReadingModel(Encoder, BaseModelClass):
    """The part of :class:`~cellprior.model.multiomeclip._model.MultiomeCLIP` that reads and embeds."""

    genes: pd.DataFrame
    peaks: list[str]
    min_coverage: float
    is_trained_: bool
    split_: dict[str, Any]
    _attached_match: dict[Modality, Features]
    _opened: Data | None = None  # data that are read without having been set up

    def feature_match(self, adata: Data | None = None) -> dict[Modality, Features]:
        """How much of some data, by default the attached, the model reads: a report by modality.

        Raises
        ------
        GeneMatchError, PeakMatchError
            If it is too little.
        """
        if adata is None and self._attached_match:
            return self._attached_match
        return self._matches(self._cells(adata))

    def _matches(self, cells: Cells) -> dict[Modality, Features]:
        found: dict[Modality, Features] = {}
        for name, adata in cells.data.items():
            sums = totals(matrix_of(adata, cells.layers[name]))
            if name == "rna":
                found[name] = matching.match(
                    adata.var,
                    self.genes,
                    gene_key=self.registry["setup_args"].get("gene_key"),
                    gene_counts=sums,
                    min_coverage=self.min_coverage,
                )
            else:
                var = adata.var
                if cells.data.get("rna") is adata:  # of one table with both, genes are not lost peaks
                    var = var.assign(feature_types=kinds_of(var))
                found[name] = matching.match_peaks(
                    var, self.peaks, peak_counts=sums, min_coverage=self.min_coverage
                )
        return found

    def _cells(self, adata: Data | None) -> Cells:
        data = next((found for found in (adata, self._opened, self.adata) if found is not None), None)
        if data is None:
            msg = "The model was loaded without data: pass adata=."
            raise ValueError(msg)
        cells = cells_of(data, self.registry["setup_args"], genes=self.genes)
        if len(cells.data) == 2 and (
            said := differ_by_suffix(*(cells.data[name].obs_names for name in MODALITIES))
        ):
            warnings.warn(said, UserWarning, stacklevel=3)
        return cells

    def _counts(self, adata: Data | None, cells: Cells) -> dict[Modality, CountsOf]:
        attached = adata is None or adata is self.adata
        match = self._attached_match if attached else self._matches(cells)
        if attached and any(
            not np.array_equal(_names_of(match[name]), part.var_names) for name, part in cells.data.items()
        ):
            match = self._attached_match = self._matches(cells)
        sizes = {"rna": len(self.genes), "atac": len(self.peaks)}
        return {name: CountsOf.of(cells, name, match[name], sizes[name]) for name in cells.data}


def _names_of(match: Features) -> np.ndarray:
    """Names of the data's columns at the time of the match."""
    return np.asarray(match.var_names if isinstance(match, matching.GeneMatch) else match.names)
