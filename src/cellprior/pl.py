"""Plots."""

from __future__ import annotations

import textwrap
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cellprior.evaluate import Report
    from cellprior.model._base import PretrainedModel

__all__ = ["report", "training"]

COLOURS = {"embedding": "C1", "baseline": "C0", "control": "0.7"}
MARKERS = {"embedding": "D", "baseline": "o", "control": "x"}


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


def report(report: Report, *, figsize: tuple[float, float] = (15.0, 10.0)) -> Figure:
    """Draw an evaluation: the verdict, held-out scores of all methods, few labels, each label, and structure.

    Points are scores of the headline splits and bars their 95 % intervals. The dashed line is the best baseline, with
    which differences are compared; intervals may overlap where the paired difference is certain.

    Parameters
    ----------
    report
        Of :func:`cellprior.evaluate.report`.
    figsize
        Width and height in inches.
    """
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=figsize, layout="constrained")
    axes = figure.subplot_mosaic("AABBCC;DDDEEE")
    headline = report.zero_shot["split"].iloc[0]
    for name, table, reader in (
        ("A", report.zero_shot, "15-NN"),
        ("B", report.linear_probe, "linear probe"),
    ):
        rows = table[(table["split"] == headline) & (table["metric"] == "macro_f1")]
        _ranked(axes[name], rows[rows["reader"].isin([reader, ""])])
        axes[name].set(title=f"{reader}, {headline}", xlabel="macro-F1", xlim=(0, 1))
    _few_labels(axes["C"], report.few_shot, headline)
    _by_label(axes["D"], report.per_label, [verdict.embedding for verdict in report.verdicts])
    _structure(axes["E"], report.zero_shot[report.zero_shot["split"] == "all cells"])
    text = "\n".join(textwrap.fill(str(verdict), 175) for verdict in report.verdicts)
    figure.suptitle(text, fontsize=11, x=0.01, ha="left")
    return figure


def _ranked(ax: Axes, rows: pd.DataFrame) -> None:
    """Scores with intervals, the best on top."""
    rows = rows.sort_values("value")
    for place, row in enumerate(rows.itertuples()):
        ends = [[row.value - row.low], [row.high - row.value]]
        ax.errorbar(row.value, place, xerr=ends, color=COLOURS[row.kind], marker=MARKERS[row.kind], capsize=3)
    ax.set_yticks(range(len(rows)), rows["method"])
    for label, kind in zip(ax.get_yticklabels(), rows["kind"], strict=True):
        label.set(color=COLOURS[kind] if kind == "embedding" else "black", wrap=True)
    best = rows.loc[rows["versus"] == "", "value"].max()
    ax.axvline(best, color="C0", linestyle="--", linewidth=1)
    ax.grid(axis="x", alpha=0.3)


def _few_labels(ax: Axes, table: pd.DataFrame, headline: str) -> None:
    ax.set(title="few labelled cells, linear probe", xlabel="labelled cells per label", ylabel="macro-F1")
    if table.empty:
        ax.text(0.5, 0.5, "not asked", ha="center", transform=ax.transAxes)
        return
    rows = table[(table["split"] == headline) & (table["metric"] == "macro_f1")]
    rows = rows[rows["reader"] == "linear probe"]
    import numpy as np

    styles = cycle(("-", "--", "-.", ":"))
    for method, points in rows.groupby("method", sort=False):
        kind = points["kind"].iloc[0]
        ends = np.array([points["value"] - points["low"], points["high"] - points["value"]])
        style: dict[str, Any] = {"color": COLOURS[kind], "linestyle": next(styles)}
        ax.errorbar(
            points["n_per_class"],
            points["value"],
            ends,
            label=method,
            marker=MARKERS[kind],
            capsize=2,
            **style,
        )
    sizes = sorted(rows["n_per_class"].unique())
    ax.set(xscale="log", ylim=(0, 1))
    ax.set_xticks(sizes, [f"{n:g}" for n in sizes])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.3)


def _by_label(ax: Axes, table: pd.DataFrame, evaluated: list[str]) -> None:
    """F1 of each label: what is evaluated in colour, baselines in blue."""
    n_cells = [f"{label} ({n:,})" for label, n in zip(table["label"], table["cells"], strict=True)]
    shown = [c for c in table.columns[2:] if c.endswith(", 15-NN") or ", " not in c]
    colours = cycle(("C1", "C3", "C2", "C4"))
    markers = cycle("os^v<>")
    for column in shown:
        method = column.removesuffix(", 15-NN")
        is_evaluated = method in evaluated
        style: dict[str, Any] = {"marker": "D" if is_evaluated else next(markers), "linestyle": ""}
        style |= {"color": next(colours)} if is_evaluated else {"color": "C0", "markerfacecolor": "none"}
        ax.plot(range(len(table)), table[column], label=method, **style)
    ax.set_xticks(range(len(table)), n_cells, rotation=45, ha="right", fontsize=8)
    ax.set(title="each label, 15-NN (cells)", ylabel="F1", ylim=(-0.03, 1.03))
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    ax.grid(axis="y", alpha=0.3)


def _structure(ax: Axes, rows: pd.DataFrame) -> None:
    """Scores of all cells; those that the labels have picked are left out."""
    rows = rows[~rows["metric"].str.endswith("picked_by_labels") & rows["value"].notna()]
    metrics = list(rows["metric"].unique())
    markers = cycle("os^v<>")
    for method, points in rows.groupby("method", sort=False):
        kind = points["kind"].iloc[0]
        marker = next(markers) if kind == "baseline" else MARKERS[kind]
        place = [metrics.index(metric) for metric in points["metric"]]
        face: dict[str, Any] = {"markerfacecolor": "none"} if kind == "baseline" else {}
        ax.plot(place, points["value"], marker, color=COLOURS[kind], label=method, **face)
    names = [
        f"{m}\n(mixing)" if m in ("ilisi",) else f"{m}\n(0 is best)" if m == "batch_leak" else m
        for m in metrics
    ]
    ax.set_xticks(range(len(metrics)), names, rotation=45, ha="right", fontsize=8)
    ax.set(title="clusters and neighbourhoods, all cells")
    ax.legend(frameon=False, fontsize=8, ncols=2)
    ax.grid(axis="y", alpha=0.3)
