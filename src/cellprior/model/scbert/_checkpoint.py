"""The files that the scBERT authors release, read into our layout.

``*.pth`` holds the tensors under ``model_state_dict``, pretrained or fine-tuned, beside the state of the optimizer. The
names of the genes, in the order of the gene vectors, are in no checkpoint: they come from a text file beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from cellprior.model.files._official import find_checkpoint, shortened, translate
from cellprior.weights import Bundle, WeightsError, read_checkpoint

CHECKPOINT_SUFFIX = ".pth"
GENE_FILE = "scbert_gene_order_16906.txt"

# their name (a pattern) -> ours
RENAMED = {
    r"token_emb\.weight$": "embedder.token_embedding.weight",
    r"pos_emb\.emb\.weight$": "embedder.gene_vectors",
    r"performer\.net\.layers\.(\d+)\.0\.norm\.": r"encoder.\1.norm1.",
    r"performer\.net\.layers\.(\d+)\.0\.fn\.fast_attention\.projection_matrix$": r"encoder.\1.attention.projection",
    r"performer\.net\.layers\.(\d+)\.0\.fn\.to_q\.": r"encoder.\1.attention.query.",
    r"performer\.net\.layers\.(\d+)\.0\.fn\.to_k\.": r"encoder.\1.attention.key.",
    r"performer\.net\.layers\.(\d+)\.0\.fn\.to_v\.": r"encoder.\1.attention.value.",
    r"performer\.net\.layers\.(\d+)\.0\.fn\.to_out\.": r"encoder.\1.attention.out.",
    r"performer\.net\.layers\.(\d+)\.1\.norm\.": r"encoder.\1.norm2.",
    r"performer\.net\.layers\.(\d+)\.1\.fn\.fn\.w([12])\.": r"encoder.\1.ff\2.",
    r"norm\.": "norm.",
    r"to_out\.(weight|bias)$": r"bins.\1",
    r"to_out\.(conv1|fc[123])\.": r"official_head.\1.",
}
UNUSED = (
    "performer.calls_since_last_redraw"  # when to redraw the features in training; here that is asked for
)


def find_official(path: Path) -> Path:
    """The checkpoint file itself, or the only one in a folder."""
    return find_checkpoint(path, CHECKPOINT_SUFFIX)


def read_official(checkpoint: Path) -> Bundle:
    """Read an official checkpoint, pretrained or fine-tuned: ``*.pth``, with the gene names beside it.

    These are ``scbert_gene_order_16906.txt``, or the only ``*gene*.txt`` with as many lines as there are gene
    vectors. Raises WeightsError if a file is missing or broken, or a tensor is not known.
    """
    state_dict = rename(read_checkpoint(checkpoint).get("model_state_dict"), checkpoint.name)
    arguments = network(state_dict, checkpoint.name)
    vectors = state_dict["embedder.gene_vectors"]
    if vectors[-1].any():
        msg = (
            f"{checkpoint.name} has a position vector for the class token, which in scBERT is zero: it was made with "
            "another kind of position, and cannot be loaded."
        )
        raise WeightsError(msg)
    state_dict["embedder.gene_vectors"] = vectors[:-1]
    symbols, gene_file = read_genes(checkpoint.parent, len(vectors) - 1)
    genes = pd.DataFrame({"ensembl_id": "", "symbol": symbols, "previous_symbols": ""})
    files = (checkpoint, gene_file)
    return Bundle(state_dict, {"model": "ScBERT", "network": arguments}, genes, "", files=files)


def read_genes(folder: Path, n_genes: int) -> tuple[list[str], Path]:
    """Gene symbols in the order of the gene vectors, and the text file in a checkpoint's folder that has them."""
    for path in [folder / GENE_FILE, *sorted(folder.glob("*gene*.txt"))]:
        symbols = path.read_text().split() if path.is_file() else []
        if len(symbols) == n_genes:
            return symbols, path
    found = sorted(path.name for path in folder.glob("*gene*.txt"))
    msg = (
        f"The checkpoint has vectors for {n_genes:,} genes, but not their names, and in {folder} there is "
        f"{'no *gene*.txt with as many lines, only ' + ', '.join(found) if found else 'no *gene*.txt'}. "
    )
    if n_genes == 16_906:
        msg += f"Put {GENE_FILE} there, the order of the released model: one symbol a line. "
    else:
        msg += "Put a text file there with the symbols that the model was trained on, in their order, one a line."
    raise WeightsError(msg)


def rename(tensors: Any, file: str) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or known to be unused, or the error lists it."""
    if not isinstance(tensors, dict):
        msg = f"{file} has no 'model_state_dict': it is not a checkpoint that scBERT's scripts have saved."
        raise WeightsError(msg)
    renamed, unknown = translate(tensors, RENAMED, prefix="module.")  # left by distributed training
    unknown = [name for name in unknown if name != UNUSED]
    if unknown:
        msg = (
            f"{file} holds {len(unknown)} tensors that scBERT does not have: "
            f"{shortened(unknown)}. It is another model's checkpoint."
        )
        raise WeightsError(msg)
    return renamed


def network(state_dict: Mapping[str, Tensor], file: str) -> dict[str, Any]:
    """Arguments of the network, read from the shapes of its tensors."""
    layers = {int(found[1]) for name in state_dict if (found := re.match(r"encoder\.(\d+)\.", name))}
    try:
        n_tokens, n_hidden = state_dict["embedder.token_embedding.weight"].shape
        n_features, head_dim = state_dict["encoder.0.attention.projection"].shape
        inner = len(state_dict["encoder.0.attention.query.weight"])
        classes = state_dict.get("official_head.fc3.weight")
        state_dict["embedder.gene_vectors"]
    except (KeyError, ValueError) as error:
        msg = f"{file} is not a scBERT checkpoint with gene vectors as positions ({error!r})."
        raise WeightsError(msg) from error
    return {
        "n_hidden": n_hidden,
        "n_layers": len(layers),
        "n_heads": inner // head_dim,
        "head_dim": head_dim,
        "n_bins": n_tokens - 2,
        "n_features": n_features,
        "gene_vectors": "fixed",
        "n_official_classes": 0 if classes is None else len(classes),
    }
