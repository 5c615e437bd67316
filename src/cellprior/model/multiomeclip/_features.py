"""Genes and peaks in the shared space: how a cell's vector moves with each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellprior.model.data._cells import Cells
from cellprior.model.data._counts import csr_tensor, row_numbers
from cellprior.model.multiomeclip._module import (
    MODALITIES,
    MLPEncoder,
    Modality,
    MultiomeCLIPModule,
    ViTEncoder,
)

MAX_CELLS = 1024  # that the mean is taken over
CHUNK = {MLPEncoder: 256, ViTEncoder: 32}  # cells whose gradient is in memory


def feature_vectors(model: Any, modality: Modality, adata: Any, indices: Any) -> pd.DataFrame:
    """See :meth:`cellprior.model.MultiomeCLIP.get_feature_representation`."""
    if modality not in MODALITIES:
        msg = f'modality={modality!r} is not known; choose "rna" or "atac".'
        raise ValueError(msg)
    model._check_if_trained(warn=False)
    cells = model._cells(adata)
    rows = row_numbers(indices, cells.n_obs)
    rows = rows[cells.has(modality)[rows]]
    if not len(rows):
        msg = (
            f"None of the cells has {modality.upper()}, over which the vectors are averaged; the data have "
            f"{' and '.join(cells.counts)}."
        )
        raise ValueError(msg)
    vectors = vectors_over(model.module, modality, cells, rows)
    names = gene_names(model) if modality == "rna" else pd.Index(model.peaks)
    return pd.DataFrame(vectors, index=names)


def gene_names(model: Any) -> pd.Index:
    """Symbols of the vocabulary, or Ensembl ids of genes that have none."""
    genes = model.genes
    symbol = genes["symbol"] if "symbol" in genes else pd.Series("", index=genes.index)
    if "ensembl_id" in genes:
        symbol = symbol.where(symbol != "", genes["ensembl_id"])
    return pd.Index(symbol.to_numpy(dtype=object))


def vectors_over(
    module: MultiomeCLIPModule, modality: Modality, cells: Cells, rows: np.ndarray
) -> np.ndarray:
    """Mean of the Jacobian over some cells, 1,024 of them at most, evenly drawn ``(n_features, n_latent)``, float32."""
    rows = rows[:: -(-len(rows) // MAX_CELLS)]
    encoder = module.encoder_of(modality)
    module.eval()
    total = torch.zeros(0)
    with torch.inference_mode(False), torch.enable_grad():
        for part in np.array_split(rows, -(-len(rows) // CHUNK[type(encoder)])):
            counts = csr_tensor(cells.counts[modality].read(part)).to(module.device)
            found = _jacobian(module, modality, encoder.inputs(counts))
            total = found if not len(total) else total + found
    by_input = total / len(rows)  # (n_latent, inputs)
    if isinstance(encoder, MLPEncoder):
        components = encoder.components
        by_feature = components @ by_input[:, : components.shape[1]].T / encoder.spread
    else:
        by_feature = by_input.T / encoder.maximum[:, None]  # all 1 of ATAC
    return by_feature.cpu().numpy()


def _jacobian(module: MultiomeCLIPModule, modality: Modality, inputs: Tensor) -> Tensor:
    """Of the sum of the cells' places in the shared space, by what enters the encoder ``(n_latent, inputs)``."""
    shift = torch.zeros(inputs.shape[1], device=inputs.device, requires_grad=True)  # of all cells alike
    latent = torch.nn.functional.normalize(module.encoder_of(modality)(inputs.detach() + shift), dim=1)
    places = module.alignment[modality](latent).sum(0)
    gradients = [torch.autograd.grad(place, shift, retain_graph=True)[0] for place in places]
    return torch.stack(gradients).detach()
