"""Plots."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cellprior.evaluate import Report
    from cellprior.genes import GeneMatch
    from cellprior.model._base import PretrainedModel

__all__ = ["gene_match", "perturbation", "report", "training"]


def __dir__() -> list[str]:
    return list(__all__)


# of what is evaluated, and of baselines and controls in the order in which they come
EVALUATED = (("C1", "D"), ("C3", "D"), ("C2", "D"), ("C8", "D"))
COMPARED = (("C0", "o"), ("C9", "s"), ("C4", "^"), ("C5", "v"), ("0.2", "P"), ("C6", "<"), ("C7", ">"))


def gene_match(match: GeneMatch, *, n_lost: int = 5, ax: Axes | None = None) -> Axes:
    """Draw how the genes of the data were found, how many of the counts are theirs, and which ones were lost.

    Parameters
    ----------
    match
        Of a model, ``model.gene_match``, or of :func:`cellprior.genes.match`.
    n_lost
        Lost genes that are named, those with most counts first.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The axes: for each route, and for what was not found, the share of the data's columns, and of its counts if they
    are known.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    names = {**{route: route.replace("_", " ") for route in match.routes}, "": "not found"}
    kinds = {"columns": match.is_gene.astype(float)}
    if match.counts_share is not None and match.gene_counts is not None:
        kinds["counts"] = match.gene_counts * match.is_gene
    height = 0.8 / len(kinds)
    for i, (kind, weight) in enumerate(kinds.items()):
        share = [float(weight[match.route == route].sum() / weight.sum()) for route in names]
        place = np.arange(len(names)) + (i - (len(kinds) - 1) / 2) * height
        bars = ax.barh(place, share, height, color=f"C{i}", label=f"share of the {kind}")
        ax.bar_label(bars, [f"{value:.1%}" for value in share], padding=3, fontsize=8)
    ax.set_yticks(range(len(names)), names.values())
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.15), title=f"{match.n_matched:,} of {len(match.vocabulary):,} genes of the vocabulary")
    ax.set_xticks(np.linspace(0, 1, 6))
    if lost := [str(name) for name in match.lost_genes(n_lost)["name"]]:
        n_all = int(((match.index < 0) & match.is_gene).sum())
        most = "lost, most counts first" if "counts" in kinds else "lost"
        text = f"{most}: {', '.join(lost)}{', ...' if n_all > n_lost else ''}"
        ax.set_xlabel(textwrap.fill(text, 60, break_on_hyphens=False))
    n_lines = ax.get_xlabel().count("\n")
    ax.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22 - 0.06 * n_lines))
    return ax


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
    from matplotlib.ticker import MaxNLocator

    from cellprior.model.learning._fit import losses_with_floors

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
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_ylabel(f"{loss.replace('_', ' ')}{'' if loss.endswith(('accuracy', 'loss')) else ' loss'}")
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return ax


def perturbation(
    shifts: pd.DataFrame, *, of: str = "cell", n_genes: int = 30, ax: Axes | None = None
) -> Axes:
    """Draw how far cells move when genes are perturbed in silico, beside how far they move for random genes.

    Parameters
    ----------
    shifts
        Of :meth:`cellprior.model.Geneformer.perturb`.
    of
        What has moved: ``"cell"``, or a gene.
    n_genes
        Perturbations that are drawn at most: those that are furthest above or below random genes of equal expression.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The axes: means over cells with 95 % intervals, the largest difference to random genes of equal expression on top.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    import matplotlib.pyplot as plt

    rows = shifts[shifts["of"] == of]
    if rows.empty:
        msg = f"of={of!r} has no rows; there are {', '.join(map(repr, shifts['of'].unique())) or 'none at all'}."
        raise ValueError(msg)
    kinds = {
        "shift": ("the genes", "C3"),
        "expression_control": ("random genes of equal expression", "C0"),
        "count_control": ("random genes", "0.6"),
    }
    by_genes = rows.groupby("genes", sort=False)[list(kinds)]
    mean, error = by_genes.mean(), 1.96 * by_genes.sem().fillna(0.0)
    above = (mean["shift"] - mean["expression_control"].fillna(0.0)).sort_values(key=abs, ascending=False)
    names = list(above.head(n_genes).sort_values().index)
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 1.2 + 0.3 * len(names)), layout="constrained")
    for i, (kind, (label, colour)) in enumerate(kinds.items()):
        place = [n + 0.15 * (1 - i) for n in range(len(names))]
        ends = error.loc[names, kind]
        ax.errorbar(
            mean.loc[names, kind],
            place,
            xerr=ends,
            fmt="o",
            color=colour,
            capsize=2,
            label=label,
            markersize=4,
        )
    n_cells = rows.groupby("genes")["cell"].nunique()
    ax.set_yticks(range(len(names)), [f"{name} ({n_cells[name]:,} cells)" for name in names], fontsize=8)
    ax.set(
        xlabel=f"shift of {'the cell' if of == 'cell' else of}, 1 - cosine",
        title=", ".join(rows["how"].unique()),
    )
    ax.grid(axis="x", alpha=0.3)
    ax.legend(
        frameon=False,
        fontsize=8,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.6 / (1.2 + 0.3 * len(names))),
    )
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

    styles = _styles(report)
    figure = plt.figure(figsize=figsize, layout="constrained")
    axes = figure.subplot_mosaic("AABBCC;DDDEEE")
    headline = report.zero_shot["split"].iloc[0]
    for name, table, reader in (
        ("A", report.zero_shot, "nearest neighbours"),
        ("B", report.linear_probe, "linear probe"),
    ):
        rows = table[(table["split"] == headline) & (table["metric"] == "macro_f1")]
        _ranked(axes[name], rows[rows["reader"].isin([reader, ""])], styles)
        axes[name].set(title=f"{reader}, {headline}", xlabel="macro-F1", xlim=(-0.02, 1.02))
    _few_labels(axes["C"], report.few_shot, headline, styles)
    _by_label(axes["D"], report.per_label, styles)
    _structure(axes["E"], report.zero_shot[report.zero_shot["split"] == "all cells"], styles)
    found = [ax.get_legend_handles_labels() for ax in axes.values()]
    handles = {label: line for pair in found for line, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    width = int(11 * figsize[0])
    lines = [line for verdict in report.verdicts for line in verdict.text.split("\n")]
    text = "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines)
    figure.suptitle(text, fontsize=11, x=0.01, ha="left")
    return figure


def _styles(report: Report) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, the same in all panels."""
    kinds = report.linear_probe.drop_duplicates("method").set_index("method")["kind"]
    evaluated, compared = cycle(EVALUATED), cycle(COMPARED)
    styles = {}
    for method, kind in kinds.items():
        pairs = {"embedding": evaluated, "baseline": compared}
        colour, marker = next(pairs[kind]) if kind in pairs else ("0.7", "x")
        styles[method] = {"color": colour, "marker": marker}
    return styles


def _ranked(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, dict[str, Any]]) -> None:
    """Scores with intervals, the best on top."""
    rows = rows.sort_values("value")
    for place, row in enumerate(rows.itertuples()):
        ends = [[row.value - row.low], [row.high - row.value]]
        ax.errorbar(row.value, place, xerr=ends, capsize=3, **styles[row.method])
    names = [textwrap.fill(method, 36, break_on_hyphens=False) for method in rows["method"]]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    for label, kind in zip(ax.get_yticklabels(), rows["kind"], strict=True):
        label.set_fontweight("bold" if kind == "embedding" else "normal")
    best = rows.loc[rows["versus"] != "", "versus"].iloc[0]
    ax.axvline(rows.loc[rows["method"] == best, "value"].iloc[0], color="0.5", linestyle="--", linewidth=1)
    ax.grid(axis="x", alpha=0.3)


def _few_labels(ax: Axes, table: pd.DataFrame, headline: str, styles: Mapping[str, dict[str, Any]]) -> None:
    ax.set(title="few labelled cells, linear probe", xlabel="labelled cells per label", ylabel="macro-F1")
    if table.empty:
        ax.text(0.5, 0.5, "not asked", ha="center", transform=ax.transAxes)
        return
    rows = table[(table["split"] == headline) & (table["metric"] == "macro_f1")]
    rows = rows[rows["reader"] == "linear probe"]
    methods = list(rows["method"].unique())
    for i, (method, points) in enumerate(rows.groupby("method", sort=False)):
        aside = 1.03 ** (i - len(methods) / 2)  # lest the intervals cover each other
        ends = (points[["value", "high"]].to_numpy() - points[["low", "value"]].to_numpy()).T
        ax.errorbar(points["n_per_class"] * aside, points["value"], ends, capsize=2, **styles[method])
    sizes = sorted(rows["n_per_class"].unique())
    ax.set(xscale="log", ylim=(-0.03, 1.03))
    ax.set_xticks(sizes, [f"{n:g}" for n in sizes])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def _by_label(ax: Axes, table: pd.DataFrame, styles: Mapping[str, dict[str, Any]]) -> None:
    """F1 of each label by its neighbours, and of the logistic regression on genes."""
    n_cells = [f"{label} ({n:,})" for label, n in zip(table["label"], table["cells"], strict=True)]
    for column in table.columns[2:]:
        method = column.removesuffix(", nearest neighbours")
        if method in styles:
            ax.plot(range(len(table)), table[column], linestyle="", label=method, **styles[method])
    ax.set_xticks(range(len(table)), n_cells, rotation=45, ha="right", fontsize=8)
    ax.set(title="each label, nearest neighbours (cells)", ylabel="F1", ylim=(-0.03, 1.03))
    ax.grid(axis="y", alpha=0.3)


def _structure(ax: Axes, rows: pd.DataFrame, styles: Mapping[str, dict[str, Any]]) -> None:
    """Scores of all cells; those that the labels have picked are left out."""
    rows = rows[~rows["metric"].str.endswith("picked_by_labels") & rows["value"].notna()]
    metrics = list(rows["metric"].unique())
    for method, points in rows.groupby("method", sort=False):
        place = [metrics.index(metric) for metric in points["metric"]]
        ax.plot(place, points["value"], linestyle="", label=method, **styles[method])
    notes = {"batch_leak": "\n(0 is best)", "ilisi": "\n(mixing)"}
    names = [metric + notes.get(metric, "") for metric in metrics]
    ax.set_xticks(range(len(metrics)), names, rotation=45, ha="right", fontsize=8)
    ax.set(title="clusters and neighbourhoods, all cells")
    ax.grid(axis="y", alpha=0.3)
