"""The whole evaluation in one object: tables, a verdict in words, Markdown and HTML."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Unpack

import numpy as np
import pandas as pd
from anndata import AnnData

from cellprior.evaluate._ask import KNN, LINEAR, PROBES, ZERO_SHOT, Answers, ask, tabulate
from cellprior.evaluate._metrics import f1, tally
from cellprior.evaluate._null import N_PERMUTATIONS
from cellprior.evaluate._protocols import N_PER_CLASS, Options, protocol, refuse_none
from cellprior.evaluate._structure import ALL_CELLS, structure
from cellprior.evaluate._task import CHOSEN, MAJORITY, Embeddings, Task, make_task
from cellprior.evaluate._verdict import METRIC, WITHIN_TYPES, Verdict, judge

VERSIONS = ("cellprior", "numpy", "scanpy", "scikit-learn", "scvi-tools", "torch")


@dataclass(frozen=True)
class Report:
    """What :func:`report` found; draw it with :func:`cellprior.pl.report`."""

    verdicts: list[Verdict]
    """One per embedding."""
    zero_shot: pd.DataFrame
    """See :func:`zero_shot`."""
    linear_probe: pd.DataFrame
    """See :func:`linear_probe`."""
    few_shot: pd.DataFrame
    """See :func:`few_shot`."""
    per_label: pd.DataFrame
    """F1 by nearest neighbours and by linear probe for each label, the largest label first."""
    notes: list[str]
    """What the reader should know of the data."""
    provenance: dict[str, Any]
    """Weights and their hashes, genes matched, cells, splits, versions, and how long it took."""

    @property
    def verdict(self) -> str:
        """Whether to use the embeddings, in words."""
        return "\n\n".join(str(verdict) for verdict in self.verdicts)

    def to_markdown(self) -> str:
        """Verdict, tables and provenance; the tables in short, as the frames have everything."""
        parts = [f"# Does pretraining help here?\n\n{self.verdict}"]
        parts += [f"## {title}\n\n{_markdown(table)}" for title, table in self.tables().items()]
        if self.notes:
            parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in self.notes))
        parts.append("## Provenance\n\n" + "\n".join(f"- {k}: {v}" for k, v in self.provenance.items()))
        return "\n\n".join(parts) + "\n"

    def _repr_html_(self) -> str:
        verdict = "".join(
            f"<p><b>{html.escape(first)}</b><br>{'<br>'.join(html.escape(line) for line in lines)}</p>"
            for first, *lines in (verdict.text.split("\n") for verdict in self.verdicts)
        )
        tables = "".join(
            f"<h4>{html.escape(title)}</h4>{table.to_html(index=False, border=0)}"
            for title, table in self.tables().items()
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        known = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in self.provenance.items())
        return f"{verdict}{tables}<ul>{notes}</ul><details><summary>Provenance</summary><ul>{known}</ul></details>"

    def tables(self) -> dict[str, pd.DataFrame]:
        """What is shown, as text by title: a score with its interval in each cell, the best baseline's difference."""
        found = {}
        for split in self.zero_shot.loc[self.zero_shot["reader"] == KNN, "split"].unique():
            found[f"Nearest neighbours, {split}"] = _wide(self.zero_shot, split, KNN)
            found[f"Linear probe, {split}"] = _wide(self.linear_probe, split, LINEAR)
        found["Clusters and neighbourhoods, all cells"] = _structure_wide(self.zero_shot)
        if not self.few_shot.empty:
            found["Few labelled cells, linear probe, macro-F1"] = _few_wide(self.few_shot)
        found["F1 by label"] = self.per_label.round(2).astype(str)
        return found


@protocol
def report(
    adata: AnnData,
    embeddings: Embeddings,
    labels_key: str,
    batch_key: str | None = None,
    *,
    seeds: int | None = None,
    n_per_class: Sequence[int] = N_PER_CLASS,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> Report:
    """Whether embeddings help on some data: all of zero shot, linear probe and few shot, with a verdict in words.

    Baselines that need no labels (components, variable genes, scVI) are fitted once on all cells, as in an analysis of
    your own. What learns labels learns from training cells, and what can be chosen (the baseline, its size, genes and
    distance, the number of neighbours, penalties) is chosen within them. Every difference is paired and has an
    interval, and there is no verdict if permuted labels are read as well as the labels. See :class:`Verdict` for what
    it says when.

    <PARAMETERS>
    n_per_class
        Labelled cells of each type in the few-shot curve.

    Returns
    -------
    Tables, a verdict, and where the numbers come from; it shows itself in a notebook.

    <RAISES>

    Examples
    --------
    >>> report = cp.evaluate.report(adata, "cellplm-starter", "cell_type", layer="counts")
    >>> print(report.verdict)
    >>> cp.pl.report(report)
    """
    refuse_none(n_per_class)
    start = time.perf_counter()
    task = make_task(adata, embeddings, labels_key=labels_key, batch_key=batch_key, seeds=seeds, **options)
    headline = next(iter(task.splits))
    answers = {
        kind: ask(
            task,
            kind,
            (*ZERO_SHOT, *PROBES),
            n_per_class=n_per_class,
            signal=kind == headline,
            progress=progress,
        )
        for kind in task.splits
    }
    scores = {kind: found.scores(task.codes) for kind, found in answers.items()}

    def table(readers: Sequence[str], *, few: bool = False) -> pd.DataFrame:
        return pd.concat(
            [
                tabulate(
                    task,
                    {a: of for a, of in scores[kind].items() if (a.n_per_class is not None) == few},
                    answers[kind],
                    readers,
                )
                for kind in task.splits
            ],
            ignore_index=True,
        )

    evaluated = [method.name for method in task.methods if method.kind == "embedding"]
    all_cells = structure(task, progress=progress)
    zero_shot = pd.concat([table(ZERO_SHOT), all_cells], ignore_index=True)
    within = all_cells[all_cells["metric"] == WITHIN_TYPES].set_index("method")["value"].to_dict()
    verdicts = [judge(task, answers[headline], scores[headline], name, within) for name in evaluated]
    return Report(
        verdicts,
        zero_shot,
        table(PROBES),
        table(PROBES, few=True) if len(n_per_class) else pd.DataFrame(),
        _per_label(task, answers[headline]),
        task.notes,
        {
            **task.provenance,
            "cells": task.n_obs,
            "labels": len(task.labels),
            "headline": f"{headline}, {len(task.splits[headline])}",
            "signal": f"p = {answers[headline].p_value:.2f}, {N_PERMUTATIONS} permutations of the labels",
            "seconds": round(time.perf_counter() - start),
            "versions": ", ".join(f"{name} {version(name)}" for name in VERSIONS),
        },
    )


def _per_label(task: Task, answers: Answers) -> pd.DataFrame:
    """F1 of each label, on average over the splits that ask about it; embeddings and baselines, no controls."""
    table = pd.DataFrame({"label": task.labels, "cells": np.bincount(task.codes[task.codes >= 0])})
    for asked, said in answers.said.items():
        shown = asked.kind != "control" and asked.n_per_class is None and asked.reader in (KNN, LINEAR, "")
        if shown and asked.method not in (MAJORITY, CHOSEN):
            by_split = [
                np.where(there > 0, f1(hit, there, given), np.nan)
                for split, codes in zip(answers.splits, said, strict=True)
                for hit, there, given in [tally(task.codes[split.test], codes, len(task.labels))]
            ]
            name = f"{asked.method}, {asked.reader}" if asked.reader else asked.method
            table[name] = pd.DataFrame(by_split).mean().to_numpy()
    return table.sort_values("cells", ascending=False, ignore_index=True)


def _with_interval(row: pd.Series, prefix: str = "", sign: str = "") -> str:
    value, low, high = (row[name] for name in _INTERVAL[prefix])
    if pd.isna(value):
        return "-"
    shown = f"{value:{sign}.3f}"
    return shown if pd.isna(low) else f"{shown} [{low:{sign}.3f}, {high:{sign}.3f}]"


_INTERVAL = {
    "": ("value", "low", "high"),
    "difference": ("difference", "difference_low", "difference_high"),
}


def _wide(table: pd.DataFrame, split: str, reader: str) -> pd.DataFrame:
    """A row per method, the best first, a column per score."""
    part = table[(table["split"] == split) & table["reader"].isin([reader, ""])]
    by_metric = {metric: rows.set_index("method") for metric, rows in part.groupby("metric", sort=False)}
    first = by_metric[METRIC].sort_values("value", ascending=False)
    shown = pd.DataFrame({"method": first.index, "kind": first["kind"].to_numpy()})
    for metric, rows in by_metric.items():
        shown[metric] = rows.loc[first.index].apply(_with_interval, axis=1).to_numpy()
    against = first["versus"].replace("", np.nan).dropna().iloc[0]
    shown[f"{METRIC}, difference to {against}"] = first.apply(
        _with_interval, axis=1, prefix="difference", sign="+"
    ).to_numpy()
    shown["seconds"] = first["seconds"].map("{:.1f}".format).replace("nan", "-").to_numpy()
    return shown


def _structure_wide(table: pd.DataFrame) -> pd.DataFrame:
    part = table[table["split"] == ALL_CELLS]
    text = part.apply(_with_interval, axis=1)
    shown = part.assign(text=text).pivot(index="method", columns="metric", values="text")
    order = part.drop_duplicates("method")
    shown = shown.loc[order["method"], part["metric"].unique()]
    shown.insert(0, "kind", order["kind"].to_numpy())
    return shown.rename_axis(columns=None).reset_index()


def _few_wide(table: pd.DataFrame) -> pd.DataFrame:
    part = table[(table["split"] == table["split"].iloc[0]) & (table["reader"] == LINEAR)]
    part = part[part["metric"] == METRIC]
    text = part.apply(_with_interval, axis=1)
    shown = part.assign(text=text).pivot(index="method", columns="n_per_class", values="text")
    shown = shown.loc[part["method"].unique()].rename(columns=lambda n: f"{n} per label")
    return shown.rename_axis(columns=None).reset_index()


def _markdown(table: pd.DataFrame) -> str:
    lines = [
        table.columns.astype(str).tolist(),
        ["---"] * table.shape[1],
        *table.astype(str).to_numpy().tolist(),
    ]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
