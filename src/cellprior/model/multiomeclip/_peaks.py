"""ATAC alone: from the peaks of a cell that are seen, which of the others are open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from torch import Tensor, nn
from torch.utils.data import Dataset

from cellprior.model.data._cells import Counts, Joint
from cellprior.model.data._counts import csr_tensor, row_numbers
from cellprior.model.data._ranks import from_first
from cellprior.model.engine._embedding import Embedding, in_memory
from cellprior.model.learning._fit import History, continued, fit
from cellprior.model.learning._holdout import hold_out
from cellprior.model.learning._processes import refuse_unseeded
from cellprior.model.learning._training import TrainingPlan
from cellprior.model.multiomeclip._module import MLPEncoder
from cellprior.model.multiomeclip._training import PRETRAINED, PairedSplitter, fit_encoder, in_parts

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

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {REGISTRY_KEYS.X_KEY: csr_tensor(self.counts.read(np.asarray(rows)))}


def pretrain(
    model: Any,
    adata: Any,
    *,
    max_epochs: int,
    mask_share: float,
    split: dict[str, Any],
    plan_kwargs: dict[str, Any] | None,
    **trainer_kwargs: Any,
) -> None:
    """See :meth:`cellprior.model.MultiomeCLIP.pretrain_atac`; ``split`` is ``train_size`` to ``batch_size``."""
    was_trained, encoder = model.is_trained_, components_of(model)
    if was_trained and not model.training_state_:
        msg = "The model has been trained: pretrain_atac comes before train()."
        raise ValueError(msg)
    if not 0 < mask_share < 1:
        msg = f"mask_share={mask_share}; a share of the open peaks between 0 and 1 is needed."
        raise ValueError(msg)
    refuse_unseeded(trainer_kwargs.get("strategy"))
    cells = model._cells(adata)
    seed = from_first(int(torch.randint(2**31, ()).item()))  # seeded as all of torch is
    having_atac = PairedSplitter(cells.has("atac"), rng=np.random.default_rng(seed), having="ATAC", **split)
    held = hold_out(model, "pretrain_atac", cells.obs.index, having_atac, split)
    train = having_atac.train_idx
    counts = cells.counts["atac"]
    having_atac.dataset = CellsOfOneModality(counts)
    if not model.training_state_:
        fit_encoder(encoder, counts, train, np.random.default_rng(seed), seed)
    measured = np.isin(np.arange(counts.n_columns), counts.column)
    open_cells = _open_cells(counts, train)
    masked = MaskedPeaks(encoder, model.module.n_latent, open_cells, mask_share=mask_share)
    plan = TrainingPlan(
        masked,
        Popularity(open_cells, len(train), measured),
        measured=torch.from_numpy(measured)[None],
        n_steps=max_epochs * len(having_atac.train_dataloader()),
        **{"lr": 3e-4, "weight_decay": 1e-2, **(plan_kwargs or {})},
    )
    try:
        fit(
            model,
            plan,
            having_atac,
            max_epochs=max_epochs,
            split={"pretrain_atac": held},
            join=lambda before, after: continued(before, _as_pretraining(after)),
            **trainer_kwargs,
        )
    finally:
        masked.fold()  # the layers have learned to read these components
        if model.is_trained_:
            model.training_state_ = {PRETRAINED: "atac"}
        model.is_trained_ = was_trained


def atac_representation(model: Any, adata: Any, indices: Any, batch_size: int | None) -> np.ndarray:
    """See :meth:`cellprior.model.MultiomeCLIP.get_atac_representation`."""
    encoder = components_of(model)
    if not model.training_state_:
        model._check_if_trained(warn=False)
    cells = model._cells(adata)
    rows = row_numbers(indices, cells.n_obs)
    if not (has := cells.has("atac")[rows]).all():
        msg = f"{int((~has).sum())} of {len(rows)} cells lack ATAC, the first {cells.obs.index[rows[~has][0]]!r}."
        raise ValueError(msg)
    some = cells.only(["atac"])

    def components(_: Any, chunks: Iterable[Joint], covariates: Any) -> Iterator[Tensor]:
        return (encoder.places(chunk.counts["atac"][1]) for chunk in chunks)

    options: dict[str, Any] = {"encode": components, "width": encoder.components.shape[1]}
    return in_memory(Embedding(model._encoder(some), some, rows, batch_size=batch_size, **options))


def components_of(model: Any) -> MLPEncoder:
    """Encoder of ATAC, if it has components.

    Raises ValueError if it has not.
    """
    encoder = model.module.encoder_of("atac")
    if not isinstance(encoder, MLPEncoder):
        msg = (
            'Components of ATAC are needed, which encoder="vit" has not; make the model with encoder="mlp-depth" or '
            'encoder="mlp".'
        )
        raise ValueError(msg)
    return encoder


def _open_cells(counts: Counts, rows: np.ndarray) -> np.ndarray:
    """Number of some cells in which each peak is open ``(n_peaks,)``."""
    total = np.zeros(counts.n_columns, dtype=np.int64)
    for part in in_parts(rows):
        block = counts.read(part)
        total += np.bincount(block.indices[block.data > 0], minlength=counts.n_columns)
    return total


def _as_pretraining(history: History) -> History:
    """Columns of a history, called as those of pretraining: ``train_loss`` becomes ``train_pretrain_loss``."""
    named: History = {}
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
