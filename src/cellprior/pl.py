"""Plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cellprior.model._base import PretrainedModel

__all__ = ["training"]


def training(model: PretrainedModel, *, ax: Axes | None = None) -> Axes:
    """Draw the reconstruction loss of a training run beside its floor, that of a predictor that knows gene means only.

    Parameters
    ----------
    model
        Trained with ``train()``.
    ax
        Axes to draw on; new ones by default.

    Raises
    ------
    ValueError
        If the model has not been trained.
    """
    import matplotlib.pyplot as plt

    history = model.history
    if not history or "train_reconstruction" not in history:
        msg = "The model has no history: draw it after train()."
        raise ValueError(msg)
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for stage, label, colour in (("train", "training cells", "C0"), ("validation", "held-out cells", "C1")):
        if f"{stage}_reconstruction" not in history:
            continue
        loss, floor = (
            history[f"{stage}_{name}"].iloc[:, 0].astype(float) for name in ("reconstruction", "floor")
        )
        ax.plot(range(1, len(loss) + 1), loss, color=colour, label=label)
        ax.plot(
            range(1, len(floor) + 1), floor, color=colour, linestyle=":", label=f"{label}, floor: gene means"
        )
    ax.set_xlabel("epoch")
    ax.set_ylabel("reconstruction loss per cell")
    ax.legend(frameon=False)
    return ax
