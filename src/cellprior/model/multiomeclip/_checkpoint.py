"""The checkpoints that scCLIP's authors released, read into our layout.

A file of Lightning: the tensors under ``state_dict``; under ``hyper_parameters`` the features as pandas frames,
``genes`` and ``peaks``, the command line, and the transformers' configurations, which alone tell the number of heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cellprior.model.files._official import shortened, translate
from cellprior.weights import InertCheckpoint, WeightsError
from cellprior.weights._inert import found, row_names

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
# parts of the transformers' configurations; another value would be another network
EXPECTED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}


@dataclass(frozen=True)
class Official:
    """An scCLIP checkpoint in our layout.

    Attributes
    ----------
    tensors
        Under our names.
    network
        Arguments of the model.
    genes, peaks
        Features in the order of the patches.
    is_scaled
        Whether the model was trained on RNA that is divided by the largest expression of each gene.
    notes
        What a reader of the model's card should know.
    """

    tensors: dict[str, Tensor]
    network: dict[str, Any]
    genes: list[str]
    peaks: list[str]
    is_scaled: bool
    notes: tuple[str, ...]


def read_scclip(checkpoint: InertCheckpoint, content: Any) -> Official | None:
    """Read an scCLIP checkpoint; None if it is another model's.

    Raises WeightsError if features, sizes or tensors are missing, unknown, or contradict each other.
    """
    file = checkpoint.path.name
    tensors = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not any("rna_model." in str(name) for name in tensors):
        return None
    stated = content.get("hyper_parameters")
    renamed = rename(checkpoint.tensors(tensors), file)
    heads = _said(stated, "num_attention_heads")
    if len(heads) != 1:
        msg = f"{file} gives {sorted(heads) or 'no'} number of attention heads; one, of both modalities, is needed."
        raise WeightsError(msg)
    for key, value in EXPECTED.items():
        if other := _said(stated, key) - {value}:
            msg = f"{file} has {key}={other}; supported is {value!r}, as in scCLIP."
            raise WeightsError(msg)
    arguments = network(renamed, heads.pop(), file) | {"genomic_order": False}
    if len(dropout := _said(stated, "hidden_dropout_prob")) == 1:
        arguments["dropout_rate"] = dropout.pop()
    features = {name: _features(stated, key, file) for name, key in (("rna", "genes"), ("atac", "peaks"))}
    for i, (name, names) in enumerate(features.items()):
        width = renamed[f"{name}.patches.weight"].shape[1]
        if width != -(-len(names) // arguments["n_patches"][i]):
            msg = (
                f"{file} contradicts itself: {len(names):,} features of {name.upper()} in {arguments['n_patches'][i]} "
                f"patches are not {width:,} a patch."
            )
            raise WeightsError(msg)
    notes = []
    if False in _said(stated, "normalize"):
        notes.append("The original's embeddings were not of unit length; here they are.")
    is_scaled = False not in _said(stated, "binary") and True not in _said(stated, "backed")
    return Official(renamed, arguments, features["rna"], features["atac"], is_scaled, tuple(notes))


def _said(stated: Any, key: str) -> set[Any]:
    """Values that a setting has, wherever it is stated."""
    return {value for value in found(stated, key) if isinstance(value, bool | int | float | str)}


def _features(stated: Any, key: str, file: str) -> list[str]:
    """Names in the index of a frame."""
    problem = "there is none"
    for frame in found(stated, key):
        try:
            return row_names(frame)
        except ValueError as error:
            problem = str(error)
    msg = f"{file} should hold a pandas frame {key!r} in its hyper_parameters: {problem}."
    raise WeightsError(msg)


def rename(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or the error lists it.

    Raises WeightsError if there are tensors that scCLIP does not have.
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

    Raises WeightsError if tensors are missing.
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
