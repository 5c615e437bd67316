"""Which cells were held out of training, kept with the weights, so that they stay held out."""

from __future__ import annotations

import base64
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from cellprior.model.data._fingerprint import digest

Parts = dict[str, np.ndarray]  # row numbers, increasing, by what they are for
TRAIN = "train"


def noted(names: pd.Index, parts: Parts) -> dict[str, Any]:
    """A split as it is saved: a digest of the cells' names, and which of them, in order of names, are in each part."""
    order = _order(names)
    return {
        "cells": digest(names[order]),
        "n_cells": len(names),
        **{name: _packed(np.isin(order, rows)) for name, rows in parts.items()},
    }


def recalled(state: Mapping[str, Any], names: pd.Index) -> Parts | None:
    """Rows by part of a split that was noted, if these are its cells, in whatever order; else None."""
    if not state or state["n_cells"] != len(names):
        return None
    order = _order(names)
    if digest(names[order]) != state["cells"]:
        return None
    parts = {name: x for name, x in state.items() if isinstance(x, str) and name != "cells"}
    return {name: np.sort(order[_unpacked(x, len(names))]) for name, x in parts.items()}


def keep_split(
    state: Mapping[str, Any], names: pd.Index, drawn: Parts, *, sizes_given: bool, rows_given: bool = False
) -> Parts:
    """The split of the training before, if it is one of these cells and no other is asked for; else a new one.

    ``state`` is from :func:`noted`, empty if no split is known; ``sizes_given`` and ``rows_given`` say whether the
    sizes of the one ``drawn``, or its very cells, are asked for, and not a default. Warns if a new one is taken
    although cells have been trained on before.
    """
    if not state:
        return drawn
    before = recalled(state, names)
    if before is None:
        warn_of_other_cells(state, len(names), stacklevel=5)
        return drawn
    same_sizes = before.keys() == drawn.keys() and all(len(before[p]) == len(drawn[p]) for p in drawn)
    if not rows_given and (same_sizes or not sizes_given):
        return before
    held_out = np.concatenate([rows for part, rows in drawn.items() if part != TRAIN])
    if n_seen := len(np.intersect1d(held_out, before[TRAIN])):
        msg = (
            "The split that is asked for is not that of the training before, so other cells are held out. "
            f"{n_seen:,} of these {len(held_out):,} have been seen in training, and their scores are too good. To "
            "keep the split, leave out the arguments that set it."
        )
        warnings.warn(msg, UserWarning, stacklevel=5)
    return drawn


def hold_out(
    model: Any,
    stage: str,
    names: pd.Index,
    cells: Any,
    asked: Mapping[str, Any],
    splitter_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Give a splitter the split to train on, see :func:`keep_split`, and note it.

    ``cells`` have ``parts``, as drawn, and ``keep(parts)``; ``split_`` of the model says what was held out before at
    this ``stage``; ``asked`` and ``splitter_kwargs`` are what the user said about the split.
    """
    parts = keep_split(
        model.split_.get(stage, {}),
        names,
        cells.parts,
        sizes_given=asked["train_size"] is not None or asked["validation_size"] is not None,
        rows_given=not asked["shuffle_set_split"] or "external_indexing" in (splitter_kwargs or {}),
    )
    cells.keep(parts)
    return noted(names, parts)


def warn_of_other_cells(state: Mapping[str, Any], n_cells: int, *, stacklevel: int) -> None:
    """Say that cells are held out anew, of data that are not known to be others than those trained on before."""
    msg = (
        f"The model has been trained before, on {state['n_cells']:,} cells, which by their names are not these "
        f"{n_cells:,}. New cells are held out. If these data share cells with those, some held-out cells have been "
        "seen in training, and their scores are too good."
    )
    warnings.warn(msg, UserWarning, stacklevel=stacklevel + 1)


def _order(names: pd.Index) -> np.ndarray:
    return np.argsort(names.to_numpy(dtype=str), kind="stable")


def _packed(mask: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()


def _unpacked(text: str, n: int) -> np.ndarray:
    # no more than was asked for, whatever the text says
    packed = zlib.decompressobj().decompress(base64.b64decode(text), max(n // 8 + 1, 1))
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n).astype(bool)
