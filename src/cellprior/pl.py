"""Plots."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cellprior.model._base import PretrainedModel

__all__ = ["training"]


def training(model: PretrainedModel, *, loss: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a loss of a training run beside its floors: what predictors that know no biology reach on the same cells.

    Parameters
    ----------
    model
        Trained with ``train()``.
    loss
        Name of a loss that has floors; by default the first.
    ax
        Axes to draw on; new ones by default.

    Raises
    ------
    ValueError
        If the model has not been trained, or has no such loss.
    """
    import matplotlib.pyplot as plt

    from cellprior.model._training import losses_with_floors

    history = model.history or {}
    floors = {stage: losses_with_floors(history, stage) for stage in ("train", "validation")}
    if not floors["train"]:
        msg = "The model has no history: draw it after train()."
        raise ValueError(msg)
    loss = next(iter(floors["train"])) if loss is None else loss
    if loss not in floors["train"]:
        msg = f"loss={loss!r} has no floor; those that have are {', '.join(floors['train'])}."
        raise ValueError(msg)
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    cells = {"train": ("training cells", "C0"), "validation": ("held-out cells", "C1")}
    for stage, (label, colour) in cells.items():
        if loss not in floors[stage]:
            continue
        reached = history[f"{stage}_{loss}"].iloc[:, 0].astype(float)
        ax.plot(range(1, len(reached) + 1), reached, color=colour, label=label)
        for (predictor, floor), style in zip(
            floors[stage][loss].items(), cycle((":", "--", "-.")), strict=False
        ):
            epochs = range(1, len(floor) + 1)
            ax.plot(epochs, floor, color=colour, linestyle=style, label=f"{label}, floor: {predictor}")
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{loss.replace('_', ' ')}{'' if loss.endswith('accuracy') else ' loss'}")
    ax.legend(frameon=False)
    return ax
