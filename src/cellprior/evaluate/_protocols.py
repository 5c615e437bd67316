"""How an embedding is put to the test: one function each, a tidy table out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypedDict, TypeVar, Unpack, cast, get_type_hints

import pandas as pd
from anndata import AnnData

from cellprior._docs import PARTS, described
from cellprior._talk import drawing
from cellprior.evaluate._ask import PROBES, ZERO_SHOT, ask, tabulate
from cellprior.evaluate._splits import HELD_OUT
from cellprior.evaluate._structure import structure
from cellprior.evaluate._task import Embeddings, Task, make_task

N_PER_CLASS = (5, 10, 20, 50)
Protocol = TypeVar("Protocol", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """What all protocols hand on to :func:`~cellprior.evaluate._task.make_task`, where the defaults stand."""

    layer: str | None
    test_size: float
    scvi_epochs: int | None
    max_cells: int
    embed_options: Mapping[str, Mapping[str, Any]] | None


SECTIONS = {
    "PARAMETERS": """\
Parameters
----------
adata
    Annotated data ``(cells, genes)`` with raw counts, in memory or backed; left as it is.
embeddings
    What is evaluated: keys of ``obsm``, names of weights, folders or official checkpoints, or arrays
    ``(cells, dimensions)`` by name.
labels_key
    Column of ``obs`` with cell types. Cells without one, or called something such as "unassigned" or "NA", and types
    of fewer than 10 cells are not asked about.
batch_key
    Column of ``obs`` with the batch or donor. Given, each is held out in turn, and that is the headline; random
    splits come second. For CellPLM's weights it also says which cells see each other.
layer
    Layer with raw counts; ``None`` for ``X``.
seeds
    Random splits: parts of the cells that are held out in turn. If more are wanted than there are parts, the cells
    are divided again. By default up to 2,000 cells are divided three times, which narrows the intervals. More cells,
    or those of batches that are held out, are divided once.
test_size
    Share of the cells in a part: 0.2 makes five, 0.4 or more two, as there are whole parts only.
scvi_epochs
    Train scVI once on all cells, for as many epochs, as one more baseline; ``None`` does not,
    as it takes far longer than all the others.
max_cells
    Of more cells, as many are drawn at random.
embed_options
    Arguments of ``get_latent_representation`` by name of weights, the same for the network with random weights:
    ``{"scbert-panglao": {"n_zero_genes": 500}}`` is an approximation that saves most of the time.
<progress>""",
    "COLUMNS": """\
``method``; ``kind``, an ``"embedding"`` that is evaluated or a ``"baseline"``; ``reader``, the classifier;
``metric``; ``split``, ``"held-out batches"`` or ``"random cells"``, and ``n_splits``; ``value`` and its 95 %
interval, ``low`` to ``high``; ``versus``, the baseline that was chosen within the training cells, and the paired
``difference`` to it with its interval, ``difference_low`` to ``difference_high``; ``seen``, what the embedding has
learned from, labels aside: ``"no cell"`` of yours, as far as weights say, or ``"training cells"`` (inductive),
``"all cells"`` (transductive), ``"these cells"`` in its pretraining, or ``"not known"``; and ``seconds`` that all
splits took.""",
    "RAISES": """\
Raises
------
TypeError
    If the data are no AnnData, but a MuData.
KeyError
    If a column, a layer or an embedding is missing.
ValueError
    If an embedding does not fit the data, or labels or batches cannot be held out.
NotCountsError
    If the data are not raw counts.
WeightsError
    If weights are not found, damaged, or of no known model.""",
}


def protocol(function: Protocol) -> Protocol:
    """Complete a function that takes ``**options``: its docstring and the signature that users see.

    The sections that the protocols share are put into the docstring. In the signature, those arguments of
    :func:`~cellprior.evaluate._task.make_task` that are `Options` stand in the place of ``**options``.
    """
    described(function, {**PARTS, **SECTIONS})
    signature = inspect.signature(function)

    @wraps(function)
    def asked(*args: Any, **kwargs: Any) -> Any:
        with drawing(kwargs.get("progress")):  # also of the embeddings that weights make on the way
            return function(*args, **kwargs)

    *own, _ = signature.parameters.values()
    of_task = inspect.signature(make_task).parameters
    shown = signature.replace(parameters=[*own, *(of_task[name] for name in Options.__annotations__)])
    complete: Any = asked
    complete.__signature__ = shown
    hints = get_type_hints(make_task)  # whose names the module of the function need not know
    complete.__annotations__ = {
        **{name: hint for name, hint in function.__annotations__.items() if name != "options"},
        **{name: hints[name] for name in Options.__annotations__},
    }
    return cast("Protocol", complete)


@protocol
def zero_shot(
    adata: AnnData,
    embeddings: Embeddings,
    *,
    labels_key: str,
    batch_key: str | None = None,
    seeds: int | None = None,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """What an embedding shows as it is, beside PCA, highly variable genes, scVI and the same network at random.

    Held-out cells are named by the nearest training cells; how many, and the distance, is chosen within the training
    cells, as are the components and genes of the PCA. Without a split, on all cells: agreement of Leiden
    clusters with the labels at resolution 1 (``ari``, ``nmi``), on average over a fixed grid (``ari_mean``,
    ``nmi_mean``), and at the resolution that the labels pick (``ari_picked_by_labels``, an upper bound and no result);
    ``silhouette``, ``clisi``; neighbours that are those of expression, within a batch and within its types (1 for all,
    0 for chance); with batches ``ilisi``, ``batch_leak``, ``scgraph``, and the shares of variance that types and
    batches explain beyond each other. Batch scores reward noise: read
    them beside the others only. There is no total.

    <PARAMETERS>

    Returns
    -------
    A tidy table:
    <COLUMNS>
    Rows of ``split`` ``"all cells"`` have no ``versus``; their interval is a jackknife of five times a fifth of the
    cells left out, or all but 1,000 [Shao and Wu, Ann. Stat. 17:1176, 1989], and ``reason`` says why a score is NaN.

    <RAISES>
    """
    task = make_task(adata, embeddings, labels_key=labels_key, batch_key=batch_key, seeds=seeds, **options)
    return pd.concat(
        [_classified(task, ZERO_SHOT, progress=progress), structure(task, progress=progress)],
        ignore_index=True,
    )


@protocol
def linear_probe(
    adata: AnnData,
    embeddings: Embeddings,
    *,
    labels_key: str,
    batch_key: str | None = None,
    seeds: int | None = None,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """How well labels can be read off an embedding, beside logistic regression on genes.

    Ridge or logistic regression on one global scale (which, and its penalty, is chosen within the training cells) and
    the nearest mean of a label. Beside them ridge on genes, and L1 logistic regression on log-normalised genes as in
    Boiarsky et al., bioRxiv 2023.10.19.563100, where it equals fine-tuned scBERT.

    <PARAMETERS>

    Returns
    -------
    A tidy table:
    <COLUMNS>

    <RAISES>
    """
    task = make_task(adata, embeddings, labels_key=labels_key, batch_key=batch_key, seeds=seeds, **options)
    return _classified(task, PROBES, progress=progress)


@protocol
def few_shot(
    adata: AnnData,
    embeddings: Embeddings,
    *,
    labels_key: str,
    n_per_class: Sequence[int] = N_PER_CLASS,
    batch_key: str | None = None,
    seeds: int = 10,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """How well labels can be read off an embedding when few cells of each are labelled.

    <PARAMETERS>
    n_per_class
        Labelled cells of each type; a type with fewer training cells gives all it has. Each seed is a draw, for each
        held-out batch if there are batches.

    Returns
    -------
    A tidy table with ``n_per_class``, and otherwise:
    <COLUMNS>

    <RAISES>
    """
    refuse_none(n_per_class, least=1)
    task = make_task(adata, embeddings, labels_key=labels_key, batch_key=batch_key, seeds=seeds, **options)
    if HELD_OUT in task.splits:
        once = task.splits[HELD_OUT]
        task.splits[HELD_OUT] = [replace(split, seed=seed) for seed in range(seeds) for split in once]
    return _classified(task, PROBES, n_per_class=n_per_class, progress=progress)


def refuse_none(n_per_class: Sequence[int], *, least: int = 0) -> None:
    """Refuse, with a ValueError, numbers of cells of which nothing can be learned."""
    if len(n_per_class) < least or any(n < 1 for n in n_per_class):
        msg = f"n_per_class={list(n_per_class)}; numbers of cells from 1 up are needed."
        raise ValueError(msg)


def _classified(
    task: Task, readers: Sequence[str], *, n_per_class: Sequence[int] = (), progress: bool | None
) -> pd.DataFrame:
    tables = []
    for kind in task.splits:
        answers = ask(task, kind, readers, n_per_class=n_per_class, whole=not n_per_class, progress=progress)
        tables.append(tabulate(task, answers.scores(task.codes), answers, readers))
    return pd.concat(tables, ignore_index=True)
