"""Training of MultiomeCLIP: minibatches of complete cells, and how well held-out cells are matched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellprior.model.data._counts import csr_tensor
from cellprior.model.data._minibatches import SentenceSampler
from cellprior.model.learning._processes import gather_cells
from cellprior.model.learning._training import adamw, steps_of
from cellprior.model.multiomeclip._cells import CountsOf
from cellprior.model.multiomeclip._loss import infonce_chance, same_label, sigmoid_chance
from cellprior.model.multiomeclip._metrics import depth_scores, latent_metrics, matching_metrics
from cellprior.model.multiomeclip._module import MODALITIES, MLPEncoder, Modality, MultiomeCLIPModule

MAX_MATCHED = 5_000  # held-out cells that are matched with each other in every epoch
ROWS = 2048  # cells that are read at a time
LABEL, ROW = "label", "row"


class PairedCells(Dataset):
    """Complete cells: raw counts of both modalities as CSR, or what enters the encoders, if that is small.

    Parameters
    ----------
    counts
        Of both modalities.
    module
        Whose encoders' inputs are kept in memory where they are components.
    rows
        Cells that will be asked for.
    label
        Code of each cell's label, or None ``(n_obs,)``.
    """

    def __init__(
        self,
        counts: Mapping[Modality, CountsOf],
        module: MultiomeCLIPModule,
        rows: np.ndarray,
        label: np.ndarray | None,
    ) -> None:
        self.counts, self.label = counts, label
        self.inputs: dict[Modality, Tensor] = {}
        self.place = np.full(int(rows.max()) + 1, -1)
        self.place[rows] = np.arange(len(rows))
        for name in MODALITIES:
            encoder = module.encoder_of(name)
            if isinstance(encoder, MLPEncoder):
                blocks = np.array_split(rows, -(-len(rows) // ROWS))
                with torch.no_grad():
                    parts = [
                        encoder.inputs(csr_tensor(counts[name].read(b)).to(module.device)).cpu()
                        for b in blocks
                    ]
                self.inputs[name] = torch.cat(parts)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        cells = np.asarray(rows)
        batch: dict[str, Tensor] = {ROW: torch.from_numpy(cells)}
        if self.label is not None:
            batch[LABEL] = torch.from_numpy(self.label[cells])
        for name in MODALITIES:
            if name in self.inputs:
                batch[name] = self.inputs[name][self.place[cells]]
            else:
                batch[name] = csr_tensor(self.counts[name].read(cells))
        return batch


class PairedMinibatches(pl.LightningDataModule):
    """Minibatches of nearly equal size, each within one category of ``batch``."""

    def __init__(
        self,
        cells: Dataset,
        train: np.ndarray,
        validation: np.ndarray,
        *,
        batch: np.ndarray | None,
        batch_size: int,
    ) -> None:
        super().__init__()
        # names that scvi-tools reads
        self.train_idx, self.val_idx, self.test_idx = train, validation, np.empty(0, dtype=np.int64)
        self.n_train, self.n_val = len(train), len(validation)
        self.cells, self.batch, self.batch_size = cells, batch, batch_size

    def train_dataloader(self) -> DataLoader:
        """Training cells, in new minibatches at each pass."""
        return self._loader(self.train_idx, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out cells."""
        return self._loader(self.val_idx, shuffle=False)

    def _loader(self, rows: np.ndarray, shuffle: bool) -> DataLoader:
        group = None if self.batch is None else self.batch[rows]
        sampler = SentenceSampler(rows, group, self.batch_size, shuffle)
        # the sampler makes the minibatches; a generator of its own leaves the global state alone
        return DataLoader(self.cells, sampler=sampler, batch_size=None, generator=torch.Generator())


class ContrastivePlan(pl.LightningModule):
    """AdamW on the contrast of the modalities; after each epoch, held-out cells are matched.

    Parameters
    ----------
    module
        To train.
    n_steps
        Steps of the whole run.
    depth
        Total counts of every cell that is held out, by modality ``(n_obs,)``, for the control that knows nothing else.
    micro_batch_size
        Cells whose gradient is computed at a time.
    keep_best
        End with the tensors of the epoch with the lowest FOSCTTM on held-out cells.
    lr
        Peak learning rate.
    weight_decay
        Of AdamW; not on biases, norms and the scale.
    warmup
        Share of all steps over which the learning rate rises; then it falls to 0 along a cosine.
    """

    def __init__(
        self,
        module: MultiomeCLIPModule,
        *,
        n_steps: int,
        depth: Mapping[Modality, np.ndarray],
        micro_batch_size: int | None = None,
        keep_best: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        self.module: Any = module
        self.n_steps, self.lr, self.weight_decay, self.warmup = n_steps, lr, weight_decay, warmup
        self.depth, self.micro_batch_size, self.keep_best = depth, micro_batch_size, keep_best
        self.held_out: list[tuple[Tensor, Tensor, Tensor]] = []
        self.depth_only: dict[str, float] = {}
        self.best = float("inf")
        self.best_tensors: dict[str, Tensor] = {}

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine, as of the other models."""
        n_steps = steps_of(self, self.n_steps)
        return adamw(self.module, n_steps, lr=self.lr, weight_decay=self.weight_decay, warmup=self.warmup)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One minibatch."""
        return self._step(batch, "train")["loss"]

    def on_train_batch_end(self, *args: Any) -> None:
        """Limit the scale."""
        self.module.limit_scale()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One minibatch; its latents are kept for the end of the epoch."""
        out = self._step(batch, "validation")
        self.held_out.append((out["rna"], out["atac"], gather_cells(batch[ROW])))

    def _step(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        for name in MODALITIES:
            encoder = self.module.encoder_of(name)
            is_input = isinstance(encoder, MLPEncoder)
            inputs[name] = batch[name] if is_input else encoder.inputs(batch[name])
        same = same_label(gather_cells(batch[LABEL])) if LABEL in batch else None
        out = self.module(inputs, same=same, micro_batch_size=self.micro_batch_size)
        n_cells = len(out["rna"])
        chance = infonce_chance if self.module.loss_kind == "infonce" else sigmoid_chance
        losses = {"loss": out["loss"].detach(), "loss_floor_chance": chance(n_cells, same=same)}
        for part, value in losses.items():
            self.log(
                f"{stage}_{part}",
                value,
                on_step=False,
                on_epoch=True,
                batch_size=n_cells,
                sync_dist=True,
                prog_bar=part == "loss",
            )
        return out

    def on_validation_epoch_end(self) -> None:
        """Match held-out cells, and keep the tensors if that was never as good."""
        rna, atac, rows = (torch.cat(parts)[:: self._stride] for parts in zip(*self.held_out, strict=True))
        self.held_out.clear()
        if not self.depth_only:
            row = rows.cpu().numpy()
            found = matching_metrics(depth_scores(self.depth["rna"][row], self.depth["atac"][row]))
            # as a floor of FOSCTTM it is drawn, and warned of if the model is no better
            self.depth_only = {
                "foscttm_floor_depth_only": found["foscttm"],
                "recall_at_1_depth_only": found["recall_at_1"],
                "recall_at_10_depth_only": found["recall_at_10"],
            }
        reached = latent_metrics(rna, atac)
        for name, value in {**reached, **self.depth_only, "n_cells": float(len(rows))}.items():
            self.log(f"validation_{name}", value, prog_bar=name == "foscttm", sync_dist=True)
        if self.keep_best and reached["foscttm"] < self.best:  # NaN is not
            self.best = reached["foscttm"]
            self.best_tensors = {name: p.detach().clone() for name, p in self.module.named_parameters()}

    @property
    def _stride(self) -> int:
        n_held_out = sum(len(rows) for _, _, rows in self.held_out)
        return -(-n_held_out // MAX_MATCHED)

    def on_train_end(self) -> None:
        """Back to the best epoch, if that is wanted."""
        with torch.no_grad():
            for name, tensor in self.best_tensors.items():
                self.module.get_parameter(name).copy_(tensor)


def split_complete(
    complete: np.ndarray,
    *,
    train_size: float | None,
    validation_size: float | None,
    shuffle: bool,
    rng: np.random.Generator,
    having: str = "both modalities",
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the complete cells to train on, and those that are held out, both increasing.

    Parameters
    ----------
    complete
        Which cells have both modalities ``(n_obs,)``.
    train_size, validation_size
        Shares of them; by default 0.9, and what is left.
    shuffle
        Draw them, instead of holding out the last.
    rng
        Draws.
    having
        What makes a cell complete, for the error.

    Raises
    ------
    ValueError
        If the shares are no shares, or fewer than two cells are left to train on.
    """
    train_size = 0.9 if train_size is None else train_size
    validation_size = 1 - train_size if validation_size is None else validation_size
    if not 0 < train_size <= 1 or not 0 <= validation_size <= 1 - train_size + 1e-9:
        msg = (
            f"train_size={train_size} and validation_size={validation_size}; shares of the cells are needed that add "
            "up to 1 at most."
        )
        raise ValueError(msg)
    rows = np.flatnonzero(complete)
    n_train = int(np.ceil(train_size * len(rows)))
    n_held_out = min(int(round(validation_size * len(rows))), len(rows) - n_train)
    if n_train < 2:
        msg = (
            f"{len(rows)} cells have {having}, of which {n_train} would be trained on; training needs two at least, "
            "and thousands to be of use."
        )
        raise ValueError(msg)
    order = rng.permutation(rows) if shuffle else rows
    return np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_held_out])
