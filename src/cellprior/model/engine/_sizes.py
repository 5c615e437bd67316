"""Cells that go through a network at a time, and the parts of an embedding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

# products of one to three rows go through other kernels, which round differently in the fifth digit
MIN_CHUNK = 16
MAX_CHUNK = 8192  # of a GPU; on a CPU, more than the model's default_batch_size is of no use
MEMORY_SHARE = 0.25  # of what is free, for the cells that are in the network at a time


def no_progress(n_cells: int) -> None:
    """Tell nobody."""


class Part(NamedTuple):
    """Some of the cells of a unit, embedded."""

    unit: int
    cells: np.ndarray  # positions among the cells that were asked for
    latent: np.ndarray  # (cells, width), float32
    last: bool  # of the unit


class Chunks:
    """Counts of the cells of a sentence by chunk of so many cells, which ``read`` gives from a number on.

    ``scratch`` is the folder for what the sentence holds, None for memory; ``step`` is told the number of cells
    whenever a stage of some is done.
    """

    def __init__(
        self,
        sizes: list[int],
        read: Callable[[int], Iterator[Any]],
        *,
        scratch: Path | None = None,
        step: Callable[[int], None] = no_progress,
    ) -> None:
        self.sizes, self.read, self.scratch, self.step = sizes, read, scratch, step

    def __iter__(self) -> Iterator[Any]:
        return self.read(0)


class BatchSize:
    """Cells that go through a network at a time: what was ``given``, raised to ``MIN_CHUNK``, or what fits.

    A cell takes ``cell_bytes``; where memory is no concern, on a CPU, it is ``default``. Raises ValueError if it is
    not positive.
    """

    def __init__(self, given: int | None, *, device: torch.device, cell_bytes: int, default: int) -> None:
        if given is not None and given < 1:
            msg = f"batch_size={given}; at least one cell at a time is needed."
            raise ValueError(msg)
        if given is not None:
            self.n_cells = max(given, MIN_CHUNK)
        elif device.type == "cuda":
            self.n_cells = fitting(torch.cuda.mem_get_info(device)[0], cell_bytes)
        else:
            self.n_cells = default
        self._warned = False

    def halve(self, error: RuntimeError) -> None:
        """Answer to a GPU that ran out of memory, with one warning.

        Raises RuntimeError if there is nothing left to halve.
        """
        smaller = max(self.n_cells // 2, MIN_CHUNK)
        if smaller == self.n_cells:
            msg = (
                f'The GPU\'s memory does not hold {smaller} cells at a time. Free some of it, use device="cpu", or, if '
                "a long sentence of CellPLM fills it, cellprior.tl.embed(..., out=..., hidden=<a folder>)."
            )
            raise RuntimeError(msg) from error
        if not self._warned:
            msg = (
                f"The GPU ran out of memory with {self.n_cells} cells at a time; going on with {smaller}, and fewer if "
                f"need be. batch_size={smaller} would have begun there."
            )
            warnings.warn(msg, UserWarning, stacklevel=4)
        self._warned, self.n_cells = True, smaller


def fitting(n_bytes: int, cell_bytes: int) -> int:
    """Cells for a quarter of some memory, a power of two, 8,192 at most."""
    n_cells = int(MEMORY_SHARE * n_bytes) // cell_bytes
    return min(max(1 << max(n_cells.bit_length() - 1, 0), MIN_CHUNK), MAX_CHUNK)
