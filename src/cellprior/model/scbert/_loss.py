"""What ScBERT is trained on: the bins of hidden genes, and the contrast of two gene subsets; beside their floors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model.learning._contrast import in_micro_batches, info_nce, retrieval_accuracy, similarities
from cellprior.model.learning._processes import gather_cells, shared_generator
from cellprior.model.scbert._floors import BinFloors
from cellprior.model.scbert._inputs import sample_mask

BinLoss = Literal["cross_entropy", "ordinal"]


def cross_entropy(log_probability: Tensor, rank: Tensor) -> Tensor:
    """Mean of ``-ln p_y`` over the bins 1 to K ``(places, K)``; how far off a wrong bin is makes no difference.

    The right one is ``rank``, its number minus 1 ``(places,)``.
    """
    return -log_probability.gather(1, rank[:, None]).mean()


def ordinal_loss(log_probability: Tensor, rank: Tensor) -> Tensor:
    """Mean of ``-Σ_k ln P(y on its side of k)`` over the K - 1 thresholds between bins.

    The ranked ignorance score [Tödter & Ahrens, Mon. Weather Rev. 140:2005, 2012], a proper score: the
    cross-entropies of all questions "is it above bin k?", so that bin 5 for 1 costs more than bin 5 for 4. The
    probabilities of the bins 1 to K ``(places, K)`` are together 1; the right one is ``rank``, its number minus 1.
    """
    up_to = log_probability.logcumsumexp(1)[:, :-1]  # ln P(y <= k)
    above = log_probability.flip(1).logcumsumexp(1).flip(1)[:, 1:]  # ln P(y > k)
    threshold = torch.arange(up_to.shape[1], device=rank.device)
    return -torch.where(rank[:, None] <= threshold, up_to, above).sum(1).mean()


BIN_LOSSES: dict[BinLoss, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross_entropy": ("masked", cross_entropy),
    "ordinal": ("ordinal", ordinal_loss),
}


def cell_losses(
    module: Any,
    batch: Mapping[str, Tensor],
    *,
    floor: BinFloors,
    measured: Tensor,
    rng_seed: int,
    bin_loss: BinLoss | None = "cross_entropy",
    contrast_weight: float = 0.0,
    mask_rate: float = 0.15,
    replace_rate: float = 0.9,
    temperature: float = 0.2,
    micro_batch_size: int | None = None,
    redraw_every: int = 1000,
) -> dict[str, Tensor]:
    """Losses of one minibatch of a training run.

    Raises ValueError if nothing is to be learned, or an argument is not one of those above.

    Parameters
    ----------
    batch
        ``X``, raw counts over the vocabulary ``(cells, n_genes)``; ``batch``, one code for all of them, if the data
        have batches.
    floor
        Predictors whose loss on the same hidden genes is given too.
    measured
        Which genes were measured, once or by batch ``(1 or n_batches, n_genes)``.
    rng_seed
        Of the mask and of the gene subsets.
    bin_loss
        See :func:`masked_losses`; ``None`` leaves hidden genes out.
    contrast_weight
        Weight of :func:`contrastive_losses`; 0 leaves them out.
    mask_rate, replace_rate
        Of the mask, see :func:`~cellprior.model.scbert._inputs.sample_mask`. Of held-out cells, all selected genes are
        replaced.
    temperature
        See :func:`~cellprior.model.learning._contrast.info_nce`.
    micro_batch_size
        Cells in memory at a time, for a third more work; ``None`` for all. Never changes the gradient.
    redraw_every
        Training steps between draws of new random features. The original counts forward passes.
    """
    refuse_impossible(bin_loss, contrast_weight, micro_batch_size)
    if module.training:
        module.steps_since_redraw += 1
        if module.steps_since_redraw > redraw_every:
            module.redraw_projections(shared_generator())
            module.steps_since_redraw = 1
    counts = batch[REGISTRY_KEYS.X_KEY]
    code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
    # apart, as processes that train together draw the same gene subsets for minibatches of other sizes
    mask_rng, subset_rng = np.random.default_rng(rng_seed).spawn(2)
    loss = torch.zeros((), device=counts.device)
    parts: dict[str, Tensor] = {}
    if bin_loss is not None:
        tokens = module.tokens(counts)
        # what is predicted in plain sight can be copied, which the floors cannot: on held-out cells all is hidden
        replace = replace_rate if module.training else 1.0
        mask = sample_mask(
            tokens.cpu().numpy(), mask_rng, rate=mask_rate, replace=replace, n_bins=module.n_bins
        )
        selected, replaced = (torch.from_numpy(m).to(counts.device) for m in mask)
        parts |= masked_losses(
            module, tokens, selected, replaced, bin_loss=bin_loss, micro_batch_size=micro_batch_size
        )
        parts |= masked_floors(
            floor.predict(counts, tokens, selected, batch=code), tokens[selected], bin_loss
        )
        loss = loss + parts[BIN_LOSSES[bin_loss][0]]
    if contrast_weight:
        known = measured[code if len(measured) > 1 else 0]
        first, second = gene_subsets(known, subset_rng)
        views = (counts * first, counts * second)
        parts |= contrastive_losses(module, views, temperature=temperature, micro_batch_size=micro_batch_size)
        loss = loss + contrast_weight * parts["contrastive"]
    return {"loss": loss, **parts}


def refuse_impossible(bin_loss: BinLoss | None, contrast_weight: float, micro_batch_size: int | None) -> None:
    """Refuse arguments of :func:`cell_losses` that cannot be meant."""
    if bin_loss not in (None, *BIN_LOSSES):
        msg = f"bin_loss={bin_loss!r} is not known; choose {', '.join(map(repr, BIN_LOSSES))} or None."
        raise ValueError(msg)
    if bin_loss is None and not contrast_weight:
        msg = "Neither hidden genes nor a contrast are to be learned: give bin_loss or a contrast_weight."
        raise ValueError(msg)
    if micro_batch_size is not None and micro_batch_size < 1:
        msg = f"micro_batch_size={micro_batch_size}; at least one cell at a time is needed."
        raise ValueError(msg)


def masked_losses(
    module: Any,
    tokens: Tensor,
    selected: Tensor,
    replaced: Tensor,
    *,
    bin_loss: BinLoss = "cross_entropy",
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Loss of the bins of selected genes, as the original pretrains, or of their order; mean over these genes.

    Parameters
    ----------
    tokens
        Bins ``(cells, n_genes)``.
    selected, replaced
        Genes that are predicted, and which of them the network sees as masked ``(cells, n_genes)``.
    bin_loss
        ``"cross_entropy"`` over all classes, with bin 0 and the mask as in the original, gives ``masked``;
        ``"ordinal"`` over bins 1 and above, see :func:`ordinal_loss`, gives ``ordinal``.
    micro_batch_size
        See :func:`cell_losses`.

    Returns
    -------
    The loss, and ``masked_accuracy``, how often the most likely of the bins 1 and above is right; 0 if no gene is
    selected.
    """

    def predict(shown: Tensor, selected: Tensor) -> Tensor:
        return module.predict_bins(module.encode(shown)[:, :-1][selected])

    name, loss = BIN_LOSSES[bin_loss]
    shown = tokens.masked_fill(replaced, module.n_bins + 1)
    logits = in_micro_batches(predict, shown, selected, size=micro_batch_size).float()  # (places, n_bins + 2)
    if not len(logits):
        return {name: logits.sum(), "masked_accuracy": logits.sum()}
    if bin_loss == "cross_entropy":
        log_probability = logits.log_softmax(1)[:, 1:-1]
    else:
        log_probability = logits[:, 1:-1].log_softmax(1)
    rank = tokens[selected].long() - 1
    return {name: loss(log_probability, rank), "masked_accuracy": accuracy(log_probability, rank)}


@torch.no_grad()
def masked_floors(
    predictions: Mapping[str, Tensor], bins: Tensor, bin_loss: BinLoss = "cross_entropy"
) -> dict[str, Tensor]:
    """Loss and accuracy of predictors, as those of :func:`masked_losses`.

    Of log-probabilities of the bins 1 and above ``(places, n_bins)`` by predictor, and the right ones ``(places,)``.
    """
    name, loss = BIN_LOSSES[bin_loss]
    rank = bins.long() - 1
    measures = {name: loss, "masked_accuracy": accuracy}
    return {
        f"{measure}_floor_{predictor}": function(log_probability, rank) if len(rank) else rank.sum().float()
        for measure, function in measures.items()
        for predictor, log_probability in predictions.items()
    }


def accuracy(log_probability: Tensor, rank: Tensor) -> Tensor:
    """How often the most likely bin is right; arguments as in :func:`cross_entropy`."""
    return hits(log_probability, rank).mean()


def hits(log_probability: Tensor, rank: Tensor) -> Tensor:
    """Whether the most likely bin is right, equals sharing ``(places,)``; arguments as in :func:`cross_entropy`."""
    best = log_probability == log_probability.amax(1, keepdim=True)  # (places, K)
    return best.gather(1, rank[:, None])[:, 0] / best.sum(1)


def gene_subsets(measured: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Two random halves of the measured genes ``(n_genes,)``.

    The same for all cells of a minibatch: with halves of its own for each cell, the widely expressed genes that one
    view lacks and the other has would tell which belong together.
    """
    genes = torch.from_numpy(rng.permutation(np.flatnonzero(measured.cpu().numpy())))
    halves = (genes[: len(genes) // 2], genes[len(genes) // 2 :])
    first, second = (
        torch.zeros_like(measured).index_fill_(0, half.to(measured.device), True) for half in halves
    )
    return first, second


def contrastive_losses(
    module: Any,
    views: tuple[Tensor, Tensor],
    *,
    temperature: float = 0.2,
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Contrast of two views of the same cells by their embeddings.

    Each view is what a panel of its genes would have measured: its depth is the sum over these. Two embeddings are
    contrasted, and their losses averaged: the mean over all genes, and that over the expressed ones. In the first,
    the gene vectors cancel out before training; alone it is learned very slowly. A network with ``pooling="cls"`` is
    contrasted by its class token alone. The embeddings of a view are centred
    on their mean, as most of an untrained embedding is the same in all cells. Where several processes train together,
    the cells of all of them are contrasted.

    Parameters
    ----------
    views
        Raw counts ``(cells, n_genes)`` each, of different genes.
    temperature
        See :func:`~cellprior.model.learning._contrast.info_nce`.
    micro_batch_size
        See :func:`cell_losses`.

    Returns
    -------
    ``contrastive``; ``contrastive_accuracy``, the share of cells whose other view is the most similar by the first of
    the embeddings; and their floors: ``chance``, and for the accuracy ``depth``, if the view nearest in depth is taken.
    """

    def embed(tokens: Tensor) -> Tensor:
        if module.pooling == "cls":
            return module.pool(tokens)[:, None]
        hidden = module.encode(tokens)[:, :-1]
        expressed = (tokens > 0).float()
        share = expressed / expressed.sum(1, keepdim=True).clamp(min=1.0)
        return torch.stack([hidden.mean(1), torch.bmm(share[:, None], hidden).squeeze(1)], dim=1)

    first, second = (
        gather_cells(in_micro_batches(embed, module.tokens(view), size=micro_batch_size)) for view in views
    )
    first, second = first - first.mean(0), second - second.mean(0)  # (cells, embeddings, n_hidden)
    pairs = zip(first.unbind(1), second.unbind(1), strict=True)
    by_embedding = [info_nce(*pair, temperature=temperature) for pair in pairs]
    loss = torch.stack(by_embedding).mean()
    with torch.no_grad():
        depth, other_depth = (torch.log1p(gather_cells(view.sum(1))) for view in views)
        nearness = -(depth[:, None] - other_depth).abs()  # (cells, cells)
        return {
            "contrastive": loss,
            "contrastive_floor_chance": torch.full_like(loss, math.log(len(first))),
            "contrastive_accuracy": retrieval_accuracy(similarities(first[:, 0], second[:, 0])),
            "contrastive_accuracy_floor_chance": torch.full_like(loss, 1 / len(first)),
            "contrastive_accuracy_floor_depth": retrieval_accuracy(nearness),
        }
