"""The files that the scGPT authors release, read into our layout.

``best_model.pt`` holds bare tensors; ``args.json`` beside it what their shapes do not tell, such as the number of
heads; ``vocab.json`` the row of each gene and of the special tokens.

One layout has many spellings: attention as ``Wqkv``, ``_impl.Wqkv`` or ``in_proj``, a prefix ``module.``, with or
without batch norm, decoders, classifiers. The original copies what fits and leaves the rest at random values; here
every tensor has its place, or the file is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cellprior.model.files._official import find_checkpoint, shortened, translate
from cellprior.model.scgpt._heads import QUERY_WIDTH
from cellprior.model.scgpt._inputs import N_BINS, PAD
from cellprior.weights import Bundle, WeightsError, read_checkpoint

CHECKPOINT, ARGS, VOCABULARY = "best_model.pt", "args.json", "vocab.json"
SUFFIX = ".pt"
PAD_TOKEN, CLS_TOKEN = "<pad>", "<cls>"
SPECIAL = (PAD_TOKEN, CLS_TOKEN, "<eoc>")  # the last is in the files, and in no computation of the original
PAGE = "https://github.com/bowang-lab/scGPT#pretrained-scgpt-model-zoo"

_LAYER = r"transformer_encoder\.layers\.(\d+)\."
# their name (a pattern) -> ours
RENAMED = {
    r"encoder\.embedding\.weight$": "gene_encoder.embedding.weight",
    r"encoder\.enc_norm\.": "gene_encoder.norm.",
    r"flag_encoder\.weight$": "flags.weight",
    r"value_encoder\.(linear[12]|norm)\.": r"value_encoder.\1.",
    r"value_encoder\.embedding\.weight$": "value_encoder.embedding.weight",
    r"value_encoder\.enc_norm\.": "value_encoder.norm.",
    r"bn\.": "batch_norm.0.",
    r"dsbn\.bns\.(\d+)\.": r"batch_norm.\1.",
    _LAYER + r"self_attn\.(?:_impl\.)?Wqkv\.": r"encoder.\1.qkv.",
    _LAYER + r"self_attn\.in_proj_(weight|bias)$": r"encoder.\1.qkv.\2",
    _LAYER + r"self_attn\.(?:_impl\.)?out_proj\.": r"encoder.\1.out.",
    _LAYER + r"linear([12])\.": r"encoder.\1.ff\2.",
    _LAYER + r"norm([12])\.": r"encoder.\1.norm\2.",
    r"batch_encoder\.embedding\.weight$": "batch_encoder.embedding.weight",
    r"batch_encoder\.enc_norm\.": "batch_encoder.norm.",
    r"decoder\.(fc|zero_logit)\.(\d)\.": r"expression.\1.\2.",
    r"decoder\.(weight|bias)$": r"expression.\1",
    r"mvc_decoder\.": "mvc.",
    r"cls_decoder\._decoder\.": "official_head.blocks.",
    r"cls_decoder\.out_layer\.": "official_head.out.",
    r"grad_reverse_discriminator\._decoder\.": "adversary.blocks.",
    r"grad_reverse_discriminator\.out_layer\.": "adversary.out.",
}
# networks of the same authors for something else
OTHERS = {
    "pert_encoder.": "a perturbation model (TransformerGenerator), whose inputs are no bins",
    "mod_encoder.": "a multi-omic model (MultiOmicTransformerModel), whose tokens have a modality",
}
# what is published, by the number of tokens and of classes
CENSUS_TOKENS, OLD_TOKENS, CP_CLASSES = 60_697, 36_574, 177
CENSUS_NAMES = (
    "0fa06ff254247c8d689175a05beba755ed61a65540ee2f4a3e95b1f995c7c869"  # sha256, joined by newlines
)


def find_official(path: Path) -> Path:
    """The checkpoint file itself, or the one in a folder: ``best_model.pt`` where there are several."""
    if path.is_dir() and (path / CHECKPOINT).is_file():
        return path / CHECKPOINT
    return find_checkpoint(path, SUFFIX)


def recognises(path: Path) -> bool:
    """Whether a file or folder looks like a checkpoint of scGPT: a ``*.pt`` that goes with a ``vocab.json``."""
    candidates = sorted(path.glob("*" + SUFFIX)) if path.is_dir() else [path] * (path.suffix == SUFFIX)
    return any(file.name == CHECKPOINT or file.with_name(VOCABULARY).is_file() for file in candidates)


def read_official(checkpoint: Path) -> Bundle:
    """Read an official checkpoint, ``best_model.pt``, with ``args.json`` and ``vocab.json`` in the same folder.

    ``"layout": "scformer"`` in ``args.json`` says that it is scFormer's, whose layout is the same and whose
    computation is not quite. Raises WeightsError if a file is missing or broken, a tensor is not known, or the files
    contradict each other.
    """
    args, vocabulary = (_read_json(checkpoint.with_name(name), checkpoint) for name in (ARGS, VOCABULARY))
    state_dict = rename(read_checkpoint(checkpoint), checkpoint.name)
    arguments = network(args, state_dict, checkpoint.name)
    rows, names = read_vocabulary(vocabulary, len(state_dict["gene_encoder.embedding.weight"]), checkpoint)
    state_dict["gene_encoder.embedding.weight"] = state_dict["gene_encoder.embedding.weight"][
        torch.tensor(rows)
    ]
    genes = pd.DataFrame({"ensembl_id": "", "symbol": names, "previous_symbols": ""})
    known_as = identify(len(vocabulary), arguments["n_official_classes"], names)
    warn_of_another_name(checkpoint, known_as)
    files = (checkpoint, checkpoint.with_name(ARGS), checkpoint.with_name(VOCABULARY))
    config = {"model": "ScGPT", "network": arguments}
    return Bundle(state_dict, config, genes, f"This is {known_as}.", files=files)


def _read_json(path: Path, checkpoint: Path) -> dict[str, Any]:
    if not path.is_file():
        msg = (
            f"{checkpoint.name} needs {path.name} beside it, which is not in {path.parent}. A checkpoint of scGPT is "
            f"three files, {CHECKPOINT}, {ARGS} and {VOCABULARY}; all come in the same folder of {PAGE}."
        )
        raise WeightsError(msg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is damaged: it is not JSON ({error}). Get it again."
        raise WeightsError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}; needed is a mapping."
        raise WeightsError(msg)
    return content


def rename(tensors: Any, file: str) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or the error lists it."""
    if wrong := [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]:
        msg = (
            f"{file} is not a checkpoint of scGPT: it holds {shortened([str(name) for name in wrong])}; needed are "
            "bare tensors, as torch.save(model.state_dict(), path) writes them."
        )
        raise WeightsError(msg)
    for prefix, what in OTHERS.items():
        if any(name.removeprefix("module.").startswith(prefix) for name in tensors):
            msg = f"{file} is {what}: it holds tensors called {prefix}*. ScGPT embeds cells and does not read it."
            raise WeightsError(msg)
    renamed, unknown = translate(tensors, RENAMED, prefix="module.")  # left by distributed training
    if unknown:
        msg = f"{file} holds {len(unknown)} tensors that scGPT does not have: {shortened(unknown)}."
        raise WeightsError(msg)
    if len(renamed) < len(tensors):
        msg = (
            f"{file} holds {len(tensors)} tensors for {len(renamed)} places: some are there under two spellings, such "
            "as Wqkv and in_proj. Save it again with one of them."
        )
        raise WeightsError(msg)
    return renamed


def network(args: Mapping[str, Any], state_dict: Mapping[str, Tensor], file: str) -> dict[str, Any]:
    """Arguments of the network, from the shapes of its tensors and, where these do not tell, from ``args.json``."""

    def size(name: str, dim: int = 0) -> int:
        return state_dict[name].shape[dim] if name in state_dict else 0

    layers = _numbers(r"encoder\.(\d+)\.", state_dict)
    domains = _numbers(r"batch_norm\.(\d+)\.", state_dict)
    try:
        n_hidden, n_ff = size("gene_encoder.embedding.weight", 1), state_dict["encoder.0.ff1.weight"].shape[0]
        n_heads = int(args["nheads"])
    except KeyError as error:
        missing = error.args[0]
        where = f"{ARGS} does not say" if missing == "nheads" else f"{file} lacks"
        msg = f"{where} {missing!r}, without which it is no checkpoint of scGPT. Get the folder again from {PAGE}."
        raise WeightsError(msg) from error
    for key, found in (("embsize", n_hidden), ("nlayers", len(layers)), ("d_hid", n_ff)):
        if int(args.get(key, found)) != found:
            msg = f"{ARGS} says {key}={args[key]}, and the tensors of {file} {found}: they are of different models."
            raise WeightsError(msg)
    scformer = str(args.get("layout", "scgpt")).lower() == "scformer"
    affine = "batch_norm.0.weight" in state_dict
    n_domains = len(domains) if domains and not affine else 0
    batches = {n_domains, size("batch_encoder.embedding.weight"), size("adversary.out.weight")}
    if len(batches - {0}) > 1:
        msg = f"The parts of {file} know {', '.join(map(str, sorted(batches - {0})))} batches: it contradicts itself."
        raise WeightsError(msg)
    return {
        "n_hidden": n_hidden,
        "n_layers": len(layers),
        "n_heads": n_heads,
        "n_ff": n_ff,
        "dropout_rate": float(args.get("dropout", 0.2)),
        "n_bins": int(args.get("n_bins", N_BINS)),
        "value_style": _value_style(state_dict),
        "cls_value": _cls_value(args, state_dict),
        "ties": "upper" if scformer else "fixed",
        "expression": _expression(state_dict),
        "mvc": _mvc(args, state_dict),
        "zero_probability": "expression.zero_logit.0.weight" in state_dict,
        "generative": "flags.weight" in state_dict,
        "batch_norm": ("single" if affine else "domain") if domains else None,
        "batch_norm_eps": 1e-5 if scformer else 6.1e-5,
        "n_batches": max(batches),
        "batch_decoder": "batch_encoder.norm.weight" in state_dict,
        "adversary": "adversary.out.weight" in state_dict,
        "n_official_classes": size("official_head.out.weight"),
        "n_official_layers": len(_numbers(r"official_head\.blocks\.(\d+)\.", state_dict)) // 2 + 1,
        "pre_norm": bool(args.get("pre_norm", False)),
    }


def _numbers(pattern: str, state_dict: Mapping[str, Tensor]) -> set[int]:
    return {int(found[1]) for name in state_dict if (found := re.match(pattern, name))}


def _value_style(state_dict: Mapping[str, Tensor]) -> str:
    if "value_encoder.linear1.weight" in state_dict:
        return "continuous"
    return "category" if "value_encoder.embedding.weight" in state_dict else "scaling"


def _cls_value(args: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> int:
    """The class token has the bin of padding, as in pretraining; of categories, padding comes behind the others."""
    return PAD if _value_style(state_dict) == "category" else int(args.get("pad_value", PAD))


def _expression(state_dict: Mapping[str, Tensor]) -> str | None:
    if "expression.weight" in state_dict:
        return "linear"
    return "mlp" if "expression.fc.0.weight" in state_dict else None


def _mvc(args: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> str | None:
    if "mvc.W.weight" in state_dict:
        detached = args.get("mvc_decoder_style") == "inner product, detach"
        return "inner product, detach" if detached else "inner product"
    if "mvc.fc1.weight" not in state_dict:
        return None
    narrow = len(state_dict["mvc.gene2query.weight"]) == QUERY_WIDTH != state_dict["mvc.fc1.weight"].shape[1]
    return "concat query" if narrow else "sum query"


def read_vocabulary(
    vocabulary: Mapping[str, Any], n_rows: int, checkpoint: Path
) -> tuple[list[int], list[str]]:
    """Rows of the embedding in our order (genes, padding, class token), and the names of the genes.

    Raises WeightsError if the numbers are not those of the rows, or the padding or the class token is missing.
    """
    file = VOCABULARY
    if missing := [name for name in (PAD_TOKEN, CLS_TOKEN) if name not in vocabulary]:
        msg = (
            f"{file} lacks {' and '.join(missing)}, which scGPT puts into cells: its row in {checkpoint.name} cannot "
            "be told. It is another model's vocabulary, or was cut; get the one that came with the checkpoint."
        )
        raise WeightsError(msg)
    if (
        sorted(vocabulary.values(), key=str) != sorted(range(len(vocabulary)), key=str)
        or len(vocabulary) != n_rows
    ):
        msg = (
            f"{file} has {len(vocabulary):,} names and {checkpoint.name} {n_rows:,} rows; needed is one number for "
            "each row, from 0 on, without gaps. The two belong to different models, or one is damaged."
        )
        raise WeightsError(msg)
    names = sorted((name for name in vocabulary if name not in SPECIAL), key=vocabulary.__getitem__)
    return [vocabulary[name] for name in (*names, PAD_TOKEN, CLS_TOKEN)], names


def identify(n_tokens: int, n_classes: int, names: list[str]) -> str:
    """What is known of a checkpoint of these sizes, in words."""
    if n_tokens == CENSUS_TOKENS:
        if hashlib.sha256("\n".join(names).encode()).hexdigest() != CENSUS_NAMES:
            return f"a checkpoint with as many tokens as the published ones, {n_tokens:,}, and other genes"
        if n_classes == CP_CLASSES:
            return (
                "scGPT_CP, continually pretrained with cell-type labels (it classifies 177), not whole-human"
            )
        if not n_classes:
            return "scGPT whole-human, or an organ's model of the same parts (no classifier), not scGPT_CP"
        return f"a checkpoint with the vocabulary of scGPT whole-human, fine-tuned for {n_classes} classes"
    if n_tokens == OLD_TOKENS:
        tuned = f", fine-tuned for {n_classes} classes" if n_classes else ""
        return f"a checkpoint with scGPT's old vocabulary of 36,574 tokens, as scGPT blood has{tuned}"
    return f"a checkpoint of scGPT's layout with {n_tokens:,} tokens and {n_classes} classes"


def warn_of_another_name(checkpoint: Path, known_as: str) -> None:
    """Say so where a file lies under the name of the other: whole-human and scGPT_CP are often confused."""
    name = f"{checkpoint.parent.name}/{checkpoint.name}".lower()
    says_cp = re.search(r"(^|[^a-z])cp([^a-z]|$)|contin", name) is not None
    says_human = re.search(r"whole|human", name) is not None and not says_cp
    is_cp, is_human = known_as.startswith("scGPT_CP"), "not scGPT_CP" in known_as
    if (says_human and is_cp) or (says_cp and is_human):
        msg = (
            f"{checkpoint.parent.name}/{checkpoint.name} is {known_as}. The two are often found under each other's "
            "name; what was published of one does not hold for the other."
        )
        warnings.warn(msg, UserWarning, stacklevel=2)
