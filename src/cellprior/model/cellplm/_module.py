"""The CellPLM network, top to bottom: gene sum, Flowformer over cells, latent, negative-binomial decoder.

Cells are the tokens. A *sentence* is a set of cells that attend to each other; attention is linear in their
number and couples them through a handful of sums only. Every forward pass below works on a list of chunks of
one sentence and adds those sums up over the chunks, so that the size of a chunk bounds the memory and never
changes the result. Training is the same code with one chunk.

Wen et al., CellPLM: Pre-training of Cell Language Model Beyond Single Cells, ICLR 2024.
Wu et al., Flowformer: Linearizing Transformers with Conservation Flows, ICML 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from cellprior._arguments import one_of, positive, share, whole
from cellprior.model.cellplm._hidden import HiddenStates
from cellprior.model.cellplm._loss import reconstruction_loss, sentence_losses
from cellprior.model.cellplm._views import sentence_view_losses
from cellprior.model.engine._cores import on_cores
from cellprior.model.engine._kernels import log_counts, weighted_gene_sum

FLOW_EPS = 1e-6
N_STREAMS = 3  # times that attention reads a sentence to find what its cells know of each other
GMVAE_HIDDEN = 512
KEEP_BYTES = 128 * 2**20  # queries, keys and values of a sentence are kept up to this size, else recomputed

Latent = Literal["vae", "gmvae"]
Mixture = Literal["expected", "argmax", "sampled"]
Absent = Literal["zero", "average"]
Kind = Literal["latent", "direction"]
Pair: TypeAlias = tuple[Tensor, Tensor]


class CellPLMModule(BaseModuleClass):
    """CellPLM.

    Parameters
    ----------
    n_genes
        Size of the gene vocabulary.
    n_hidden
        Width of the encoder; divisible by ``n_heads`` and by 4.
    n_layers
        Flowformer layers.
    n_heads
        Attention heads.
    n_latent
        Width of the embedding.
    dropout_rate
        Dropout in embedder, encoder and decoder.
    latent
        ``"vae"`` (one Gaussian) or ``"gmvae"`` (a mixture of ``n_clusters`` Gaussians).
    n_clusters
        Components of the mixture; read for ``latent="gmvae"`` only.
    n_batches, n_datasets
        Categories of the two decoder covariates; 0 leaves a covariate out.
    target_sum
        Scale each cell to this many counts before the logarithm. ``None``, as in the original, feeds raw
        counts, so that the embedding moves with sequencing depth.
    absent
        What a gene that the data lack stands for: ``"zero"``, as in the original, a count of 0; ``"average"``, an
        average cell's, which the network then knows: a cell is scaled to the part of ``target_sum`` that an average
        cell has in the genes of the data, and a gene moves it as far as it differs from the average.
    embedding
        ``"latent"``, as in the original, or ``"direction"``: the latent from half way to the middle of its sentence,
        over its length, see :class:`Direction`.
    decoder_rank
        Width of the layer in front of the decoder's means.
    """

    def __init__(
        self,
        n_genes: int,
        *,
        n_hidden: int = 1024,
        n_layers: int = 4,
        n_heads: int = 8,
        n_latent: int = 512,
        dropout_rate: float = 0.2,
        latent: Latent = "vae",
        n_clusters: int = 16,
        n_batches: int = 0,
        n_datasets: int = 0,
        target_sum: float | None = None,
        absent: Absent = "zero",
        embedding: Kind = "latent",
        decoder_rank: int = 128,
    ) -> None:
        super().__init__()
        whole(n_hidden=n_hidden, n_layers=n_layers, n_heads=n_heads, n_latent=n_latent, n_clusters=n_clusters)
        whole(decoder_rank=decoder_rank)
        whole(least=0, n_batches=n_batches, n_datasets=n_datasets)
        share(dropout_rate=dropout_rate)
        one_of(("vae", "gmvae"), latent=latent)
        one_of(("zero", "average"), absent=absent)
        one_of(("latent", "direction"), embedding=embedding)
        if target_sum is not None:
            positive(target_sum=target_sum)
        if n_hidden % n_heads or n_hidden % 4:
            msg = f"n_hidden={n_hidden} must be divisible by n_heads={n_heads} and by 4 (the groups of the GroupNorm)."
            raise ValueError(msg)
        self.n_hidden, self.n_latent = n_hidden, n_latent
        self.kl_weight = 0.0  # rises in training; saved beside the tensors
        self.embedder = Embedder(n_genes, n_hidden, dropout_rate, target_sum, absent)
        self.encoder = nn.ModuleList(
            FlowformerLayer(n_hidden, n_heads, dropout_rate) for _ in range(n_layers)
        )
        self.pre_latent_norm = nn.LayerNorm(n_hidden)
        self.latent: VAELatent | GMVAELatent = (
            VAELatent(n_hidden, n_latent) if latent == "vae" else GMVAELatent(n_hidden, n_latent, n_clusters)
        )
        self.direction = Direction(n_latent) if embedding == "direction" else None
        sizes = (n_genes, n_hidden, n_latent, decoder_rank)
        self.decoder = NBDecoder(*sizes, dropout_rate, n_batches, n_datasets)

    def encode(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """Embed one sentence that fits in memory: latent means ``(cells, n_latent)`` of raw counts ``(cells, genes)``.

        ``gene_index`` is the vocabulary row of each column; ``None`` if the columns are the vocabulary.
        """
        (latent,) = self.encode_chunks([counts], gene_index=gene_index)
        return latent

    def encode_chunks(
        self,
        chunks: Iterable[Tensor],
        *,
        gene_index: Tensor | None = None,
        mixture: Mixture = "expected",
        states: HiddenStates | None = None,
        decodable: bool = False,
    ) -> Iterator[Tensor]:
        """Embed one sentence given in chunks of cells; the result does not depend on where the chunks are cut.

        Holds the hidden states of the whole sentence, ``4 * n_hidden`` bytes per cell, and releases them chunk
        by chunk as the latents are read. ``mixture`` is read by a GMVAE only, see :class:`GMVAELatent`; for ``states``
        see :meth:`hidden_chunks`. ``decodable`` gives what the decoder reads, also where the embedding is its
        direction.

        Yields
        ------
        Latent means of each chunk ``(cells, n_latent)``, float32, or their directions.
        """
        hidden = self.hidden_chunks(chunks, gene_index=gene_index, states=states)
        noise = self.latent.draw_noise(sum(hidden.sizes)) if mixture == "sampled" else None

        def latents(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
            start = 0
            for h in chunks:
                rows = None if noise is None else noise[start : start + len(h)]
                start += len(h)
                yield self.latent.mean(h, mixture=mixture, noise=rows).float()

        if self.direction is None or decodable:
            yield from latents(hidden.release())
            return
        middle = self.direction.middle(
            add_up(map(sum_and_size, latents(hidden[i] for i in range(len(hidden)))))
        )
        for z in latents(hidden.release()):
            yield self.direction(z, middle)

    def hidden_chunks(
        self,
        chunks: Iterable[Tensor],
        *,
        gene_index: Tensor | None = None,
        states: HiddenStates | None = None,
    ) -> HiddenStates:
        """Hidden states in front of the latent layer, ``(cells, n_hidden)`` per chunk of one sentence.

        Of raw counts, and with ``states``, which hold the hidden states, new or half done, of those chunks that these
        lack. ``gene_index`` is as of :meth:`encode`.
        """
        hidden = HiddenStates() if states is None else states
        if hidden.stage < 0:
            table = self.embedder.table(gene_index)
            embed = partial(self.embedder, table=table)
            hidden.fill(on_cores(embed, chunks, self.embedder.gene_embedding.device))
        for number, layer in enumerate(self.encoder):
            if hidden.stage == number:
                layer(hidden)
        if hidden.stage == len(self.encoder):
            hidden.replace(lambda i, h: self.pre_latent_norm(h))
        return hidden

    def hidden(self, counts: Tensor, *, gene_index: Tensor | None = None) -> Tensor:
        """Hidden states ``(cells, n_hidden)`` of one sentence that fits in memory, see :meth:`hidden_chunks`."""
        (hidden,) = self.hidden_chunks([counts], gene_index=gene_index)
        return hidden

    def latent_of(self, hidden: Tensor) -> Tensor:
        """Embedding ``(cells, n_latent)`` of hidden states."""
        return self.latent.mean(hidden)

    def trainable_parts(self) -> dict[str, list[nn.Module]]:
        """What fine-tuning trains besides the annotation head, by the name of the choice."""
        # the original leaves pre_latent_norm out, by oversight: it names the others one by one
        return {
            "last": [self.encoder[-1], self.pre_latent_norm],
            "all": [self.embedder, self.encoder, self.pre_latent_norm],
            "head": [],
            "lora": [self.pre_latent_norm],
        }

    def adapted_layers(self) -> list[nn.Linear]:
        """Projections that ``trainable="lora"`` changes."""
        attentions = [layer.attention for layer in self.encoder if isinstance(layer, FlowformerLayer)]
        return [linear for attention in attentions for linear in (attention.query, attention.value)]

    def decode(
        self,
        z: Tensor,
        *,
        batch: Tensor | None = None,
        dataset: Tensor | None = None,
        genes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Negative-binomial mean ``(cells, n_genes)`` and dispersion ``(n_genes,)`` of latents ``z``.

        The mean is up to a factor per cell: scale it to the cell's depth. A covariate that is not given is
        averaged over. ``genes`` are numbers of those that are wanted, by default all.
        """
        return self.decoder(z, batch=batch, dataset=dataset, genes=genes)

    def pretraining_loss(
        self,
        counts: Tensor,
        mask: Tensor,
        *,
        batch: Tensor | None = None,
        dataset: Tensor | None = None,
        kl_weight: float = 1.0,
        measured: Tensor | None = None,
        imputation: bool = False,
    ) -> dict[str, Tensor]:
        """Masked reconstruction plus latent loss of one sentence.

        Parameters
        ----------
        counts
            Raw counts over the vocabulary ``(cells, n_genes)``.
        mask
            ``True`` where a count is hidden from the input ``(cells, n_genes)``; a cell without any is context only.
        batch, dataset
            Decoder covariates ``(cells,)``.
        kl_weight
            Weight of the KL term of a VAE.
        measured
            Which genes were measured ``(n_genes,)``; the others say nothing. By default all.
        imputation
            What the original fine-tunes for imputation with: every cell counts, also one without a hidden gene, and
            hidden genes do not count once more by themselves.

        Returns
        -------
        ``loss`` and its parts ``reconstruction`` and ``latent``.
        """
        (hidden,) = self.hidden_chunks([counts.masked_fill(mask, 0.0)])
        z, latent = self.latent.sample(hidden, kl_weight=kl_weight)
        mean, dispersion = self.decode(z, batch=batch, dataset=dataset)
        if measured is not None:
            counts, mean, mask = counts[:, measured], mean[:, measured], mask[:, measured]
            dispersion = dispersion[measured]
        reconstruction = reconstruction_loss(counts, mean, dispersion, None if imputation else mask)
        return {"loss": latent + reconstruction, "reconstruction": reconstruction, "latent": latent}

    def training_losses(
        self, batch: Mapping[str, Tensor], *, views: bool = False, **objective: Any
    ) -> dict[str, Tensor]:
        """Losses of one sentence of a training run.

        See :func:`~cellprior.model.cellplm._loss.sentence_losses`, with ``views``
        :func:`~cellprior.model.cellplm._views.sentence_view_losses`.
        """
        return (sentence_view_losses if views else sentence_losses)(self, batch, **objective)


class Genes(NamedTuple):
    """What the embedder knows of the columns of some data."""

    vectors: Tensor  # (genes, n_hidden)
    target_sum: float | None  # of a cell's counts in these genes
    average: Tensor | None  # what an average cell adds up to in these genes (n_hidden,)


class Embedder(nn.Module):
    """Cells as weighted sums of gene vectors, then a linear layer and a group norm."""

    share: Tensor
    average: Tensor

    def __init__(
        self, n_genes: int, n_hidden: int, dropout_rate: float, target_sum: float | None, absent: Absent
    ) -> None:
        super().__init__()
        self.target_sum, self.knows_average = target_sum, absent == "average"
        self.gene_embedding = nn.Parameter(torch.empty(n_genes, n_hidden))
        nn.init.normal_(self.gene_embedding, std=n_hidden**-0.5)
        self.linear = nn.Linear(n_hidden, n_hidden)
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = nn.GroupNorm(4, n_hidden)
        if self.knows_average:
            # of an average cell: counts of each gene in 10,000, and the mean of the network's input
            self.register_buffer("share", torch.full((n_genes,), 1e4 / n_genes))
            self.register_buffer("average", torch.zeros(n_genes))

    def table(self, gene_index: Tensor | None) -> Genes:
        """What is known of the data's columns, gathered once for all chunks."""
        every = slice(None) if gene_index is None else gene_index
        vectors = self.gene_embedding[every]
        target_sum, average = self.target_sum, None
        if self.knows_average:
            average = self.average[every] @ vectors
            if target_sum is not None:
                target_sum = target_sum * float(self.share[every].sum() / self.share.sum())
        device = vectors.device.type
        if torch.is_autocast_enabled(device):
            vectors = vectors.to(torch.get_autocast_dtype(device))
        return Genes(vectors, target_sum, average)

    def forward(self, counts: Tensor, table: Genes) -> Tensor:
        x = weighted_gene_sum(log_counts(counts, table.target_sum), table.vectors)  # (cells, n_hidden)
        if table.average is not None:
            x = x - table.average
        return self.norm(self.dropout(F.relu(self.linear(x).float())))


class FlowformerLayer(nn.Module):
    """Pre-norm layer: flow attention over the cells of a sentence, then a feed-forward network per cell."""

    def __init__(self, n_hidden: int, n_heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(n_hidden)
        self.attention = FlowAttention(n_hidden, n_heads)
        self.norm2 = nn.LayerNorm(n_hidden)
        self.ff = nn.Sequential(
            nn.Linear(n_hidden, 2 * n_hidden),
            nn.GELU(),
            nn.Dropout(dropout_rate),
            nn.Linear(2 * n_hidden, n_hidden),
            nn.Dropout(dropout_rate),
        )
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, hidden: HiddenStates) -> None:
        """Replace the chunks of ``hidden``, ``(cells, n_hidden)`` each, by the layer's output."""
        projected = Projections(self.attention, self.norm1, hidden)
        sums = FlowSums(*hidden.sums(lambda: self.attention.reduce(projected)))
        hidden.replace(lambda i, h: self.output(h, projected.of(i, "query")[0], sums))

    def output(self, h: Tensor, q: Tensor, sums: FlowSums) -> Tensor:
        """The layer's output ``(cells, n_hidden)`` of some cells of the sentence, from their queries."""
        h = h + self.dropout(self.attention(q, sums))
        return h + self.ff(self.norm2(h)).float()


class FlowSums(NamedTuple):
    """All that the cells of a sentence know of each other."""

    n_cells: int
    key: Tensor  # Σ k                        (heads, dim)
    key_flow: Tensor  # Σ k·O                 (heads, dim)
    weight: Tensor  # Σ exp(co)               (heads,)
    memory: Tensor  # Σ exp(co)·k⊗v           (heads, dim, dim)


class FlowAttention(nn.Module):
    """Attention by flow conservation (Flowformer), linear in the number of cells, without mask or position.

    With σ the logistic function, q and k after σ, ε = 1e-6, sums over the cells of the sentence, and all of it per
    head: ``I = 1 / (q+ε)·(Σk+ε)``, ``O = 1 / (k+ε)·(Σq+ε)``, ``co = clip((k+ε)·(Σ qI + ε), -1, 1)``,
    ``out = σ((q+ε)·(Σ kO + ε)) · (qI)ᵀ Σ k ⊗ v·softmax(co)·N``.
    The clip bounds ``exp(co)``, so the softmax needs no maximum and all of it can be summed in a stream.
    """

    def __init__(self, n_hidden: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(n_hidden, n_hidden)
        self.key = nn.Linear(n_hidden, n_hidden)
        self.value = nn.Linear(n_hidden, n_hidden)
        self.out = nn.Linear(n_hidden, n_hidden)
        self.dropout = nn.Dropout(0.01)  # a constant of the original, apart from dropout_rate

    def project(self, x: Tensor, name: str) -> Tensor:
        """One of ``query``, ``key``, ``value`` of normalised cells, ``(cells, n_hidden)``, head after head."""
        y = getattr(self, name)(x).float()
        return y if name == "value" else torch.sigmoid(y)

    def reduce(self, projected: Projections) -> FlowSums:
        """Stream three times over the sentence and collect what its cells know of each other."""
        known: list[Pair] = []
        for _ in range(N_STREAMS):
            known.append(as_float(self.stream(projected, known)))
        return self.sums(projected.n_cells, known)

    def stream(self, projected: Projections, known: Sequence[Pair]) -> Pair:
        """Sums over some cells of the next stream, given those of the streams before it over the whole sentence.

        What different cells give is added up, in float64, by :func:`add_up`; so a sentence may be anywhere.
        """
        names = (("query", "key"), ("query", "key"), ("key", "value"))[len(known)]
        functions: tuple[Callable[..., Pair], ...] = (self._totals, self._flows, self._competition)
        function = functions[len(known)]

        def of_chunk(i: int) -> Pair:
            return function(*projected.of(i, *names), *known)

        return add_up(on_cores(of_chunk, range(len(projected)), self.query.weight.device))

    @staticmethod
    def sums(n_cells: int, known: Sequence[Pair]) -> FlowSums:
        """What the three streams over a sentence have found."""
        (_, key), (key_flow, _), (weight, memory) = known
        return FlowSums(n_cells, key, key_flow, weight, memory)

    def _totals(self, q: Tensor, k: Tensor) -> Pair:
        return q.sum(0).view(self.n_heads, -1), k.sum(0).view(self.n_heads, -1)

    def _flows(self, q: Tensor, k: Tensor, totals: Pair) -> Pair:
        total_q, total_k = totals
        with torch.autocast(q.device.type, enabled=False):
            return _weighted_sum(k, 1 / _dot(k, total_q)), _weighted_sum(q, 1 / _dot(q, total_k))

    def _competition(self, k: Tensor, v: Tensor, totals: Pair, flows: Pair) -> Pair:
        _, query_flow = flows
        with torch.autocast(k.device.type, enabled=False):
            w = _dot(k, query_flow).clamp(-1, 1).exp()  # (cells, heads)
            k, v = k.unflatten(1, (self.n_heads, -1)), v.unflatten(1, (self.n_heads, -1))
            return w.sum(0), torch.matmul((k * w[:, :, None]).permute(1, 2, 0), v.transpose(0, 1))

    def forward(self, q: Tensor, sums: FlowSums) -> Tensor:
        """Attention output of some cells of the sentence, ``(cells, n_hidden)``, from their queries."""
        with torch.autocast(q.device.type, enabled=False):
            allocation = torch.sigmoid(_dot(q, sums.key_flow)) / _dot(q, sums.key)  # (cells, heads)
            memory = sums.memory * (sums.n_cells / sums.weight)[:, None, None]
            flow = torch.matmul(
                q.unflatten(1, (self.n_heads, -1)).transpose(0, 1), memory
            )  # (heads, cells, dim)
            read = (flow.transpose(0, 1) * allocation[:, :, None]).flatten(1)
        return self.dropout(self.out(read).float())


class Projections:
    """Queries, keys and values of a sentence by chunk: kept while they are small, else computed at each use."""

    def __init__(self, attention: FlowAttention, norm: nn.LayerNorm, hidden: HiddenStates) -> None:
        self.attention, self.norm, self.hidden = attention, norm, hidden
        self.n_cells = sum(hidden.sizes)
        size = 3 * self.n_cells * attention.query.in_features * 4
        self.kept: list[dict[str, Tensor]] | None = [{} for _ in hidden] if size <= KEEP_BYTES else None

    def __len__(self) -> int:
        return len(self.hidden)

    def of(self, i: int, *names: str) -> list[Tensor]:
        kept = {} if self.kept is None else self.kept[i]
        missing = [name for name in names if name not in kept]
        if missing:
            x = self.norm(self.hidden[i])
            kept.update({name: self.attention.project(x, name) for name in missing})
        return [kept[name] for name in names]


def _dot(x: Tensor, total: Tensor) -> Tensor:
    """Product of cells ``(cells, n_hidden)`` with a sum over cells ``(heads, dim)``, per head ``(cells, heads)``.

    ``(x+ε)·(total+ε)``, the ε on the sum as in the original; as one matrix product, which reads the cells once.
    """
    total = total + FLOW_EPS
    return x @ torch.block_diag(*total).T + FLOW_EPS * total.sum(1)


def _weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Sum of cells ``(cells, n_hidden)`` weighted per head ``(cells, heads)``, as ``(heads, dim)``."""
    n_heads = weight.shape[1]
    return (
        (weight.T @ x).view(n_heads, n_heads, -1).diagonal().T
    )  # the products across heads are cheaper than copies


def add_up(parts: Iterable[Pair]) -> Pair:
    """Sum pairs of tensors over chunks; in float64 where there is more than one, so that cutting costs no digits."""
    parts = iter(parts)
    first, second = next(parts)
    wide = torch.float32 if first.device.type == "mps" else torch.float64
    for a, b in parts:
        first, second = first.to(wide) + a, second.to(wide) + b
    return first, second


def as_float(pair: Pair) -> Pair:
    """Sums as the network uses them, float32."""
    return pair[0].float(), pair[1].float()


def sum_and_size(z: Tensor) -> Pair:
    """Sum ``(n_latent,)`` and number of some cells' latents ``(cells, n_latent)``."""
    return z.sum(0), torch.tensor(float(len(z)), device=z.device)


class Direction(nn.Module):
    """The direction of a latent from half way to the middle of its sentence, of length 1.

    The middle is what a study's protocol and its mixture of cells have in common. Half of it is taken off: all of it
    costs more where few types make up a sentence than it gains, and a cell by itself has a direction too.
    """

    SHARE = 0.5

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.n_latent = n_latent

    def middle(self, total: Pair) -> Tensor:
        """Middle ``(n_latent,)`` of a sentence, from :func:`sum_and_size` of its latents."""
        sum_, n_cells = total
        return (sum_ / n_cells).float()

    def forward(self, z: Tensor, middle: Tensor, *, share: float = SHARE) -> Tensor:
        """Directions ``(cells, n_latent)``."""
        return F.normalize(z - share * middle, dim=1)


class VAELatent(nn.Module):
    """Gaussian latent; its embedding is the mean."""

    FREE_NATS = 1.0  # a weighted KL below this is dropped

    def __init__(self, n_hidden: int, n_latent: int) -> None:
        super().__init__()
        self.mu = nn.Linear(n_hidden, n_latent)
        self.log_var = nn.Linear(n_hidden, n_latent)

    def draw_noise(self, n_cells: int) -> None:
        """The mean needs none."""

    def mean(self, h: Tensor, *, mixture: Mixture = "expected", noise: Tensor | None = None) -> Tensor:
        """Embedding ``(cells, n_latent)``."""
        return self.mu(h)

    def sample(self, h: Tensor, *, kl_weight: float) -> tuple[Tensor, Tensor]:
        """Draw ``(cells, n_latent)``, in eval mode the mean, and weighted KL to N(0, 1), 0 below FREE_NATS."""
        mu = self.mu(h)
        var = self.log_var(h).clamp(-5, 5).exp() + 1e-4
        z = mu + var.sqrt() * torch.randn_like(mu) if self.training else mu
        kl = 0.5 * (mu**2 + var - 1 - var.log()).sum(-1).mean() * kl_weight
        return z, torch.where(kl < self.FREE_NATS, torch.zeros_like(kl), kl)


class GMVAELatent(nn.Module):
    """Mixture-of-Gaussians latent.

    The embedding is the posterior mean: ``"expected"`` averages the component means over q(y|x), ``"argmax"``
    takes the most likely component; both are deterministic. ``"sampled"`` draws the component, as the original
    does even at inference, from the global random state.
    """

    FREE_NATS = 5.0
    WEIGHT = 5.0  # of both loss terms

    def __init__(self, n_hidden: int, n_latent: int, n_clusters: int) -> None:
        super().__init__()
        self.n_clusters = n_clusters
        self.logits = nn.Linear(n_hidden, n_clusters)
        self.joint = nn.Linear(n_hidden + n_clusters, GMVAE_HIDDEN)
        self.mu = nn.Linear(GMVAE_HIDDEN, n_latent)
        self.var = nn.Linear(GMVAE_HIDDEN, n_latent)
        self.prior_mu = nn.Linear(n_clusters, n_latent)
        self.prior_var = nn.Linear(n_clusters, n_latent)

    def draw_noise(self, n_cells: int) -> Tensor:
        """Gumbel noise of a whole sentence ``(cells, n_clusters)``, drawn at once so that chunks do not matter."""
        uniform = torch.rand(n_cells, self.n_clusters, device=self.logits.weight.device)
        return -torch.log(-torch.log(uniform + 1e-20) + 1e-20)

    def mean(self, h: Tensor, *, mixture: Mixture = "expected", noise: Tensor | None = None) -> Tensor:
        """Embedding ``(cells, n_latent)``."""
        logits = self.logits(h).float()
        if mixture == "expected":
            by_cluster = F.relu(self._joint_parts(h))  # (cells, clusters, hidden)
            return self.mu(torch.einsum("nk,nkd->nd", logits.softmax(-1), by_cluster))
        scores = logits if noise is None else logits + noise
        return self.mean_given(h, F.one_hot(scores.argmax(-1), self.n_clusters).to(h.dtype))

    def mean_given(self, h: Tensor, y: Tensor) -> Tensor:
        """Posterior mean ``(cells, n_latent)`` given cluster weights ``y`` ``(cells, n_clusters)``."""
        return self.mu(F.relu(self.joint(torch.cat([h, y], -1))))

    def _joint_parts(self, h: Tensor) -> Tensor:
        """``joint([h, e_k])`` for all clusters k at once, ``(cells, clusters, hidden)``."""
        of_h, of_y = self.joint.weight.split([h.shape[1], self.n_clusters], dim=1)
        return F.linear(h, of_h, self.joint.bias)[:, None, :] + of_y.T

    def sample(self, h: Tensor, *, kl_weight: float) -> tuple[Tensor, Tensor]:
        """Reparametrised draw ``(cells, n_latent)`` and latent loss.

        The loss is ``5·max(5, E[log q(z|x,y) - log p(z|y)]) + 5·max(5, ln K - H(q(y|x)))``. With K = 16 the second
        term cannot exceed ln 16 < 5: it is a constant, as in the original. ``kl_weight`` is not read.
        """
        logits = self.logits(h)
        y = (logits + self.draw_noise(len(h))).softmax(-1)
        t = F.relu(self.joint(torch.cat([h, y], -1)))
        mu, var = self.mu(t), F.softplus(self.var(t))
        z = mu + torch.randn_like(mu) * (var + 1e-10).sqrt()
        log_ratio = _log_normal(z, mu, var) - _log_normal(z, self.prior_mu(y), F.softplus(self.prior_var(y)))
        log_prob = logits.log_softmax(-1)
        negative_entropy = (log_prob.exp() * log_prob).sum(-1).mean() + math.log(self.n_clusters)
        loss = log_ratio.mean().clamp(min=self.FREE_NATS) + negative_entropy.clamp(min=self.FREE_NATS)
        return z, self.WEIGHT * loss


def _log_normal(z: Tensor, mu: Tensor, var: Tensor) -> Tensor:
    var = var + 1e-8
    return -0.5 * (math.log(2 * math.pi) + var.log() + (z - mu) ** 2 / var).sum(-1)


class NBDecoder(nn.Module):
    """Latent and covariates to the mean and dispersion of a negative binomial per gene."""

    def __init__(
        self,
        n_genes: int,
        n_hidden: int,
        n_latent: int,
        rank: int,
        dropout_rate: float,
        n_batches: int,
        n_datasets: int,
    ) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(n_latent, n_hidden), nn.PReLU(), nn.Dropout(dropout_rate), nn.GroupNorm(4, n_hidden)
        )
        self.batch = Covariate(n_batches, n_hidden) if n_batches else None
        self.dataset = Covariate(n_datasets, n_hidden) if n_datasets else None
        self.rank = nn.Linear(n_hidden, rank)
        self.log_mean = nn.Linear(rank, n_genes)
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes))

    def forward(
        self, z: Tensor, *, batch: Tensor | None, dataset: Tensor | None, genes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.hidden(z)
        for covariate, code in ((self.batch, batch), (self.dataset, dataset)):
            if covariate is not None:
                x = x + covariate(code)
        every = slice(None) if genes is None else genes
        of_genes = self.log_mean.weight[every], self.log_mean.bias[every]
        mean = F.linear(F.relu(self.rank(x)), *of_genes).exp().clamp(1e-5, 1e6)
        return mean, self.log_dispersion[every].exp().clamp(1e-4, 1e4)


class Covariate(nn.Module):
    """One learned vector per category; without a code, the sum over all of them (the norm makes it the mean)."""

    def __init__(self, n_categories: int, n_hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_categories, n_hidden)
        self.activation = nn.PReLU()
        self.norm = nn.GroupNorm(4, n_hidden)

    def forward(self, code: Tensor | None) -> Tensor:
        x = self.embedding.weight.detach().sum(0, keepdim=True) if code is None else self.embedding(code)
        return self.norm(self.activation(x))
