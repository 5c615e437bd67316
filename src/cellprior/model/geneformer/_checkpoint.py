"""The folders that the Geneformer authors release, read into our layout.

A folder holds ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``) of a ``BertForMaskedLM``, as
transformers writes them. Which genes its tokens are, and what they are divided by, is in pickles elsewhere, see
:mod:`~cellprior.model.geneformer._vocabulary`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellprior.model.files._official import shortened, translate
from cellprior.model.geneformer._vocabulary import find_vocabulary
from cellprior.weights import Bundle, WeightsError, read_checkpoint

FILES = ("model.safetensors", "pytorch_model.bin")

# their name (a pattern) -> ours
_LAYER = r"bert\.encoder\.layer\.(\d+)\."
RENAMED = {
    r"bert\.embeddings\.word_embeddings\.": "embedder.tokens.",
    r"bert\.embeddings\.position_embeddings\.": "embedder.positions.",
    r"bert\.embeddings\.token_type_embeddings\.": "embedder.types.",
    r"bert\.embeddings\.LayerNorm\.": "embedder.norm.",
    _LAYER + r"attention\.self\.(query|key|value)\.": r"encoder.\1.\2.",
    _LAYER + r"attention\.output\.dense\.": r"encoder.\1.out.",
    _LAYER + r"attention\.output\.LayerNorm\.": r"encoder.\1.norm1.",
    _LAYER + r"intermediate\.dense\.": r"encoder.\1.ff1.",
    _LAYER + r"output\.dense\.": r"encoder.\1.ff2.",
    _LAYER + r"output\.LayerNorm\.": r"encoder.\1.norm2.",
    r"cls\.predictions\.transform\.dense\.": "transform.",
    r"cls\.predictions\.transform\.LayerNorm\.": "transform_norm.",
    r"cls\.predictions\.bias$": "gene_bias",
}
COUNTED = "bert.embeddings.position_ids"  # 0, 1, 2, ...
# where they are not left out, the same numbers again
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# what our network has built in: value needed, and the one that a config without it means
BUILT_IN = {
    "hidden_act": ("relu", "gelu"),
    "layer_norm_eps": (1e-12, 1e-12),
    "position_embedding_type": ("absolute", "absolute"),
    "pad_token_id": (0, 0),
    "type_vocab_size": (2, 2),
}
SIZES = {
    "hidden_size": "n_hidden",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "n_feedforward",
    "max_position_embeddings": "n_positions",
}


def find_official(path: Path) -> Path | None:
    """The file of weights of an official folder, itself or in the folder; None if this is none."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((folder / name for name in FILES if (folder / name).is_file()), folder)
    if path.name not in FILES or _config(folder).get("model_type") != "bert":
        return None
    return path


def read_official(checkpoint: Path) -> Bundle:
    """Read an official folder, by its ``model.safetensors`` or ``pytorch_model.bin``, with ``config.json`` beside it.

    The dictionaries are where :func:`~cellprior.model.geneformer._vocabulary.find_vocabulary` looks for them. Raises
    WeightsError if a file is missing, broken or another model's, or a tensor is not known.
    """
    folder = checkpoint.parent
    config = _config(folder)
    arguments = network(config, folder / "config.json")
    vocabulary = find_vocabulary(folder, int(config["vocab_size"]))
    state_dict = rename(_tensors(checkpoint), checkpoint.name)
    state_dict["gene_scale"] = torch.from_numpy(vocabulary.scale)
    arguments["special_tokens"] = vocabulary.special
    files = (checkpoint, folder / "config.json", *vocabulary.files)
    config = {"model": "Geneformer", "network": arguments}
    return Bundle(state_dict, config, vocabulary.genes, "", files=files)


def network(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of the network from its config, those that the dictionaries decide left out.

    Raises WeightsError if it describes another network.
    """
    for name, (needed, default) in BUILT_IN.items():
        if (value := config.get(name, default)) != needed:
            msg = f"{path}: {name} is {value!r}, and {needed!r} in all Geneformers. It is another network's."
            raise WeightsError(msg)
    for name in (*SIZES, "vocab_size"):
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            msg = f"{path}: {name} is {value!r}; a whole number above 0 is needed."
            raise WeightsError(msg)
    if config["hidden_size"] % config["num_attention_heads"]:
        msg = (
            f"{path}: hidden_size {config['hidden_size']} is no multiple of num_attention_heads "
            f"{config['num_attention_heads']}."
        )
        raise WeightsError(msg)
    dropout = config.get("hidden_dropout_prob", 0.1)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        msg = f"{path}: hidden_dropout_prob is {dropout!r}; a number from 0 to below 1 is needed."
        raise WeightsError(msg)
    return {ours: config[theirs] for theirs, ours in SIZES.items()} | {"dropout_rate": float(dropout)}


def rename(tensors: Mapping[str, Any], file: str) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or known to be superfluous, or the error lists it."""
    for name, original in TIED.items():
        if name in tensors and not (original in tensors and torch.equal(tensors[name], tensors[original])):
            msg = f"{file}: {name} is not {original}, to which it is tied in Geneformer. It is another network's."
            raise WeightsError(msg)
    renamed, unknown = translate(tensors, RENAMED, prefix="")
    unknown = [name for name in unknown if name not in TIED and name != COUNTED]
    if any(name.startswith("classifier.") for name in unknown):
        msg = (
            f"{file} is a classifier that was fine-tuned with the authors' code, without the prediction of genes. Load "
            "the pretrained weights, and teach them your labels: model.fine_tune()."
        )
        raise WeightsError(msg)
    if unknown:
        msg = (
            f"{file} holds {len(unknown)} tensors that Geneformer does not have: {shortened(unknown)}. It is another "
            "model's checkpoint."
        )
        raise WeightsError(msg)
    return {name: tensor.float() for name, tensor in renamed.items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix == ".bin":
        found = read_checkpoint(path)
        if wrong := [name for name, tensor in found.items() if not isinstance(tensor, Tensor)]:
            msg = f"{path}: {wrong[0]} is no tensor; needed: a dictionary of tensors."
            raise WeightsError(msg)
        return found
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        msg = f"{path} is damaged or truncated ({error}). Get it again."
        raise WeightsError(msg) from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
