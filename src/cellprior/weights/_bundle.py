"""The bundle, our format of pretrained weights (one writer, one reader), and other people's checkpoints."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
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

FORMAT_VERSION = 2  # the first had no file of peaks, and bundles without peaks are still of it
GENE_COLUMNS = ("ensembl_id", "symbol", "previous_symbols")
# The config comes last: a folder without one is not a bundle, so a half-written bundle cannot be read.
FILES = ("model.safetensors", "genes.tsv", "README.md", "config.json")
PEAKS = "peaks.tsv"  # of models that read ATAC; the config then has their number, `n_peaks`
PEAK_COLUMNS = ("peak",)


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

    peaks: list[str] | None = None
    """Names of peaks in order, if the model reads ATAC."""

    files: tuple[Path, ...] = ()
    """What it was read from: the bundle folder, or a checkpoint and what lay beside it; for `sha256`."""

    @property
    def vocabulary(self) -> dict[str, Any]:
        """Arguments of the model besides those of its network: `genes`, and `peaks` if there are any."""
        return {"genes": self.genes} | ({} if self.peaks is None else {"peaks": self.peaks})


def write_bundle(
    folder: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    genes: pd.DataFrame,
    card: str,
    peaks: Sequence[str] | None = None,
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
    peaks
        Names of peaks in order, such as `chr1:100-600`, of a model that reads ATAC.
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
    import pandas as pd
    from safetensors.torch import save_file

    folder = Path(folder)
    present = [name for name in (*FILES, PEAKS) if (folder / name).exists()]
    if present and not overwrite:
        msg = f"{folder} already holds {', '.join(present)}. Pass overwrite=True or choose another folder."
        raise FileExistsError(msg)
    table = _normalise_genes(genes)
    n_peaks = None if peaks is None else len(peaks)
    if problem := _config_problem(config, len(table), n_peaks):
        msg = f"The bundle cannot be written: {problem}."
        raise ValueError(msg)
    tensors = {name: _for_disk(name, tensor, dtype) for name, tensor in state_dict.items()}
    stamp = {"format_version": 1 if peaks is None else 2, "cellprior_version": version("cellprior")}
    if n_peaks is not None:
        stamp["n_peaks"] = n_peaks
    text = json.dumps({**config, **stamp}, indent=2, allow_nan=False) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as path:
        stage = Path(path)
        save_file(tensors, stage / "model.safetensors")
        _write_table(table, stage / "genes.tsv")
        if peaks is not None:
            _write_table(pd.DataFrame({"peak": list(peaks)}), stage / PEAKS)
        (stage / "README.md").write_text(card, encoding="utf-8")
        (stage / "config.json").write_text(text, encoding="utf-8")
        # safetensors writes a file for its owner alone
        shutil.copymode(stage / "config.json", stage / "model.safetensors")
        for name in ("config.json", PEAKS):
            (folder / name).unlink(missing_ok=True)
        for name in FILES if peaks is None else (PEAKS, *FILES):
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
    genes = _read_table(folder / "genes.tsv", GENE_COLUMNS)
    peaks = _read_peaks(folder / PEAKS) if "n_peaks" in config else None
    if problem := _config_problem(config, len(genes), None if peaks is None else len(peaks)):
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
    return Bundle(
        state_dict, config, genes, (folder / "README.md").read_text(encoding="utf-8"), peaks, (folder,)
    )


def model_of(folder: str | os.PathLike[str]) -> str | None:
    """Name of the model class of a bundle; None if the folder is none, whatever other `config.json` it may have.

    Raises
    ------
    WeightsError
        If its `config.json` is not JSON.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    content = _json(path)
    if isinstance(content, dict) and not {"model", "format_version"} & content.keys():
        return None
    return str(content.get("model", "")) if isinstance(content, dict) else ""


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
    zipped = is_zipped(path)
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


def is_zipped(path: Path) -> bool:
    """Whether a checkpoint has the zip format that torch.save writes since PyTorch 1.6.

    Raises
    ------
    WeightsError
        If there is no such file, or it is no checkpoint, or not all of one.
    """
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
    return zipped


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


def _config_problem(config: Mapping[str, Any], n_genes: int, n_peaks: int | None) -> str | None:
    """What keeps a config from describing a bundle with this many genes, and peaks if it has any."""
    if not isinstance(config.get("model"), str) or not isinstance(config.get("network"), Mapping):
        return "the config needs `model`, a class name, and `network`, a mapping of its arguments"
    stated = config.get("n_genes", config["network"].get("n_genes", n_genes))
    if stated != n_genes:
        return f"the config says {stated} genes, the gene list has {n_genes}"
    if config.get("n_peaks", n_peaks) != n_peaks:
        return f"the config says {config['n_peaks']} peaks, {PEAKS} has {n_peaks}"
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


def _write_table(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, sep="\t", index=False, lineterminator="\n", encoding="utf-8")


def _read_peaks(path: Path) -> list[str]:
    if not path.is_file():
        msg = (
            f"{path.parent} lacks {PEAKS}: the config says that the model reads peaks. Get the bundle again."
        )
        raise WeightsError(msg)
    return list(_read_table(path, PEAK_COLUMNS)["peak"])


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    try:
        # A gene may be called NA or NAN: nothing is a missing value.
        table = pd.read_csv(
            path, sep="\t", dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8"
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read as a table ({error})."
        raise WeightsError(msg) from error
    if list(table.columns) != list(columns):
        msg = f"{path} has the columns {list(table.columns)}; needed: {list(columns)}."
        raise WeightsError(msg)
    if not path.read_bytes().endswith(b"\n"):
        msg = f"{path} is truncated: its last line has no end. Get the bundle again."
        raise WeightsError(msg)
    return table


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON ({error})."
        raise WeightsError(msg) from error


def _read_config(path: Path) -> dict[str, Any]:
    content = _json(path)
    config: dict[str, Any] = content if isinstance(content, dict) else {}
    found = config.get("format_version")
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
