"""The files that the Nicheformer authors release, read into our layout.

``nicheformer.ckpt`` is Lightning's: tensors under ``state_dict``, arguments under ``hyper_parameters``, and numbers of
NumPy, for which it cannot be read as a file of tensors only. The copy on the Hugging Face hub is ``model.safetensors``
with ``config.json``, as transformers writes them. Which genes the tokens are is in other files, see
:mod:`~cellprior.model.nicheformer._vocabulary`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellprior.model.files._official import shortened, translate
from cellprior.model.nicheformer._inputs import FIRST_GENE
from cellprior.model.nicheformer._vocabulary import find_vocabulary
from cellprior.weights import Bundle, InertCheckpoint, WeightsError

FILE = "model.safetensors"
PREFIX = "nicheformer."  # of the hub's copy
SPARE_TOKENS = 5  # rows of the table behind the last gene

# their name (a pattern) -> ours
_LAYER = r"encoder\.layers\.(\d+)\."
RENAMED = {
    r"embeddings\.weight$": "embedder.tokens.weight",
    r"positional_embedding\.weight$": "embedder.positions.weight",
    _LAYER + r"self_attn\.in_proj_(weight|bias)$": r"encoder.\1.in_proj.\2",  # cut into three below
    _LAYER + r"self_attn\.out_proj\.": r"encoder.\1.out.",
    _LAYER + r"linear1\.": r"encoder.\1.ff1.",
    _LAYER + r"linear2\.": r"encoder.\1.ff2.",
    _LAYER + r"(norm1|norm2)\.": r"encoder.\1.\2.",
    r"classifier_head\.": "gene_logits.",
}
# 0, 1, 2, ...; a layer that was only copied; and two heads that no step of the pretraining has reached
UNUSED = r"pos$|encoder_layer\.|pooler_head\.|cls_head\."
SIZES = {
    "dim_model": "n_hidden",
    "nlayers": "n_layers",
    "nheads": "n_heads",
    "dim_feedforward": "n_feedforward",
    "context_length": "n_positions",
}
# what our network has built in
BUILT_IN = {"learnable_pe": True, "specie": True, "assay": True, "modality": True}


def is_official(path: Path) -> bool:
    """Whether a folder, or the file of weights in it, is the hub's copy, or one that its code has written."""
    folder = path if path.is_dir() else path.parent
    path = folder / FILE if path.is_dir() else path
    return path.name == FILE and path.is_file() and _config(folder).get("model_type") == "nicheformer"


def read_hub(path: Path) -> tuple[Bundle, Path]:
    """Read the hub's copy, a folder or its ``model.safetensors``; and give that file.

    Raises WeightsError if a file is missing, broken or another model's, or a tensor is not known.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = path if path.is_dir() else path.parent
    path = folder / FILE
    if not is_official(path):
        msg = (
            f"{folder} holds no Nicheformer: needed is a bundle, or a folder with config.json (model_type nicheformer) "
            f"and {FILE}. The authors' nicheformer.ckpt is made into a bundle by cellprior.model.convert(path, folder, "
            "trust=True), or `cellprior convert`."
        )
        raise WeightsError(msg)
    try:
        tensors = load_file(path, device="cpu")
    except SafetensorError as error:
        msg = f"{path} is damaged or truncated ({error}). Get it again."
        raise WeightsError(msg) from error
    return bundle_of(tensors, _config(folder), path, folder / "config.json"), path


def read_lightning(checkpoint: InertCheckpoint, content: Any) -> Bundle | None:
    """Read the authors' ``.ckpt``; None if it is another model's.

    Raises WeightsError if sizes, tensors or the vocabulary beside it are missing, unknown, or contradict each other.
    """
    tensors = content.get("state_dict") if isinstance(content, Mapping) else None
    stated = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    ours = {"positional_embedding.weight", "classifier_head.weight"}
    if not isinstance(tensors, Mapping) or not ours <= {str(name) for name in tensors}:
        return None
    if not isinstance(stated, Mapping):
        msg = f"{checkpoint.path} has no hyper_parameters, which alone say how many heads there are."
        raise WeightsError(msg)
    return bundle_of(checkpoint.tensors(tensors), stated, checkpoint.path, checkpoint.path)


def bundle_of(tensors: Mapping[str, Tensor], stated: Mapping[str, Any], file: Path, source: Path) -> Bundle:
    """A bundle of their tensors, under their names; the vocabulary is looked for beside their ``file``.

    Raises WeightsError if they are another network's.
    """
    arguments, n_tokens = network(stated, source)
    vocabulary = find_vocabulary(file.parent, n_tokens)
    state_dict = rename(tensors, file.name, n_tokens=n_tokens)
    state_dict["gene_means"] = torch.from_numpy(vocabulary.means)
    config = {"model": "Nicheformer", "network": arguments}
    files = tuple(dict.fromkeys((file, source, *vocabulary.files)))
    return Bundle(state_dict, config, vocabulary.genes, "", files=files)


def network(stated: Mapping[str, Any], source: Path) -> tuple[dict[str, Any], int]:
    """Arguments of the network, and how many tokens it has.

    Raises WeightsError if they describe another network.
    """
    for name in (*SIZES, "n_tokens"):
        value = stated.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            msg = f"{source}: {name} is {ascii(value)[:60]}; a whole number above 0 is needed."
            raise WeightsError(msg)
    for name, needed in BUILT_IN.items():
        if (value := stated.get(name, needed)) is not needed:
            msg = f"{source}: {name} is {ascii(value)[:60]}, and {needed} in the released Nicheformer."
            raise WeightsError(msg)
    if stated["dim_model"] % stated["nheads"]:
        msg = f"{source}: dim_model {stated['dim_model']} is no multiple of nheads {stated['nheads']}."
        raise WeightsError(msg)
    if stated["n_tokens"] <= FIRST_GENE:
        msg = f"{source}: n_tokens is {stated['n_tokens']}; the first {FIRST_GENE} are no genes."
        raise WeightsError(msg)
    dropout = stated.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        msg = f"{source}: dropout is {ascii(dropout)[:60]}; a number from 0 to below 1 is needed."
        raise WeightsError(msg)
    arguments = {ours: stated[theirs] for theirs, ours in SIZES.items()} | {"dropout_rate": float(dropout)}
    return arguments, stated["n_tokens"]


def rename(tensors: Mapping[str, Tensor], file: str, *, n_tokens: int) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or known to be superfluous, or the error lists it.

    Raises WeightsError if there are tensors that Nicheformer does not have.
    """
    renamed, unknown = translate(tensors, RENAMED, prefix=PREFIX)
    unknown = [name for name in unknown if not re.match(UNUSED, name)]
    if unknown:
        msg = (
            f"{file} holds {len(unknown)} tensors that the pretrained Nicheformer does not have: {shortened(unknown)}. "
            "It is another model's checkpoint, or was fine-tuned with the authors' code: load the pretrained weights, "
            "and teach them your labels, model.fine_tune()."
        )
        raise WeightsError(msg)
    found: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        if ".in_proj." in name:
            if tensor.ndim < 1 or len(tensor) % 3:
                msg = f"{file}: {name} is {tuple(tensor.shape)}, which is not three projections."
                raise WeightsError(msg)
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[name.replace("in_proj", part)] = third.float().contiguous()
        else:
            found[name] = tensor.float()
    table = found.get("embedder.tokens.weight")
    if table is not None and table.ndim == 2 and len(table) == n_tokens + SPARE_TOKENS:
        found["embedder.tokens.weight"] = table[:n_tokens].clone()  # the others are of no token
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
