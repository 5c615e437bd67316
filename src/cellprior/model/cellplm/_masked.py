"""How well CellPLM predicts the counts of hidden genes, beside predictors that know no biology."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial
from torch import Tensor
from torch.distributions import Poisson

from cellprior.model.cellplm._inputs import sample_mask
from cellprior.model.cellplm._loss import GeneMeans
from cellprior.model.cellplm._module import CellPLMModule
from cellprior.model.learning._masked import MODEL, MaskedScores

MIN_MEAN = 1e-4  # of all predictors, lest a count of a gene that no training cell has cost without bound
GENE_RATE, MAX_CELLS = 0.25, 128  # hidden, and of so many cells, to choose the covariates on
MEASURES = ("negative_binomial", "poisson")


class Fitted(NamedTuple):
    """What training cells have to say."""

    floor: GeneMeans
    covariates: dict[int, dict[str, int]]  # of the decoder, by batch


@torch.no_grad()
def masked_scores(
    module: CellPLMModule,
    counts: Tensor,
    fitted: Fitted,
    *,
    share: float,
    rng: np.random.Generator,
    measured: Tensor,
    batch: int = 0,
) -> MaskedScores:
    """Negative-binomial and Poisson loss (nats per gene) of the counts of hidden genes.

    The cells are one sentence, three quarters of them with hidden genes, as in pretraining. In the training loss, the
    means of the hidden genes are scaled to the cell's true sum of them, which gives part of the answer away; here
    those of all predictors are scaled to what is in sight of the cell. The counts are raw ones over the vocabulary
    ``(cells, n_genes)``, ``measured`` is ``(n_genes,)``, the module in eval mode. ``share`` is the most frequent one
    of the genes of a cell that is hidden, expressed or not, see :func:`~cellprior.model.cellplm._inputs.sample_mask`.
    ``fitted`` to other cells are ``gene_means``, each gene's share of the counts at the cell's depth, and the
    covariates; beside it, ``equal_shares`` is the same for all genes.
    """
    floor = fitted.floor
    i = batch if len(floor.share) > 1 else 0
    hidden = (
        torch.from_numpy(sample_mask(*counts.shape, rng=rng, gene_rate=share)).to(counts.device) & measured
    )
    z = _latent(module, counts, hidden)
    predictions = {
        MODEL: decoded(module, z, fitted.covariates.get(batch, {})),
        "gene_means": (floor.share[i], floor.dispersion[i]),
        "equal_shares": (torch.ones_like(floor.share[i]), floor.dispersion[i]),
    }
    sums: dict[str, dict[str, Tensor]] = {measure: {} for measure in MEASURES}
    for name, (means, dispersion) in predictions.items():
        for measure in MEASURES:
            sums[measure][name] = _loss(measure, counts, hidden, measured, means, dispersion)
    return MaskedScores(hidden.sum(1), sums)


@torch.no_grad()
def fit_covariates(
    module: CellPLMModule, batches: Iterable[Mapping[str, Tensor]], measured: Tensor
) -> dict[int, dict[str, int]]:
    """The data set and batch of training with which the decoder fits the cells of each batch best, by Poisson loss.

    The data set first, then the batch; on the first cells of each batch. Their mean, as where none is given, may fit
    best only if the decoder was trained with it: on data of no batch that it knows. The module is in eval mode, each
    minibatch of training cells of one batch, ``measured`` ``(n_genes,)``.
    """
    decoder, found = module.decoder, {}
    categories = {
        name: covariate.embedding.num_embeddings
        for name, covariate in (("dataset", decoder.dataset), ("batch", decoder.batch))
        if covariate is not None
    }
    for batch in batches if categories else ():
        code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
        if code in found:
            continue
        counts = batch[REGISTRY_KEYS.X_KEY][:MAX_CELLS].to(measured.device)
        drawn = sample_mask(*counts.shape, rng=np.random.default_rng(0), gene_rate=GENE_RATE)
        hidden = torch.from_numpy(drawn).to(counts.device) & measured
        z = _latent(module, counts, hidden)
        chosen: dict[str, int] = {}
        for name, n_categories in categories.items():
            candidates = [chosen, *({**chosen, name: category} for category in range(n_categories))]
            losses = [
                _loss("poisson", counts, hidden, measured, *decoded(module, z, candidate))
                for candidate in candidates
            ]
            chosen = candidates[int(torch.stack(losses).sum(1).argmin())]
        found[code] = chosen
    return found


def _latent(module: CellPLMModule, counts: Tensor, hidden: Tensor) -> Tensor:
    (state,) = module.hidden_chunks([counts.masked_fill(hidden, 0.0)])
    return module.latent.mean(state)


def decoded(module: CellPLMModule, z: Tensor, covariates: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Means up to a factor per cell ``(cells, n_genes)``, and dispersions ``(n_genes,)``."""
    codes = {name: torch.full((len(z),), category, device=z.device) for name, category in covariates.items()}
    return module.decode(z, **codes)


def _loss(
    measure: str, counts: Tensor, hidden: Tensor, measured: Tensor, means: Tensor, dispersion: Tensor
) -> Tensor:
    """Sum over the hidden genes of each cell ``(cells,)``; the means are scaled to what is in sight of it."""
    in_sight = measured & ~hidden
    scale = (counts * in_sight).sum(1) / (means * in_sight).sum(1).clamp(min=1e-12)
    cell, gene = hidden.nonzero(as_tuple=True)
    # the gamma functions of a large dispersion cancel out: float32 would leave two digits
    wide = torch.float32 if counts.device.type == "mps" else torch.float64
    x = counts[cell, gene].to(wide)
    mean = (means.expand_as(counts)[cell, gene] * scale[cell]).to(wide).clamp(min=MIN_MEAN)
    if measure == "poisson":
        log_probability = Poisson(mean).log_prob(x)
    else:
        log_probability = NegativeBinomial(mu=mean, theta=dispersion[gene].to(wide)).log_prob(x)
    return x.new_zeros(len(counts)).index_add_(0, cell, -log_probability)
