"""The Geneformer network, top to bottom: ranked genes as tokens, BERT over them, genes out.

A cell is the sequence of its expressed genes, most remarkable first, see :mod:`~cellprior.model.geneformer._inputs`.
Cells of nearly equal length go through the network together, so that little of the work is padding; what is not read
(the last layer, the logits of all genes) is not computed.

Theodoris et al., Transfer learning enables predictions in network biology, Nature 2023. Devlin et al., BERT, NAACL
2019: layers with their norms behind (post-LN).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from cellprior._arguments import flag, share, whole
from cellprior.model.engine._cores import on_cores
from cellprior.model.engine._groups import of_like_length
from cellprior.model.geneformer._inputs import first_gene, rank_tokens, token_counts
from cellprior.model.geneformer._loss import masked_losses
from cellprior.model.learning._ranked import pooled

# tokens that go through the network together: what a core's cache likes, and what keeps a GPU busy
CPU_TOKENS, GPU_TOKENS = 4096, 2**17
LEAST_FILLED = 0.9  # how long the shortest cell of a group is, at least, as a share of the longest
NORM_EPS = 1e-12
EVERYTHING = slice(None)

Pooling = Literal["mean", "cls"]


class GeneformerModule(BaseModuleClass):
    """Geneformer.

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
        Most tokens of a cell.
    special_tokens
        Cells begin with ``<cls>`` and end with ``<eos>``, as in V2.
    dropout_rate
        Dropout of the embeddings, of attention, and after attention and feed-forward network.
    """

    gene_scale: Tensor

    def __init__(
        self,
        n_genes: int,
        *,
        n_hidden: int = 256,
        n_layers: int = 6,
        n_heads: int = 4,
        n_feedforward: int = 512,
        n_positions: int = 2048,
        special_tokens: bool = False,
        dropout_rate: float = 0.02,
    ) -> None:
        super().__init__()
        whole(
            n_hidden=n_hidden,
            n_layers=n_layers,
            n_heads=n_heads,
            n_feedforward=n_feedforward,
            n_positions=n_positions,
        )
        flag(special_tokens=special_tokens)
        share(dropout_rate=dropout_rate)
        if n_hidden % n_heads:
            msg = f"n_hidden={n_hidden} is no multiple of n_heads={n_heads}."
            raise ValueError(msg)
        self.n_genes, self.n_hidden, self.n_latent = n_genes, n_hidden, n_hidden
        self.n_positions, self.special = n_positions, special_tokens
        self.first_gene = first_gene(special_tokens)
        self.n_tokens = n_genes + self.first_gene
        self.register_buffer("gene_scale", torch.ones(n_genes, dtype=torch.float64))
        self.embedder = Embedder(self.n_tokens, n_hidden, n_positions, dropout_rate)
        self.encoder = nn.ModuleList(
            TransformerLayer(n_hidden, n_heads, n_feedforward, dropout_rate) for _ in range(n_layers)
        )
        self.transform = nn.Linear(n_hidden, n_hidden)
        self.transform_norm = nn.LayerNorm(n_hidden, eps=NORM_EPS)
        self.gene_bias = nn.Parameter(torch.zeros(self.n_tokens))
        self.apply(_initialise)

    def check_tensors(self, state_dict: Mapping[str, Tensor]) -> None:
        """Refuse numbers that genes cannot be divided by.

        Raises ValueError, with the name of the tensor.
        """
        if not bool((state_dict["gene_scale"] > 0).all()):
            msg = "the tensor gene_scale has values that are not above 0."
            raise ValueError(msg)

    def tokens(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """Tokens of cells ``(cells, longest)``, int64, 0 behind each cell's, from raw counts, dense or sparse CSR.

        ``gene_index`` is the vocabulary row of each column; ``None`` if the columns are the vocabulary.
        """
        return rank_tokens(
            counts,
            self.gene_scale,
            n_positions=self.n_positions,
            special=self.special,
            gene_index=gene_index,
        )

    def encode(
        self,
        counts: Tensor,
        *,
        gene_index: Tensor | None = None,
        pooling: Pooling | None = None,
        layer: int = -1,
    ) -> Tensor:
        """Embed cells from raw counts ``(cells, n_hidden)``; arguments as of :meth:`tokens` and :meth:`pool`."""
        return self.pool(self.tokens(counts, gene_index=gene_index), pooling, layer=layer)

    def pool(
        self,
        tokens: Tensor,
        pooling: Pooling | None = None,
        *,
        layer: int = -1,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """Embed cells from their tokens.

        Parameters
        ----------
        tokens
            ``(cells, positions)``, 0 behind each cell's.
        pooling
            ``"mean"`` over the genes, or ``"cls"``, the first position, for networks that have this token; by default
            the original's choice, ``"cls"`` where there is one.
        layer
            0 for the output of the last layer, -1 for that of the one before it, and so on, as the original counts.
        left_out
            Positions that are seen, and not part of the mean ``(cells, positions)``.

        Returns
        -------
        Float32 ``(cells, n_hidden)``; zeros for a mean over no genes.
        """
        pooling = self.checked_pooling(pooling)
        read = slice(0, 1) if pooling == "cls" else EVERYTHING

        def pooled(some: tuple[Tensor, int]) -> tuple[Tensor, Tensor]:
            cells, length = some
            group = tokens[cells, :length]
            hidden = self._encode(group, layer, read=read)
            if pooling == "mean":
                share = group >= self.first_gene
                if left_out is not None:
                    share = share & ~left_out[cells, :length]
                share = share / share.sum(1, keepdim=True).clamp(min=1)
                with torch.autocast(tokens.device.type, enabled=False):
                    hidden = torch.bmm(share[:, None].float(), hidden.float())
            return cells, hidden[:, 0].float()

        found = torch.zeros(len(tokens), self.n_hidden, device=tokens.device)
        for cells, of_cells in on_cores(pooled, self._groups(tokens), tokens.device):
            found = found.index_copy(0, cells, of_cells)
        return found

    def states(self, tokens: Tensor, *, layer: int = 0) -> Tensor:
        """Hidden states of all positions ``(cells, positions, n_hidden)``, zeros behind each cell's tokens.

        Arguments as of :meth:`pool`.
        """
        found = torch.zeros(*tokens.shape, self.n_hidden, device=tokens.device)
        for cells, length in self._groups(tokens):
            group = tokens[cells, :length]
            hidden = self._encode(group, layer).float().masked_fill((group == 0)[..., None], 0.0)
            found = found.index_put((cells,), F.pad(hidden, (0, 0, 0, tokens.shape[1] - length)))
        return found

    def predict_genes(self, hidden: Tensor) -> Tensor:
        """Logits of all tokens ``(..., n_tokens)`` from hidden states of the last layer."""
        hidden = self.transform_norm(F.relu(self.transform(hidden)))
        return F.linear(hidden, self.embedder.tokens.weight, self.gene_bias)

    def hidden(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """Mean over the genes ``(cells, n_hidden)`` from raw counts, what the annotation head reads.

        Gradients are those of all cells, with the memory of a few.
        """
        tokens = self.tokens(counts, gene_index=gene_index)
        return pooled(lambda cells: self.pool(cells, "mean"), tokens, token_counts(tokens))

    @torch.no_grad()
    def attention(self, tokens: Tensor) -> Tensor:
        """Attention within one cell, mean over heads and layers ``(positions, positions)``; rows sum to 1.

        Parameters
        ----------
        tokens
            Of one cell ``(1, positions)``, without padding.
        """
        if len(tokens) != 1 or (tokens == 0).any():
            msg = f"tokens hold {len(tokens)} cells, or padding; attention is given for one cell at a time."
            raise ValueError(msg)
        with torch.autocast(tokens.device.type, enabled=False):
            x, total = self.embedder(tokens), torch.zeros((), device=tokens.device)
            for layer in self._layers():
                total = total + layer.attention_map(x)[0].mean(0)
                x = layer(x, None)
        return total / len(self.encoder)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """What fine-tuning trains besides the annotation head; ``"last"`` is the last layer that the embedding has."""
        used = self._layers()[:-1]
        return {
            "last": [*used[-1:]] or [self.embedder],
            "all": [self.embedder, *used],
            "head": [],
            "lora": [layer.norm1 for layer in used[-1:]] or [self.embedder.norm],
        }

    def adapted_layers(self) -> list[nn.Linear]:
        """Projections that ``trainable="lora"`` changes."""
        return [linear for layer in self._layers()[:-1] for linear in (layer.query, layer.value)]

    def training_losses(self, batch: Mapping[str, Tensor], **objective: Any) -> dict[str, Tensor]:
        """Losses of one minibatch of a training run, see :func:`~cellprior.model.geneformer._loss.masked_losses`."""
        return masked_losses(self, batch, **objective)

    def checked_pooling(self, pooling: str | None) -> Pooling:
        """How to pool, if that is possible.

        Raises ValueError if it is not.
        """
        if pooling is None:
            return "cls" if self.special else "mean"
        if pooling == "cls" and not self.special:
            msg = 'pooling="cls": this network has no <cls> token, as all of V1. Take pooling="mean".'
            raise ValueError(msg)
        if pooling not in ("mean", "cls"):
            msg = f'pooling={pooling!r} is not known; choose "mean" or "cls".'
            raise ValueError(msg)
        return "cls" if pooling == "cls" else "mean"

    def checked_layer(self, layer: int) -> int:
        """How many layers are computed for an output, if there is such an output.

        Raises ValueError if there is none.
        """
        n_layers = len(self.encoder)
        if not -n_layers <= layer <= 0:
            msg = (
                f"layer={layer}; from 0, the last of {n_layers} layers, to {-n_layers}, what goes into the first, is "
                "possible. The original counts so: -1 is the layer before the last."
            )
            raise ValueError(msg)
        return n_layers + layer

    def _layers(self) -> list[TransformerLayer]:
        return [layer for layer in self.encoder if isinstance(layer, TransformerLayer)]

    def _groups(self, tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Cells that go through the network together, of nearly equal length, and the longest's; not those of none."""
        if tokens.ndim != 2 or tokens.shape[1] > self.n_positions:
            msg = f"tokens are {tuple(tokens.shape)}, needed (cells, positions), {self.n_positions} at most."
            raise ValueError(msg)
        room = CPU_TOKENS if tokens.device.type == "cpu" else GPU_TOKENS
        return of_like_length(token_counts(tokens), room, filled=LEAST_FILLED)

    def _encode(self, tokens: Tensor, layer: int, *, read: slice = EVERYTHING) -> Tensor:
        """Hidden states of the positions ``read`` of some cells, padded to the longest."""
        n_layers = self.checked_layer(layer)
        seen = tokens != 0
        mask = None if bool(seen.all()) else seen[:, None, None]  # (cells, heads, queries, keys)
        x = self.embedder(tokens)
        for i, of_layer in enumerate(self._layers()[:n_layers]):
            x = of_layer(x, mask, read if i == n_layers - 1 else EVERYTHING)
        return x if n_layers else x[:, read]


class Embedder(nn.Module):
    """Vectors of tokens and of their places; the table of types is the original's, which has one type only."""

    def __init__(self, n_tokens: int, n_hidden: int, n_positions: int, dropout_rate: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, n_hidden)
        self.positions = nn.Embedding(n_positions, n_hidden)
        self.types = nn.Embedding(2, n_hidden)
        self.norm = nn.LayerNorm(n_hidden, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, tokens: Tensor) -> Tensor:
        """Positions ``(cells, positions, n_hidden)`` from tokens ``(cells, positions)``."""
        places = self.positions.weight[: tokens.shape[1]]
        return self.dropout(self.norm(self.tokens(tokens) + self.types.weight[0] + places))


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

    def forward(self, x: Tensor, mask: Tensor | None, read: slice = EVERYTHING) -> Tensor:
        """Output at the positions ``read`` of ``x`` ``(cells, positions, n_hidden)``.

        Those in ``mask`` are seen ``(cells, 1, 1, positions)``; ``None`` for all.
        """
        query, key, value = (
            self._heads(linear(part))
            for linear, part in ((self.query, x[:, read]), (self.key, x), (self.value, x))
        )
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)  # (cells, positions, n_hidden)
        x = self.norm1(x[:, read] + self.dropout(self.out(y)))
        return self.norm2(x + self.dropout(self.ff2(F.relu(self.ff1(x)))))

    def attention_map(self, x: Tensor) -> Tensor:
        """Attention of each position to each ``(cells, heads, queries, keys)``, none of them padding."""
        query, key = self._heads(self.query(x)), self._heads(self.key(x))
        return (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(3)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)  # (cells, heads, positions, head_dim)


def _initialise(part: nn.Module) -> None:
    """Weights as BERT has them at the beginning."""
    if isinstance(part, nn.Linear | nn.Embedding):
        nn.init.normal_(part.weight, std=0.02)
    if isinstance(part, nn.Linear):
        nn.init.zeros_(part.bias)
