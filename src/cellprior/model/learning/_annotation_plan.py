"""Supervised training, shared by the models: the head, what trains beside it, on which cells, and the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cellprior.model.data._fields import CountsManager
from cellprior.model.data._minibatches import CountsDataset, VocabularyLoader
from cellprior.model.learning._plan import Plan
from cellprior.model.learning._processes import gather_objects

HEAD_DROPOUT = 0.5  # of the original
LORA_RANK = 8
TARGET = "target"  # class of a cell in a minibatch; NO_CLASS for one that is context only
NO_CLASS = -1
MIN_CELLS = 3  # a class with fewer has none to spare for validation or calibration
SPREAD_PRIOR = 20  # cells of the average class that a class's spread is mixed with
# of the scatter within classes to a sphere: directions in which known cells hardly differ are noisy
SHRINKAGE = 0.5


class AnnotationHead(nn.Module):
    """Latent, dropout and classes on the hidden state in front of a model's latent; and where the classes lie.

    Classes are learned on the hidden state. Where they lie is measured in the model's embedding of it, a projection
    that fine-tuning leaves as it was: on real cells this finds more of the unseen types than distances in the hidden
    state.
    """

    shift: Tensor
    scale: Tensor
    center: Tensor
    whitening: Tensor
    spread: Tensor

    def __init__(self, n_hidden: int, n_latent: int, n_classes: int) -> None:
        super().__init__()
        self.latent = nn.Linear(n_hidden, n_latent)
        self.dropout = nn.Dropout(HEAD_DROPOUT)
        self.linear = nn.Linear(n_latent, n_classes)
        self.register_buffer("shift", torch.zeros(n_hidden))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("center", torch.zeros(n_classes, n_latent))
        self.register_buffer("whitening", torch.zeros(n_latent, n_latent))
        self.register_buffer("spread", torch.ones(n_classes))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``(cells, n_classes)``."""
        return self.linear(self.dropout(self.latent((hidden - self.shift) / self.scale)))

    def standardise(self, hidden: np.ndarray) -> None:
        """Take off from now on what hidden states ``(cells, n_hidden)`` have in common, and scale what is left."""
        self.shift.copy_(torch.as_tensor(hidden.mean(axis=0)))
        self.scale.fill_(float(hidden.std(axis=0).mean()) or 1.0)

    def locate(self, latent: np.ndarray, code: np.ndarray) -> None:
        """Learn where labelled cells of each class lie in the embedding ``(cells, n_latent)``, see :meth:`novelty`."""
        n_classes = len(self.center)
        center = np.stack([latent[code == c].mean(axis=0) for c in range(n_classes)])
        within = (latent - center[code]).astype(np.float64)
        covariance = within.T @ within / len(within)
        sphere = np.diag(np.full(len(covariance), np.trace(covariance) / len(covariance)))
        values, vectors = np.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere)
        self.whitening.copy_(torch.as_tensor(vectors / np.sqrt(values.clip(min=1e-12))))
        self.center.copy_(torch.as_tensor(center))
        self.spread.fill_(1.0)
        distance = self._distances(torch.as_tensor(latent, device=self.center.device)).cpu().numpy()
        own = distance[np.arange(len(code)), code]
        n_cells = np.bincount(code, minlength=n_classes)
        spread = np.array([np.median(own[code == c]) for c in range(n_classes)])
        # a class of few cells seems tight: its mean leans towards them
        spread = (n_cells * spread + SPREAD_PRIOR * np.median(own)) / (n_cells + SPREAD_PRIOR)
        self.spread.copy_(torch.as_tensor(spread))

    def _distances(self, latent: Tensor) -> Tensor:
        """Mahalanobis distance to each class over the class's spread, ``(cells, n_classes)``."""
        # by differences: the product form rounds by the number of rows, and so by batch_size
        mode = "donot_use_mm_for_euclid_dist"
        return (
            torch.cdist(latent @ self.whitening, self.center @ self.whitening, compute_mode=mode)
            / self.spread
        )

    def novelty(self, latent: Tensor) -> Tensor:
        """How far a cell's embedding is from the nearest class, ``(cells,)``; about 1 for the cells trained on."""
        return self._distances(latent.float()).amin(1)


class LowRank(nn.Module):
    """A low-rank change of a weight matrix, 0 at first [Hu et al., LoRA, ICLR 2022]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn_like(linear.weight[:LORA_RANK]) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros_like(linear.weight[:, :LORA_RANK]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@contextmanager
def only_trainable(module: Any, trainable: str) -> Iterator[list[nn.Module]]:
    """Freeze all but the named parts and the head for a while; gives the parts that train.

    Low-rank changes are added to their matrices at the end.
    """
    adapted = module.adapted_layers() if trainable == "lora" else []
    was_trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False)
    for linear in adapted:
        parametrize.register_parametrization(linear, "weight", LowRank(linear))
    parts = [*module.trainable_parts()[trainable], module.annotation]
    parts += [linear.parametrizations.weight[0] for linear in adapted]
    for part in parts:
        part.requires_grad_(True)
    try:
        yield parts
    finally:
        for linear in adapted:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        module.requires_grad_(True)
        for parameter, was in was_trained.items():
            parameter.requires_grad_(was)


class Split(NamedTuple):
    """Row numbers of the labelled cells by what they are for."""

    train: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray


def split_cells(
    code: np.ndarray, *, validation_size: float, calibration_size: float, rng: np.random.Generator
) -> Split:
    """Split labelled cells.

    Calibration cells are drawn as they come, so that they are exchangeable with new cells, but two of each class are
    left; of the others, validation cells are drawn by class, at least one where a class can spare it. ``code`` is the
    class of each cell, NO_CLASS for none ``(n_obs,)``; the sizes are shares of the labelled cells.
    """
    rows = rng.permutation(np.flatnonzero(code != NO_CLASS))
    n_cells = np.bincount(code[rows])
    drawn = rows[n_cells[code[rows]] >= MIN_CELLS][: round(calibration_size * len(rows))]
    spare = n_cells - 2
    taken = pd.Series(code[drawn]).groupby(code[drawn]).cumcount().to_numpy()  # of its class before it
    calibration = drawn[taken < spare[code[drawn]]]
    rest = rows[~np.isin(rows, calibration)]
    validation: list[np.ndarray] = []
    for c in range(len(n_cells)):
        of_class = rest[code[rest] == c]
        n = min(max(round(validation_size * n_cells[c]), 1), len(of_class) - 1)
        if validation_size and n_cells[c] >= MIN_CELLS:
            validation.append(of_class[:n])
    held = np.concatenate([np.empty(0, dtype=rows.dtype), *validation])
    return Split(np.sort(rest[~np.isin(rest, held)]), np.sort(held), np.sort(calibration))


class AnnotationCells(pl.LightningDataModule):
    """Sentences of labelled cells; with ``context``, of these cells too."""

    def __init__(
        self,
        manager: CountsManager,
        code: np.ndarray,
        split: Split,
        *,
        context: np.ndarray | None,
        batch_size: int,
        column: np.ndarray,
        n_columns: int,
        covariates: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.covariates = covariates
        self.train_idx, self.val_idx, self.test_idx = split  # names that scvi-tools reads
        self.n_train, self.n_val = len(split.train), len(split.validation)
        self.manager, self.code, self.context = manager, code, context
        self.options: dict[str, Any] = {"batch_size": batch_size, "column": column, "n_columns": n_columns}

    def train_dataloader(self) -> VocabularyLoader:
        """Training cells, in new sentences at each pass."""
        return self._loader(self.train_idx, shuffle=True)

    def val_dataloader(self) -> VocabularyLoader:
        """Validation cells."""
        return self._loader(self.val_idx, shuffle=False)

    def _loader(self, rows: np.ndarray, shuffle: bool) -> VocabularyLoader:
        loader = VocabularyLoader(
            self.manager,
            indices=rows if self.context is None else self.context,
            shuffle=shuffle,
            by_batch=True,
            dense=True,
            data_and_attributes=[REGISTRY_KEYS.X_KEY, *self.covariates],
            **self.options,
        )
        target = np.full(len(self.code), NO_CLASS)
        target[rows] = self.code[rows]
        assert isinstance(loader.dataset, CountsDataset)  # of our own manager
        loader.dataset.data[TARGET] = target
        return loader


class AnnotationPlan(Plan):
    """Cross-entropy with class weights; macro-F1 on validation cells."""

    class_weights: Tensor
    lr_argument = "lr={lr}"

    def __init__(
        self,
        module: Any,
        parts: list[nn.Module],
        *,
        gene_index: Tensor,
        class_weights: Tensor,
        n_steps: int,
        lr: float,
        weight_decay: float = 1e-7,
    ) -> None:
        super().__init__(module, n_steps=n_steps, lr=lr, weight_decay=weight_decay)
        self.parts = tuple(parts)  # a tuple, lest they be registered twice
        self.register_buffer("gene_index", gene_index, persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.validated: list[tuple[np.ndarray, np.ndarray]] = []

    def on_train_epoch_start(self) -> None:
        """Dropout in the parts that train, and nowhere else."""
        self.module.eval()
        for part in self.parts:
            part.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One sentence."""
        return self._step(batch, "train")[0]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One sentence."""
        _, logits = self._step(batch, "validation")
        target = batch[TARGET]
        known = target != NO_CLASS
        self.validated.append((target[known].cpu().numpy(), logits[known].argmax(1).cpu().numpy()))

    def _step(self, batch: dict[str, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        covariates = {key: x for key, x in batch.items() if key not in (REGISTRY_KEYS.X_KEY, TARGET)}
        hidden = self.module.hidden(batch[REGISTRY_KEYS.X_KEY], gene_index=self.gene_index, **covariates)
        logits = self.module.annotation(hidden)
        loss = annotation_loss(logits, batch[TARGET], self.class_weights)
        n_cells = max(int((batch[TARGET] != NO_CLASS).sum()), 1)
        name = f"annotation_{stage}_loss"
        self.log_epoch({name: loss.detach()}, n_cells, shown=name)
        return loss, logits

    def on_validation_epoch_end(self) -> None:
        """Macro-F1 of the cells of all processes."""
        everyones = [cells for of_process in gather_objects(self.validated) for cells in of_process]
        truth, named = (np.concatenate(parts) for parts in zip(*everyones, strict=True))
        self.validated.clear()
        self.log("annotation_validation_macro_f1", macro_f1(truth, named), prog_bar=True, sync_dist=True)


def annotation_loss(logits: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of the cells that have a class; 0 if none has."""
    known = target != NO_CLASS
    loss = F.cross_entropy(logits[known], target[known], weight=class_weights, reduction="sum")
    return loss / class_weights[target[known]].sum().clamp(min=1e-12)


def macro_f1(truth: np.ndarray, named: np.ndarray) -> float:
    """Mean over the classes in ``truth`` of ``2 TP / (2 TP + FP + FN)``."""
    classes = np.unique(truth)
    hit = [np.sum((truth == c) & (named == c)) for c in classes]
    seen = [np.sum(truth == c) + np.sum(named == c) for c in classes]
    return float(np.mean(2 * np.array(hit) / np.array(seen)))
