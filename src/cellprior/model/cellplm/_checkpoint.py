"""The files that the CellPLM authors released, read into our layout.

``<prefix>.best.ckpt`` holds the tensors under ``model_state_dict``, ``<prefix>.config.json`` beside it the sizes and
the gene list whose order is that of the gene vectors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from cellprior.model.files._official import find_checkpoint, shortened, translate
from cellprior.weights import Bundle, WeightsError, read_checkpoint

CHECKPOINT_SUFFIX = ".best.ckpt"

# their name (a pattern) -> ours
RENAMED = {
    r"embedder\.extra_linear\.0\.": "embedder.linear.",
    r"embedder\.extra_linear\.3\.": "embedder.norm.",
    r"embedder\.feat_enc\.emb$": "embedder.gene_embedding",
    r"encoder\.layers\.(\d+)\.self_attn\.(query|key|value|out)_projection\.": r"encoder.\1.attention.\2.",
    r"encoder\.layers\.(\d+)\._ff_block\.": r"encoder.\1.ff.",
    r"encoder\.layers\.(\d+)\.norm([12])\.": r"encoder.\1.norm\2.",
    r"pre_latent_norm\.norm\.": "pre_latent_norm.",
    r"latent\.layers\.1\.hid_2mu\.": "latent.mu.",
    r"latent\.layers\.1\.hid_2sigma\.": "latent.log_var.",
    r"latent\.layers\.1\.inference\.inference_qyx\.0\.logits\.": "latent.logits.",
    r"latent\.layers\.1\.inference\.inference_qzyx\.0\.": "latent.joint.",
    r"latent\.layers\.1\.inference\.inference_qzyx\.2\.(mu|var)\.": r"latent.\1.",
    r"latent\.layers\.1\.inference\.y_(mu|var)\.": r"latent.prior_\1.",
    r"decoder\.layers\.0\.": "decoder.hidden.",
    r"decoder\.covariate_layers\.0\.(batch|dataset)\.0\.": r"decoder.\1.embedding.",
    r"decoder\.covariate_layers\.0\.(batch|dataset)\.1\.": r"decoder.\1.activation.",
    r"decoder\.covariate_layers\.0\.(batch|dataset)\.2\.": r"decoder.\1.norm.",
    r"decoder\.out_layer\.dec_disp$": "decoder.log_dispersion",
    r"decoder\.out_layer\.dec_1\.": "decoder.rank.",
    r"decoder\.out_layer\.dec_mean\.0\.": "decoder.log_mean.",
}
# in the files, but in no computation of the original: a norm and the coordinates of cells
UNUSED = re.compile(r"embedder\.(norm0|pe_enc)\.")

# the parts that both released models have in common; another value would be another network
EXPECTED = {"enc_mod": "flowformer", "dec_mod": "nbmlp", "dec_layers": 2, "norm": "groupnorm", "enc_head": 8}


def find_official(path: Path) -> Path:
    """The checkpoint file itself, or the only one in a folder."""
    return find_checkpoint(path, CHECKPOINT_SUFFIX)


def config_name(checkpoint: str) -> str:
    """Name of the configuration that belongs to a checkpoint."""
    return checkpoint.removesuffix(CHECKPOINT_SUFFIX) + ".config.json"


def read_official(checkpoint: Path) -> Bundle:
    """Read an official checkpoint, ``<prefix>.best.ckpt``, with ``<prefix>.config.json`` in the same folder.

    Raises WeightsError if a file is missing or broken, a tensor is not known, or the configuration is another
    network's.
    """
    config_path = checkpoint.with_name(config_name(checkpoint.name))
    if not config_path.is_file():
        msg = (
            f"{checkpoint.name} needs {config_path.name} beside it, which is not in {checkpoint.parent}: it holds the "
            "gene list. Both come in the same archive; put them into one folder."
        )
        raise WeightsError(msg)
    state_dict = rename(read_checkpoint(checkpoint).get("model_state_dict"), checkpoint.name)
    try:
        config = json.loads(config_path.read_text())
        if not all(isinstance(name, str) for name in config["gene_list"]):
            raise TypeError("gene_list")
        genes = pd.DataFrame({"ensembl_id": config["gene_list"], "symbol": "", "previous_symbols": ""})
        arguments = network(config, state_dict)
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{config_path.name} is damaged or not CellPLM's ({error!r}). Get it again."
        raise WeightsError(msg) from error
    files = (checkpoint, config_path)
    return Bundle(state_dict, {"model": "CellPLM", "network": arguments}, genes, "", files=files)


def rename(tensors: Any, file: str) -> dict[str, Tensor]:
    """Their tensors under our names; every one is used, or known to be unused, or the error lists it."""
    if not isinstance(tensors, dict):
        msg = f"{file} has no 'model_state_dict': it is not a CellPLM checkpoint; those are named *{CHECKPOINT_SUFFIX}."
        raise WeightsError(msg)
    renamed, unknown = translate(tensors, RENAMED, prefix="module.")  # left by distributed training
    unknown = [name for name in unknown if not UNUSED.match(name)]
    if unknown:
        msg = (
            f"{file} holds {len(unknown)} tensors that CellPLM's embedding model does not have: "
            f"{shortened(unknown)}. "
            "Checkpoints with a task head cannot be loaded as an embedding model."
        )
        raise WeightsError(msg)
    return renamed


def network(config: dict[str, Any], state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of the network from a released configuration, checked against the tensors."""
    for key, value in EXPECTED.items():
        if config.get(key, value) != value:
            msg = f"The configuration has {key}={config[key]!r}; supported is {value!r}, as in the released models."
            raise WeightsError(msg)
    latent = "gmvae" if "latent.logits.weight" in state_dict else "vae"
    if config["latent_mod"] != latent:
        msg = (
            f"The configuration says latent_mod={config['latent_mod']!r}, the checkpoint holds a {latent!r} latent: "
            "the two files belong to different models. 20231027_85M is a VAE, 20230926_85M a GMVAE."
        )
        raise WeightsError(msg)
    return {
        "n_hidden": config["enc_hid"],
        "n_layers": config["enc_layers"],
        "n_heads": EXPECTED["enc_head"],
        "n_latent": config["post_latent_dim"],
        "dropout_rate": config["model_dropout"],
        "latent": latent,
        "n_clusters": config["num_clusters"],
        "n_batches": config["batch_num"],
        "n_datasets": config["dataset_num"],
    }
