"""Labels of one study read on another: the analyst's real job."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellprior._obs import numbered
from cellprior._talk import bar
from cellprior.evaluate import _methods as methods
from cellprior.evaluate._ask import CENTROID, KNN, LINEAR, Answers, Asked, Fold
from cellprior.evaluate._expression import log_normalised, of_genes, raw_counts
from cellprior.evaluate._inputs import record_of
from cellprior.evaluate._intervals import CLASS_SCORES, compared
from cellprior.evaluate._methods import SEEN, Method, Space
from cellprior.evaluate._naming import refuse_other_weights
from cellprior.evaluate._splits import HELD_OUT, MIN_LEARNED, RANDOM, Split, label_codes
from cellprior.evaluate._task import Task, copies_of, refuse_others, seen_by_weights, trained_on

CENTRED = "genes, each study centred"
JOINT = "PCA of both studies"
HARMONY = "Harmony"
LEAST_SHARED = 0.2  # of the smaller study's genes
READERS = (KNN, CENTROID, LINEAR)


def transfer(
    reference: ad.AnnData,
    query: ad.AnnData | Mapping[str, ad.AnnData],
    embeddings: str | Sequence[str] | Mapping[str, str],
    labels_key: str,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    scvi_epochs: int | None = None,
    embed_options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """How well labels that were learned on one study name the cells of another.

    What can be chosen (neighbours, distance, components, penalty) is chosen within the reference, in whole batches if
    it has a ``batch_key``. Beside the embeddings stand principal components of the genes that both studies have, of the
    reference and of both together; these genes with the mean of each study at the origin, which needs no more than a
    subtraction and is what the others are compared with; Harmony where ``harmonypy`` is installed; and scVI if asked
    for.

    Parameters
    ----------
    reference
        Labelled cells with raw counts.
    query
        Cells of another study, with labels to compare with; or several studies by name.
    embeddings
        Names of weights, folders or official checkpoints, or keys of ``obsm`` that all studies have.
    labels_key
        Column of ``obs`` in all studies. A label that the reference lacks, or has fewer than 8 cells of, is not asked
        about.
    layer
        Layer with raw counts in all studies; ``None`` for ``X``.
    batch_key
        Column of ``obs`` with the batch of each cell, in all studies.
    scvi_epochs
        Train scVI on both studies for as many epochs, as one more baseline; ``None`` does not.
    embed_options
        Arguments of ``get_latent_representation`` by name of weights.
    progress
        Whether to draw a bar, by default as ``cellprior.settings.progress`` says.

    Returns
    -------
    A tidy table: ``method``, ``kind``, ``reader``, ``metric``, ``study`` (a name, or ``"all"`` for their mean),
    ``seen`` (what the embedding has learned from: ``"no cell"`` of these studies, as far as weights say, or ``"not
    known"``; the ``"training cells"`` of the reference; ``"these cells"``, of either study, in its pretraining; or
    ``"all cells"``, the query's among them), ``value`` with its 95 % interval, ``versus`` and the paired
    ``difference`` with its interval, ``chosen``, and ``n_cells`` that were asked about. Of one study the interval is of
    cells; of all, of studies.

    Raises
    ------
    TypeError
        If a study is no AnnData.
    KeyError
        If a column, a layer or an embedding is missing.
    ValueError
        If the studies share too few genes or labels, or a key of ``obsm`` is noted as of different weights in them.
    NotCountsError
        If the data are not raw counts.
    WeightsError
        If weights are not found, damaged, or of no known model.

    Examples
    --------
    >>> cp.evaluate.transfer(reference, query, "cellplm-starter", "cell_type", layer="counts")
    """
    queries = dict(query) if isinstance(query, Mapping) else {"query": query}
    names = _names(embeddings)
    for study, cells in {"the reference": reference, **queries}.items():
        refuse_others(cells)
        for key in (labels_key, batch_key):
            if key is not None and key not in cells.obs:
                msg = f"{key!r} not found in obs of {study}; its columns are {list(cells.obs.columns)}."
                raise KeyError(msg)
    options: dict[str, Any] = {"layer": layer, "batch_key": batch_key, "scvi_epochs": scvi_epochs}
    found = []
    with bar(len(queries), "transfer", unit=" studies", progress=progress) as steps:
        for study, cells in queries.items():
            task = _pair(reference, cells, labels_key, study, **options)
            task.methods[:0] = [
                _embedding(
                    name, given, reference, cells, batch_key, layer, (embed_options or {}).get(name, {})
                )
                for name, given in names.items()
            ]
            found.append((study, task, _answers(task)))
            steps.update()
    return _table(found)


def _names(embeddings: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(embeddings, Mapping):
        return dict(embeddings)
    return {str(name): str(name) for name in ([embeddings] if isinstance(embeddings, str) else embeddings)}


def _seen(given: str, *studies: ad.AnnData) -> methods.Seen:
    """What a key of obsm has learned from: weights may have learned from these cells, and others perhaps from all.

    Raises ValueError if the studies were embedded by different weights.
    """
    refuse_other_weights(given, *studies)
    return "not known" if all("weights" in record_of(cells, given) for cells in studies) else "all cells"


def _embedding(
    name: str,
    given: str,
    reference: ad.AnnData,
    query: ad.AnnData,
    batch_key: str | None,
    layer: str | None,
    options: Mapping[str, Any],
) -> Method:
    """Embedding of the reference and then the query, each embedded by itself."""
    from cellprior.model import model_class

    if given in reference.obsm and given in query.obsm:
        values = np.concatenate([np.asarray(reference.obsm[given]), np.asarray(query.obsm[given])])
        return methods.fixed(name, values, seen=_seen(given, reference, query))
    if given in reference.obsm or given in query.obsm:
        msg = f"obsm[{given!r}] is in one of the studies only: embed both."
        raise KeyError(msg)
    cls: Any = model_class(given)
    found, n_known = [], []
    for cells in (reference, query):
        with cls.opened(given, cells, layer=layer, batch_key=batch_key) as model:
            found.append(model.get_latent_representation(**options))
            asks = model.trained_on_ is not None  # otherwise no count is read
            n_known.append(trained_on(model, raw_counts(cells, layer)) if asks else None)
    seen = [seen_by_weights(n, cells.n_obs) for n, cells in zip(n_known, (reference, query), strict=True)]
    return methods.fixed(name, np.concatenate(found), seen=max(seen, key=SEEN.index))


def _pair(
    reference: ad.AnnData,
    query: ad.AnnData,
    labels_key: str,
    study: str,
    *,
    layer: str | None,
    batch_key: str | None,
    scvi_epochs: int | None,
) -> Task:
    """Both studies as one task with one split: learned on the reference, asked about the query."""
    shared = _shared(reference, query, study)
    counts = sp.vstack([raw_counts(cells[:, shared], layer) for cells in (reference, query)], format="csr")
    counts = of_genes(counts, reference.var.loc[shared])
    known, labels = label_codes(reference.obs[labels_key], MIN_LEARNED)
    of_query, names = numbered(query.obs[labels_key])
    asked = np.append(pd.Index(labels).get_indexer(names), -1)[of_query]
    codes = np.concatenate([known, asked])
    n = reference.n_obs
    copies = copies_of(counts)
    train = np.flatnonzero((codes >= 0) & (np.arange(len(codes)) < n) & ~np.isin(copies, copies[n:]))
    test = np.flatnonzero((codes >= 0) & (np.arange(len(codes)) >= n))
    if not len(test) or len(np.unique(codes[train])) < 2:
        msg = (
            f"{study}: no cell has one of the reference's labels ({', '.join(labels[:5])}, ...). Name the types "
            "alike in both studies, or map one onto the other first."
        )
        raise ValueError(msg)
    batches = None
    if batch_key is not None:
        batches = pd.concat(
            [cells.obs[batch_key].astype(str) for cells in (reference, query)], ignore_index=True
        )
    genes = methods.Genes(log_normalised(counts))
    of_study = np.repeat([0, 1], [n, query.n_obs])
    pca, joint = methods.pca("PCA", genes, train), methods.pca(JOINT, genes)
    task = Task(codes, labels, batches, genes, copies, [], {})
    task.splits = {study: [Split(HELD_OUT if batch_key else RANDOM, 0, study, train, test)]}
    task.methods = [_centred(genes, train, of_study), pca, joint]
    if importlib.util.find_spec("harmonypy") is not None:
        task.methods.append(_harmony(joint, of_study))
    if scvi_epochs is not None:
        both = pd.Series(of_study.astype(str))
        task.methods.append(methods.scvi(counts, both, scvi_epochs))
    return task


def _shared(reference: ad.AnnData, query: ad.AnnData, study: str) -> pd.Index:
    for name, cells in (("the reference", reference), (study, query)):
        if not cells.var_names.is_unique:
            msg = f"var_names of {name} are not unique: make them so, adata.var_names_make_unique()."
            raise ValueError(msg)
    shared = reference.var_names.intersection(query.var_names)
    fewest = min(reference.n_vars, query.n_vars)
    if len(shared) < max(2, LEAST_SHARED * fewest):
        msg = (
            f"{len(shared)} of {fewest} genes have the same name in the reference ({reference.var_names[0]}, ...) and "
            f"in {study} ({query.var_names[0]}, ...). Put the same kind of name, symbols or Ensembl ids, there."
        )
        raise ValueError(msg)
    return shared


def _centred(genes: methods.Genes, rows: np.ndarray, of_study: np.ndarray) -> Method:
    """Variable genes of the reference, the mean of each study at the origin."""

    def fit() -> list[Space]:
        values = genes.variable(rows).copy()
        for study in np.unique(of_study):
            values[of_study == study] -= values[of_study == study].mean(axis=0)
        return [Space("", values, values.shape[1:])]

    return Method(CENTRED, "baseline", fit, "all cells")


def _harmony(joint: Method, of_study: np.ndarray) -> Method:
    """Harmony on the components of both studies [Korsunsky et al., 2019]."""

    def fit() -> list[Space]:
        import harmonypy  # type: ignore[import-not-found,unused-ignore]  # not a dependency

        obs = pd.DataFrame({"study": of_study.astype(str)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = harmonypy.run_harmony(joint.fit()[0].usual, obs, "study", random_state=0, verbose=False)
        moved = np.asarray(found.Z_corr)
        values = moved.T if moved.shape[0] != len(of_study) else moved
        return [Space("", values.astype(np.float32), values.shape[1:])]

    return Method(HARMONY, "baseline", fit, "all cells")


def _answers(task: Task) -> Answers:
    [splits] = task.splits.values()
    answers = Answers(splits, task.copies)
    fold = Fold(task, splits[0], None)
    for method in task.methods:
        for reader in READERS:
            answers.add(Asked(method.name, method.kind, reader), fold.read(reader, method.fit())[0])
    return answers


def _table(found: Sequence[tuple[str, Task, Answers]]) -> pd.DataFrame:
    """Rows of each study, and of their mean if there are several."""
    tables = []
    of_studies: dict[tuple[Asked, str], list[float]] = {}
    for study, task, answers in found:
        scores = answers.scores(task.codes)
        for reader in READERS:
            shown = [asked for asked in scores if asked.reader == reader]
            for metric in CLASS_SCORES:
                draws = {asked.method: scores[asked][metric] for asked in shown}
                table = compared(draws, versus=CENTRED, of=answers.resampling.interval, within=(0.0, 1.0))
                table["chosen"] = [answers.words(asked.method, reader) for asked in shown]
                table["seen"] = table["method"].map({method.name: method.seen for method in task.methods})
                tables.append(_noted(table, shown, metric, study).assign(n_cells=len(answers.splits[0].test)))
                for asked in shown:
                    of_studies.setdefault((asked, metric), []).append(float(scores[asked][metric][0]))
    if len(found) > 1:
        tables.insert(0, _summed(found, of_studies))
    return pd.concat(tables, ignore_index=True)


def _summed(
    found: Sequence[tuple[str, Task, Answers]], of_studies: Mapping[tuple[Asked, str], Sequence[float]]
) -> pd.DataFrame:
    """Means over the studies, with Student's intervals: as many units as studies."""
    from cellprior.evaluate._intervals import Resampling

    nobody = np.empty(0, dtype=np.int64)
    again = Resampling(1, [Split(HELD_OUT, 0, study, nobody, nobody) for study, _, _ in found])
    tables = []
    for reader in READERS:
        shown = [
            asked for asked, metric in of_studies if asked.reader == reader and metric == CLASS_SCORES[0]
        ]
        for metric in CLASS_SCORES:
            draws = {a.method: np.array([np.mean(v := of_studies[a, metric]), *v]) for a in shown}
            table = compared(draws, versus=CENTRED, of=again.interval, within=(0.0, 1.0))
            n_cells = sum(len(answers.splits[0].test) for _, _, answers in found)
            seen = {
                method.name: max((task.methods[i].seen for _, task, _ in found), key=SEEN.index)
                for i, method in enumerate(found[0][1].methods)
            }
            table["seen"] = table["method"].map(seen)
            tables.append(_noted(table.assign(chosen=""), shown, metric, "all").assign(n_cells=n_cells))
    return pd.concat(tables, ignore_index=True)


def _noted(table: pd.DataFrame, shown: Sequence[Asked], metric: str, study: str) -> pd.DataFrame:
    table.insert(1, "kind", [asked.kind for asked in shown])
    table.insert(2, "reader", [asked.reader for asked in shown])
    table.insert(3, "metric", metric)
    table.insert(4, "study", study)
    return table
