"""The UCE network, top to bottom: genes as vectors of their proteins, a post-norm transformer, a decoder of cells.

A token is a row of a table. In the released files that is a vector of 5,120 numbers, of a protein or of a chromosome,
which two small layers make 1,280 of; as these see nothing else, here the table holds what they give, which is the
same to the last digits. A cell sees itself only. Without gradients, cells of like length go through together, and the
last layer computes the class token alone.

Rosen et al., Universal cell embedding provides a foundation model for cell biology, Nature 2026,
doi 10.1038/s41586-026-10689-z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from cellprior._arguments import share, whole
from cellprior.model.data._entries import Counts, entries_of
from cellprior.model.engine._cores import on_cores
from cellprior.model.engine._groups import by_length
from cellprior.model.learning._contrast import in_micro_batches
from cellprior.model.uce._inputs import (
    SENTENCE_LENGTH,
    Genome,
    Sampling,
    Sentences,
    of_one_species,
    sentences,
)
from cellprior.model.uce._loss import presence_losses

# tokens that go through together: what keeps the processor busy, and little more
CPU_TOKENS, GPU_TOKENS = 2048, 131_072
CPU_TRAINED_TOKENS, GPU_TRAINED_TOKENS = 4096, 32_768  # whose gradient is computed at a time
QUERIES = 4096  # pairs of a cell and a gene that are asked for at a time
MIXED = 0.9  # share of a cell's counts in one species, below which it is remarkable
EVERYTHING = slice(None)
CLS = slice(0, 1)

Padding = Literal["masked", "released"]
PADDINGS = ("masked", "released")


class Tokens(NamedTuple):
    """Sentences, see :class:`~cellprior.model.uce._inputs.Sentences`."""

    token: Tensor  # (sentences, width)
    length: Tensor  # (sentences,), on the CPU


class UCEModule(BaseModuleClass):
    """UCE.

    Parameters
    ----------
    n_genes
        Size of the gene vocabulary, of all species.
    n_chromosomes
        Of all species.
    n_hidden
        Width of a token.
    n_layers
        Transformer layers.
    n_heads
        Attention heads.
    n_feedforward
        Width inside the feed-forward networks.
    n_protein
        Width of the vectors of proteins that the tables were made of; the layers that did it are kept, for further
        species, and training leaves them and the tables alone. ``None`` for tables that are learned.
    n_latent
        Width of the embedding.
    dropout_rate
        Dropout throughout.
    decoder_width
        Of the first layer of the decoder of cells.
    binary_widths
        Of the layers that say whether a gene is expressed.
    sentence_length
        Genes that are drawn of a cell.
    """

    gene_number: Tensor
    gene_chromosome: Tensor
    gene_start: Tensor
    gene_species: Tensor
    chromosome_code: Tensor

    def __init__(
        self,
        n_genes: int,
        *,
        n_chromosomes: int = 1,
        n_hidden: int = 1280,
        n_layers: int = 4,
        n_heads: int = 20,
        n_feedforward: int = 5120,
        n_protein: int | None = None,
        n_latent: int = 1280,
        dropout_rate: float = 0.05,
        decoder_width: int = 1024,
        binary_widths: Sequence[int] = (2048, 512, 128),
        sentence_length: int = SENTENCE_LENGTH,
    ) -> None:
        super().__init__()
        whole(n_chromosomes=n_chromosomes, n_hidden=n_hidden, n_layers=n_layers, n_heads=n_heads)
        whole(n_feedforward=n_feedforward, n_latent=n_latent, decoder_width=decoder_width)
        whole(sentence_length=sentence_length)
        share(dropout_rate=dropout_rate)
        if n_protein is not None:
            whole(n_protein=n_protein)
        if not isinstance(binary_widths, list | tuple) or not binary_widths:
            msg = f"binary_widths={binary_widths!r}; needed: a list of whole numbers."
            raise ValueError(msg)
        whole(**{f"binary_widths[{i}]": width for i, width in enumerate(binary_widths)})
        if n_hidden % n_heads or n_hidden % 2:
            msg = f"n_hidden={n_hidden} is no even multiple of n_heads={n_heads}: each head needs a whole width."
            raise ValueError(msg)
        self.n_genes, self.n_hidden, self.n_latent = n_genes, n_hidden, n_latent
        self.sentence_length = sentence_length
        self.register_buffer("gene_number", torch.arange(n_genes))
        self.register_buffer("gene_chromosome", torch.zeros(n_genes, dtype=torch.int64))
        self.register_buffer("gene_start", torch.arange(n_genes))
        self.register_buffer("gene_species", torch.zeros(n_genes, dtype=torch.int64))
        self.register_buffer("chromosome_code", torch.arange(n_chromosomes))
        # genes, chromosomes, what closes a chromosome, the class token, the padding
        self.token_table = nn.Embedding(n_genes + n_chromosomes + 3, n_hidden)
        self.gene_table = nn.Embedding(n_genes, n_hidden)
        self.token_encoder = None if n_protein is None else protein_encoder(n_protein, n_hidden)
        self.gene_encoder = None if n_protein is None else protein_encoder(n_protein, n_hidden)
        if n_protein is not None:
            for part in (self.token_table, self.gene_table, self.token_encoder, self.gene_encoder):
                assert part is not None
                part.requires_grad_(False)
        self.dropout = nn.Dropout(dropout_rate)
        self.encoder = nn.ModuleList(
            Layer(n_hidden, n_heads, n_feedforward, dropout_rate) for _ in range(n_layers)
        )
        self.decoder = nn.Sequential(
            block(n_hidden, decoder_width, dropout_rate),
            block(decoder_width, n_latent, dropout_rate),
            block(n_latent, n_latent, dropout_rate),
            nn.Linear(n_latent, n_latent),
        )
        widths = [n_latent + n_hidden, *binary_widths]
        self.presence = nn.Sequential(
            *(block(i, o, dropout_rate) for i, o in zip(widths[:-1], widths[1:], strict=True)),
            nn.Linear(widths[-1], 1),
        )

    @property
    def _device(self) -> torch.device:
        """Without a look at every tensor, which :attr:`device` takes."""
        return self.token_table.weight.device

    @property
    def genome(self) -> Genome:
        """Where genes lie."""
        parts = (
            self.gene_number, self.gene_chromosome, self.gene_start, self.gene_species, self.chromosome_code
        )  # fmt: skip
        return Genome(*(part.cpu().numpy() for part in parts))

    def check_tensors(self, state_dict: Mapping[str, Tensor]) -> None:
        """Refuse genes on chromosomes that are not there.

        Raises ValueError, with the tensor.
        """
        n = len(state_dict["chromosome_code"])
        chromosome = state_dict["gene_chromosome"]
        if len(chromosome) and not (0 <= int(chromosome.min()) and int(chromosome.max()) < n):
            msg = (
                f"gene_chromosome goes from {int(chromosome.min())} to {int(chromosome.max())}, and there are {n} "
                "chromosomes, counted from 0."
            )
            raise ValueError(msg)
        if len(state_dict["chromosome_code"].unique()) < n:
            msg = "chromosome_code has a number twice."
            raise ValueError(msg)
        if len(chromosome) and int(state_dict["gene_species"].min()) < 0:
            msg = "gene_species has numbers below 0."
            raise ValueError(msg)

    def cells(self, counts: Tensor, gene_index: Tensor | None = None) -> tuple[Counts, np.ndarray]:
        """Counts above 0 of the species that has most of each cell's, and the share of the counts that these are.

        Raw counts ``(cells, genes)`` are dense or sparse CSR; ``gene_index`` is the vocabulary row of each column,
        ``None`` if the columns are the vocabulary.
        """
        return of_one_species(entries_of(counts, gene_index), self.gene_species.cpu().numpy())

    def tokens(
        self,
        counts: Tensor,
        *,
        gene_index: Tensor | None = None,
        n_draws: int = 1,
        sampling: Sampling = "keyed",
        seed: int = 0,
    ) -> Tokens:
        """Sentences of cells, ``n_draws`` of each in turn; see :func:`~cellprior.model.uce._inputs.sentences`."""
        cells, _ = self.cells(counts, gene_index)
        return self.tokens_of(cells, n_draws=n_draws, sampling=sampling, seed=seed)

    def tokens_of(
        self, cells: Counts, *, n_draws: int = 1, sampling: Sampling = "keyed", seed: int = 0
    ) -> Tokens:
        """As :meth:`tokens`, of counts as entries."""
        how: dict[str, Any] = {"n_draws": n_draws, "sampling": sampling, "seed": seed}
        return self.on_device(sentences(cells, self.genome, length=self.sentence_length, **how))

    def on_device(self, found: Sentences) -> Tokens:
        """Sentences as tensors where the network is."""
        return Tokens(torch.from_numpy(found.token).to(self._device), torch.from_numpy(found.length))

    def encode(self, tokens: Tokens, *, padding: Padding = "masked") -> Tensor:
        """Hidden states of all tokens ``(sentences, width, n_hidden)``; those of padding mean nothing.

        ``"masked"`` padding is not seen by a cell; ``"released"`` is, as in the original's code, and more than
        anything else, as 1 is added to its logits: a cell then depends on the longest sentence beside it.
        """
        return self._encode(tokens, padding, EVERYTHING)

    def pool(self, tokens: Tokens, *, padding: Padding = "masked") -> Tensor:
        """Hidden states of the class token ``(sentences, n_hidden)``, float32.

        Sentences of like length go through together; with ``padding="released"``, all of them.
        """
        if padding == "released":
            return self._encode(tokens, padding, CLS)[:, 0].float()
        found = torch.empty(len(tokens.token), self.n_hidden, device=self._device)

        def of_cls(some: Tensor) -> tuple[Tensor, Tensor]:
            return some, self._encode(self.of(tokens, some), padding, CLS)[:, 0].float()

        for some, states in on_cores(of_cls, self.groups(tokens.length), self._device):
            found[some] = states
        return found

    def latent_of(self, hidden: Tensor) -> Tensor:
        """Embedding ``(..., n_latent)``, of length 1, from hidden states of the class token ``(..., n_hidden)``."""
        return F.normalize(self.decoder(hidden).float(), dim=-1)

    def hidden(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """The class token ``(cells, n_hidden)`` from raw counts, what the annotation head reads.

        Gradients are those of all cells, with the memory of a few.
        """
        tokens = self.tokens(counts, gene_index=gene_index)
        return self.pool(tokens) if not torch.is_grad_enabled() else self.trained(tokens)

    def trained(self, tokens: Tokens) -> Tensor:
        """The class token ``(sentences, n_hidden)``, with gradients and the memory of a few sentences."""

        def embed(token: Tensor, length: Tensor) -> Tensor:
            return self._encode(Tokens(token[:, : int(length.max())], length), "masked", CLS)[:, 0]

        at_a_time = CPU_TRAINED_TOKENS if self._device.type == "cpu" else GPU_TRAINED_TOKENS
        return in_micro_batches(embed, *tokens, size=max(at_a_time // tokens.token.shape[1], 1))

    def predict(self, latent: Tensor, genes: Tensor) -> Tensor:
        """Logits that genes are expressed ``(cells, genes)``, of embeddings of length 1 ``(cells, n_latent)``."""
        cell, gene = self._halves(latent, genes)
        found = torch.empty(len(latent), len(genes), device=latent.device)
        at_a_time = max(QUERIES // max(len(genes), 1), 1)
        for part in range(0, len(latent), at_a_time):
            both = cell[part : part + at_a_time, None] + gene[None]
            found[part : part + at_a_time] = self._rest(both)
        return found

    def predict_pairs(self, latent: Tensor, genes: Tensor) -> Tensor:
        """Logits that genes are expressed, some of each cell ``(cells, queries)``; ``genes`` as these."""
        cell, _ = self._halves(latent, genes[:0, 0])
        _, gene = self._halves(latent[:0], genes.flatten())
        return self._rest(cell[:, None] + gene.unflatten(0, genes.shape))

    def _halves(self, latent: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer makes of cells, and of genes; it makes their sum of both."""
        first = self._first
        of_cell, of_gene = first.weight.split([self.n_latent, self.n_hidden], dim=1)
        return F.linear(latent, of_cell, first.bias), F.linear(self.gene_table(genes), of_gene)

    @property
    def _first(self) -> nn.Linear:
        first: Any = self.presence[0]
        return first[0]

    def _rest(self, both: Tensor) -> Tensor:
        first: Any = self.presence[0]
        return self.presence[1:](first[1:](both))[..., 0].float()

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """What fine-tuning trains besides the annotation head."""
        last: Any = self.encoder[-1]
        return {"all": [self.encoder], "last": [last], "head": [], "lora": [last.norm2]}

    def adapted_layers(self) -> list[nn.Linear]:
        """Projections that ``trainable="lora"`` changes: queries, keys and values."""
        return [layer.qkv for layer in self._layers()]

    def training_losses(self, batch: Mapping[str, Tensor], **objective: Any) -> dict[str, Tensor]:
        """Losses of one minibatch of a training run, see :func:`~cellprior.model.uce._loss.presence_losses`."""
        return presence_losses(self, batch, **objective)

    def groups(self, length: Tensor) -> Iterator[Tensor]:
        """Sentences in the order of their length, as many at a time as are worth it."""
        return by_length(length, CPU_TOKENS if self._device.type == "cpu" else GPU_TOKENS)

    def of(self, tokens: Tokens, some: Tensor) -> Tokens:
        """Some sentences, without the padding that none of them needs."""
        length = tokens.length[some]
        return Tokens(tokens.token[some.to(tokens.token.device), : int(length.max())], length)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.encoder if isinstance(layer, Layer)]

    def _mask(self, tokens: Tokens, padding: Padding, dtype: torch.dtype) -> Tensor | None:
        """Which keys are seen, or what is added to their logits ``(sentences, 1, 1, width)``; ``None`` for nothing."""
        if padding not in PADDINGS:
            msg = f'padding={padding!r} is not known; choose "masked" or "released".'
            raise ValueError(msg)
        is_pad = torch.arange(tokens.token.shape[1])[None] >= tokens.length[:, None]
        if not bool(is_pad.any()):
            return None
        is_pad = is_pad.to(tokens.token.device)[:, None, None]
        return ~is_pad if padding == "masked" else is_pad.to(dtype)

    def _encode(self, tokens: Tokens, padding: Padding, read: slice) -> Tensor:
        """Hidden states of the tokens ``read``."""
        x = self.token_table(tokens.token) * math.sqrt(self.n_hidden)
        x = self.dropout(x + sinusoids(x.shape[1], self.n_hidden).to(x))
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        mask = self._mask(tokens, padding, dtype)
        *layers, last = self._layers()
        for layer in layers:
            x = layer(x, mask)
        return last(x, mask, read=read)


def sinusoids(n_positions: int, width: int) -> Tensor:
    """What is added to tokens by their position ``(n_positions, width)`` [Vaswani et al., NeurIPS 2017, 3.5]."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = torch.arange(n_positions)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def protein_encoder(n_protein: int, n_hidden: int) -> nn.Sequential:
    """What makes a token, or a gene that is asked for, of the vector of a protein."""
    return nn.Sequential(nn.Linear(n_protein, n_hidden), nn.GELU(), nn.LayerNorm(n_hidden))


def block(n_in: int, n_out: int, dropout_rate: float) -> nn.Sequential:
    """A layer of the decoders."""
    return nn.Sequential(nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.GELU(), nn.Dropout(dropout_rate))


class Layer(nn.Module):
    """Attention between the tokens of a cell, then a feed-forward network per token, each with a norm behind it."""

    def __init__(self, n_hidden: int, n_heads: int, n_feedforward: int, dropout_rate: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(n_hidden, 3 * n_hidden)
        self.out = nn.Linear(n_hidden, n_hidden)
        self.norm1 = nn.LayerNorm(n_hidden)
        self.ff1 = nn.Linear(n_hidden, n_feedforward)
        self.ff2 = nn.Linear(n_feedforward, n_hidden)
        self.norm2 = nn.LayerNorm(n_hidden)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, mask: Tensor | None, *, read: slice = EVERYTHING) -> Tensor:
        """Output at the tokens ``read`` of ``x`` ``(cells, width, n_hidden)``.

        ``mask`` says which keys are seen, or what is added to their logits, broadcast to
        ``(cells, heads, queries, keys)``.
        """
        x = self.norm1(x[:, read] + self.dropout(self._attend(x, mask, read)))
        return self.norm2(x + self.dropout(self.ff2(self.dropout(F.relu(self.ff1(x))))))

    def _heads(self, x: Tensor, rows: slice) -> Tensor:
        """Some of queries, keys and values ``(those, cells, heads, width, dim)``."""
        weight, bias = self.qkv.weight[rows], self.qkv.bias[rows]
        n = len(weight) // x.shape[-1]
        return F.linear(x, weight, bias).unflatten(-1, (n, self.n_heads, -1)).permute(2, 0, 3, 1, 4)

    def _attend(self, x: Tensor, mask: Tensor | None, read: slice) -> Tensor:
        width = x.shape[-1]
        (q,) = self._heads(x[:, read], slice(width))
        k, v = self._heads(x, slice(width, None))
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))
