"""What each method says of held-out cells, and how it compares."""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from cellprior._talk import bar
from cellprior.evaluate import _probes as probes
from cellprior.evaluate._intervals import CLASS_SCORES, Draws, Resampling, compared
from cellprior.evaluate._methods import Kind, Method, Space, centred
from cellprior.evaluate._neighbors import Chosen, asked_within, choose, pools
from cellprior.evaluate._null import groups, once, p_value, permuted
from cellprior.evaluate._splits import HELD_OUT, Split, inner_folds
from cellprior.evaluate._task import CHOSEN, MAJORITY, ON_GENES, RIDGE, Task
from cellprior.model.engine._cores import on_cores

Reader: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From an embedding, labels, and another embedding to labels of the other."""

KNN, LINEAR, CENTROID = "nearest neighbours", "linear probe", "nearest centroid"
ZERO_SHOT, PROBES = (KNN,), (LINEAR, CENTROID)
FEW_SHOT: dict[str, Reader] = {
    LINEAR: lambda train, codes, test: probes.linear(train, codes, test, tuned=False),
    CENTROID: probes.nearest_centroid,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose answer it is, and how it was asked."""

    method: str
    kind: Kind
    reader: str
    n_per_class: int | None = None

    def is_rival(self, reader: str) -> bool:
        """Whether an embedding that is read so is compared with it; what reads genes is a rival of the linear probe."""
        return self.kind == "baseline" and (self.reader or LINEAR) == reader


@dataclass
class Answers:
    """What all methods say of the test cells of some splits, for each split, and the seconds it took."""

    splits: list[Split]
    copies: np.ndarray
    said: dict[Asked, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    chosen: dict[Asked, list[Chosen]] = field(default_factory=lambda: defaultdict(list))
    """With what was chosen within the training cells."""
    by_chance: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    """By method and reader, names under permuted labels ``(1 + permutations, cells)``."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    p_value: float | None = None
    """Of the test that there is a signal, ``None`` if it was not asked for."""

    @cached_property
    def resampling(self) -> Resampling:
        """The same draws for all answers."""
        return Resampling(len(self.copies), self.splits, copies=self.copies)

    def add(self, asked: Asked, chosen: Chosen) -> None:
        """Answers on one split."""
        self.said[asked].append(chosen.said)
        self.chosen[asked].append(chosen)

    def take(self, others: Answers) -> None:
        """Further answers, behind those that are there."""
        for asked, said in others.said.items():
            self.said[asked] += said
        for asked, chosen in others.chosen.items():
            self.chosen[asked] += chosen
        for key, names in others.by_chance.items():
            self.by_chance[key] += names
        for name, seconds in others.seconds.items():
            self.seconds[name] += seconds

    def scores(self, codes: np.ndarray) -> dict[Asked, dict[str, Draws]]:
        """Scores by draw, of which all with as many labels are paired."""
        again = {len(self.splits): self.resampling}
        for n in {len(said) for said in self.said.values()} - again.keys():
            again[n] = Resampling(len(self.copies), self.splits[:n], copies=self.copies)
        return {asked: again[len(said)].classification(codes, said) for asked, said in self.said.items()}

    def words(self, method: str, reader: str) -> str:
        """What was chosen most often, and in how many splits."""
        asked = next(
            a for a in self.chosen if a.method == method and a.reader == reader and a.n_per_class is None
        )
        most, n = Counter(chosen.words for chosen in self.chosen[asked]).most_common(1)[0]
        return most if n == len(self.splits) else f"{most} in {n} of {len(self.splits)} splits"


class Fold:
    """One split, with what its readings share."""

    def __init__(self, task: Task, split: Split, labellings: np.ndarray | None) -> None:
        self.split, self.n_labels = split, len(task.labels)
        self.codes = task.codes[split.train]
        self.labellings = None if labellings is None else labellings[:, split.train]
        copies = task.copies[split.train]
        batches = None
        if split.kind == HELD_OUT and task.batches is not None:
            batches = task.batches.to_numpy()[split.train]
        self.folds = inner_folds(self.codes, copies=copies, batches=batches, seed=split.seed)
        self.asked = asked_within(self.codes, copies)

    def neighbours(self, spaces: Sequence[Space]) -> tuple[Chosen, np.ndarray | None]:
        """Names by nearest neighbours, and those under each labelling."""
        found = pools(spaces, self.split, self.folds, self.asked)
        if self.labellings is None:
            return choose(found, self.codes[None], self.asked, self.n_labels)[0], None
        chosen = choose(found, self.labellings, self.asked, self.n_labels)
        return chosen[0], np.stack([of_labelling.said for of_labelling in chosen])

    def linear(self, spaces: Sequence[Space]) -> tuple[Chosen, np.ndarray | None]:
        """Names by a linear probe, and those under each labelling by a ridge of one penalty."""
        chosen = probes.best_linear(spaces, self.split, self.codes, self.folds, self.n_labels)
        if self.labellings is None or spaces[0].values.shape[1] > probes.MOST_DIMENSIONS:
            return chosen, None
        train, test = probes.one_scale(
            *(spaces[0].values[rows] for rows in (self.split.train, self.split.test))
        )
        ridge = probes.Ridge(train.astype(np.float32), test.astype(np.float32))
        return chosen, ridge.predict(self.labellings, self.n_labels)

    def centroid(self, spaces: Sequence[Space]) -> tuple[Chosen, np.ndarray | None]:
        """Names by the nearest mean."""
        return probes.best_centroid(spaces, self.split, self.codes, self.folds, self.n_labels), None

    def read(self, reader: str, spaces: Sequence[Space]) -> tuple[Chosen, np.ndarray | None]:
        """Names by a reader."""
        return {KNN: self.neighbours, LINEAR: self.linear, CENTROID: self.centroid}[reader](spaces)


def ask(
    task: Task,
    kind: str,
    readers: Sequence[str],
    *,
    n_per_class: Sequence[int] = (),
    whole: bool = True,
    signal: bool = False,
    progress: bool | None = None,
) -> Answers:
    """Let every method name the test cells of every split of a kind, several methods at a time.

    ``readers`` are `ZERO_SHOT` or `PROBES` or both, asked with all training cells if ``whole``, beside the
    classifiers that need no embedding; the `PROBES` also with ``n_per_class`` training cells of a label.
    With ``signal``, permutations of the labels are read, too, and tell whether there is one. Where more is asked, few
    labels and permutations are of the first division of the cells alone.
    """
    splits = task.splits[kind]
    n_once = len(once(splits))
    labellings = None
    if signal:
        labellings = permuted(task.codes, task.copies, groups(task.n_obs, splits, task.batches))
    folds = [Fold(task, split, labellings if i < n_once else None) for i, split in enumerate(splits)]
    with_few = folds[:n_once] if whole else folds
    asked = [*task.methods, None] if whole else task.methods

    def of_one(job: tuple[Fold, Method | None]) -> Answers:
        fold, method = job
        answers = Answers([fold.split], task.copies)
        if method is None:
            _ask_classifiers(task, fold, answers, linear=LINEAR in readers)
        else:
            with _timed(answers, method.name):
                spaces = method.fit()
                if whole:
                    _ask_whole(answers, fold, method, spaces, readers)
                if fold in with_few:
                    few = {n: _draw(fold.split, task.codes, n) for n in n_per_class}
                    _ask_few(answers, task, fold, method, spaces[0].usual, few)
        return answers

    jobs = [(fold, method) for fold in folds for method in asked]
    parts, answers = [], Answers(splits, task.copies)
    with bar(len(jobs), kind, unit=" methods", progress=progress) as steps:
        _prepare(task, answers)
        with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"), torch.no_grad():
            warnings.simplefilter("ignore")  # filters are of all threads, so what one of them ignores, all do
            for part in on_cores(of_one, jobs, torch.device("cpu")):
                parts.append(part)
                steps.update()
    for i, fold in enumerate(folds):
        of_split = Answers([fold.split], task.copies)
        for part in parts[i * len(asked) : (i + 1) * len(asked)]:
            of_split.take(part)
        if whole:
            _choose_baseline(of_split, readers)
        answers.take(of_split)
    if labellings is not None:
        answers.p_value = p_value(list(answers.by_chance.values()), labellings, splits)
    return answers


def _prepare(task: Task, answers: Answers) -> None:
    """What is the same for all splits: not by several of them at once."""
    for method in task.methods:
        with _timed(answers, method.name):
            method.fit()
    for name in task.genes.sets:
        task.genes.products(name)


@contextmanager
def _timed(answers: Answers, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    answers.seconds[name] += time.perf_counter() - start


def _ask_whole(
    answers: Answers, fold: Fold, method: Method, spaces: Sequence[Space], readers: Sequence[str]
) -> None:
    for reader in readers:
        chosen, by_chance = fold.read(reader, spaces)
        answers.add(Asked(method.name, method.kind, reader), chosen)
        if by_chance is not None:
            answers.by_chance[method.name, reader].append(by_chance)


def _ask_few(
    answers: Answers,
    task: Task,
    fold: Fold,
    method: Method,
    latent: np.ndarray,
    few: Mapping[int, np.ndarray],
) -> None:
    for n, rows in few.items():
        for reader, read in FEW_SHOT.items():
            said = read(latent[rows], task.codes[rows], latent[fold.split.test])
            answers.said[Asked(method.name, method.kind, reader, n)].append(said)


def _ask_classifiers(task: Task, fold: Fold, answers: Answers, *, linear: bool) -> None:
    """What needs no embedding: genes themselves, and the largest label."""
    train, test = fold.split.train, fold.split.test
    arguments = fold.codes, fold.folds, fold.n_labels
    if linear and "all genes" in task.genes.sets:
        with _timed(answers, RIDGE):
            inner, all_cells = centred(task.genes.products("all genes"), train)
            ridge = probes.Ridge(inner, all_cells[test], products=True)
            answers.add(Asked(RIDGE, "baseline", ""), probes.best_ridge(ridge, *arguments))
    with _timed(answers, ON_GENES):
        x, codes, (_, folds, n_labels) = task.log[train], fold.codes, arguments
        chosen = probes.best_sparse(x, codes, task.log[test], folds, n_labels)
        answers.add(Asked(ON_GENES, "baseline", ""), chosen)
    answers.said[Asked(MAJORITY, "baseline", "")].append(probes.largest(fold.codes, len(test)))


def _choose_baseline(answers: Answers, readers: Sequence[str]) -> None:
    """Of the baselines on the latest split, the one that names the training cells best: no test cell has a say."""
    for reader in readers:
        pool = {
            asked.method: chosen[-1]
            for asked, chosen in answers.chosen.items()
            if asked.method != CHOSEN and asked.is_rival(reader) and not np.isnan(chosen[-1].inner)
        }
        best = max(pool, key=lambda m: pool[m].inner)
        words = f"{best}: {pool[best].words}" if pool[best].words else best
        answers.add(Asked(CHOSEN, "baseline", reader), pool[best]._replace(words=words))


def _draw(split: Split, codes: np.ndarray, n: int) -> np.ndarray:
    """``n`` training cells of each label, or as many as it has."""
    rng = np.random.default_rng((split.seed, n, len(split.test)))
    rows = [np.flatnonzero(codes[split.train] == label) for label in np.unique(codes[split.train])]
    return np.sort(np.concatenate([split.train[rng.permutation(found)[:n]] for found in rows]))


def tabulate(
    task: Task, scores: Mapping[Asked, Mapping[str, Draws]], answers: Answers, readers: Sequence[str]
) -> pd.DataFrame:
    """A row per method, reader and score, beside the baseline that was chosen within the training cells.

    Those on genes are baselines of the linear probe; elsewhere they are shown and not compared with. With few labels,
    of which none can be spared to choose by, PCA is the baseline.
    """
    tables = []
    for n in sorted({asked.n_per_class for asked in scores}, key=lambda n: n or 0):
        for reader in readers:
            shown = [a for a in scores if a.n_per_class == n and a.reader in (reader, "")]
            for metric in CLASS_SCORES:
                draws = {a.method: scores[a][metric] for a in shown}
                versus = CHOSEN if n is None else "PCA"
                table = compared(draws, versus=versus, of=answers.resampling.interval, within=(0.0, 1.0))
                said = {"kind": [a.kind for a in shown], "reader": [a.reader for a in shown]}
                tables.append(table.assign(**said, n_per_class=n, metric=metric))
    found = pd.concat(tables, ignore_index=True).drop_duplicates(
        ["method", "reader", "n_per_class", "metric"]
    )
    found["split"], found["n_splits"] = answers.splits[0].kind, len(answers.splits)
    found["seen"] = (
        found["method"]
        .map({CHOSEN: "all cells", **{method.name: method.seen for method in task.methods}})
        .fillna("training cells")
    )
    found["seconds"] = found["method"].map(answers.seconds).round(1)
    first = ["method", "kind", "reader", "n_per_class", "metric", "split"]
    found = found[[*first, *found.columns.difference(first, sort=False)]]
    return found if found["n_per_class"].notna().any() else found.drop(columns="n_per_class")
