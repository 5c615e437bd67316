"""The ScGPT network, top to bottom: expressed genes as tokens, a post-norm transformer, decoders.

A token is a vector of a gene plus one of its bin; there is no order among tokens, and a cell sees itself only. Without
gradients, cells of like length go through together, and where only the class token is asked for, the last layer
computes that one alone.

Cui et al., scGPT: toward building a foundation model for single-cell multi-omics using generative AI, Nature Methods
21:1470, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from cellprior._arguments import flag, one_of, positive, share, whole
from cellprior.model.data._entries import entries_of
from cellprior.model.engine._cores import on_cores
from cellprior.model.engine._groups import by_length
from cellprior.model.learning._contrast import in_micro_batches
from cellprior.model.scgpt._heads import CellExpression, Classifier, Expression, Mvc, linear_expression
from cellprior.model.scgpt._inputs import MASK, N_BINS, PAD, Ties, Tokens, tokenize
from cellprior.model.scgpt._loss import cell_losses

# tokens that go through together: what keeps the processor busy, and little more
CPU_TOKENS, GPU_TOKENS = 2048, 131_072
CPU_TRAINED_TOKENS, GPU_TRAINED_TOKENS = 4096, 32_768  # whose gradient is computed at a time
EVERYTHING = slice(None)
CLS = slice(0, 1)

Pooling = Literal["cls", "mean", "weighted"]
ValueStyle = Literal["continuous", "category", "scaling"]
BatchNorm = Literal["single", "domain"]


class ScGPTModule(BaseModuleClass):
    """ScGPT.

    Parameters
    ----------
    n_genes
        Size of the gene vocabulary.
    n_hidden
        Width of a token.
    n_layers
        Transformer layers.
    n_heads
        Attention heads.
    n_ff
        Width inside the feed-forward networks.
    dropout_rate
        Dropout after embedding, attention and feed-forward network, and on the attention.
    n_bins
        Bins of expression, with bin 0.
    value_style
        What a bin becomes: ``"continuous"``, a small network of its number; ``"category"``, a vector of its own;
        ``"scaling"``, a factor of the gene's vector.
    cls_value
        Bin of the class token: -2 in pretraining, 0 in the original's fine-tuning.
    ties
        Which bin a count gets where it could be in several, see :func:`~cellprior.model.scgpt._inputs.bins_of`.
    expression
        Decoder of a gene's bin from its token: ``"mlp"``, ``"linear"`` as in the first scFormer, or ``None``.
    mvc
        Decoder of a gene's bin from the cell, see :class:`~cellprior.model.scgpt._heads.CellExpression`; ``None`` for
        none.
    zero_probability
        Whether the decoders also give the probability of a bin above 0.
    generative
        Whether the network has the flags of generative pretraining.
    batch_norm
        Between embedding and transformer: ``"single"``, or ``"domain"`` for statistics of each batch; ``None`` for
        none.
    batch_norm_eps
        Of these; scFormer has 1e-5.
    n_batches
        Batches that the parts below know.
    batch_decoder
        Whether the decoders are told the batch.
    adversary
        Whether there is a classifier of batches, from whose gradient the encoder is to hide them.
    n_official_classes, n_official_layers
        Classes and layers of the original's own classifier; 0 classes for none.
    pre_norm
        The original's ``norm_scheme="pre"``, which no published model has: each residual starts from the normed input.
    """

    def __init__(
        self,
        n_genes: int,
        *,
        n_hidden: int = 512,
        n_layers: int = 12,
        n_heads: int = 8,
        n_ff: int = 512,
        dropout_rate: float = 0.2,
        n_bins: int = N_BINS,
        value_style: ValueStyle = "continuous",
        cls_value: int = PAD,
        ties: Ties = "fixed",
        expression: Literal["mlp", "linear"] | None = "mlp",
        mvc: Mvc | None = "inner product",
        zero_probability: bool = False,
        generative: bool = False,
        batch_norm: BatchNorm | None = None,
        batch_norm_eps: float = 6.1e-5,
        n_batches: int = 0,
        batch_decoder: bool = False,
        adversary: bool = False,
        n_official_classes: int = 0,
        n_official_layers: int = 3,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        whole(n_hidden=n_hidden, n_layers=n_layers, n_heads=n_heads, n_ff=n_ff, n_bins=n_bins)
        whole(least=0, n_batches=n_batches, n_official_classes=n_official_classes)
        whole(least=0, n_official_layers=n_official_layers)
        whole(least=PAD, cls_value=cls_value)
        share(dropout_rate=dropout_rate)
        positive(batch_norm_eps=batch_norm_eps)
        one_of(get_args(ValueStyle), value_style=value_style)
        one_of(get_args(Ties), ties=ties)
        for name, value, choices in (
            ("expression", expression, ("mlp", "linear")),
            ("mvc", mvc, get_args(Mvc)),
            ("batch_norm", batch_norm, get_args(BatchNorm)),
        ):
            if value is not None:
                one_of(choices, **{name: value})
        flag(
            zero_probability=zero_probability,
            generative=generative,
            batch_decoder=batch_decoder,
            adversary=adversary,
            pre_norm=pre_norm,
        )
        if n_hidden % n_heads:
            msg = f"n_hidden={n_hidden} is no multiple of n_heads={n_heads}: each head needs a whole width."
            raise ValueError(msg)
        self.n_genes, self.n_hidden, self.n_latent, self.n_bins = n_genes, n_hidden, n_hidden, n_bins
        self.cls_value, self.ties, self.n_batches = cls_value, ties, n_batches
        self.max_genes: int | None = None  # of :meth:`hidden`; saved beside the tensors
        self.domain: int | None = None  # where none is asked for; saved beside the tensors
        self.gene_encoder = GeneEncoder(n_genes + 2, n_hidden)  # the padding and the class token come last
        self.value_encoder = value_encoder(value_style, n_bins, n_hidden)
        self.flags = nn.Embedding(2, n_hidden) if generative else None  # the first is never used
        self.batch_norm = None if batch_norm is None else nn.ModuleList(
            nn.BatchNorm1d(n_hidden, eps=batch_norm_eps, affine=batch_norm == "single")
            for _ in range(n_batches if batch_norm == "domain" else 1)
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout_rate)
        self.encoder = nn.ModuleList(
            Layer(n_hidden, n_heads, n_ff, dropout_rate, pre_norm) for _ in range(n_layers)
        )
        self.batch_encoder = GeneEncoder(n_batches, n_hidden) if batch_decoder else None
        width = n_hidden * (2 if batch_decoder else 1)
        decoder = {"mlp": Expression, "linear": linear_expression}
        self.expression = (
            None if expression is None else decoder[expression](width, n_hidden, zero_probability)
        )
        self.mvc = None if mvc is None else CellExpression(n_hidden, width, mvc, zero_probability)
        self.official_head = (
            Classifier(n_hidden, n_official_classes, n_official_layers, nn.ReLU)
            if n_official_classes
            else None
        )
        self.adversary: Classifier | None = None
        if adversary:
            self.add_adversary(n_batches)

    def add_adversary(self, n_batches: int) -> None:
        """A new classifier of batches."""
        self.n_batches = n_batches
        self.adversary = Classifier(self.n_hidden, n_batches, 3, nn.LeakyReLU).to(self.device)

    @property
    def _device(self) -> torch.device:
        """Without a look at every tensor, which :attr:`device` takes."""
        return self.gene_encoder.embedding.weight.device

    def tokens(
        self,
        counts: Tensor,
        *,
        gene_index: Tensor | None = None,
        ties: Ties | None = None,
        seed: int = 0,
        max_genes: int | None = None,
    ) -> Tokens:
        """Tokens of the expressed genes of raw counts ``(cells, genes)``, dense or sparse CSR.

        ``gene_index`` is the vocabulary row of each column; ``None`` if the columns are the vocabulary. The rest is
        as of :func:`~cellprior.model.scgpt._inputs.tokenize`; ``ties`` is by default the network's.
        """
        entries = entries_of(counts, gene_index)
        found = tokenize(
            entries,
            n_genes=self.n_genes,
            n_bins=self.n_bins,
            ties=self.ties if ties is None else ties,
            seed=seed,
            max_genes=max_genes,
            cls_value=self.cls_value,
        )
        gene, value, length = (torch.from_numpy(part) for part in found)
        device = self._device
        return Tokens(gene.to(device), value.to(device), length)

    def encode(self, tokens: Tokens, *, domain: int | None = None) -> Tensor:
        """Hidden states of all tokens ``(cells, width, n_hidden)``, in the order given; those of padding mean nothing.

        The bin of a token may be ``MASK``; with ``batch_norm="domain"``, ``domain`` is the batch whose statistics are
        used.
        """
        return self._encode(tokens, domain)

    def pool(
        self,
        tokens: Tokens,
        pooling: Pooling = "cls",
        *,
        unit_length: bool = True,
        domain: int | None = None,
    ) -> Tensor:
        """Embed cells ``(cells, n_hidden)``, float32; cells of like length go through together.

        Parameters
        ----------
        tokens
            Cells.
        pooling
            ``"cls"``, the class token; ``"mean"`` over all tokens of the cell, with the class token and without the
            padding that the original counts too; ``"weighted"``, a sum weighted by bin.
        unit_length
            Divide each vector by its length, as the original does for ``"cls"`` and ``"weighted"``.
        domain
            See :meth:`encode`.
        """
        if pooling not in ("cls", "mean", "weighted"):
            msg = f'pooling={pooling!r} is not known; choose "cls", "mean" or "weighted".'
            raise ValueError(msg)
        found = torch.empty(len(tokens.gene), self.n_hidden, device=self._device)

        def pooled(cells: Tensor) -> tuple[Tensor, Tensor]:
            return cells, self._pool(self.of(tokens, cells), pooling, domain).float()

        for cells, of_cells in on_cores(pooled, self.groups(tokens.length), self._device):
            found[cells] = of_cells
        return F.normalize(found, dim=1) if unit_length else found

    def hidden(
        self, counts: Tensor, *, gene_index: Tensor | None = None, domain: int | None = None
    ) -> Tensor:
        """The class token ``(cells, n_hidden)`` from raw counts, what the annotation head reads.

        Gradients are those of all cells, with the memory of a few.
        """
        tokens = self.tokens(counts, gene_index=gene_index, max_genes=self.max_genes)
        if not torch.is_grad_enabled():
            return self.pool(tokens, unit_length=False, domain=domain)

        def embed(gene: Tensor, value: Tensor, length: Tensor) -> Tensor:
            width = int(length.max())
            return self._pool(Tokens(gene[:, :width], value[:, :width], length), "cls", domain)

        return in_micro_batches(embed, *tokens, size=self.trained_at_a_time(tokens))

    def trained_at_a_time(self, tokens: Tokens) -> int | None:
        """Cells whose gradients fit into memory together; ``None`` for all, which batch norm needs."""
        at_a_time = CPU_TRAINED_TOKENS if self._device.type == "cpu" else GPU_TRAINED_TOKENS
        return None if self.batch_norm is not None else max(at_a_time // tokens.gene.shape[1], 1)

    def predict_bins(self, hidden: Tensor, *, batch: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Bins of genes, as real numbers, from their hidden states ``(cells, width)``.

        And the probability that they are above 0, if the network has it; the original calls that ``zero_probs``.
        """
        if self.expression is None:
            msg = "This network has no decoder of expression; load a pretrained checkpoint."
            raise RuntimeError(msg)
        of_batch = self._batch_vectors(batch)
        if of_batch is not None:
            hidden = torch.cat([hidden, of_batch[:, None].expand(-1, hidden.shape[1], -1)], dim=2)
        return self.expression(hidden)

    def predict_bins_of_cell(
        self, cell: Tensor, gene: Tensor, *, batch: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Bins of any genes ``(cells, width)`` from the class token of cells ``(cells, n_hidden)``; as above."""
        if self.mvc is None:
            msg = "This network has no decoder of expression from the cell; load a pretrained checkpoint."
            raise RuntimeError(msg)
        of_batch = self._batch_vectors(batch)
        if of_batch is not None:
            cell = torch.cat([cell, of_batch], dim=1)
        return self.mvc(cell, self.gene_encoder(gene))

    def classify(self, cell: Tensor) -> Tensor:
        """Logits ``(cells, n_official_classes)`` of the original's classifier, from the class token of cells."""
        if self.official_head is None:
            msg = "This network has no classifier of the original; load a checkpoint that has one, such as scGPT_CP."
            raise RuntimeError(msg)
        return self.official_head(cell)

    def generate(self, cell: Tensor, gene: Tensor, value: Tensor | None = None) -> Tensor:
        """Bins of genes ``(cells, width)`` of a cell that is given by its vector in place of the first token.

        The vector is ``cell`` ``(cells, n_hidden)``; the first of the vocabulary rows ``gene`` ``(cells, width)`` is
        not read. ``value`` has the bins, if known.
        """
        x = self.gene_encoder(gene)
        if value is not None:
            x = self._with_values(x, value)
        x = torch.cat([cell[:, None], x[:, 1:]], dim=1)
        mask = self._key_mask(gene)
        for layer in self._layers():
            x = layer(x, mask)
        return self.predict_bins(x)[0]

    def encode_generative(
        self, tokens: Tokens, generated: Tensor, *, cell: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of known tokens, and of genes that are to be generated, as generative pretraining has them.

        Known tokens see each other; a generated one sees these and itself. What it reads does not go through the
        output projection of the attention: in the original's pretraining it did not.

        Parameters
        ----------
        tokens
            Known genes behind the class token ``(cells, width)``.
        generated
            Vocabulary rows ``(cells, n_generated)``.
        cell
            Vectors ``(cells, n_hidden)`` that take the place of the class token's.
        """
        if self.flags is None:
            msg = "This network has no flags of generative pretraining; the released scGPT_human has them."
            raise RuntimeError(msg)
        known = self._embed(tokens, None)
        if cell is not None:
            known = torch.cat([cell[:, None], known[:, 1:]], dim=1)
        x = torch.cat([known, self.gene_encoder(generated) + self.flags.weight[1]], dim=1)
        n_known, n = known.shape[1], x.shape[1]
        seen = torch.eye(n, dtype=torch.bool, device=x.device)
        seen[:, :n_known] = True
        is_pad = torch.cat([tokens.gene, generated], dim=1) == self.n_genes
        mask = seen & ~is_pad[:, None, None, :]
        mask = mask | torch.eye(n, dtype=torch.bool, device=x.device)  # lest padding see nothing at all
        for layer in self._layers():
            x = layer(x, mask, n_projected=n_known)
        return x[:, :n_known], x[:, n_known:]

    @torch.no_grad()
    def attention(self, tokens: Tokens, layer: int | None = None) -> Tensor:
        """Attention between the tokens of one cell ``(queries, keys)``, mean over heads; of one layer or their mean."""
        if len(tokens.gene) != 1:
            msg = f"tokens hold {len(tokens.gene)} cells; attention is given for one cell at a time."
            raise ValueError(msg)
        x = self._embed(tokens, None)
        maps = []
        for each in self._layers():
            maps.append(each.attention_map(x))
            x = each(x, None)
        return torch.stack(maps).mean(0) if layer is None else maps[layer]

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """What fine-tuning trains besides the annotation head; ``"transformer"`` is the original's ``freeze``."""
        embedding = (self.gene_encoder, self.value_encoder, self.batch_norm)
        last = self._layers()[-1]
        return {
            "all": [*(part for part in embedding if part is not None), self.encoder],
            "transformer": [self.encoder],
            "last": [last],
            "head": [],
            "lora": [last.norm2],
        }

    def adapted_layers(self) -> list[nn.Linear]:
        """Projections that ``trainable="lora"`` changes: queries, keys and values."""
        return [layer.qkv for layer in self._layers()]

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.encoder if isinstance(layer, Layer)]

    def training_losses(self, batch: Mapping[str, Tensor], **objective: Any) -> dict[str, Tensor]:
        """Losses of one minibatch of a training run, see :func:`~cellprior.model.scgpt._loss.cell_losses`."""
        return cell_losses(self, batch, **objective)

    def groups(self, length: Tensor) -> Iterator[Tensor]:
        """Cells in the order of their length, as many at a time as are worth it."""
        return by_length(length, CPU_TOKENS if self._device.type == "cpu" else GPU_TOKENS)

    def of(self, tokens: Tokens, cells: Tensor) -> Tokens:
        """Some cells, without the padding that none of them needs."""
        length = tokens.length[cells]
        width, at = int(length.max()), cells.to(tokens.gene.device)
        return Tokens(tokens.gene[at, :width], tokens.value[at, :width], length)

    def _key_mask(self, gene: Tensor) -> Tensor | None:
        """Which keys are seen ``(cells, 1, 1, width)``; ``None`` if there is no padding."""
        is_pad = gene == self.n_genes
        return ~is_pad[:, None, None, :] if bool(is_pad.any()) else None

    def _embed(self, tokens: Tokens, domain: int | None) -> Tensor:
        """What goes into the transformer ``(cells, width, n_hidden)``."""
        x = self._with_values(self.gene_encoder(tokens.gene), tokens.value)
        return x if self.batch_norm is None else self._batch_normed(x, domain)

    def _with_values(self, genes: Tensor, value: Tensor) -> Tensor:
        """Vectors of genes ``(cells, width, n_hidden)`` and of their bins in one."""
        if self.value_encoder is None:
            return genes * value[..., None]
        return genes + self.dropout(self.value_encoder(value))

    def _batch_normed(self, x: Tensor, domain: int | None) -> Tensor:
        """Padding takes part in the statistics, as in the original."""
        assert self.batch_norm is not None
        domain = 0 if len(self.batch_norm) == 1 else self.domain if domain is None else domain
        if domain is None or not 0 <= domain < len(self.batch_norm):
            msg = (
                f"This network norms each of {len(self.batch_norm)} batches on its own, in the order of its training: "
                f"found domain={domain}; say which of them the cells are like, domain=0 to "
                f"{len(self.batch_norm) - 1}."
            )
            raise ValueError(msg)
        return self.batch_norm[domain](x.transpose(1, 2)).transpose(1, 2)

    def _encode(self, tokens: Tokens, domain: int | None, read: slice = EVERYTHING) -> Tensor:
        """Hidden states of the tokens ``read``."""
        x, mask = self._embed(tokens, domain), self._key_mask(tokens.gene)
        *layers, last = self._layers()
        for layer in layers:
            x = layer(x, mask)
        return last(x, mask, read=read)

    def _pool(self, tokens: Tokens, pooling: Pooling, domain: int | None) -> Tensor:
        if pooling == "cls":
            return self._encode(tokens, domain, CLS)[:, 0]
        hidden = self._encode(tokens, domain)
        weight = (tokens.gene != self.n_genes).to(hidden.dtype)
        weight = weight * tokens.value if pooling == "weighted" else weight / weight.sum(1, keepdim=True)
        return torch.bmm(weight[:, None], hidden)[:, 0]

    def _batch_vectors(self, batch: Tensor | None) -> Tensor | None:
        """Vectors of the batch that the decoders are told ``(cells, n_hidden)``."""
        if self.batch_encoder is None:
            return None
        if batch is None:
            msg = f"The decoders of this network are told the batch: give batch, numbers below {self.n_batches}."
            raise ValueError(msg)
        return self.batch_encoder(batch)


class GeneEncoder(nn.Module):
    """Vectors with a norm behind them; of genes, or of batches."""

    def __init__(self, n: int, n_hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, n_hidden)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.norm = nn.LayerNorm(n_hidden)

    def forward(self, index: Tensor) -> Tensor:
        """Vectors ``(..., n_hidden)``."""
        return self.norm(self.embedding(index))


def value_encoder(style: ValueStyle, n_bins: int, n_hidden: int) -> nn.Module | None:
    """What makes vectors of bins; ``None`` where the bin is a factor."""
    if style == "scaling":
        return None
    known: dict[str, type[nn.Module]] = {"continuous": ContinuousValues, "category": CategoryValues}
    if style not in known:
        msg = f'value_style={style!r} is not known; choose "continuous", "category" or "scaling".'
        raise ValueError(msg)
    return known[style](n_bins, n_hidden)


class ContinuousValues(nn.Module):
    """A network of one number. There are as many bins as fit a table, which is computed instead of each token."""

    def __init__(self, n_bins: int, n_hidden: int) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.linear1 = nn.Linear(1, n_hidden)
        self.linear2 = nn.Linear(n_hidden, n_hidden)
        self.norm = nn.LayerNorm(n_hidden)

    def forward(self, value: Tensor) -> Tensor:
        """Vectors ``(..., n_hidden)`` of bins, ``MASK`` and ``PAD``, whole numbers; or of any numbers."""
        if value.is_floating_point():
            x = value.clamp(max=512)[..., None]
            return self.norm(self.linear2(F.relu(self.linear1(x))))
        table = self(torch.arange(PAD, self.n_bins, device=value.device, dtype=self.linear1.weight.dtype))
        return F.embedding(value - PAD, table)


class CategoryValues(nn.Module):
    """A vector for each bin."""

    def __init__(self, n_bins: int, n_hidden: int) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.embedding = nn.Embedding(n_bins + 2, n_hidden)
        self.norm = nn.LayerNorm(n_hidden)

    def forward(self, value: Tensor) -> Tensor:
        """Vectors ``(..., n_hidden)`` of bins, ``MASK`` and ``PAD``, which come behind them."""
        value = value.long()
        row = torch.where(value == MASK, self.n_bins + 1, torch.where(value == PAD, self.n_bins, value))
        return self.norm(self.embedding(row))


class Layer(nn.Module):
    """Attention between the tokens of a cell, then a feed-forward network per token, each with a norm behind it."""

    def __init__(self, n_hidden: int, n_heads: int, n_ff: int, dropout_rate: float, pre_norm: bool) -> None:
        super().__init__()
        self.n_heads, self.pre_norm = n_heads, pre_norm
        self.qkv = nn.Linear(n_hidden, 3 * n_hidden)
        self.out = nn.Linear(n_hidden, n_hidden)
        self.norm1 = nn.LayerNorm(n_hidden)
        self.ff1 = nn.Linear(n_hidden, n_ff)
        self.ff2 = nn.Linear(n_ff, n_hidden)
        self.norm2 = nn.LayerNorm(n_hidden)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(
        self, x: Tensor, mask: Tensor | None, *, read: slice = EVERYTHING, n_projected: int | None = None
    ) -> Tensor:
        """Output at the tokens ``read`` of ``x`` ``(cells, width, n_hidden)``.

        The keys in ``mask`` are seen, which is broadcast to ``(cells, heads, queries, keys)``; ``None`` for all. Only
        ``n_projected`` of the first tokens go through the output projection; ``None`` for all.
        """
        if self.pre_norm:
            x = self.norm1(x)
        y = self._attend(x, mask, read, n_projected)
        x = x[:, read] + self.dropout(y)
        x = self.norm2(x) if self.pre_norm else self.norm1(x)
        x = x + self.dropout(self.ff2(self.dropout(F.relu(self.ff1(x)))))
        return x if self.pre_norm else self.norm2(x)

    def _heads(self, x: Tensor, rows: slice = EVERYTHING) -> Tensor:
        """Some of queries, keys and values ``(those, cells, heads, width, dim)``."""
        weight, bias = self.qkv.weight[rows], self.qkv.bias[rows]
        n = len(weight) // x.shape[-1]
        return F.linear(x, weight, bias).unflatten(-1, (n, self.n_heads, -1)).permute(2, 0, 3, 1, 4)

    def _attend(self, x: Tensor, mask: Tensor | None, read: slice, n_projected: int | None) -> Tensor:
        if read == EVERYTHING:
            q, k, v = self._heads(x)
        else:
            width = x.shape[-1]
            (q,) = self._heads(x[:, read], slice(width))
            k, v = self._heads(x, slice(width, None))
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)
        if n_projected is None:
            return self.out(y)
        return torch.cat([self.out(y[:, :n_projected]), y[:, n_projected:]], dim=1)

    def attention_map(self, x: Tensor) -> Tensor:
        """Attention of one cell ``(queries, keys)``, mean over heads."""
        q, k, _ = self._heads(self.norm1(x) if self.pre_norm else x)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[0]
