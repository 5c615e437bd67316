"""The Nicheformer network, top to bottom: context and ranked genes as tokens, a transformer over them, genes out.

A cell is what is known of its making, and then its expressed genes by rank, see
:mod:`~cellprior.model.nicheformer._inputs`. The original runs all cells at the same length, and averages over the
padding behind the genes as well. No position ever attends to padding: its keys and values are not computed, and without
padding in the mean neither are its own states.

Tejada-Lapuerta, Schaar et al., Nicheformer: a foundation model for single-cell and spatial omics, Nature Methods
22:2525, 2025. Layers with their norms behind (post-LN), as of Vaswani et al., Attention is all you need, NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from cellprior._arguments import one_of, share, whole
from cellprior.model.engine._cores import on_cores
from cellprior.model.engine._groups import of_like_length
from cellprior.model.learning._ranked import pooled
from cellprior.model.nicheformer._inputs import (
    FIRST_GENE,
    N_CONTEXT,
    PAD,
    TECHNOLOGIES,
    GeneScale,
    context_code,
    is_context,
    rank_tokens,
    token_counts,
)
from cellprior.model.nicheformer._loss import masked_losses

# tokens that go through the network together: what a core's cache likes, and what keeps a GPU busy
CPU_TOKENS, GPU_TOKENS = 4096, 2**17
LEAST_FILLED = 0.9  # how long the shortest cell of a group is, at least, as a share of the longest
NORM_EPS = 1e-12

Pooling = Literal["all", "genes"]
POOLINGS = ("all", "genes")
GENE_SCALES = ("clean", "rounded")


class NicheformerModule(BaseModuleClass):
    """Nicheformer.

    Parameters
    ----------
    n_genes
        Size of the gene vocabulary.
    n_hidden
        Width of a position.
    n_layers
        Transformer layers.
    n_heads
        Attention heads.
    n_feedforward
        Width within the feed-forward networks.
    n_positions
        Most tokens of a cell, context included.
    dropout_rate
        Dropout of attention, within the feed-forward network, and after both.
    gene_scale
        How genes are ranked unless a method is told otherwise: by count over the mean of the gene in the technology
        (``"clean"``), or by that mean rounded to a whole number (``"rounded"``), as the authors' tokens were made.
    """

    gene_means: Tensor

    def __init__(
        self,
        n_genes: int,
        *,
        n_hidden: int = 512,
        n_layers: int = 12,
        n_heads: int = 16,
        n_feedforward: int = 1024,
        n_positions: int = 1500,
        dropout_rate: float = 0.0,
        gene_scale: GeneScale = "clean",
    ) -> None:
        super().__init__()
        whole(n_hidden=n_hidden, n_layers=n_layers, n_heads=n_heads, n_feedforward=n_feedforward)
        whole(least=N_CONTEXT + 1, n_positions=n_positions)
        share(dropout_rate=dropout_rate)
        one_of(GENE_SCALES, gene_scale=gene_scale)
        if n_hidden % n_heads:
            msg = f"n_hidden={n_hidden} is no multiple of n_heads={n_heads}."
            raise ValueError(msg)
        self.n_genes, self.n_hidden, self.n_latent = n_genes, n_hidden, n_hidden
        self.n_positions, self.gene_scale = n_positions, gene_scale
        self.first_gene, self.n_tokens = FIRST_GENE, n_genes + FIRST_GENE
        # 0 where a gene was never seen in a technology
        self.register_buffer("gene_means", torch.zeros(len(TECHNOLOGIES), n_genes, dtype=torch.float64))
        self.embedder = Embedder(self.n_tokens, n_hidden, n_positions)
        self.encoder = nn.ModuleList(
            TransformerLayer(n_hidden, n_heads, n_feedforward, dropout_rate) for _ in range(n_layers)
        )
        self.gene_logits = nn.Linear(n_hidden, self.n_tokens)
        self.apply(_initialise)

    def tokens(
        self,
        counts: Tensor,
        *,
        gene_index: Tensor | None = None,
        context: Tensor | None = None,
        gene_scale: GeneScale | None = None,
    ) -> Tensor:
        """Tokens of cells ``(cells, longest)``, int64, padding behind each cell's, from raw counts, dense or CSR.

        ``gene_index`` is the vocabulary row of each column; ``None`` if the columns are the vocabulary. ``context``
        is the code of each cell ``(cells,)``, see :func:`~cellprior.model.nicheformer._inputs.context_code`; by
        default human, dissociated, of some assay. ``gene_scale`` is by default the network's.
        """
        if context is None:
            context = torch.full((len(counts),), context_code())
        context = context.to(counts.device).long().reshape(-1)
        scale = self.checked_scale(gene_scale)
        how: dict[str, Any] = {"n_positions": self.n_positions, "gene_index": gene_index, "gene_scale": scale}
        return rank_tokens(counts, self.gene_means, context, **how)

    def encode(
        self,
        counts: Tensor,
        *,
        gene_index: Tensor | None = None,
        context: Tensor | None = None,
        gene_scale: GeneScale | None = None,
        **pool: Any,
    ) -> Tensor:
        """Embed cells from raw counts ``(cells, n_hidden)``; arguments as of :meth:`tokens` and :meth:`pool`."""
        tokens = self.tokens(counts, gene_index=gene_index, context=context, gene_scale=gene_scale)
        return self.pool(tokens, **pool)

    def pool(
        self,
        tokens: Tensor,
        pooling: Pooling = "all",
        *,
        with_context: bool = False,
        layer: int = -1,
    ) -> Tensor:
        """Embed cells from their tokens.

        Parameters
        ----------
        tokens
            ``(cells, positions)``, padding behind each cell's.
        pooling
            Mean over ``"all"`` positions of the network, padding included, as the original; or over the ``"genes"``.
        with_context
            Over the tokens of species, assay and modality too.
        layer
            As the original counts: 0 is the output of the first layer, -1 that of the last.

        Returns
        -------
        Float32 ``(cells, n_hidden)``; zeros for a mean over nothing.
        """
        one_of(POOLINGS, pooling=pooling)
        n_layers = self.checked_layer(layer)

        def pooled(some: tuple[Tensor, int]) -> tuple[Tensor, Tensor]:
            cells, length = some
            group = tokens[cells, :length]
            n_read = self.n_positions if pooling == "all" else length
            hidden = self._encode(group, n_layers, n_read)
            group = F.pad(group, (0, n_read - length), value=PAD)
            part = torch.ones_like(group, dtype=torch.bool) if pooling == "all" else group != PAD
            if not with_context:
                part = part & ~is_context(group)
            weight = part / part.sum(1, keepdim=True).clamp(min=1)
            with torch.autocast(tokens.device.type, enabled=False):
                return cells, torch.bmm(weight[:, None].float(), hidden.float())[:, 0]

        found = torch.zeros(len(tokens), self.n_hidden, device=tokens.device)
        for cells, mean in on_cores(pooled, self._groups(tokens, padded=pooling == "all"), tokens.device):
            found = found.index_copy(0, cells, mean)
        return found

    def states(self, tokens: Tensor, *, layer: int = -1, padding: bool = False) -> Tensor:
        """Hidden states of positions ``(cells, positions, n_hidden)``.

        Zeros behind each cell's tokens; with ``padding``, of all ``n_positions`` of the network, with their states.
        Other arguments as of :meth:`pool`.
        """
        n_layers = self.checked_layer(layer)
        n_all = self.n_positions if padding else tokens.shape[1]
        found = torch.zeros(len(tokens), n_all, self.n_hidden, device=tokens.device)
        for cells, length in self._groups(tokens, padded=padding):
            group = tokens[cells, :length]
            hidden = self._encode(group, n_layers, n_all if padding else length).float()
            if not padding:
                hidden = hidden.masked_fill((group == PAD)[..., None], 0.0)
            found = found.index_put((cells,), F.pad(hidden, (0, 0, 0, n_all - hidden.shape[1])))
        return found

    def predict_genes(self, hidden: Tensor) -> Tensor:
        """Logits of all tokens ``(..., n_tokens)`` from hidden states of the last layer."""
        return self.gene_logits(hidden)

    def hidden(
        self, counts: Tensor, *, gene_index: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Mean over the genes ``(cells, n_hidden)`` from raw counts, what the annotation head reads.

        Gradients are those of all cells, with the memory of a few.
        """
        tokens = self.tokens(counts, gene_index=gene_index, context=context)
        return pooled(lambda cells: self.pool(cells, "genes"), tokens, token_counts(tokens))

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """What fine-tuning trains besides the annotation head."""
        layers = self._layers()
        return {
            "last": [layers[-1]],
            "all": [self.embedder, *layers],
            "head": [],
            "lora": [layers[-1].norm1],
        }

    def adapted_layers(self) -> list[nn.Linear]:
        """Projections that ``trainable="lora"`` changes."""
        return [linear for layer in self._layers() for linear in (layer.query, layer.value)]

    def training_losses(self, batch: Mapping[str, Tensor], **objective: Any) -> dict[str, Tensor]:
        """Losses of one minibatch of a training run, see :func:`~cellprior.model.nicheformer._loss.masked_losses`."""
        return masked_losses(self, batch, **objective)

    def checked_scale(self, gene_scale: str | None) -> GeneScale:
        """How to rank genes, if that is known.

        Raises ValueError if it is not.
        """
        if gene_scale is None:
            return self.gene_scale
        one_of(GENE_SCALES, gene_scale=gene_scale)
        return "rounded" if gene_scale == "rounded" else "clean"

    def checked_layer(self, layer: int) -> int:
        """How many layers are computed for an output, if there is such an output.

        Raises ValueError if there is none.
        """
        n_layers = len(self.encoder)
        if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer < n_layers:
            msg = (
                f"layer={layer!r}; a whole number from 0, the first of {n_layers} layers, to {n_layers - 1} is needed, "
                "or from -1, the last, down."
            )
            raise ValueError(msg)
        return 1 + layer % n_layers

    def _layers(self) -> list[TransformerLayer]:
        return [layer for layer in self.encoder if isinstance(layer, TransformerLayer)]

    def _groups(self, tokens: Tensor, *, padded: bool) -> Iterator[tuple[Tensor, int]]:
        """Cells that go through the network together, of nearly equal length, and the longest's; not those of none.

        With ``padded``, all positions of the network are computed.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.n_positions:
            msg = f"tokens are {tuple(tokens.shape)}, needed (cells, positions), {self.n_positions} at most."
            raise ValueError(msg)
        room = CPU_TOKENS if tokens.device.type == "cpu" else GPU_TOKENS
        least = self.n_positions if padded else 0
        return of_like_length(token_counts(tokens), room, filled=LEAST_FILLED, least=least)

    def _encode(self, tokens: Tensor, n_layers: int, n_read: int) -> Tensor:
        """States ``(cells, n_read, n_hidden)`` of some cells, padded to the longest; what is behind it is padding."""
        n_seen = tokens.shape[1]
        seen = tokens != PAD
        mask = None if bool(seen.all()) else seen[:, None, None]  # (cells, heads, queries, keys)
        x = self.embedder(F.pad(tokens, (0, n_read - n_seen), value=PAD))
        for layer in self._layers()[:n_layers]:
            x = layer(x, mask, n_seen)
        return x


class Embedder(nn.Module):
    """Vectors of tokens and of their places; that of padding is 0."""

    def __init__(self, n_tokens: int, n_hidden: int, n_positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, n_hidden, padding_idx=PAD)
        self.positions = nn.Embedding(n_positions, n_hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Positions ``(cells, positions, n_hidden)`` from tokens ``(cells, positions)``."""
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]


class TransformerLayer(nn.Module):
    """Attention between the positions of a cell, then a feed-forward network per position, each with a norm behind."""

    def __init__(self, n_hidden: int, n_heads: int, n_feedforward: int, dropout_rate: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(n_hidden, n_hidden)
        self.key = nn.Linear(n_hidden, n_hidden)
        self.value = nn.Linear(n_hidden, n_hidden)
        self.out = nn.Linear(n_hidden, n_hidden)
        self.norm1 = nn.LayerNorm(n_hidden, eps=NORM_EPS)
        self.ff1 = nn.Linear(n_hidden, n_feedforward)
        self.ff2 = nn.Linear(n_feedforward, n_hidden)
        self.norm2 = nn.LayerNorm(n_hidden, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, mask: Tensor | None, n_seen: int) -> Tensor:
        """Output at all positions ``(cells, positions, n_hidden)``.

        Those behind ``n_seen`` are padding, which nothing attends to; ``mask`` says which of the others are seen
        ``(cells, 1, 1, n_seen)``, ``None`` for all.
        """
        seen = x[:, :n_seen]
        query, key, value = (
            self._heads(linear(part))
            for linear, part in ((self.query, x), (self.key, seen), (self.value, seen))
        )
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)  # (cells, positions, n_hidden)
        x = self.norm1(x + self.dropout(self.out(y)))
        return self.norm2(x + self.dropout(self.ff2(self.dropout(F.relu(self.ff1(x))))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)  # (cells, heads, positions, head_dim)


def _initialise(part: nn.Module) -> None:
    """Weights as BERT has them at the beginning: the original's are larger, and learn more slowly."""
    if isinstance(part, nn.Linear | nn.Embedding):
        nn.init.normal_(part.weight, std=0.02)
    if isinstance(part, nn.Linear):
        nn.init.zeros_(part.bias)
    if isinstance(part, nn.Embedding) and part.padding_idx is not None:
        nn.init.zeros_(part.weight[part.padding_idx])
