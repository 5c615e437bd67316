"""Views of the same cells, as other experiments would have seen them: at another depth, through another panel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEPTHS = (200.0, 20_000.0)  # counts of an average cell of a view
PANELS = (0.05, 1.0)  # share of the measured genes that a panel has
PANEL_RATE = 0.5  # of the views, that see a panel; the others see all measured genes
DEPTH_SPREAD = 0.4  # standard deviation of ln(depth) within a view


class View(NamedTuple):
    """Counts of some genes ``(cells, genes)``, and their numbers in the vocabulary ``(genes,)``."""

    counts: Tensor
    genes: Tensor


def draw_view(
    counts: Tensor,
    measured: Tensor,
    rng: np.random.Generator,
    *,
    depths: tuple[float, float] = DEPTHS,
    panels: tuple[float, float] = PANELS,
    panel_rate: float = PANEL_RATE,
) -> View:
    """Thin cells to a depth, and keep some of the genes.

    The depth of the view is drawn evenly on the logarithm, that of a cell is around it, and a cell that has fewer
    counts keeps them all. Half of the panels are drawn evenly from the measured genes, half prefer those with many
    counts, by the square root, as designed panels do. Counts are whole numbers over the vocabulary
    ``(cells, n_genes)``, ``measured`` the increasing numbers of the genes that were; ``depths`` and ``panels`` are
    the least and greatest depth of a view and share of the measured genes in a panel, ``panel_rate`` the probability
    of one.
    """
    genes = measured
    if rng.random() < panel_rate:
        n_kept = max(int(len(measured) * np.exp(rng.uniform(*np.log(panels)))), 1)
        score = rng.gumbel(size=len(measured))
        if rng.random() < 0.5:
            score += 0.5 * np.log(counts[:, measured].sum(0).cpu().numpy() + 0.1)
        kept = np.sort(np.argpartition(-score, n_kept - 1)[:n_kept])
        genes = measured[torch.from_numpy(kept).to(measured.device)]
    depth = np.exp(rng.uniform(*np.log(depths)) + DEPTH_SPREAD * rng.standard_normal(len(counts)))
    share = np.minimum(depth / counts.sum(1).clamp(min=1.0).cpu().numpy(), 1.0)
    seen = counts[:, genes]
    row, column = seen.nonzero(as_tuple=True)
    drawn = rng.binomial(seen[row, column].cpu().numpy().astype(np.int64), share[row.cpu().numpy()])
    thinned = torch.zeros_like(seen)
    thinned[row, column] = torch.from_numpy(drawn).to(seen)
    return View(thinned, genes)
