"""Checkpoints as scCLIP's scripts leave them."""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch


@contextmanager
def made_up_transformers() -> Iterator[type]:
    """For a while, the module and class that an scCLIP checkpoint names; nothing of it is left."""
    module = ModuleType("transformers.models.vit.configuration_vit")
    config = type("ViTConfig", (), {"__module__": module.__name__})
    module.ViTConfig = config
    parents = ("transformers", "transformers.models", "transformers.models.vit")
    added = {**{name: ModuleType(name) for name in parents}, module.__name__: module}
    sys.modules.update(added)
    try:
        yield config
    finally:
        for name in added:
            del sys.modules[name]


def write_scclip(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    genes: Sequence[str],
    peaks: Sequence[str],
    n_heads: int = 4,
    said: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    hyper: Mapping[str, Any] | None = None,
) -> Path:
    """Write tensors under their names with what Lightning puts beside them.

    Parameters
    ----------
    said
        Of the command line.
    config
        Of the transformers' configurations.
    hyper
        Of ``hyper_parameters``, also in place of what is there.
    """
    frames = {
        "peaks": pd.DataFrame({"n_cells": np.arange(len(peaks))}, index=pd.Index(list(peaks), dtype=object)),
        "genes": pd.DataFrame(index=pd.Index(list(genes), dtype=object)),
    }
    with made_up_transformers() as vit:
        configs = {}
        for name in ("atac_config", "rna_config"):
            configs[name] = vit()
            settings = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0}
            configs[name].__dict__ |= {"num_attention_heads": n_heads, **settings, **(config or {})}
        args = argparse.Namespace(**{"binary": True, "normalize": True, "num_heads": 99, **(said or {})})
        content = {
            "epoch": 99,
            "pytorch-lightning_version": "1.9.0",
            "state_dict": OrderedDict(tensors),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            "hyper_parameters": {**configs, "args": args, **frames, **(hyper or {})},
        }
        torch.save(content, path)
    return path
