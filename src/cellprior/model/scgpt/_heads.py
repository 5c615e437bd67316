"""What ScGPT reads from hidden states: bins of genes, from their tokens or from the cell, and classes."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mvc = Literal["inner product", "inner product, detach", "concat query", "sum query"]
QUERY_WIDTH = 64  # of the styles that the original calls "concat query" and "sum query"


class Expression(nn.Module):
    """Bin of a gene from its token, and the probability that it is above 0."""

    def __init__(self, width: int, n_hidden: int, zero_probability: bool) -> None:
        super().__init__()
        self.fc = _mlp(width, n_hidden)
        self.zero_logit = _mlp(width, n_hidden) if zero_probability else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bins ``(...)`` and probabilities from ``(..., width)``."""
        bins = self.fc(hidden)[..., 0]
        return bins, None if self.zero_logit is None else self.zero_logit(hidden)[..., 0].sigmoid()


def _mlp(width: int, n_hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, n_hidden), nn.LeakyReLU(), nn.Linear(n_hidden, n_hidden), nn.LeakyReLU(),
        nn.Linear(n_hidden, 1),
    )  # fmt: skip


class LinearExpression(nn.Linear):
    """Bin of a gene from its token in one step, as in the first scFormer."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Bins ``(...)``, and no probability."""
        return super().forward(input)[..., 0], None


def linear_expression(width: int, n_hidden: int, zero_probability: bool) -> LinearExpression:
    """See :class:`LinearExpression`; arguments as of :class:`Expression`."""
    return LinearExpression(width, 1)


class CellExpression(nn.Module):
    """Bin of any gene from the class token of a cell; the original's masked value prediction for cell modelling.

    Parameters
    ----------
    n_hidden
        Width of the genes' vectors.
    width
        Of the cells', with the batch where decoders are told it.
    style
        With q the sigmoid of a projection of the gene's vector and c the cell's: ``"inner product"``, ``(W q)·c``;
        with ``", detach"``, without a gradient for the gene; ``"concat query"`` and ``"sum query"``, a small network
        of q beside c, or of their sum. The original cannot run the last two.
    zero_probability
        Give the probability that the bin is above 0 as well; with the inner product only.
    """

    def __init__(self, n_hidden: int, width: int, style: Mvc, zero_probability: bool) -> None:
        super().__init__()
        self.style = style
        inner = style.startswith("inner product")
        self.gene2query = nn.Linear(n_hidden, QUERY_WIDTH if style == "concat query" else n_hidden)
        if inner:
            self.W = nn.Linear(n_hidden, width, bias=False)
        elif style in ("concat query", "sum query"):
            self.fc1 = nn.Linear(width + QUERY_WIDTH if style == "concat query" else width, QUERY_WIDTH)
            self.hidden_activation = nn.PReLU()
            self.fc2 = nn.Linear(QUERY_WIDTH, 1)
        else:
            msg = f"mvc={style!r} is not known; choose one of {', '.join(map(repr, Mvc.__args__))}."  # type: ignore[attr-defined]
            raise ValueError(msg)
        self.W_zero_logit = nn.Linear(n_hidden, width) if inner and zero_probability else None

    def forward(self, cell: Tensor, genes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bins ``(cells, width)`` and probabilities, of genes by their vectors ``(cells, width, n_hidden)``."""
        query = self.gene2query(genes.detach() if self.style.endswith("detach") else genes).sigmoid()
        if not self.style.startswith("inner product"):
            c = cell[:, None].expand(-1, genes.shape[1], -1)
            x = torch.cat([c, query], dim=2) if self.style == "concat query" else c + query
            return self.fc2(self.hidden_activation(self.fc1(x)))[..., 0], None
        bins = torch.bmm(self.W(query), cell[:, :, None])[..., 0]
        if self.W_zero_logit is None:
            return bins, None
        return bins, torch.bmm(self.W_zero_logit(query), cell[:, :, None])[..., 0].sigmoid()


class Classifier(nn.Module):
    """Classes from the class token of cells: the original's own annotation, and its adversary."""

    def __init__(self, n_hidden: int, n_classes: int, n_layers: int, activation: type[nn.Module]) -> None:
        super().__init__()
        blocks = [
            (nn.Linear(n_hidden, n_hidden), activation(), nn.LayerNorm(n_hidden)) for _ in range(n_layers - 1)
        ]
        self.blocks = nn.Sequential(*(part for block in blocks for part in block))
        self.out = nn.Linear(n_hidden, n_classes)

    def forward(self, cell: Tensor) -> Tensor:
        """Logits ``(cells, n_classes)``."""
        return self.out(self.blocks(cell))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def reverse_gradient(x: Tensor) -> Tensor:
    """The same numbers, whose gradient has the opposite sign [Ganin & Lempitsky, ICML 2015]."""
    return _Reversed.apply(x)


def zero_loss(probability: Tensor, above: Tensor) -> Tensor:
    """Mean of ``-ln`` of the probability of what is the case: that a bin is above 0, or not ``(places,)``."""
    eps = torch.finfo(probability.dtype).eps
    return F.binary_cross_entropy(probability.clamp(eps, 1 - eps), above.to(probability.dtype))
