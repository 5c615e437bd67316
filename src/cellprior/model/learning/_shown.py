"""What a user sees of a training: a line before it, a bar of progress, and a line after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from lightning.pytorch.utilities import rank_zero_only
from scvi.train._callbacks import LoudEarlyStopping
from torch import Tensor

from cellprior._talk import bar, tell


class Steps(pl.Callback):
    """Tells a bar how many cells were learned from, and what the losses are.

    Parameters
    ----------
    drawn
        The bar; several processes cannot share it, and only the first tells it.
    """

    def __init__(self, drawn: Any) -> None:
        self.drawn = drawn

    def __getstate__(self) -> dict[str, Any]:
        return {"drawn": None}  # of another process

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which epoch it is."""
        if self.drawn is not None and trainer.is_global_zero:
            self.drawn.set_description(f"epoch {trainer.current_epoch + 1}", refresh=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the cells."""
        if self.drawn is not None and trainer.is_global_zero:
            first = next(value for value in batch.values() if isinstance(value, Tensor))
            self.drawn.update(len(first) * trainer.world_size)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the loss of the epoch: of held-out cells, if there are any. ``history`` has all of them."""
        if self.drawn is not None and trainer.is_global_zero:
            losses = trainer.progress_bar_metrics
            name = next(
                (name for name in losses if name.endswith("validation_loss")), next(iter(losses), None)
            )
            if name is not None:
                self.drawn.set_postfix({name: f"{float(losses[name]):.4g}"}, refresh=False)


@contextmanager
def shown(
    model: Any, plan: Any, cells: Any, *, max_epochs: int, progress: bool
) -> Iterator[list[pl.Callback]]:
    """Say what is about to be trained, and draw a bar, if ``progress``; gives the callbacks that move it.

    ``cells`` have ``n_train`` and ``n_val``; the parameters of the plan with a gradient are counted.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0  # of several processes
    if first:
        n_all = sum(p.numel() for p in model.module.parameters())
        trained = [p.numel() for p in plan.module.parameters() if p.requires_grad]
        share = "" if sum(trained) == n_all else f", of which {sum(trained):,} are trained"
        tell(
            f"{type(model).__name__}: {n_all:,} parameters{share}. {cells.n_train:,} cells to learn from, "
            f"{cells.n_val:,} held out. {_epochs(max_epochs)} at most."
        )
    total = cells.n_train * max_epochs if max_epochs > 0 else None
    drawing = progress and first
    with bar(total, "epoch 1", progress=None if drawing else False) as drawn:
        yield [Steps(drawn)] if drawing else []


def told_end(history: Mapping[str, pd.DataFrame], trainer: Any, *, best: int | None) -> None:
    """Say how a training ended; scvi-tools does not, of one that was stopped early.

    ``best`` is the epoch whose weights are kept; ``None`` for the last.
    """
    losses = [name for stage in ("validation", "train") for name in history if name.endswith(f"{stage}_loss")]
    loss = f" {losses[0]}: {float(history[losses[0]].iloc[-1, 0]):.4g}." if losses else ""
    n_epochs, n_most = trainer.current_epoch, trainer.max_epochs or 0
    how = f"Trained for {_epochs(n_epochs)}."
    if n_epochs < n_most:
        no_better = any(getattr(callback, "early_stopping_reason", None) for callback in trainer.callbacks)
        why = ", as it no longer got better" if no_better else ""
        how = f"Stopped after {n_epochs:,} of {n_most:,} epochs{why}."
    kept = "" if best is None else f" Kept: the weights of epoch {best}, the best on held-out cells."
    if trainer.is_global_zero:
        tell(f"{how}{loss}{kept}")


def _epochs(n: int) -> str:
    return "1 epoch" if n == 1 else f"{n:,} epochs"


def hush_early_stopping(trainer: Any) -> None:
    """Keep scvi-tools from printing why a training was stopped; :func:`told_end` says it."""
    for callback in trainer.callbacks:
        if isinstance(callback, LoudEarlyStopping):
            callback.teardown = lambda *_, **__: None  # an attribute of this callback alone
