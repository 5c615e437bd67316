"""ATAC alone: from the peaks of a cell that are seen, which of the others are open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from torch import Tensor, nn
from torch.utils.data import Dataset

from cellprior.model.data._counts import csr_tensor
from cellprior.model.multiomeclip._cells import CountsOf
from cellprior.model.multiomeclip._module import MLPEncoder

MASK_SHARE = 0.3
TRUST = 100.0  # cells in which a peak is open, from which on it is trusted more than not
ROUNDS = 20  # of drawing anew what turns out to be open


class MaskedPeaks(nn.Module):
    """Tell the open peaks that were hidden from a cell's encoder from closed ones, by the cell's vector.

    The encoder reads a bag of the open peaks that are left, each with its inverse document frequency, as ever; the
    bag starts from the components of an SVD. A peak's score is its vector times the cell's, on top of what its
    popularity says. Trained on as many closed peaks as hidden ones, with the logistic loss [negative sampling, Mikolov
    et al., NeurIPS 2013].

    Most peaks are open in a handful of cells, which could be learned by heart: both tensors of a peak count by
    ``n / (n + 100)``, if it is open in ``n`` cells.

    Parameters
    ----------
    encoder
        Of ATAC, with its components fitted.
    n_latent
        Width of what it gives.
    open_cells
        Number of training cells in which each peak is open ``(n_peaks,)``.
    mask_share
        Share of the open peaks that is hidden.
    """

    trust: Tensor

    def __init__(
        self, encoder: MLPEncoder, n_latent: int, open_cells: np.ndarray, *, mask_share: float
    ) -> None:
        super().__init__()
        self.encoder, self.mask_share = encoder, mask_share
        self.register_buffer("trust", torch.from_numpy(open_cells / (open_cells + TRUST)).float()[:, None])
        self.shift = nn.Parameter(torch.zeros_like(encoder.components))  # of the components
        self.vectors = nn.Parameter(torch.zeros(len(open_cells), n_latent))

    @property
    def components(self) -> Tensor:
        """The bag: where each peak pulls a cell ``(n_peaks, n_components)``."""
        return self.encoder.components + self.trust * self.shift

    def cell_vectors(self, visible: Tensor) -> Tensor:
        """Of cells whose open peaks are seen in part, CSR ``(cells, n_peaks)``: ``(cells, n_latent)``."""
        # a bag of fewer peaks is smaller, as with dropout
        inputs = self.encoder.inputs(visible, self.components / (1 - self.mask_share))
        return self.encoder(inputs)

    def training_losses(
        self, batch: Mapping[str, Tensor], *, floor: Popularity, measured: Tensor, rng_seed: int
    ) -> dict[str, Tensor]:
        """``loss``, that of popularity, and that of chance; ``measured`` peaks alone can be drawn, by ``floor``."""
        counts = batch[REGISTRY_KEYS.X_KEY]
        generator = torch.Generator(counts.device).manual_seed(rng_seed)
        visible, row, peak = hide(counts, self.mask_share, generator)
        closed_row, closed_peak = draw_closed(counts, row, floor, generator)
        rows, peaks = torch.cat([row, closed_row]), torch.cat([peak, closed_peak])
        is_open = torch.cat([torch.ones_like(row), torch.zeros_like(closed_row)]).float()
        of_peak = F.embedding(peaks, self.vectors) * self.trust[peaks]  # (peaks, n_latent)
        known = floor.log_odds[peaks]
        scores = (self.cell_vectors(visible)[rows] * of_peak).sum(1) + known
        return {
            "loss": _logistic(scores, is_open),
            "loss_floor_popularity": _logistic(known, is_open),
            "loss_floor_chance": torch.full_like(known.sum(), math.log(2)),
        }

    @torch.no_grad()
    def fold(self) -> None:
        """Give the encoder the components that were learned."""
        self.encoder.components.copy_(self.components)
        self.shift.zero_()


class Popularity(nn.Module):
    """How often each peak is open: what closed peaks are drawn by, and the predictor that knows nothing else.

    As open and closed ones are drawn alike, hardly more than chance can be known without looking at the cell.

    Parameters
    ----------
    open_cells
        Number of training cells in which each peak is open ``(n_peaks,)``; one is added.
    n_cells
        Number of training cells.
    measured
        Peaks that the data have; the others are never drawn ``(n_peaks,)``.
    """

    cumulative: Tensor
    log_odds: Tensor

    def __init__(self, open_cells: np.ndarray, n_cells: int, measured: np.ndarray) -> None:
        super().__init__()
        often = np.where(measured, open_cells + 1.0, 0.0)
        closed = 1.0 - open_cells / (n_cells + 1.0)  # share of cells in which a peak may be drawn
        log_odds = np.log((often * closed).sum() / often.sum()) - np.log(closed)
        self.register_buffer("cumulative", torch.from_numpy(np.cumsum(often) / often.sum()))
        self.register_buffer("log_odds", torch.from_numpy(log_odds).float())  # of hidden to closed

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Peaks ``(n,)``."""
        at = torch.rand(n, generator=generator, dtype=torch.float64, device=self.cumulative.device)
        return torch.searchsorted(self.cumulative, at, right=True).clamp(max=len(self.cumulative) - 1)


def hide(counts: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hide each open peak with a probability of ``share``.

    Parameters
    ----------
    counts
        CSR ``(cells, n_peaks)``.
    share
        Between 0 and 1.
    generator
        On the device of the counts.

    Returns
    -------
    1 for each open peak that is left, CSR; and cell and peak of those that are hidden, one entry each.
    """
    row, peak = _open(counts)
    hidden = torch.rand(len(row), generator=generator, device=row.device) < share
    left = torch.bincount(row[~hidden], minlength=len(counts))
    indptr = F.pad(left.cumsum(0), (1, 0))
    ones = torch.ones(int(indptr[-1]), device=row.device)
    visible = torch.sparse_csr_tensor(indptr, peak[~hidden], ones, size=counts.shape, check_invariants=False)
    return visible, row[hidden], peak[hidden]


def draw_closed(
    counts: Tensor, row: Tensor, popularity: Popularity, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A closed peak for each entry of ``row``, in that cell; by popularity.

    Returns
    -------
    Cell and peak. Where nothing but open peaks was drawn time and again, there is none.
    """
    n_peaks = counts.shape[1]
    open_row, open_peak = _open(counts)
    known = open_row * n_peaks + open_peak  # increasing, as rows and columns are
    drawn = row * n_peaks + popularity.draw(len(row), generator)
    for _ in range(ROUNDS):
        again = _among(drawn, known).nonzero().squeeze(1)
        if not len(again):
            return row, drawn % n_peaks
        drawn[again] = row[again] * n_peaks + popularity.draw(len(again), generator)
    closed = drawn[~_among(drawn, known)]
    return closed // n_peaks, closed % n_peaks


class CellsOfOneModality(Dataset):
    """Raw counts as CSR tensors."""

    def __init__(self, counts: CountsOf) -> None:
        self.counts = counts

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {REGISTRY_KEYS.X_KEY: csr_tensor(self.counts.read(np.asarray(rows)))}


def as_pretraining(history: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Columns of a history, called as those of pretraining: ``train_loss`` becomes ``train_pretrain_loss``."""
    named = {}
    for column, values in history.items():
        stage, found, rest = column.partition("_loss")
        if found and stage in ("train", "validation"):
            name = f"{stage}_pretrain_loss{rest}"
            named[name] = values.rename(columns={column: name})
    return named


def _open(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Cell and peak of each value that is not 0."""
    n_values = counts.crow_indices().diff()
    row = torch.repeat_interleave(torch.arange(len(n_values), device=n_values.device), n_values)
    is_open = counts.values() > 0
    return row[is_open], counts.col_indices().long()[is_open]


def _among(values: Tensor, increasing: Tensor) -> Tensor:
    if not len(increasing):
        return torch.zeros_like(values, dtype=torch.bool)
    place = torch.searchsorted(increasing, values).clamp(max=len(increasing) - 1)
    return increasing[place] == values


def _logistic(scores: Tensor, target: Tensor) -> Tensor:
    """Mean of the logistic loss; 0 of nothing."""
    total = F.binary_cross_entropy_with_logits(scores, target, reduction="sum")
    return total / max(len(scores), 1)
