"""Training of MultiomeCLIP: minibatches of complete cells, and how well held-out cells are matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cellprior._arguments import count
from cellprior._obs import read_names, warn_of_unlabeled
from cellprior.model.data._cells import Cells, Counts
from cellprior.model.data._counts import csr_tensor, row_numbers
from cellprior.model.data._minibatches import SentenceSampler
from cellprior.model.data._ranks import from_first, rank_and_count
from cellprior.model.learning._fit import KeepBest, fit
from cellprior.model.learning._holdout import hold_out
from cellprior.model.learning._plan import Plan
from cellprior.model.learning._processes import gather_cells, refuse_unseeded
from cellprior.model.multiomeclip._inputs import thinned
from cellprior.model.multiomeclip._loss import infonce_chance, same_label, sigmoid_chance
from cellprior.model.multiomeclip._metrics import depth_scores, latent_metrics, matching_metrics
from cellprior.model.multiomeclip._module import MODALITIES, MLPEncoder, Modality, MultiomeCLIPModule

MAX_MATCHED = 5_000  # held-out cells that are matched with each other in every epoch
MAX_FITTED = 20_000  # training cells that components are found from
MIN_UNSEEN = 50  # held-out cells that the means of the modalities are taken from, if there are as many
THIN_TO = 0.5  # share of its counts that a cell keeps at least, where its depth is read
ROWS = 2048  # cells that are read at a time
LABEL, ROW = "label", "row"
PRETRAINED = "pretrained"  # modality, in the training state of a model that has not been trained yet


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
    to_thin
        Cells that are thinned each time they are asked for, see :func:`~cellprior.model.multiomeclip._inputs.thinned`.
    thin_to
        Share of their counts that they keep at least.
    seed
        Of what they keep.
    """

    def __init__(
        self,
        counts: Mapping[str, Counts],
        module: MultiomeCLIPModule,
        rows: np.ndarray,
        label: np.ndarray | None,
        *,
        to_thin: np.ndarray | None = None,
        thin_to: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.counts, self.label, self.thin_to = counts, label, thin_to
        self.is_thinned = np.zeros(int(rows.max()) + 1, dtype=bool)
        if to_thin is not None and thin_to < 1:
            self.is_thinned[to_thin] = True
            rows = rows[~self.is_thinned[rows]]
        self.rng = np.random.default_rng([seed, rank_and_count()[0]])
        self.encoders: dict[Modality, MLPEncoder] = {}
        self.inputs: dict[Modality, Tensor] = {}
        self.place = np.full(len(self.is_thinned), -1)
        self.place[rows] = np.arange(len(rows))
        for name in MODALITIES:
            encoder = module.encoder_of(name)
            if isinstance(encoder, MLPEncoder):
                self.encoders[name] = encoder
                parts = [self._inputs(name, counts[name].read(part)) for part in in_parts(rows)]
                self.inputs[name] = torch.cat(parts) if parts else torch.empty(0)

    @torch.no_grad()
    def _inputs(self, name: Modality, counts: sp.csr_matrix) -> Tensor:
        encoder = self.encoders[name]
        return encoder.inputs(csr_tensor(counts).to(encoder.components.device)).cpu()

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        cells = np.asarray(rows)
        batch: dict[str, Tensor] = {ROW: torch.from_numpy(cells)}
        if self.label is not None:
            batch[LABEL] = torch.from_numpy(self.label[cells])
        is_thinned = self.is_thinned[cells].any()
        for name in MODALITIES:
            if name in self.inputs and not is_thinned:
                batch[name] = self.inputs[name][self.place[cells]]
                continue
            counts = self.counts[name].read(cells)
            if is_thinned:
                counts = thinned(counts, self.thin_to, self.rng)
            batch[name] = self._inputs(name, counts) if name in self.inputs else csr_tensor(counts)
        return batch


class PairedSplitter(pl.LightningDataModule):
    """Complete cells, split, in minibatches of nearly equal size, each within one category of ``batch``.

    ``dataset`` is to be set before cells are loaded.

    Parameters
    ----------
    complete
        Which cells have both modalities ``(n_obs,)``.
    batch_size
        Cells of a minibatch.
    rng
        Draws the split.
    train_size, validation_size
        Shares of the complete cells; by default 0.9, and what is left. Others are test cells.
    shuffle_set_split
        Draw them, instead of holding out the last.
    external_indexing
        Numbers of the training, held-out and test cells, instead of a draw; the last two may be left out.
    batch
        Code of each cell's batch ``(n_obs,)``.
    having
        What makes a cell complete, for errors.

    Raises
    ------
    ValueError
        If the shares are no shares, fewer than two cells are left to train on, or cells that are given are incomplete
        or given twice.
    """

    dataset: Dataset

    def __init__(
        self,
        complete: np.ndarray,
        *,
        batch_size: int,
        rng: np.random.Generator,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        external_indexing: Sequence[np.ndarray] | None = None,
        batch: np.ndarray | None = None,
        having: str = "both modalities",
    ) -> None:
        super().__init__()
        self.batch, self.batch_size = batch, batch_size
        if external_indexing is not None:
            train, held_out, self.rows = _given(external_indexing, complete, having)
        else:
            self.rows = np.flatnonzero(complete)
            n_train, n_held_out = _sizes(len(self.rows), train_size, validation_size)
            order = rng.permutation(self.rows) if shuffle_set_split else self.rows
            train, held_out = np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_held_out])
        if len(train) < 2:
            msg = (
                f"{len(self.rows)} cells have {having}, of which {len(train)} would be trained on; training needs two "
                "at least, and thousands to be of use."
            )
            raise ValueError(msg)
        self.keep({"train": train, "validation": held_out})

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """Rows by what they are for, increasing."""
        return {"train": self.train_idx, "validation": self.val_idx}

    def keep(self, parts: Mapping[str, np.ndarray]) -> None:
        """Take these from now on."""
        # names that scvi-tools reads
        self.train_idx, self.val_idx = parts["train"], parts["validation"]
        self.test_idx = np.setdiff1d(self.rows, np.concatenate([self.train_idx, self.val_idx]))
        self.n_train, self.n_val = len(self.train_idx), len(self.val_idx)

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
        return DataLoader(self.dataset, sampler=sampler, batch_size=None, generator=torch.Generator())


def _sizes(n_cells: int, train_size: float | None, validation_size: float | None) -> tuple[int, int]:
    """Numbers of cells to train on and to hold out."""
    train_size = 0.9 if train_size is None else train_size
    validation_size = 1 - train_size if validation_size is None else validation_size
    if not 0 < train_size <= 1 or not 0 <= validation_size <= 1 - train_size + 1e-9:
        msg = (
            f"train_size={train_size} and validation_size={validation_size}; shares of the cells are needed that add "
            "up to 1 at most."
        )
        raise ValueError(msg)
    n_train = int(np.ceil(train_size * n_cells))
    return n_train, min(int(round(validation_size * n_cells)), n_cells - n_train)


def _given(
    indexing: Sequence[np.ndarray], complete: np.ndarray, having: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to train on and to hold out, and these with the test cells; all increasing."""
    parts = [np.sort(row_numbers(np.asarray(part), len(complete))) for part in indexing]
    every, n_times = np.unique(np.concatenate(parts), return_counts=True)
    if (n_times > 1).any():
        msg = f"external_indexing names {(n_times > 1).sum()} cells twice, the first is number {every[n_times > 1][0]}."
        raise ValueError(msg)
    if not complete[every].all():
        lacking = every[~complete[every]]
        msg = (
            f"external_indexing names {len(lacking)} cells without {having}, the first is number {lacking[0]}. "
            "Leave them out."
        )
        raise ValueError(msg)
    return parts[0], parts[1] if len(parts) > 1 else np.empty(0, dtype=np.int64), every


class ContrastivePlan(Plan):
    """AdamW on the contrast of the modalities; after each epoch, held-out cells are matched.

    Parameters
    ----------
    module, n_steps, lr, weight_decay, warmup
        See :class:`~cellprior.model.learning._plan.Plan`; the scale of the contrast has no weight decay either.
    depth
        Total counts of every cell that is held out, by modality ``(n_obs,)``, for the control that knows nothing else.
    micro_batch_size
        Cells whose gradient is computed at a time.
    """

    def __init__(
        self,
        module: MultiomeCLIPModule,
        *,
        n_steps: int,
        depth: Mapping[Modality, np.ndarray],
        micro_batch_size: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
    ) -> None:
        super().__init__(module, n_steps=n_steps, lr=lr, weight_decay=weight_decay, warmup=warmup)
        self.depth, self.micro_batch_size = depth, micro_batch_size
        self.held_out: list[tuple[Tensor, Tensor, Tensor]] = []
        self.depth_only: dict[str, float] = {}

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
        losses = {
            f"{stage}_loss": out["loss"].detach(),
            f"{stage}_loss_floor_chance": chance(n_cells, same=same),
        }
        self.log_epoch(losses, n_cells, shown=f"{stage}_loss")
        return out

    def on_validation_epoch_end(self) -> None:
        """Match held-out cells."""
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

    @property
    def _stride(self) -> int:
        n_held_out = sum(len(rows) for _, _, rows in self.held_out)
        return -(-n_held_out // MAX_MATCHED)


def train(
    model: Any,
    *,
    max_epochs: int,
    split: dict[str, Any],
    plan_kwargs: dict[str, Any] | None,
    datasplitter_kwargs: dict[str, Any] | None,
    micro_batch_size: int | None,
    thin_to: float | None,
    early_stopping: bool,
    **trainer_kwargs: Any,
) -> None:
    """See :meth:`cellprior.model.MultiomeCLIP.train`; ``split`` is ``train_size`` to ``batch_size``."""
    if micro_batch_size is not None:
        count(micro_batch_size=micro_batch_size)
    if thin_to is None:
        thin_to = THIN_TO if getattr(model.module.atac, "reads_depth", False) else 1.0
    if not 0 < thin_to <= 1:
        msg = f"thin_to={thin_to}; a share of the counts above 0 is needed, 1 to keep them all."
        raise ValueError(msg)
    if model.adata is None:
        msg = "The model was loaded without data; load it with the data to train on."
        raise ValueError(msg)
    refuse_unseeded(trainer_kwargs.get("strategy"))
    cells = model._cells(None)
    seed = from_first(int(torch.randint(2**31, ()).item()))  # seeded as all of torch is
    args = model.registry["setup_args"]
    pairs = model._data_splitter_cls(
        cells.complete,
        rng=np.random.default_rng(seed),
        batch=codes_of(cells.obs, args["batch_key"]),
        **split,
        **(datasplitter_kwargs or {}),
    )
    held = hold_out(model, "train", cells.obs.index, pairs, split, datasplitter_kwargs)
    rows, held_out = pairs.train_idx, pairs.val_idx
    counts = cells.counts
    if not model.is_trained_ or model.training_state_:
        _fit_inputs(model, cells, held_out, seed)
    label = codes_of(cells.obs, args["labels_key"], unlabeled=args["unlabeled_category"])
    pairs.dataset = PairedCells(
        counts,
        model.module,
        np.concatenate([rows, held_out]),
        label,
        to_thin=rows,
        thin_to=thin_to,
        seed=seed,
    )
    plan = model._training_plan_cls(
        model.module,
        n_steps=max_epochs * len(pairs.train_dataloader()),
        depth=_depth(counts, held_out, cells.n_obs),
        micro_batch_size=micro_batch_size,
        **(plan_kwargs or {}),
    )
    pretrained = model.training_state_
    model.training_state_ = {}  # before checkpoints are saved
    try:
        fit(
            model,
            plan,
            pairs,
            max_epochs=max_epochs,
            split={"train": held},
            best=KeepBest("validation_foscttm") if early_stopping else None,
            early_stopping=early_stopping,
            **trainer_kwargs,
        )
    except BaseException:
        if model.is_trained_:  # the weights have moved, and what is known of the modalities with them
            align(model, cells, rows, held_out)
        else:
            model.training_state_ = pretrained
        raise
    align(model, cells, rows, held_out)


def _fit_inputs(model: Any, cells: Cells, held_out: np.ndarray, seed: int) -> None:
    """Weights and components, or maxima, from all cells that are not held out, paired or not."""
    rng = np.random.default_rng(seed)
    for name in MODALITIES:
        if model.training_state_.get(PRETRAINED) != name:
            rows = np.setdiff1d(np.flatnonzero(cells.has(name)), held_out)
            fit_encoder(model.module.encoder_of(name), cells.counts[name], rows, rng, seed)


def fit_encoder(encoder: Any, counts: Counts, rows: np.ndarray, rng: np.random.Generator, seed: int) -> None:
    """Find an encoder's weights and components, or maxima, from some cells."""
    if len(rows) > MAX_FITTED:
        rows = np.sort(rng.choice(rows, MAX_FITTED, replace=False))
    encoder.fit(sp.vstack([counts.read(part) for part in in_parts(rows)], format="csr"), seed=seed % 2**31)


def align(model: Any, cells: Cells, train: np.ndarray, held_out: np.ndarray | None = None) -> None:
    """Find what the modalities share on training cells, and where they lie on others, if there are enough."""
    unseen = None if held_out is None or len(held_out) < MIN_UNSEEN else _both(model, cells, held_out)
    model.module.align(*_both(model, cells, train), unseen=unseen)


def _both(model: Any, cells: Cells, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Unit vectors of RNA and ATAC of some cells, or of a part of them."""
    rows = rows[:: -(-len(rows) // MAX_FITTED)]
    rna, atac = (torch.from_numpy(model._vectors(cells, name, rows)) for name in MODALITIES)
    return rna, atac


def codes_of(obs: pd.DataFrame, key: str | None, *, unlabeled: str | None = None) -> np.ndarray | None:
    """Number of each cell's category, by first appearance, -1 for ``unlabeled``; None without a key."""
    if key is None:
        return None
    names = read_names(obs, key, frame="mdata.obs")
    codes, labels = pd.factorize(names)
    if unlabeled is not None:
        warn_of_unlabeled(labels, unlabeled, where=f"mdata.obs[{key!r}]")
    return np.where(names == unlabeled, -1, codes)


def in_parts(rows: np.ndarray) -> list[np.ndarray]:
    """Cells, as many at a time as are read."""
    return np.array_split(rows, -(-len(rows) // ROWS)) if len(rows) else []


def _depth(counts: Mapping[str, Counts], rows: np.ndarray, n_obs: int) -> dict[Modality, np.ndarray]:
    """Total counts of some cells by modality, 0 for the others ``(n_obs,)``."""
    found: dict[Modality, np.ndarray] = {name: np.zeros(n_obs) for name in MODALITIES}
    for name, depth in found.items():
        for part in in_parts(rows):
            depth[part] = np.asarray(counts[name].read(part).sum(axis=1)).ravel()
    return found
