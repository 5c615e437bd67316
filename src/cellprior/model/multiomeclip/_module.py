"""The MultiomeCLIP network, top to bottom: RNA and ATAC of a cell, each through an encoder, onto one unit sphere.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision (CLIP), ICML 2021. The transformer
is that of Xiong, Chen, Kellis, scCLIP: Multi-modal Single-cell Contrastive Learning Integration Pre-training, NeurIPS
AI4Science workshop 2023; the reduced inputs and wide layers with much dropout follow Gossi et al., Matching single
cells across modalities with contrastive learning and optimal transport, Briefings in Bioinformatics 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from cellprior._arguments import flag, one_of, pair, share, whole
from cellprior.model.data._counts import csr_tensor
from cellprior.model.engine._kernels import cell_depth, weighted_gene_sum
from cellprior.model.learning._contrast import in_micro_batches, similarities
from cellprior.model.learning._processes import gather_cells
from cellprior.model.multiomeclip._inputs import (
    components_of,
    inverse_document_frequency,
    log_share,
    open_peaks,
)
from cellprior.model.multiomeclip._loss import infonce, sigmoid_loss

ROWS = 4096  # cells whose weighted counts are made at a time
SCALE, MAX_SCALE = 1 / 0.07, 100.0  # of the scores, at the start and at most
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # where SigLIP starts
LEAST_SPREAD = 0.1  # of the logarithm of the depth: of cells of one depth, a tenth more is not far away
RIDGE = 0.1  # of the alignment, in units of the mean variance

Modality = Literal["rna", "atac"]
MODALITIES: tuple[Modality, ...] = ("rna", "atac")
EncoderKind = Literal["mlp-depth", "mlp", "vit"]
Loss = Literal["infonce", "sigmoid"]


def default_width(encoder: EncoderKind) -> int:
    """``n_hidden`` where none is given."""
    return 512 if encoder == "mlp-depth" else 256


class MultiomeCLIPModule(BaseModuleClass):
    """MultiomeCLIP.

    Parameters
    ----------
    n_genes, n_peaks
        Sizes of the vocabularies.
    encoder
        ``"mlp-depth"``: components of the weighted counts, and the logarithm of a cell's depth, through a wide network.
        ``"mlp"``: the same without the depth. ``"vit"``: scCLIP's transformer over patches of features.
    n_latent
        Width of the shared space.
    n_hidden
        Width of a layer, or of a patch; by default 512 of ``"mlp-depth"``, and 256 of the others.
    n_layers
        Layers; by default 2, and 6 of ``"vit"``.
    dropout_rate
        By default 0.5, and 0.1 of ``"vit"``.
    n_components
        Of RNA and ATAC; not of ``"vit"``.
    n_heads, n_mlp, n_patches
        Of ``"vit"``: attention heads, width of the feed-forward network, and patches of RNA and ATAC.
    mask_padding
        Of ``"vit"``: leave out the patches that hold no feature, which the original attends to.
    peak_order
        Of ``"vit"``: the peaks in the order in which they are cut into patches; as they are by default.
    loss
        ``"infonce"``, or ``"sigmoid"``.
    """

    def __init__(
        self,
        n_genes: int,
        n_peaks: int,
        *,
        encoder: EncoderKind = "mlp-depth",
        n_latent: int = 64,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        dropout_rate: float | None = None,
        n_components: Sequence[int] = (64, 256),
        n_heads: int = 8,
        n_mlp: int = 512,
        n_patches: Sequence[int] = (128, 128),
        mask_padding: bool = True,
        peak_order: np.ndarray | None = None,
        loss: Loss = "infonce",
    ) -> None:
        super().__init__()
        one_of(("mlp-depth", "mlp", "vit"), encoder=encoder)
        one_of(("infonce", "sigmoid"), loss=loss)
        n_hidden = default_width(encoder) if n_hidden is None else n_hidden
        whole(n_latent=n_latent, n_hidden=n_hidden, n_heads=n_heads, n_mlp=n_mlp)
        if n_layers is not None:
            whole(least=0, n_layers=n_layers)
        if dropout_rate is not None:
            share(dropout_rate=dropout_rate)
        pair(n_components=n_components, n_patches=n_patches)
        flag(mask_padding=mask_padding)
        self.n_latent, self.loss_kind = n_latent, loss
        encoders: list[MLPEncoder | ViTEncoder] = []
        for i, (modality, n_features) in enumerate(zip(MODALITIES, (n_genes, n_peaks), strict=True)):
            is_atac = modality == "atac"
            if encoder != "vit":
                encoders.append(
                    MLPEncoder(
                        n_features,
                        n_latent,
                        is_atac=is_atac,
                        reads_depth=encoder == "mlp-depth",
                        n_components=min(n_components[i], n_features),
                        n_hidden=n_hidden,
                        n_layers=2 if n_layers is None else n_layers,
                        dropout_rate=0.5 if dropout_rate is None else dropout_rate,
                    )
                )
            else:
                encoders.append(
                    ViTEncoder(
                        n_features,
                        n_latent,
                        is_atac=is_atac,
                        n_patches=n_patches[i],
                        n_hidden=n_hidden,
                        n_layers=6 if n_layers is None else n_layers,
                        n_heads=n_heads,
                        n_mlp=n_mlp,
                        dropout_rate=0.1 if dropout_rate is None else dropout_rate,
                        mask_padding=mask_padding,
                        order=peak_order if is_atac else None,
                    )
                )
        self.rna, self.atac = encoders
        self.alignment = nn.ModuleDict({name: Alignment(n_latent) for name in MODALITIES})
        scale = SCALE if loss == "infonce" else SIGMOID_SCALE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS)) if loss == "sigmoid" else None

    def check_tensors(self, state_dict: Mapping[str, Tensor]) -> None:
        """Refuse values that would make embeddings of NaN, or reach beyond the features.

        Raises ValueError, with the name of the tensor.
        """
        for name, values in state_dict.items():
            part = name.removeprefix("rna.").removeprefix("atac.")
            if part in ("spread", "depth_spread", "maximum") and not bool((values > 0).all()):
                msg = f"the tensor {name} has values that are not above 0."
            elif part == "idf" and not bool((values >= 0).all()):
                msg = f"the tensor {name} has values below 0."
            elif part == "order" and not torch.equal(values.sort().values, torch.arange(len(values))):
                msg = f"the tensor {name} is no order of {len(values)} features."
            else:
                continue
            raise ValueError(msg)

    def encoder_of(self, modality: Modality) -> MLPEncoder | ViTEncoder:
        """Encoder of a modality."""
        return self.rna if modality == "rna" else self.atac

    def embed(self, modality: Modality, counts: Tensor) -> Tensor:
        """Unit vectors ``(cells, n_latent)``.

        Parameters
        ----------
        modality
            ``"rna"`` or ``"atac"``.
        counts
            Raw counts over the vocabulary ``(cells, features)``, dense or sparse CSR.
        """
        encoder = self.encoder_of(modality)
        return F.normalize(encoder(encoder.inputs(counts)), dim=1)

    def scores(self, rna: Tensor, atac: Tensor) -> Tensor:
        """Scaled cosines ``(cells of ATAC, cells of RNA)`` of latents ``(cells, n_latent)``."""
        scores = similarities(atac, rna) * self.logit_scale.exp()
        return scores if self.logit_bias is None else scores + self.logit_bias

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        *,
        same: Tensor | None = None,
        micro_batch_size: int | None = None,
    ) -> dict[str, Tensor]:
        """``loss`` of cells with both modalities, and their latents ``rna`` and ``atac`` ``(cells, n_latent)``.

        Where several processes train together, of the cells of all of them.

        Parameters
        ----------
        inputs
            Of the encoders, ``rna`` and ``atac``, see :meth:`MLPEncoder.inputs`.
        same
            Which cells are no negatives of which, as they have the same label ``(cells, cells)``.
        micro_batch_size
            Cells whose gradient is computed at a time; the loss and its gradient are those of all cells.
        """
        rna = gather_cells(in_micro_batches(self.rna, inputs["rna"], size=micro_batch_size))
        atac = gather_cells(in_micro_batches(self.atac, inputs["atac"], size=micro_batch_size))
        loss = infonce if self.loss_kind == "infonce" else sigmoid_loss
        return {"loss": loss(self.scores(rna, atac), same=same), "rna": rna, "atac": atac}

    @torch.no_grad()
    def align(self, rna: Tensor, atac: Tensor, *, unseen: tuple[Tensor, Tensor] | None = None) -> None:
        """Find what the modalities share, from unit vectors of the same training cells ``(cells, n_latent)``.

        The directions are those of a canonical correlation analysis with a ridge [Vinod, Journal of Econometrics
        1976]; a direction weighs as much as the modalities correlate on it. A cell's place in one of them is thus a
        guess of its place in the other.

        Parameters
        ----------
        rna, atac
            Of the training cells.
        unseen
            RNA and ATAC of cells that were not trained on, whose means then are those of the modalities: training has
            drawn the modalities of its own cells nearer to each other than those of other cells.
        """
        means = [latent.mean(0) for latent in unseen or (rna, atac)]
        centred = [latent - latent.mean(0) for latent in (rna, atac)]
        whitening = [inverse_root(x.T @ x / len(x)) for x in centred]
        left, _, right = torch.linalg.svd(whitening[0] @ (centred[0].T @ centred[1]) @ whitening[1])
        directions = whitening[0] @ left, whitening[1] @ right.T
        turned = [x @ axes for x, axes in zip(centred, directions, strict=True)]
        deviation = [x.square().mean(0).sqrt().clamp(min=1e-6) for x in turned]
        correlation = (turned[0] * turned[1]).mean(0) / (deviation[0] * deviation[1])
        for name, mean, axes, spread in zip(MODALITIES, means, directions, deviation, strict=True):
            alignment = self.alignment[name]
            assert isinstance(alignment, Alignment)  # for the type checker
            alignment.mean.copy_(mean)
            alignment.axes.copy_(axes * correlation / spread)

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Keep the scale of the scores at 100 or less, after each step."""
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))


class Alignment(nn.Module):
    """From a modality's part of the sphere to what both modalities share.

    The modalities lie apart on the sphere, as those of all models of this kind do [Liang et al., NeurIPS 2022], and
    each has directions that say nothing about the other.

    Attributes
    ----------
    mean
        Of the modality over the training cells ``(n_latent,)``.
    axes
        Shared directions, those on which the modalities agree most first, weighted ``(n_latent, n_latent)``.
    """

    mean: Tensor
    axes: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_latent))
        self.register_buffer("axes", torch.eye(n_latent))

    def forward(self, latent: Tensor) -> Tensor:
        """Unit vectors ``(cells, n_latent)`` to unit vectors."""
        return F.normalize((latent - self.mean) @ self.axes, dim=1)


class MLPEncoder(nn.Module):
    """Components of weighted counts through wide layers.

    The depth of a cell says how far its components can be trusted, and, as both modalities of a cell are deep or
    shallow together, something about its partner.

    Attributes
    ----------
    idf
        Weight of each feature ``(n_features,)``.
    components
        ``(n_features, n_components)``.
    mean, spread
        Of the training cells on the components ``(n_components,)``, and how far they are from it.
    depth_mean, depth_spread
        Mean and standard deviation of the logarithm of the depth of the training cells, if it is read.
    """

    idf: Tensor
    components: Tensor
    mean: Tensor
    spread: Tensor
    depth_mean: Tensor
    depth_spread: Tensor

    def __init__(
        self,
        n_features: int,
        n_latent: int,
        *,
        is_atac: bool,
        n_components: int,
        n_hidden: int,
        n_layers: int,
        dropout_rate: float,
        reads_depth: bool = False,
    ) -> None:
        super().__init__()
        self.is_atac, self.reads_depth = is_atac, reads_depth
        self.register_buffer("idf", torch.ones(n_features))
        self.register_buffer("components", torch.zeros(n_features, n_components))
        self.register_buffer("mean", torch.zeros(n_components))
        self.register_buffer("spread", torch.tensor(1.0))
        if reads_depth:
            self.register_buffer("depth_mean", torch.tensor(0.0))
            self.register_buffer("depth_spread", torch.tensor(1.0))
        layers: list[nn.Module] = []
        width = n_components + reads_depth
        for _ in range(n_layers):
            layers += [nn.Linear(width, n_hidden), nn.ELU(), nn.Dropout(dropout_rate)]
            width = n_hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, n_latent))

    @torch.no_grad()
    def fit(self, counts: sp.csr_matrix, *, seed: int) -> None:
        """Find weights and components from raw counts of the training cells ``(cells, n_features)``."""
        depth = np.asarray(counts.sum(axis=1)).ravel()
        if self.is_atac:
            open_cells = np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1])
            idf = inverse_document_frequency(open_cells, counts.shape[0])
            self.idf.copy_(torch.from_numpy(idf))
        weighted = [self._weigh(*self._read(csr_tensor(part))) for part in _row_blocks(counts)]
        blocks = [
            sp.csr_matrix(
                (part.values().numpy(), part.col_indices().numpy(), part.crow_indices().numpy()), part.shape
            )
            for part in weighted
        ]
        components, mean, spread = components_of(
            sp.vstack(blocks, format="csr"), depth, self.components.shape[1], seed=seed
        )
        self.components.copy_(torch.from_numpy(components))
        self.mean.copy_(torch.from_numpy(mean))
        self.spread.fill_(spread)
        if self.reads_depth:
            depths = torch.cat([torch.log1p(self._read(csr_tensor(part))[1]) for part in _row_blocks(counts)])
            self.depth_mean.copy_(depths.mean())
            self.depth_spread.copy_(depths.std(correction=0).clamp(min=LEAST_SPREAD))

    def places(self, counts: Tensor, components: Tensor | None = None) -> Tensor:
        """Place of each cell on the components, its own or others ``(cells, n_components)``."""
        return self._places(*self._read(counts), components)

    def inputs(self, counts: Tensor, components: Tensor | None = None) -> Tensor:
        """What the layers read: places, and with ``reads_depth``, the depth ``(cells, n_components + reads_depth)``."""
        read, depth = self._read(counts)
        places = self._places(read, depth, components)
        if not self.reads_depth:
            return places
        standard = (torch.log1p(depth) - self.depth_mean) / self.depth_spread
        return torch.cat([places, standard[:, None]], dim=1)

    def _read(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Counts, or open peaks, and how many a cell has ``(cells,)``."""
        read = open_peaks(counts) if self.is_atac else counts
        return read, cell_depth(read)

    def _places(self, read: Tensor, depth: Tensor, components: Tensor | None = None) -> Tensor:
        components = self.components if components is None else components
        return (weighted_gene_sum(self._weigh(read, depth), components) - self.mean) / self.spread

    def _weigh(self, read: Tensor, depth: Tensor) -> Tensor:
        return log_share(read, weight=self.idf.to(read.device) if self.is_atac else None, depth=depth)

    def forward(self, inputs: Tensor) -> Tensor:
        """Latent ``(cells, n_latent)``, not yet of unit length."""
        return self.layers(inputs)


class ViTEncoder(nn.Module):
    """Patches of features as tokens, with a class token in front; scCLIP's encoder.

    Attributes
    ----------
    maximum
        Largest log-normalised expression of each gene in the training cells ``(n_features,)``.
    order
        Features in the order of the patches ``(n_features,)``.
    """

    maximum: Tensor
    order: Tensor

    def __init__(
        self,
        n_features: int,
        n_latent: int,
        *,
        is_atac: bool,
        n_patches: int,
        n_hidden: int,
        n_layers: int,
        n_heads: int,
        n_mlp: int,
        dropout_rate: float,
        mask_padding: bool,
        order: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.is_atac = is_atac
        self.patch_size = -(-n_features // n_patches)
        # the original cuts as many patches as asked for: of 128 patches for 130 features, 63 are padding
        self.n_used = -(-n_features // self.patch_size) if mask_padding else n_patches
        self.n_features = n_features
        self.register_buffer("maximum", torch.ones(n_features))
        self.register_buffer("order", torch.from_numpy(np.arange(n_features) if order is None else order))
        self.patches = nn.Linear(self.patch_size, n_hidden)
        self.cls_token = nn.Parameter(torch.randn(1, 1, n_hidden) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, n_patches + 1, n_hidden) * 0.02)
        self.dropout = nn.Dropout(dropout_rate)
        self.encoder = nn.ModuleList(
            TransformerLayer(n_hidden, n_heads, n_mlp, dropout_rate) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(n_hidden, eps=1e-12)
        self.pooler = nn.Linear(n_hidden, n_hidden)
        self.projection = nn.Linear(n_hidden, n_latent, bias=False)

    @torch.no_grad()
    def fit(self, counts: sp.csr_matrix, *, seed: int) -> None:
        """Find the largest expression of each gene in the training cells ``(cells, n_features)``."""
        if self.is_atac:
            return
        largest = torch.zeros(self.n_features)
        for part in _row_blocks(counts):
            values = log_share(csr_tensor(part))
            largest.scatter_reduce_(0, values.col_indices().long(), values.values(), "amax")
        self.maximum.copy_(torch.where(largest > 0, largest, 1.0))

    def inputs(self, counts: Tensor) -> Tensor:
        """Log-normalised expression over its maximum, or 1 for an open peak ``(cells, n_features)``, dense."""
        if self.is_atac:
            values = open_peaks(counts)
            return values.to_dense() if values.layout == torch.sparse_csr else values
        values = log_share(counts)
        return (values.to_dense() if values.layout == torch.sparse_csr else values) / self.maximum

    def forward(self, inputs: Tensor) -> Tensor:
        """Latent ``(cells, n_latent)``, not yet of unit length."""
        x = self.embed(inputs)
        for layer in self.encoder:
            x = layer(x)
        return self.projection(self.pool(x))

    def embed(self, inputs: Tensor) -> Tensor:
        """Class token and patches ``(cells, 1 + n_patches, n_hidden)``."""
        ordered = inputs[:, self.order]
        padded = F.pad(ordered, (0, self.n_used * self.patch_size - self.n_features))
        tokens = self.patches(padded.view(len(inputs), self.n_used, self.patch_size))
        tokens = torch.cat([self.cls_token.expand(len(inputs), -1, -1), tokens], dim=1)
        return self.dropout(tokens + self.positions[:, : 1 + self.n_used])

    def pool(self, hidden: Tensor) -> Tensor:
        """Class token of the last hidden states ``(cells, n_hidden)``."""
        return torch.tanh(self.pooler(self.norm(hidden[:, 0])))


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward network, each behind a norm and around a residual."""

    def __init__(self, n_hidden: int, n_heads: int, n_mlp: int, dropout_rate: float) -> None:
        super().__init__()
        if n_hidden % n_heads:
            msg = f"n_hidden={n_hidden} cannot be split into n_heads={n_heads} heads; choose a multiple."
            raise ValueError(msg)
        self.n_heads, self.dropout_rate = n_heads, dropout_rate
        self.norm_before = nn.LayerNorm(n_hidden, eps=1e-12)
        self.query, self.key, self.value = (nn.Linear(n_hidden, n_hidden) for _ in range(3))
        self.out = nn.Linear(n_hidden, n_hidden)
        self.norm_after = nn.LayerNorm(n_hidden, eps=1e-12)
        self.up, self.down = nn.Linear(n_hidden, n_mlp), nn.Linear(n_mlp, n_hidden)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``(cells, tokens, n_hidden)`` to the same."""
        normed = self.norm_before(x)
        query, key, value = (
            part(normed).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )  # (cells, heads, tokens, head_dim)
        rate = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))  # (cells, tokens, n_hidden)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_after(x)))))


def inverse_root(covariance: Tensor) -> Tensor:
    """``(C + λ I)^(-1/2)``, where λ is a tenth of the mean variance."""
    variance, axes = torch.linalg.eigh(covariance)
    variance = (variance + RIDGE * variance.mean()).clamp(min=1e-12)
    return axes / variance.sqrt() @ axes.T


def _row_blocks(counts: sp.csr_matrix) -> Iterable[sp.csr_matrix]:
    return (counts[i : i + ROWS] for i in range(0, counts.shape[0], ROWS))
