"""The bundle, our format of pretrained weights (one writer, one reader), and other people's checkpoints."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellprior.weights._fetch import is_web_page
from cellprior.weights._registry import WeightsError

if TYPE_CHECKING:
    import os

    import pandas as pd
    import torch

FORMAT_VERSION = 1
GENE_COLUMNS = ("ensembl_id", "symbol", "previous_symbols")
# The config comes last: a folder without one is not a bundle, so a half-written bundle cannot be read.
FILES = ("model.safetensors", "genes.tsv", "README.md", "config.json")


@dataclass(frozen=True, slots=True)
class Bundle:
    """Contents of a bundle folder."""

    state_dict: dict[str, torch.Tensor]
    """Tensors by name, on the CPU; half precision on disk is float32 here."""

    config: dict[str, Any]
    """At least `model` (class name), `network` (its arguments), `format_version`, `cellprior_version`."""

    genes: pd.DataFrame
    """Vocabulary in order; `ensembl_id`, `symbol` and `previous_symbols` ("A|B"), with "" for unknown."""

    card: str
    """Markdown."""


def write_bundle(
    folder: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    genes: pd.DataFrame,
    card: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights as a folder that others can load with `from_pretrained`.

    Parameters
    ----------
    folder
        Created if needed. Files in it that are not part of a bundle are left alone.
    state_dict
        Tensors by name.
    config
        What builds the model: `model`, the class name, and `network`, its arguments; and anything else that
        JSON can hold. `n_genes`, here or in `network`, must be the number of rows of `genes`.
    genes
        Vocabulary in order; `ensembl_id` or `symbol` is needed, `previous_symbols` is optional.
    card
        Markdown for `README.md`: licence, training data, evaluation.
    dtype
        Floating point type on disk, such as `torch.float16`; by default each tensor keeps its own.
    overwrite
        Whether to replace a bundle that is already there.

    Returns
    -------
    The folder.

    Raises
    ------
    FileExistsError
        If the folder holds a bundle, or a part of one, and `overwrite` is off.
    ValueError
        If the config, the genes or a tensor cannot be stored faithfully.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    present = [name for name in FILES if (folder / name).exists()]
    if present and not overwrite:
        msg = f"{folder} already holds {', '.join(present)}. Pass overwrite=True or choose another folder."
        raise FileExistsError(msg)
    table = _normalise_genes(genes)
    if problem := _config_problem(config, len(table)):
        msg = f"The bundle cannot be written: {problem}."
        raise ValueError(msg)
    tensors = {name: _for_disk(name, tensor, dtype) for name, tensor in state_dict.items()}
    stamp = {"format_version": FORMAT_VERSION, "cellprior_version": version("cellprior")}
    text = json.dumps({**config, **stamp}, indent=2, allow_nan=False) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as path:
        stage = Path(path)
        save_file(tensors, stage / "model.safetensors")
        table.to_csv(stage / "genes.tsv", sep="\t", index=False, lineterminator="\n", encoding="utf-8")
        (stage / "README.md").write_text(card, encoding="utf-8")
        (stage / "config.json").write_text(text, encoding="utf-8")
        # safetensors writes a file for its owner alone
        shutil.copymode(stage / "config.json", stage / "model.safetensors")
        (folder / "config.json").unlink(missing_ok=True)
        for name in FILES:
            (stage / name).replace(folder / name)
    return folder


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read a folder written by `write_bundle`; nothing in it is executed.

    Raises
    ------
    WeightsError
        If a file is missing, damaged or in contradiction to another, or the format is newer than this
        cellprior.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        msg = f"{folder} is not a bundle: it lacks {', '.join(missing)}. A bundle holds {', '.join(FILES)}."
        raise WeightsError(msg)
    config = _read_config(folder / "config.json")
    genes = _read_genes(folder / "genes.tsv")
    if problem := _config_problem(config, len(genes)):
        msg = f"The bundle {folder} contradicts itself: {problem}."
        raise WeightsError(msg)
    try:
        tensors = load_file(folder / "model.safetensors", device="cpu")
    except SafetensorError as error:
        msg = f"{folder / 'model.safetensors'} is damaged or truncated ({error}). Get the bundle again."
        raise WeightsError(msg) from error
    half = (torch.float16, torch.bfloat16)
    state_dict = {
        name: tensor.float() if tensor.dtype in half else tensor for name, tensor in tensors.items()
    }
    return Bundle(state_dict, config, genes, (folder / "README.md").read_text(encoding="utf-8"))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint that was written with `torch.save`; only tensors and plain containers, no code.

    Parameters
    ----------
    path
        File such as CellPLM's `<prefix>.best.ckpt` or scBERT's `panglao_pretrain.pth`.

    Returns
    -------
    The dictionary in the file, its tensors on the CPU and, where the format allows, read from disk when used.

    Raises
    ------
    WeightsError
        If the file is missing, truncated, not a checkpoint, or holds anything that would have to be executed.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        msg = f"There is no checkpoint file {path}."
        raise WeightsError(msg)
    if is_web_page(path):
        msg = (
            f"{path} is a web page, not a checkpoint: the host probably asked for a login. Download it again."
        )
        raise WeightsError(msg)
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not zipped and file.read(2) == b"PK":
            msg = f"{path} is truncated: it ends before its table of contents. Get it again."
            raise WeightsError(msg)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is damaged, or was not written by torch.save"
        msg = (
            f"{path} is refused, and nothing in it was executed: {reason}. Needed: tensors in plain "
            "containers, as torch.save(model.state_dict(), path) writes them."
        )
        raise WeightsError(msg) from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        msg = f"{path} is truncated or not a torch checkpoint ({error!r}). Get it again."
        raise WeightsError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}; needed: a dictionary of tensors (a state_dict)."
        raise WeightsError(msg)
    return content


def _for_disk(name: str, tensor: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """Contiguous copy on the CPU, in the type for the disk."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        msg = f"state_dict[{name!r}] is a {type(tensor).__name__}; a bundle holds tensors only."
        raise ValueError(msg)
    # A copy, because safetensors refuses tensors that share memory.
    copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if dtype is None or not copy.is_floating_point():
        return copy
    small = copy.to(dtype)
    if not torch.equal(small.isfinite(), copy.isfinite()):
        msg = f"state_dict[{name!r}] has values up to {copy.abs().max():.3g}, which {dtype} cannot hold."
        raise ValueError(msg)
    return small


def _config_problem(config: Mapping[str, Any], n_genes: int) -> str | None:
    """What keeps a config from describing a bundle with this many genes."""
    if not isinstance(config.get("model"), str) or not isinstance(config.get("network"), Mapping):
        return "the config needs `model`, a class name, and `network`, a mapping of its arguments"
    stated = config.get("n_genes", config["network"].get("n_genes", n_genes))
    if stated != n_genes:
        return f"the config says {stated} genes, the gene list has {n_genes}"
    return None


def _normalise_genes(genes: pd.DataFrame) -> pd.DataFrame:
    """The three columns as text, with "" for what is unknown."""
    table = genes.reindex(columns=list(GENE_COLUMNS)).astype(object)
    table = table.where(table.notna(), "").astype(str)
    nameless = (table["ensembl_id"] == "") & (table["symbol"] == "")
    if nameless.any():
        row = int(nameless.to_numpy().argmax())
        msg = (
            f"Gene {row} has neither `ensembl_id` nor `symbol`; the columns found are {list(genes.columns)}."
        )
        raise ValueError(msg)
    return table


def _read_genes(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        # A gene may be called NA or NAN: nothing is a missing value.
        genes = pd.read_csv(
            path, sep="\t", dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8"
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read as a table ({error})."
        raise WeightsError(msg) from error
    if list(genes.columns) != list(GENE_COLUMNS):
        msg = f"{path} has the columns {list(genes.columns)}; needed: {list(GENE_COLUMNS)}."
        raise WeightsError(msg)
    return genes


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON ({error})."
        raise WeightsError(msg) from error
    found = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(found, int):
        msg = f"{path} has no `format_version`: it is not the config of a cellprior bundle."
        raise WeightsError(msg)
    if found > FORMAT_VERSION:
        msg = (
            f"{path} has format {found}, of cellprior {config.get('cellprior_version')}; this one reads "
            f"formats up to {FORMAT_VERSION}. Upgrade cellprior."
        )
        raise WeightsError(msg)
    return config
