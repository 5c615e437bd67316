"""Whether there is anything to be found: the same readings of labels that were drawn again at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cellprior.evaluate._neighbors import macro_f1
from cellprior.evaluate._splits import HELD_OUT, Split

N_PERMUTATIONS = 100


def once(splits: Sequence[Split]) -> list[Split]:
    """The splits by which a signal is looked for: the first ones, up to one that asks about a cell again."""
    asked: set[int] = set()
    found = []
    for split in splits:
        if asked & (own := set(split.test.tolist())):
            break
        asked |= own
        found.append(split)
    return found


def groups(n_cells: int, splits: Sequence[Split], batches: pd.Series | None) -> np.ndarray:
    """Within which labels are drawn again ``(cells,)``: batches if they are held out, otherwise the parts that are.

    Parts are stratified by the labels. Labels drawn over all cells would not be, so each method would read them worse
    than labels without a signal that the parts were made from.
    """
    if splits[0].kind == HELD_OUT and batches is not None:
        return np.asarray(pd.factorize(batches)[0])
    part = np.full(n_cells, -1)
    for i, split in enumerate(once(splits)):
        part[split.test] = i
    return part


def permuted(codes: np.ndarray, copies: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    """The labels, and then permutations of them ``(1 + permutations, cells)``.

    They stay ``among`` the cells of a group, see :func:`groups`, if there are any; copies of a cell keep one label
    among them. A cell without a label, -1, stays so; ``copies`` is the same number for cells with the same counts
    ``(cells,)``.
    """
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(codes >= 0)
    first, of_cell = np.unique(copies[rows], return_index=True, return_inverse=True)[1:]
    labels = codes[rows][first]
    group = np.zeros(len(first), dtype=int) if among is None else among[rows[first]]
    order = np.argsort(group, kind="stable")
    found = np.repeat(codes[None], 1 + N_PERMUTATIONS, axis=0)
    for again in found[1:]:
        within = order[np.lexsort((rng.random(len(order)), group[order]))]
        drawn = np.empty_like(labels)
        drawn[order] = labels[within]
        again[rows] = drawn[of_cell]
    return found


def p_value(said: Sequence[Sequence[np.ndarray]], labellings: np.ndarray, splits: Sequence[Split]) -> float:
    """How often the best of all readings of permuted labels is at least as good as that of the labels.

    Each reading is measured in its own standard deviations from its own mean over the permutations, and of these the
    largest counts: one test, however many readings there are [Westfall and Young, Resampling-Based Multiple Testing,
    1993]. ``said`` holds for each reading, and each split of :func:`once`, the names of its test cells under each
    labelling ``(labellings, cells)``.
    """
    test = np.concatenate([split.test for split in once(splits)])
    n_labels = int(labellings.max()) + 1
    scores = np.array(
        [
            [
                macro_f1(truth[test], names, n_labels)
                for truth, names in zip(labellings, np.concatenate(list(of_reading), axis=1), strict=True)
            ]
            for of_reading in said
        ]
    )
    by_chance = scores[:, 1:]
    spread = np.maximum(by_chance.std(axis=1, keepdims=True), 1e-9)
    best = ((scores - by_chance.mean(axis=1, keepdims=True)) / spread).max(axis=0)
    return float(np.mean(best >= best[0]))
