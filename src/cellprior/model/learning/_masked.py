"""How well hidden genes are predicted, cell by cell; what the models give and :mod:`cellprior.evaluate` compares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MODEL = "model"  # beside predictors that know no biology


class MaskedScores(NamedTuple):
    """Of some cells: how many genes were hidden, and sums over these of each measure, by predictor."""

    n_hidden: Tensor  # (cells,)
    sums: dict[str, dict[str, Tensor]]  # by measure and predictor (cells,)


def by_cell(values: Tensor, cell: Tensor, n_cells: int) -> Tensor:
    """Sums over the places of each cell, on the CPU ``(n_cells,)``."""
    return torch.zeros(n_cells, dtype=torch.float64).index_add_(0, cell, values.cpu().double())
