"""Two views of each cell: the embedding is to tell whose they are, and the decoder what the cell's counts were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model.cellplm._loss import GeneMeans, reconstruction_loss
from cellprior.model.learning._contrast import chance_of_labels, info_nce, label_contrast
from cellprior.model.learning._views import View, draw_view

N_RECONSTRUCTED = 1_500  # genes at a time
TEMPERATURE = 0.1


def view_losses(
    module: Any,
    counts: Tensor,
    views: tuple[View, View],
    measured: Tensor,
    rng: np.random.Generator,
    *,
    floor: tuple[Tensor, Tensor],
    code: Tensor | None = None,
    temperature: float | Tensor = TEMPERATURE,
    reconstruction_weight: float = 1.0,
    kl_weight: float = 0.0,
    **covariates: Tensor | None,
) -> dict[str, Tensor]:
    """Contrast of two views of the cells of a sentence, contrast of their labels, and reconstruction of their counts.

    Each view is a sentence of its own. The first one's latents give the counts of some measured genes, in its panel or
    not, as they were before it was thinned.

    Parameters
    ----------
    module
        A :class:`~cellprior.model.cellplm._module.CellPLMModule`.
    counts
        Raw counts over the vocabulary ``(cells, n_genes)``.
    views
        Of these cells.
    measured
        Numbers of the genes that were measured ``(genes,)``.
    rng
        Draws the genes.
    floor
        Share of the counts of each gene, up to a factor, and dispersion, that do not depend on the cell
        ``(n_genes,)``.
    code
        Label of each cell, negative for none.
    temperature
        Of both contrasts.
    reconstruction_weight
        Of the reconstruction, nats per gene, beside the contrasts.
    kl_weight
        Of the KL term of a VAE.
    **covariates
        Of the decoder.

    Returns
    -------
    ``loss``; its parts ``view_contrast``, ``label_contrast`` where there are labels, ``reconstruction``, ``latent``;
    and what an embedding in which all cells are alike, or a decoder that gives all cells the same, reaches.
    """
    hidden = [module.hidden(view.counts, gene_index=view.genes) for view in views]
    first, second = (module.latent_of(h) for h in hidden)
    if (
        module.direction is not None
    ):  # all of the middle taken off, lest what a view has in common tells it apart
        first, second = (module.direction(z, z.mean(0), share=1.0) for z in (first, second))
    chance = counts.new_tensor(math.log(len(counts)))
    losses = {
        "view_contrast": info_nce(first, second, temperature=temperature),
        "view_contrast_floor_chance": chance,
    }
    loss = losses["view_contrast"]
    if code is not None:
        losses["label_contrast"] = label_contrast(first, second, code, temperature=temperature)
        losses["label_contrast_floor_chance"] = counts.new_tensor(chance_of_labels(code))
        loss = loss + losses["label_contrast"]
    genes = measured
    if len(measured) > N_RECONSTRUCTED:
        drawn = np.sort(rng.choice(len(measured), N_RECONSTRUCTED, replace=False))
        genes = measured[torch.from_numpy(drawn).to(measured.device)]
    z, latent = module.latent.sample(hidden[0], kl_weight=kl_weight)
    target = counts[:, genes]
    reconstruction = reconstruction_loss(target, *module.decode(z, genes=genes, **covariates)) / len(genes)
    share, dispersion = floor
    with torch.no_grad():
        of_means = reconstruction_loss(target, share[genes].expand_as(target), dispersion[genes]) / len(genes)
    losses |= {
        "reconstruction": reconstruction,
        "reconstruction_floor_gene_means": of_means,
        "latent": latent,
    }
    return {"loss": loss + reconstruction_weight * reconstruction + latent, **losses}


def sentence_view_losses(
    module: Any,
    batch: Mapping[str, Tensor],
    *,
    floor: GeneMeans,
    measured: Tensor,
    rng_seed: int,
    temperature: float = TEMPERATURE,
    reconstruction_weight: float = 1.0,
    depths: tuple[float, float] | None = None,
    panels: tuple[float, float] | None = None,
    panel_rate: float | None = None,
    covariate: Sequence[int | None] = (None,),
) -> dict[str, Tensor]:
    """Losses of one sentence of a training run with ``objective="views"``, see :func:`view_losses`.

    Parameters
    ----------
    batch, floor, measured, rng_seed, covariate
        See :func:`~cellprior.model.cellplm._loss.sentence_losses`.
    temperature, reconstruction_weight
        See :func:`view_losses`.
    depths, panels, panel_rate
        See :func:`~cellprior.model.learning._views.draw_view`.
    """
    counts = batch[REGISTRY_KEYS.X_KEY]
    number = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
    known = measured[number if len(measured) > 1 else 0].nonzero()[:, 0]
    i = number if len(floor.share) > 1 else 0
    rng = np.random.default_rng(rng_seed)
    given: dict[str, Any] = {"depths": depths, "panels": panels, "panel_rate": panel_rate}
    given = {name: value for name, value in given.items() if value is not None}
    views = draw_view(counts, known, rng, **given), draw_view(counts, known, rng, **given)
    category = covariate[number if len(covariate) > 1 else 0]
    return view_losses(
        module,
        counts,
        views,
        known,
        rng,
        floor=(floor.share[i], floor.dispersion[i]),
        temperature=temperature,
        reconstruction_weight=reconstruction_weight,
        batch=None if category is None else torch.full((len(counts),), category, device=counts.device),
    )
