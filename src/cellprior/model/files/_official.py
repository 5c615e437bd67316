"""What reading the files of a model's authors has in common: which file, and whose tensor is whose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cellprior.weights import WeightsError


def find_checkpoint(path: Path, suffix: str) -> Path:
    """The checkpoint file itself, or the only one in a folder.

    Raises WeightsError if it has another suffix, or the folder holds none or several.
    """
    if not path.is_dir():
        if not path.name.endswith(suffix):
            msg = f"{path.name} is neither a bundle (a folder) nor an official checkpoint (*{suffix})."
            raise WeightsError(msg)
        return path
    found = sorted(path.glob("*" + suffix))
    if len(found) != 1:
        msg = (
            f"{path} holds no bundle (model.safetensors) and {len(found)} official checkpoints (*{suffix}); "
            "give the path of one."
        )
        raise WeightsError(msg)
    return found[0]


def translate(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], *, prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of those that have none.

    ``names`` has patterns of their names and replacements, ours; a ``prefix`` left by the code that saved them is
    taken off. Raises WeightsError if there is something else than tensors.
    """
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            msg = f"The checkpoint has {ascii(name)[:60]}: {type(tensor).__name__} where tensors by name are needed."
            raise WeightsError(msg)
        name = name.removeprefix(prefix)
        for pattern, ours in names.items():
            new, n = re.subn("^" + pattern, ours, name)
            if n:
                renamed[new] = tensor
                break
        else:
            unknown.append(name)
    return renamed, unknown


def shortened(names: list[str]) -> str:
    """The first ten names."""
    return f"{', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"
