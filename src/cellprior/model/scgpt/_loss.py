"""What ScGPT is trained on: hidden bins, from their tokens and from the cell, and what a cell's vector should be.

Beside each loss stands what is reached without biology, see :class:`~cellprior.model.scgpt._floors.BinFloors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scvi import REGISTRY_KEYS
from torch import Tensor

from cellprior.model.learning._contrast import in_micro_batches, similarities
from cellprior.model.learning._processes import gather_cells
from cellprior.model.scgpt._floors import BinFloors, depth_of
from cellprior.model.scgpt._heads import reverse_gradient, zero_loss
from cellprior.model.scgpt._inputs import (
    MASK,
    TokenArrays,
    Tokens,
    sample_mask,
    sample_tokens,
    with_silent_genes,
)


class Read(NamedTuple):
    """What the network says of some cells."""

    cell: Tensor  # class token                                    (cells, n_hidden)
    bins: Tensor  # of the genes, from their tokens                (cells, width)
    above: Tensor | None  # probability that these are above 0     (cells, width)
    mvc: Tensor | None  # bins of the genes, from the cell         (cells, width)
    mvc_above: Tensor | None


def cell_losses(
    module: Any,
    batch: Mapping[str, Tensor],
    *,
    floor: BinFloors,
    measured: Tensor,
    rng_seed: int,
    mask_rate: float = 0.4,
    mvc_weight: float = 1.0,
    ecs_weight: float = 0.0,
    ecs_threshold: float = 0.8,
    contrast_weight: float = 0.0,
    dab_weight: float = 0.0,
    with_zeros: bool = False,
    max_genes: int | None = 1200,
) -> dict[str, Tensor]:
    """Losses of one minibatch of a training run.

    Raises ValueError if a part needs batches and there are none, or a share is none.

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
        Of the mask, and of the genes that are left where a cell has more than ``max_genes``.
    mask_rate
        Share of a cell's tokens whose bin is hidden.
    mvc_weight
        Weight of the same bins predicted from the class token; 0 leaves it out.
    ecs_weight, ecs_threshold
        Weight and threshold of :func:`elastic_similarity`.
    contrast_weight
        Weight of :func:`contrastive`.
    dab_weight
        Weight of naming the batch from the class token, whose gradient is reversed.
    with_zeros
        Genes that a cell does not express have tokens too, and may be hidden. The original does that for integration.
    max_genes
        Of a cell, others at each step; ``None`` for all.
    """
    if not 0 < mask_rate < 1:
        msg = f"mask_rate={mask_rate} is no share of the genes of a cell: a number between 0 and 1 is needed."
        raise ValueError(msg)
    counts = batch[REGISTRY_KEYS.X_KEY]
    code = batch[REGISTRY_KEYS.BATCH_KEY].flatten().long() if REGISTRY_KEYS.BATCH_KEY in batch else None
    refuse_without_batches(module, code, dab_weight)
    every = module.tokens(counts)
    known = measured[int(code[0]) if code is not None and len(measured) > 1 else 0] if with_zeros else None
    rng = np.random.default_rng(rng_seed)
    tokens, hidden = drawn(module, every, rng, mask_rate=mask_rate, max_genes=max_genes, silent=known)

    read = read_cells(module, tokens, hidden, code)
    parts = masked_losses(read, tokens.value, hidden)
    cell, place = hidden.nonzero(as_tuple=True)
    where, depth = tokens.gene[cell, place], depth_of(every.length).to(module.device)[cell]
    truth = tokens.value[cell, place].float()
    floors = floor.predict(where, depth, with_zeros=with_zeros)
    squared = {name: (found - truth).square().mean() for name, found in floors.items()} if len(where) else {}
    loss = parts["masked"] + parts.get("masked_zero", 0.0)
    if mvc_weight and read.mvc is not None:
        loss = loss + mvc_weight * (parts["mvc"] + parts.get("mvc_zero", 0.0))
    else:
        parts.pop("mvc", None), parts.pop("mvc_zero", None)
    for name in list(parts):
        if name.endswith("_zero") and len(where):
            parts[f"{name}_floor_gene_rate"] = zero_loss(floor.rate(where).clamp(0, 1), truth > 0)
        elif not name.endswith("_zero"):
            parts |= {f"{name}_floor_{predictor}": value for predictor, value in squared.items()}
    if ecs_weight:
        parts |= elastic_similarity(read.cell, ecs_threshold)
        loss = loss + ecs_weight * parts["ecs"]
    if contrast_weight:
        again = read_cells(module, tokens, hidden, code)
        parts |= contrastive(read.cell, again.cell)
        loss = loss + contrast_weight * parts["contrastive"]
    if dab_weight:
        assert code is not None and module.adversary is not None  # see refuse_without_batches
        parts["dab"] = F.cross_entropy(module.adversary(reverse_gradient(read.cell)), code)
        parts["dab_chance"] = floor.surprise_of_batch(int(code[0])).to(loss.device)
        loss = loss + dab_weight * parts["dab"]
    return {"loss": loss, **parts}


def drawn(
    module: Any,
    tokens: Tokens,
    rng: np.random.Generator,
    *,
    mask_rate: float,
    max_genes: int | None,
    silent: Tensor | None,
) -> tuple[Tokens, Tensor]:
    """The tokens of one step, and which of their bins are hidden ``(cells, width)``.

    Genes in ``silent`` ``(n_genes,)`` get a token of bin 0 where they are not expressed; the rest is as of
    :func:`cell_losses`.
    """
    arrays = TokenArrays(tokens.gene.cpu().numpy(), tokens.value.cpu().numpy(), tokens.length.numpy())
    if silent is not None:
        arrays = with_silent_genes(arrays, silent.nonzero()[:, 0].cpu().numpy(), module.n_genes)
    if max_genes is not None:
        arrays = sample_tokens(arrays, max_genes, rng)
    hidden = torch.from_numpy(sample_mask(arrays.value, mask_rate, rng))
    gene, value, length = (torch.from_numpy(part) for part in arrays)
    device = tokens.gene.device
    return type(tokens)(gene.to(device), value.to(device), length), hidden.to(device)


def refuse_without_batches(module: Any, code: Tensor | None, dab_weight: float) -> None:
    """Refuse what needs to know the batch where it is not known."""
    needs = [
        name
        for name, needed in (
            ("dab_weight", dab_weight),
            ('batch_norm="domain"', module.batch_norm is not None and len(module.batch_norm) > 1),
            ("batch_decoder=True", module.batch_encoder is not None),
        )
        if needed
    ]
    if needs and code is None:
        msg = (
            f"{needs[0]} needs the batch of each cell: name its column, setup_anndata(adata, batch_key=...)."
        )
        raise ValueError(msg)
    if needs and code is not None and int(code.max()) >= module.n_batches:
        msg = (
            f"{needs[0]}: the network knows {module.n_batches} batches, and these data have number "
            f"{int(code.max())}, counted from 0. Build it with n_batches= as many as there are."
        )
        raise ValueError(msg)
    if dab_weight and module.adversary is None:
        msg = 'dab_weight needs a classifier of batches: objective="integration" adds one.'
        raise ValueError(msg)


def read_cells(module: Any, tokens: Tokens, hidden: Tensor, code: Tensor | None) -> Read:
    """What the network says of cells some of whose bins are hidden; a few go through at a time.

    The bins ``hidden`` ``(cells, width)`` are ``MASK`` to the network; ``code`` is the batch of each cell
    ``(cells,)``.
    """
    of_batch = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device) if code is None else code
    domain = int(of_batch[0]) if module.batch_norm is not None and code is not None else None
    width = hidden.shape[1]

    def read(gene: Tensor, value: Tensor, length: Tensor, batch: Tensor) -> Tensor:
        n = int(length.max())
        gene = gene[:, :n]
        x = module.encode(type(tokens)(gene, value[:, :n], length), domain=domain)
        found = [*module.predict_bins(x, batch=batch)]
        found += (
            module.predict_bins_of_cell(x[:, 0], gene, batch=batch) if module.mvc is not None else (None,) * 2
        )
        padded = [F.pad(part.float(), (0, width - n)) for part in found if part is not None]
        return torch.cat([x[:, 0].float(), *padded], dim=1)

    shown = tokens.value.masked_fill(hidden, MASK)
    size = module.trained_at_a_time(tokens)
    packed = in_micro_batches(read, tokens.gene, shown, tokens.length, of_batch, size=size)
    given = [True, getattr(module.expression, "zero_logit", None) is not None, module.mvc is not None]
    given.append(module.mvc is not None and module.mvc.W_zero_logit is not None)
    cell, *rows = packed.split([module.n_hidden, *[width] * sum(given)], dim=1)
    bins, above, mvc, mvc_above = (rows.pop(0) if here else None for here in given)
    assert bins is not None
    return Read(cell, bins, above, mvc, mvc_above)


def masked_losses(read: Read, target: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Mean squared error of hidden bins, and of whether they are above 0, where the network says that.

    ``masked`` and ``masked_zero`` are from the tokens, ``mvc`` and ``mvc_zero`` from the cell; 0 if nothing was
    hidden.
    """
    truth = target[hidden].float()
    parts = {}
    for name, bins, above in (("masked", read.bins, read.above), ("mvc", read.mvc, read.mvc_above)):
        if bins is None:
            continue
        n = max(len(truth), 1)
        parts[name] = (bins[hidden] - truth).square().sum() / n
        if above is not None:
            parts[f"{name}_zero"] = zero_loss(above[hidden], truth > 0) if len(truth) else above.sum() * 0
    return parts


def elastic_similarity(cell: Tensor, threshold: float) -> dict[str, Tensor]:
    """The original's elastic cell similarity: cells should be alike, or have nothing in common.

    The mean over all pairs of ``1 - (max(0, cos) - threshold)²``, the cosine of a cell with itself taken as 0. Its
    least value needs no biology (vectors at right angles to each other); ``ecs_floor_alike`` is what it is where all
    are the same. Cells ``(cells, n_hidden)`` are drawn together above the threshold.
    """
    cosine = similarities(cell, cell)
    cosine = F.relu(cosine.masked_fill(torch.eye(len(cell), dtype=torch.bool, device=cell.device), 0.0))
    loss = (1 - (cosine - threshold).square()).mean()
    own = 1 / len(cell)
    alike = 1 - (1 - own) * (1 - threshold) ** 2 - own * threshold**2
    return {"ecs": loss, "ecs_floor_alike": torch.full_like(loss, alike)}


def contrastive(first: Tensor, second: Tensor, temperature: float = 0.5) -> dict[str, Tensor]:
    """Cross-entropy of finding a cell among all by its other pass through the network, with other dropout.

    The passes are ``(cells, n_hidden)``; where several processes train together, the cells of all are compared.
    """
    first, second = gather_cells(first), gather_cells(second)
    scores = similarities(first, second) / temperature
    loss = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
    return {"contrastive": loss, "contrastive_floor_chance": torch.full_like(loss, math.log(len(scores)))}
