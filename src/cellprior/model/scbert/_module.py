"""The ScBERT network, top to bottom: binned genes as tokens, Performer over genes, bins out.

A cell is a sequence with one position per vocabulary gene, expressed or not, and a class token at the end. Attention
is linear in the number of positions and couples them through a handful of sums only, see
:mod:`~cellprior.model.scbert._attention`. Without gradients the network goes through a cell in chunks of positions
that fit a processor's cache; with gradients the same code takes all positions at once.

Yang et al., scBERT as a large-scale pretrained deep language model for cell type annotation of single-cell RNA-seq
data, Nature Machine Intelligence 2022. Choromanski et al., Rethinking Attention with Performers, ICLR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cellprior._arguments import one_of, share, whole
from cellprior.model.engine._cores import on_cores
from cellprior.model.learning._contrast import in_micro_batches
from cellprior.model.scbert._attention import FavorAttention, KeyMax, KeySums
from cellprior.model.scbert._inputs import counts_to_bins
from cellprior.model.scbert._loss import cell_losses
from cellprior.model.scbert._pairs import class_tokens

# of features at a time: what a core's cache holds, and what keeps a GPU busy
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 6 * 2**20, 2**30
KEEP_BYTES = 64 * 2**20  # of features that a layer keeps for its gradient; above, they are computed again
TRAINED_POSITIONS = 20_000  # of the cells whose gradient is computed at a time: one cell of the released size
EVERYTHING = slice(None)
HEAD_WIDTHS = (512, 128)  # of the original's classifier
MAX_BINS = 253  # with two other tokens they fit a byte
MAX_FEATURES = 2**14  # they are drawn one by one

Pooling = Literal["mean", "cls", "expressed"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "expressed")
GeneVectors = Literal["learned", "fixed"]


class ScBERTModule(BaseModuleClass):
    """ScBERT.

    Parameters
    ----------
    n_genes
        Size of the gene vocabulary.
    n_hidden
        Width of a position.
    n_layers
        Performer layers.
    n_heads, head_dim
        Attention heads and their width.
    n_bins
        Bins of expression above bin 0. Token ``n_bins + 1`` is the mask.
    n_features
        Random features of the attention; by default ``int(head_dim * ln(head_dim))``.
    dropout_rate
        Dropout after attention and feed-forward network; the original has none.
    gene_vectors
        ``"learned"``, or ``"fixed"``: in float64 and not trained, as the gene2vec vectors of the original.
    key_max
        Over what the maximum of the keys is taken. ``"batch"``, as in the original, makes the cells of a batch
        change each other's embedding.
    n_official_classes
        Classes of a checkpoint that the original fine-tuned: its classifier in place of the bins.
    pooling
        How a cell is embedded unless :meth:`pool` is told otherwise: as the weights were trained for.
    """

    def __init__(
        self,
        n_genes: int,
        *,
        n_hidden: int = 200,
        n_layers: int = 6,
        n_heads: int = 10,
        head_dim: int = 64,
        n_bins: int = 5,
        n_features: int | None = None,
        dropout_rate: float = 0.0,
        gene_vectors: GeneVectors = "learned",
        key_max: KeyMax = "cell",
        n_official_classes: int = 0,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        whole(n_hidden=n_hidden, n_layers=n_layers, n_heads=n_heads)
        whole(most=MAX_FEATURES, head_dim=head_dim)
        whole(most=MAX_BINS, n_bins=n_bins)
        whole(least=0, n_official_classes=n_official_classes)
        share(dropout_rate=dropout_rate)
        one_of(("learned", "fixed"), gene_vectors=gene_vectors)
        one_of(("cell", "batch"), key_max=key_max)
        one_of(POOLINGS, pooling=pooling)
        if n_features is None:
            n_features = int(head_dim * math.log(head_dim))
        whole(most=MAX_FEATURES, n_features=n_features)
        self.n_genes, self.n_hidden, self.n_latent, self.n_bins = n_genes, n_hidden, n_hidden, n_bins
        self.key_max = key_max
        self.steps_since_redraw = 0  # rises in training; saved beside the tensors
        self.pooling: Pooling = pooling
        self.n_zero_genes: int | None = None  # of :meth:`hidden`, see :meth:`pool`; saved beside the tensors
        self.n_kernel_values = n_heads * n_features  # of one position
        self.embedder = Embedder(n_genes, n_hidden, n_bins + 2, gene_vectors)
        self.encoder = nn.ModuleList(
            PerformerLayer(n_hidden, n_heads, head_dim, n_features, dropout_rate) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(n_hidden)
        self.bins = None if n_official_classes else nn.Linear(n_hidden, n_bins + 2)
        self.official_head = (
            OfficialHead(n_genes + 1, n_hidden, n_official_classes) if n_official_classes else None
        )

    def tokens(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """Bins of all vocabulary genes ``(cells, n_genes)``, uint8, from raw counts, dense or sparse CSR.

        ``gene_index`` is the vocabulary row of each column, ``None`` if the columns are the vocabulary. The other
        genes are in bin 0.
        """
        bins = counts_to_bins(counts, self.n_bins)
        if gene_index is None:
            return bins
        tokens = bins.new_zeros(len(bins), self.n_genes)
        tokens[:, gene_index] = bins
        return tokens

    def encode(self, tokens: Tensor) -> Tensor:
        """Hidden states of all positions ``(cells, n_genes + 1, n_hidden)``, the class token last.

        Parameters
        ----------
        tokens
            Bins, or ``n_bins + 1`` where a gene is masked, ``(cells, n_genes)``.
        """
        self._check(tokens)
        return torch.cat([self._encode(group) for group in self._groups(tokens)])

    def predict_bins(self, hidden: Tensor) -> Tensor:
        """Logits ``(cells, positions, n_bins + 2)`` from hidden states, of all or some positions."""
        if self.bins is None:
            msg = (
                "A checkpoint that the original fine-tuned has no prediction of bins; load a pretrained one."
            )
            raise RuntimeError(msg)
        return self.bins(hidden)

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits ``(cells, n_official_classes)`` of the original's own classifier."""
        if self.official_head is None:
            msg = "This network has no classifier of the original; load a checkpoint that the original fine-tuned."
            raise RuntimeError(msg)
        return torch.cat([self.official_head(self.encode(group)) for group in self._groups(tokens)])

    def pool(
        self, tokens: Tensor, pooling: Pooling | None = None, *, n_zero_genes: int | None = None
    ) -> Tensor:
        """Embed cells; without gradients, the hidden states of a few cells are in memory at a time.

        Parameters
        ----------
        tokens
            Bins ``(cells, n_genes)``.
        pooling
            ``"mean"`` over the genes, ``"expressed"`` over those above bin 0 (over all, in a cell without any), or
            ``"cls"``, the class token; by default the network's own.
        n_zero_genes
            Approximate: besides the genes above bin 0, keep only so many of a cell's other genes, which stand for
            all of them in every sum. They come from a fixed order, so that a cell's result is always the same.

        Returns
        -------
        Embedding ``(cells, n_hidden)``, float32.
        """
        pooling = self.pooling if pooling is None else pooling
        if pooling not in POOLINGS:
            msg = f'pooling={pooling!r} is not known; choose "mean", "cls" or "expressed".'
            raise ValueError(msg)
        if n_zero_genes is not None and n_zero_genes < 1:
            msg = (
                f"n_zero_genes={n_zero_genes}; at least 1 is needed to stand for the others, or None for all."
            )
            raise ValueError(msg)
        self._check(tokens)
        if self._by_pairs(pooling, n_zero_genes):
            return class_tokens(self, tokens)
        pooled = partial(self._pool, pooling=pooling, n_zero_genes=n_zero_genes)
        return torch.cat(list(on_cores(pooled, self._groups(tokens), tokens.device)))

    def _by_pairs(self, pooling: Pooling | None = None, n_zero_genes: int | None = None) -> bool:
        """Whether cells are embedded by :func:`~cellprior.model.scbert._pairs.class_tokens`."""
        of_class = (self.pooling if pooling is None else pooling) == "cls"
        return of_class and len(self.encoder) == 1 and n_zero_genes is None and self.key_max == "cell"

    def hidden(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """Cells as :meth:`pool` embeds them ``(cells, n_hidden)``, from raw counts: what the annotation head reads.

        Gradients are those of all cells, with the memory of a few.
        """
        tokens = self.tokens(counts, gene_index=gene_index)
        size = None
        if torch.is_grad_enabled() and not self._by_pairs(n_zero_genes=self.n_zero_genes):
            kept = self.n_genes
            if self.n_zero_genes is not None:
                kept = min(kept, int((tokens > 0).sum(1).max()) + self.n_zero_genes)
            size = max(TRAINED_POSITIONS // kept, 1)
        return in_micro_batches(
            lambda cells: self.pool(cells, n_zero_genes=self.n_zero_genes), tokens, size=size
        )

    @torch.no_grad()
    def attention(self, tokens: Tensor, *, genes: Tensor | None = None) -> Tensor:
        """Attention within one cell, mean over heads and layers, each layer's from that layer's own input.

        The original takes each map from an input to which the layer's output has been added, in float16.

        Parameters
        ----------
        tokens
            Bins ``(1, n_genes)``.
        genes
            Positions; ``n_genes`` is the class token.

        Returns
        -------
        Without ``genes``, attention that each position receives, mean over all queries ``(n_genes + 1,)``; sums to
        1. With ``genes``, what these pay to each other ``(queries, keys)``, as shares of all that they pay.
        """
        self._check(tokens)
        if len(tokens) != 1:
            msg = f"tokens hold {len(tokens)} cells; attention is given for one cell at a time."
            raise ValueError(msg)
        with torch.autocast(tokens.device.type, enabled=False):
            x = self.embedder(tokens)
            chunk = self._chunk(x, torch.float32)
            maps = []
            for layer in self._performers():
                maps.append(layer.attention_map(x, genes, chunk))
                x = layer(x, None, chunk)
        return torch.stack(maps).mean(0)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """What fine-tuning trains besides the annotation head; ``"original"`` is the last layer but one."""
        return {
            "last": [self.encoder[-1], self.norm],
            "original": [*self.encoder[-2:-1], self.norm],
            "all": [self.embedder, self.encoder, self.norm],
            "head": [],
            "lora": [self.norm],
        }

    def adapted_layers(self) -> list[nn.Linear]:
        """Projections that ``trainable="lora"`` changes."""
        attentions = [layer.attention for layer in self._performers()]
        return [linear for attention in attentions for linear in (attention.query, attention.value)]

    def redraw_projections(self, generator: torch.Generator | None = None) -> None:
        """New random features for the layers whose attention trains; the other layers were not made for them."""
        for layer in self._performers():
            if any(parameter.requires_grad for parameter in layer.attention.parameters()):
                layer.attention.redraw(generator)

    def _performers(self) -> list[PerformerLayer]:
        return [layer for layer in self.encoder if isinstance(layer, PerformerLayer)]

    def training_losses(self, batch: Mapping[str, Tensor], **objective: Any) -> dict[str, Tensor]:
        """Losses of one minibatch of a training run, see :func:`~cellprior.model.scbert._loss.cell_losses`."""
        return cell_losses(self, batch, **objective)

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[1] != self.n_genes:
            msg = (
                f"tokens are {tuple(tokens.shape)}, needed (cells, {self.n_genes}): one per vocabulary gene. The "
                "class token is added by the network."
            )
            raise ValueError(msg)

    def _groups(self, tokens: Tensor) -> Iterator[Tensor]:
        """Cells that go through the network together: as many as fit a chunk, and all where there are gradients."""
        if torch.is_grad_enabled() or self.key_max == "batch":
            return iter([tokens])
        at_a_time = _chunk_bytes(tokens.device) // (4 * self.n_kernel_values * (self.n_genes + 1))
        return iter(tokens.split(max(at_a_time, 1)))

    def _chunk(self, x: Tensor, dtype: torch.dtype) -> Chunk:
        size = x.shape[1]
        if not torch.is_grad_enabled():
            size = max(_chunk_bytes(x.device) // (dtype.itemsize * self.n_kernel_values * len(x)), 32)
        return Chunk(size, dtype, self.key_max)

    def _encode(
        self,
        tokens: Tensor,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        read: slice = EVERYTHING,
    ) -> Tensor:
        """Hidden states of the positions ``read``, float32, see :meth:`PerformerLayer.forward`."""
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.autocast(device, enabled=False):
            x = self.embedder(tokens, index)
            chunk = self._chunk(x, dtype)
            again = torch.is_grad_enabled() and 4 * x[..., 0].numel() * self.n_kernel_values > KEEP_BYTES
            for layer in self.encoder:
                of_layer = read if layer is self.encoder[-1] else EVERYTHING
                if again:
                    x = checkpoint(layer, x, weight, chunk, of_layer, use_reentrant=False)
                else:
                    x = layer(x, weight, chunk, of_layer)
            return self.norm(x)

    def _pool(self, tokens: Tensor, pooling: Pooling, n_zero_genes: int | None) -> Tensor:
        index = weight = None
        share = torch.ones_like(tokens, dtype=torch.float32)
        if n_zero_genes is not None:
            index, share = sample_genes(tokens, n_zero_genes)
            tokens = tokens.gather(1, index)
            weight = F.pad(share, (0, 1), value=1.0)  # the class token
        if pooling == "cls":
            return self._encode(tokens, index, weight, read=slice(-1, None)).squeeze(1)
        if pooling == "expressed":
            expressed = share * (tokens > 0)
            share = torch.where(expressed.any(1, keepdim=True), expressed, share)
        hidden = self._encode(tokens, index, weight)
        share = share / share.sum(1, keepdim=True)
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.bmm(share[:, None], hidden[:, :-1]).squeeze(1)


def sample_genes(tokens: Tensor, n_zero_genes: int, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The genes that an approximate pass keeps: the expressed ones, and some of the others.

    Of the genes in bin 0 in ``tokens`` ``(cells, n_genes)``, ``n_zero_genes`` are kept: the first ones in an order
    that depends on ``n_genes`` alone, or in ``order`` ``(n_genes,)``, as training draws one for each step. Gives
    positions ``(cells, kept)``, and how many genes each stands for, 0 for the padding of cells that keep fewer.
    """
    if order is None:
        order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    order = order.to(tokens.device)
    zero = tokens[:, order] == 0
    n_zero = zero.sum(1, keepdim=True)
    kept = ~zero | (zero.cumsum(1) <= n_zero_genes)
    n_kept = kept.sum(1)
    row, column = kept.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=tokens.device) - (n_kept.cumsum(0) - n_kept)[row]
    first = column.new_zeros(len(tokens), int(n_kept.max()))
    first[row, place] = column
    stands_for = n_zero / n_zero.clamp(max=n_zero_genes)  # NaN, and not read, where no gene is in bin 0
    weight = torch.where(zero.gather(1, first), stands_for, 1.0)
    padding = torch.arange(first.shape[1], device=tokens.device) >= n_kept[:, None]
    return order[first], weight.masked_fill(padding, 0.0)


class Embedder(nn.Module):
    """Token vectors plus gene vectors; for the class token, token 0 and no gene."""

    def __init__(self, n_genes: int, n_hidden: int, n_tokens: int, gene_vectors: GeneVectors) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(n_tokens, n_hidden)
        self.gene_vectors: Tensor
        if gene_vectors == "learned":
            self.gene_vectors = nn.Parameter(torch.randn(n_genes, n_hidden))
        else:
            self.register_buffer("gene_vectors", torch.randn(n_genes, n_hidden, dtype=torch.float64))

    def forward(self, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Positions ``(cells, genes + 1, n_hidden)`` of all genes, or of those of ``index`` ``(cells, genes)``."""
        genes = self.gene_vectors if index is None else self.gene_vectors[index]
        x = (
            self.token_embedding(tokens.int()) + genes
        ).float()  # a sum in float64 where the gene vectors are
        of_class = self.token_embedding.weight[0].expand(len(x), 1, -1)
        return torch.cat([x, of_class], 1)


class Chunk(NamedTuple):
    """How a layer goes through a cell."""

    size: int  # positions at a time
    dtype: torch.dtype  # of the large products; what is between them is float32
    key_max: KeyMax


class PerformerLayer(nn.Module):
    """Pre-norm layer: attention between the positions of a cell, then a feed-forward network per position."""

    def __init__(
        self, n_hidden: int, n_heads: int, head_dim: int, n_features: int, dropout_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(n_hidden)
        self.attention = FavorAttention(n_hidden, n_heads, head_dim, n_features)
        self.norm2 = nn.LayerNorm(n_hidden)
        self.ff1 = nn.Linear(n_hidden, 4 * n_hidden)
        self.ff2 = nn.Linear(4 * n_hidden, n_hidden)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, weight: Tensor | None, chunk: Chunk, read: slice = EVERYTHING) -> Tensor:
        """Output of the layer at the positions ``read``; written over ``x`` where there are no gradients.

        Positions are ``(cells, positions, n_hidden)``; ``weight`` is how many each stands for ``(cells, positions)``,
        0 for padding, ``None`` for 1 each; all are seen.
        """
        keys = self._keys(x, weight, chunk)
        x = x[:, read]
        if torch.is_grad_enabled():
            return self._block(x, keys, chunk)
        for part in x.split(chunk.size, 1):
            part.copy_(self._block(part, keys, chunk))
        return x

    def _keys(self, x: Tensor, weight: Tensor | None, chunk: Chunk) -> KeySums:
        parts = self._normed(x, chunk)
        if weight is None:
            return self.attention.reduce(((part, None) for part in parts), chunk.key_max)
        return self.attention.reduce(zip(parts, weight.split(chunk.size, 1), strict=True), chunk.key_max)

    def _normed(self, x: Tensor, chunk: Chunk) -> Iterator[Tensor]:
        return (self.norm1(part).to(chunk.dtype) for part in x.split(chunk.size, 1))

    def _block(self, x: Tensor, keys: KeySums, chunk: Chunk) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x).to(chunk.dtype), keys).float())
        hidden = F.gelu(_linear(self.ff1, self.norm2(x).to(chunk.dtype)))
        return x + self.dropout(_linear(self.ff2, hidden).float())

    def attention_map(self, x: Tensor, genes: Tensor | None, chunk: Chunk) -> Tensor:
        """Attention of one cell, see :meth:`ScBERTModule.attention`."""
        keys = self._keys(x, None, chunk)
        if genes is None:
            return self.attention.received(lambda: self._normed(x, chunk), keys)
        return self.attention.between(self.norm1(x[:, genes]), keys)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


class OfficialHead(nn.Module):
    """Classifier of the original: one number per position, then three linear layers."""

    def __init__(self, n_positions: int, n_hidden: int, n_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, (1, n_hidden))
        self.fc1 = nn.Linear(n_positions, HEAD_WIDTHS[0])
        self.fc2 = nn.Linear(*HEAD_WIDTHS)
        self.fc3 = nn.Linear(HEAD_WIDTHS[1], n_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``(cells, n_classes)`` from all positions ``(cells, positions, n_hidden)``."""
        by_position = F.relu(self.conv1(hidden[:, None])).flatten(1)  # (cells, positions)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(by_position)))))


def _chunk_bytes(device: torch.device) -> int:
    return CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
