"""Softmax attention by positive random features (FAVOR+), summed up over positions in a stream.

Choromanski et al., Rethinking Attention with Performers, ICLR 2021. With W the features, c = dim^-1/4, and

    φ(u, M) = exp(c W u - |c u|² / 2 - M) + ε,    ε = 1e-4,

a position with query q reads ``Σ φ(q)·φ(k) v / Σ φ(q)·φ(k)`` over all keys k. M is the maximum of ``c W q`` for each
query, and for the keys the maximum of ``c W k`` over all positions, features and heads of a cell. It would cancel, were
it not for ε: with the original's maximum over a whole batch, cells change each other's output.

All exponentials are taken to the base 2, with log2(e) in the features: several times faster on CPUs. Tensors have the
positions last, ``(cells * heads, features, positions)``, so that no product needs a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_EPS = 1e-4

KeyMax = Literal["cell", "batch"]


def orthogonal_features(n_features: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Random features ``(n_features, dim)``: orthogonal in blocks of ``dim``, as long as Gaussian vectors are.

    Drawn in the order of the original, blocks first, so that the same seed gives its matrices.
    """
    n_blocks = -(-n_features // dim)
    draws = [torch.randn(dim, dim, generator=generator) for _ in range(n_blocks)]
    directions = torch.cat([torch.linalg.qr(draw).Q.T for draw in draws])[:n_features]
    length = torch.randn(n_features, dim, generator=generator).norm(dim=1)
    return length[:, None] * directions


class KeySums(NamedTuple):
    """All that a position sees of the others."""

    top: Tensor  # the keys' maximum M, to the base 2          (cells * heads, 1, 1)
    sums: Tensor  # Σ φ(k) ⊗ [v, 1]                            (cells * heads, dim + 1, features)


class FavorAttention(nn.Module):
    """Attention between all positions of a cell, linear in their number.

    Parameters
    ----------
    n_hidden
        Width of the positions.
    n_heads, head_dim
        Heads and their width; their product need not be ``n_hidden``.
    n_features
        Random features, shared by the heads.
    """

    projection: Tensor

    def __init__(self, n_hidden: int, n_heads: int, head_dim: int, n_features: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        self.query = nn.Linear(n_hidden, n_heads * head_dim, bias=False)
        self.key = nn.Linear(n_hidden, n_heads * head_dim, bias=False)
        self.value = nn.Linear(n_hidden, n_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, n_hidden)
        self.register_buffer("projection", orthogonal_features(n_features, head_dim))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features."""
        n_features, dim = self.projection.shape
        self.projection.copy_(orthogonal_features(n_features, dim, generator))

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Queries, keys or values ``(cells * heads, dim, positions)``."""
        weight = linear.weight.to(x.dtype).expand(len(x), -1, -1)
        return torch.bmm(weight, x.transpose(1, 2)).view(len(x) * self.n_heads, self.head_dim, -1)

    def _logits(self, linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
        """``c W u`` ``(cells * heads, features, positions)`` and ``|c u|² / 2`` ``(cells * heads, 1, positions)``.

        Both to the base 2, of queries or keys u.
        """
        u = self._heads(linear, x)
        scale = math.log2(math.e) * self.head_dim**-0.25
        features = (self.projection * scale).to(x.dtype).expand(len(u), -1, -1)
        half_square = u.float().square().sum(1, keepdim=True) * (0.5 * scale * self.head_dim**-0.25)
        return torch.bmm(features, u), half_square

    def reduce(self, parts: Iterable[tuple[Tensor, Tensor | None]], key_max: KeyMax) -> KeySums:
        """Sum keys and values up over all positions; where M rises, what was summed before is scaled down.

        Positions are ``(cells, positions, n_hidden)``, with how many each stands for, ``None`` for 1 each; M is taken
        over ``key_max``.
        """
        top = self.projection.new_tensor(-torch.inf)
        sums = values = self.projection.new_zeros(())
        for x, weight in parts:
            logits, half_square = self._logits(self.key, x)
            risen = torch.maximum(top, self._highest(logits, weight, len(x), key_max))
            v = F.pad(self._heads(self.value, x), (0, 0, 0, 1), value=1.0)  # a last one to sum φ(k) itself
            if weight is not None:
                v = v * weight.to(v.dtype).repeat_interleave(self.n_heads, 0)[:, None]
            kernel = _exp2_of_difference(logits, half_square + risen)
            sums = sums * torch.exp2(top - risen) + torch.bmm(v, kernel.transpose(1, 2)).float()
            values = values + v.sum(2, keepdim=True, dtype=torch.float32)
            top = risen
        return KeySums(top, sums + KERNEL_EPS * values)

    def _highest(self, logits: Tensor, weight: Tensor | None, n_cells: int, key_max: KeyMax) -> Tensor:
        """M of some positions ``(cells * heads, 1, 1)``."""
        if weight is None:
            highest = logits.view(n_cells, -1).amax(1)  # (cells,)
        else:
            by_position = logits.unflatten(0, (n_cells, -1)).amax((1, 2))  # (cells, positions)
            highest = by_position.masked_fill(weight == 0, -torch.inf).amax(1)
        if key_max == "batch":
            highest = highest.amax().expand_as(highest)
        return highest.float().repeat_interleave(self.n_heads)[:, None, None]

    def _query_kernel(self, x: Tensor) -> Tensor:
        """φ(q) without its ε ``(cells * heads, features, positions)``."""
        logits, half_square = self._logits(self.query, x)
        return _exp2_of_difference(logits, half_square + logits.amax(1, keepdim=True))

    def forward(self, x: Tensor, keys: KeySums) -> Tensor:
        """What positions ``(cells, positions, n_hidden)`` read, of the same shape."""
        y = torch.bmm(keys.sums.to(x.dtype), self._query_kernel(x)).float()
        y = y + KERNEL_EPS * keys.sums.sum(2, keepdim=True)  # (cells * heads, dim + 1, positions)
        y = (y[:, :-1] / y[:, -1:]).to(x.dtype).reshape(len(x), -1, x.shape[1])
        weight, bias = self.out.weight.to(x.dtype), self.out.bias.to(x.dtype)
        return torch.baddbmm(bias, y.transpose(1, 2), weight.T.expand(len(x), -1, -1))

    def received(self, parts: Callable[[], Iterable[Tensor]], keys: KeySums) -> Tensor:
        """Attention that each position of one cell receives, mean over queries and heads ``(positions,)``.

        ``parts`` gives the positions from the start at each call.
        """
        total, n_queries = torch.zeros((), device=keys.sums.device), 0
        for x in parts():
            total = total + self._normalised(x, keys).sum(2)  # (heads, features)
            n_queries += x.shape[1]
        by_key = [torch.einsum("hm,hmn->n", total, self._key_kernel(x, keys)) for x in parts()]
        return torch.cat(by_key) / (n_queries * self.n_heads)

    def between(self, x: Tensor, keys: KeySums) -> Tensor:
        """Attention between some positions of one cell, mean over heads ``(queries, keys)``.

        Of all the attention that a query pays, so that a row sums to less than 1.
        """
        pairs = torch.bmm(self._normalised(x, keys).transpose(1, 2), self._key_kernel(x, keys))
        return pairs.mean(0)

    def _normalised(self, x: Tensor, keys: KeySums) -> Tensor:
        """φ(q) over its sum over all keys ``(cells * heads, features, positions)``."""
        kernel = self._query_kernel(x) + KERNEL_EPS
        return kernel / torch.bmm(keys.sums[:, -1:], kernel)

    def _key_kernel(self, x: Tensor, keys: KeySums) -> Tensor:
        """φ(k) ``(cells * heads, features, positions)``."""
        logits, half_square = self._logits(self.key, x)
        return _exp2_of_difference(logits, half_square + keys.top) + KERNEL_EPS


def _exp2_of_difference(x: Tensor, shift: Tensor) -> Tensor:
    """``2 ** (x - shift)``; in the memory of ``x`` where there are no gradients."""
    if torch.is_grad_enabled():
        return torch.exp2(x - shift.to(x.dtype))
    return x.sub_(shift.to(x.dtype)).exp2_()
