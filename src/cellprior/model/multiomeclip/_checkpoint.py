"""scCLIP's tensors under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cellprior.model._official import shortened, translate
from cellprior.weights import WeightsError

_LAYER = r"(rna|atac)_model\.encoder\.layer\.(\d+)\."
RENAMED = {
    r"(rna|atac)_model\.embeddings\.cls_token$": r"\1.cls_token",
    r"(rna|atac)_model\.embeddings\.position_embeddings$": r"\1.positions",
    r"(rna|atac)_model\.embeddings\.patch_embeddings\.projection\.": r"\1.patches.",
    _LAYER + r"attention\.attention\.(query|key|value)\.": r"\1.encoder.\2.\3.",
    _LAYER + r"attention\.output\.dense\.": r"\1.encoder.\2.out.",
    _LAYER + r"intermediate\.dense\.": r"\1.encoder.\2.up.",
    _LAYER + r"output\.dense\.": r"\1.encoder.\2.down.",
    _LAYER + r"layernorm_(before|after)\.": r"\1.encoder.\2.norm_\3.",
    r"(rna|atac)_model\.layernorm\.": r"\1.norm.",
    r"(rna|atac)_model\.pooler\.dense\.": r"\1.pooler.",
    r"(rna|atac)_projection\.": r"\1.projection.",
    r"criterion\.logit_scale$": "logit_scale",
}


def rename(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or the error lists it.

    Raises
    ------
    WeightsError
        If there are tensors that scCLIP does not have.
    """
    renamed, unknown = translate(tensors, RENAMED, prefix="model.")
    if unknown:
        msg = (
            f"{file} holds {len(unknown)} tensors that scCLIP does not have: "
            f"{shortened(unknown)}. It is another model's checkpoint."
        )
        raise WeightsError(msg)
    return renamed


def network(state_dict: Mapping[str, Tensor], n_heads: int, file: str) -> dict[str, Any]:
    """Arguments of the network, from the shapes of renamed tensors; the number of heads leaves no trace in them.

    Raises
    ------
    WeightsError
        If tensors are missing.
    """
    layers = {int(found[1]) for name in state_dict if (found := re.match(r"rna\.encoder\.(\d+)\.", name))}
    try:
        n_mlp, n_hidden = state_dict["rna.encoder.0.up.weight"].shape
        return {
            "encoder": "vit",
            "n_latent": len(state_dict["rna.projection.weight"]),
            "n_hidden": n_hidden,
            "n_layers": len(layers),
            "n_heads": n_heads,
            "n_mlp": n_mlp,
            "n_patches": [state_dict[f"{name}.positions"].shape[1] - 1 for name in ("rna", "atac")],
            "mask_padding": False,
        }
    except KeyError as error:
        msg = f"{file} is not an scCLIP checkpoint: it lacks {error}."
        raise WeightsError(msg) from error
