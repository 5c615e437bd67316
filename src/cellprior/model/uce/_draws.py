"""Several sentences of a cell in one vector, and how sure it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def average_of_draws(latent: Tensor, n_draws: int) -> tuple[Tensor, Tensor]:
    """Mean direction of the draws of each cell, and its spread.

    With R the length of the mean of a cell's K vectors of length 1, the vectors vary by ``s² = K (1 - R²) / (K - 1)``
    around their expectation, and their mean by ``s² / K``. The spread is what that is in cosines: the expected
    ``1 - cos`` between this mean and the one of endlessly many draws, ``s² / (2 K R²)``; it falls as ``1 / K``. (Of
    vectors on a sphere, see Mardia & Jupp, Directional Statistics, 2000, 9.3.) Latents of length 1, those of a cell
    one after the other ``(cells * n_draws, n_latent)``, give vectors of length 1 ``(cells, n_latent)``, and spreads
    ``(cells,)``, NaN for one draw.
    """
    if n_draws == 1:
        return latent, torch.full_like(latent[:, 0], torch.nan)
    mean = latent.unflatten(0, (-1, n_draws)).mean(1)
    squared = mean.square().sum(1).clamp(min=1e-12, max=1.0)
    return F.normalize(mean, dim=1), (1 - squared) / (2 * (n_draws - 1) * squared)
