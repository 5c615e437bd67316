"""One way to run any training: how it is set up, what is watched and kept of it, and how it ends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import pandas as pd
from torch import Tensor

from cellprior._talk import without_trainer_talk
from cellprior.model.learning._finite import DivergedError, FiniteLoss, copies, not_finite, put_back
from cellprior.model.learning._shown import hush_early_stopping, shown, told_end

FEW_STEPS = 1_000
MANY_PARAMETERS = 2_000  # for each cell
History = dict[str, pd.DataFrame]


class KeepBest(pl.Callback):
    """Ends a training with the tensors of the epoch that was best on held-out cells.

    They stay in memory; scvi-tools' :class:`~scvi.train.SaveCheckpoint` writes the whole model to disk at each epoch.
    ``monitor`` is the logged number that decides, ``mode`` whether the lowest is best or the highest; of equals, the
    epoch in which ``loss`` is lowest, the first by default.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"] = "min", loss: str | None = None) -> None:
        self.monitor, self.mode, self.loss = monitor, mode, loss
        self.reached = (math.inf, math.inf)
        self.epoch: int | None = None
        self.tensors: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the tensors if the epoch is the best so far."""
        if trainer.sanity_checking:
            return
        found = trainer.callback_metrics
        value = float(found[self.monitor])
        reached = (-value if self.mode == "max" else value, float(found[self.loss]) if self.loss else 0.0)
        if all(map(math.isfinite, reached)) and reached < self.reached:
            self.reached, self.epoch = reached, trainer.current_epoch + 1
            self.tensors.update(copies(pl_module.module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Back to the best epoch."""
        put_back(pl_module.module, self.tensors)


def fit(
    model: Any,
    plan: pl.LightningModule,
    cells: Any,
    *,
    max_epochs: int,
    accelerator: str,
    devices: int | list[int] | str,
    split: Mapping[str, Any],
    best: KeepBest | None = None,
    join: Callable[[History, History], History] | None = None,
    early_stopping_monitor: str | None = None,
    **trainer_kwargs: Any,
) -> History:
    """Train a model's module, and give the history of this run alone.

    However the run ends, ``history_`` of the model has that of the runs before as well, and the module is in eval
    mode. Where it ends early, after an epoch at least, the weights are trained ones. ``cells`` are loaders of
    minibatches, with ``n_val``; ``split`` says which cells are held out, by the name of the training, as ``split_``
    of the model keeps it; ``best`` keeps the best epoch, and says what early stopping watches, by default
    ``validation_loss``; ``join`` makes one history of that before and that of this run. What else
    :class:`~scvi.train.Trainer` takes goes there: gradients are clipped at norm 2 unless ``gradient_clip_val`` says
    otherwise, ``enable_progress_bar=False`` draws no bar, ``simple_progress_bar=False`` Lightning's, a step at a
    time. Warns if a loss ends no better than its floor. Raises ValueError if early stopping watches held-out cells,
    and there are none; DivergedError if a loss is not finite. The model has the last weights with a finite loss.
    """
    monitor = early_stopping_monitor or (best.monitor if best else "validation_loss")
    if trainer_kwargs.get("early_stopping") and not cells.n_val and "validation" in monitor:
        msg = (
            f"early_stopping=True watches {monitor} of held-out cells, and there are none: lower train_size."
        )
        raise ValueError(msg)
    # our samplers know whose cells are whose; of an epoch with fewer than 10 steps, Lightning warns that none is logged
    defaults: dict[str, Any] = {
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "gradient_clip_val": 2.0,
        "early_stopping_monitor": monitor,
        "early_stopping_mode": best.mode if best else "min",
    }
    if cells.n_val:
        defaults["check_val_every_n_epoch"] = 1
    progress = trainer_kwargs.pop("enable_progress_bar", True)
    lightnings = progress and not trainer_kwargs.get("simple_progress_bar", True)
    defaults["enable_progress_bar"] = lightnings
    with without_trainer_talk():
        runner = model._train_runner_cls(
            model,
            training_plan=plan,
            data_splitter=cells,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            **{**defaults, **trainer_kwargs},
        )
    hush_early_stopping(runner.trainer)
    guard = FiniteLoss(best.tensors if best else {})
    # in front of those that save, or end the training on NaN themselves
    runner.trainer.callbacks[:0] = [guard, *([best] if best else [])]
    model.module.train()  # loaded weights are in eval mode, and Lightning leaves them there
    model.split_ = {**model.split_, **split}
    found, was_trained = model.history_, model.is_trained_
    model.is_trained_ = False  # of a trained model, scvi-tools keeps no new columns of the history
    try:
        with (
            without_trainer_talk(),
            shown(
                model, plan, cells, max_epochs=max_epochs, progress=progress and not lightnings
            ) as callbacks,
        ):
            runner.trainer.callbacks += callbacks
            runner()
        if (name := not_finite(plan.module)) is not None:  # type: ignore[arg-type]
            raise guard.error(runner.trainer, plan, f"The weights {name} are not finite")
    except BaseException as error:
        if isinstance(error, DivergedError) or not_finite(plan.module) is not None:  # type: ignore[arg-type]
            guard.restore(plan)
        model.is_trained_ = guard.n_epochs > 0
        raise
    finally:
        model.module.eval()
        model.is_trained_ = model.is_trained_ or was_trained
        after = (model.history_ or {}) if model.history_ is not found else {}
        model.history_ = (join or continued)(found or {}, after)
    told_end(after, runner.trainer, best=best.epoch if best else None)
    n_parameters = sum(p.numel() for p in model.module.parameters())
    warn_above_floor(
        after, n_parameters=n_parameters, n_cells=cells.n_train, n_steps=runner.trainer.global_step
    )
    return after


def continued(before: History, after: History) -> History:
    """History of two runs: columns of both are joined, epochs counted on."""
    joined = dict(before)
    for name, values in after.items():
        if name in before:
            values = pd.concat([before[name], values], ignore_index=True).rename_axis(values.index.name)
        joined[name] = values
    return joined


def losses_with_floors(history: Mapping[str, pd.DataFrame], stage: str) -> dict[str, dict[str, pd.Series]]:
    """Names of the losses of a stage that have floors, and the columns of these by the predictor's name."""
    found: dict[str, dict[str, pd.Series]] = {}
    for column, values in history.items():
        name, is_floor, predictor = column.removeprefix(f"{stage}_").partition("_floor_")
        if is_floor and column.startswith(f"{stage}_"):
            found.setdefault(name, {})[predictor.replace("_", " ")] = values.iloc[:, 0].astype(float)
    return found


def _advice(n_parameters: int, n_cells: int, n_steps: int) -> str:
    """What to change of a training that has not learned what is known without it."""
    found = []
    if n_steps < FEW_STEPS:
        found.append(f"It took {n_steps:,} steps: raise max_epochs, or lower batch_size.")
    if n_parameters > MANY_PARAMETERS * n_cells:
        found.append(
            f'It has {n_parameters:,} parameters for {n_cells:,} cells: size="small", or a smaller n_hidden and '
            "n_layers, when the model is made; or begin with pretrained weights, from_pretrained."
        )
    return " ".join([*found, "Else try another lr in plan_kwargs, or look at the data."])


def warn_above_floor(
    history: Mapping[str, pd.DataFrame], *, n_parameters: int, n_cells: int, n_steps: int
) -> None:
    """Say so if a loss ended no better than a floor, on held-out cells, or on the training cells if none were.

    And what to change: too few steps or too large a network for the cells, whichever it was.
    """
    stage = "validation" if "validation_loss" in history else "train"
    for name, floors in losses_with_floors(history, stage).items():
        reached = float(history[f"{stage}_{name}"].iloc[-1, 0])
        sign = -1 if name.endswith("accuracy") else 1
        ahead = {
            what: floor.iloc[-1] for what, floor in floors.items() if sign * (reached - floor.iloc[-1]) >= 0
        }
        if ahead:
            cells = "held-out" if stage == "validation" else "training"
            msg = (
                f"After training, {name} on {cells} cells is {reached:.4g}, no better than what is known without "
                f"looking at cells: {', '.join(f'{what} {value:.4g}' for what, value in ahead.items())}. "
                f"{_advice(n_parameters, n_cells, n_steps)}"
            )
            warnings.warn(msg, UserWarning, stacklevel=5)  # of who called the model's method
