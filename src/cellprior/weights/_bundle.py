"""The bundle, our format of pretrained weights (one writer, one reader), and other people's checkpoints."""

from __future__ import annotations

import errno
import json
import math
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

from cellprior.weights._download import is_web_page
from cellprior.weights._registry import WeightsError
from cellprior.weights._trained_on import TRAINED_ON

if TYPE_CHECKING:
    import os

    import pandas as pd
    import torch

# The first had no file of peaks, the second no species of genes; a bundle is of the first that has what it needs.
FORMAT_VERSION = 3
GENE_COLUMNS = ("ensembl_id", "symbol", "previous_symbols")
SPECIES = "species"  # one more column, where genes are of several species
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
    """Vocabulary in order; `ensembl_id`, `symbol` and `previous_symbols` ("A|B"), with "" for unknown; maybe
    `species`."""

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
        Vocabulary in order; `ensembl_id` or `symbol` is needed, `previous_symbols` and `species` are optional.
    card
        Markdown for `README.md`: licence, training data, evaluation.
    peaks
        Names of peaks in order, such as `chr1:100-600`, of a model that reads ATAC.
    dtype
        Floating point type on disk, such as `torch.float16`; by default each tensor keeps its own. All are read as
        float32 where they have fewer bits, `torch.float8_e4m3fn` included.
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
        If the config, the genes or a tensor cannot be stored faithfully, or a tensor is not finite.
    OSError
        If the folder cannot be written.
    """
    import pandas as pd
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    present = [name for name in (*FILES, PEAKS) if (folder / name).exists()]
    if present and not overwrite:
        msg = f"{folder} already holds {', '.join(present)}. Pass overwrite=True or choose another folder."
        raise FileExistsError(msg)
    table = _normalise_genes(genes)
    n_peaks = None if peaks is None else len(peaks)
    if problem := config_problem(config, len(table), n_peaks):
        msg = f"The bundle cannot be written: {problem}."
        raise ValueError(msg)
    tensors = {name: _for_disk(name, tensor, dtype) for name, tensor in state_dict.items()}
    form = 3 if SPECIES in table else 1 if peaks is None else 2
    stamp = {"format_version": form, "cellprior_version": version("cellprior")}
    if n_peaks is not None:
        stamp["n_peaks"] = n_peaks
    text = json.dumps({**config, **stamp}, indent=2, allow_nan=False) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as path:
        stage = Path(path)
        try:
            save_file(tensors, stage / "model.safetensors")
        except SafetensorError as error:  # what it makes of an error of the system
            code = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
            raise OSError(code, str(error), str(folder)) from error
        _write_table(table, stage / "genes.tsv")
        if peaks is not None:
            _write_table(pd.DataFrame({"peak": list(peaks)}), stage / PEAKS)
        (stage / "README.md").write_text(card, encoding="utf-8")
        (stage / "config.json").write_text(text, encoding="utf-8")
        # safetensors writes a file for its owner alone
        shutil.copymode(stage / "config.json", stage / "model.safetensors")
        for name in ("config.json", PEAKS, TRAINED_ON):
            (folder / name).unlink(missing_ok=True)
        for name in FILES if peaks is None else (PEAKS, *FILES):
            (stage / name).replace(folder / name)
    return folder


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
    if zipped:
        refuse_packed(path)
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
    except Exception as error:  # a damaged pickle may raise anything
        msg = f"{path} is truncated or not a torch checkpoint ({error!r}). Get it again."
        raise WeightsError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}; needed: a dictionary of tensors (a state_dict)."
        raise WeightsError(msg)
    return content


def is_zipped(path: Path) -> bool:
    """Whether a checkpoint has the zip format that torch.save writes since PyTorch 1.6.

    Raises WeightsError if there is no such file, or it is no checkpoint, or not all of one.
    """
    if not path.is_file():
        msg = f"There is no checkpoint file {path}."
        raise WeightsError(msg)
    if is_web_page(path):
        msg = (
            f"{path} is a web page, not a checkpoint: the host probably asked for a login. Download it again."
        )
        raise WeightsError(msg)
    with path.open("rb") as file:
        begins_zipped = file.read(2) == b"PK"
        try:
            zipped = zipfile.is_zipfile(file)
        except zipfile.BadZipFile:  # one that says of itself that it is a part of several
            zipped = False
    if begins_zipped and not zipped:
        msg = f"{path} is truncated: it ends before its table of contents, or that is damaged. Get it again."
        raise WeightsError(msg)
    return zipped


def refuse_packed(path: Path) -> None:
    """Refuse a zipped checkpoint whose records are compressed: torch.save never does, and a little can hold a lot.

    Raises WeightsError, with the name of the record; or if the table of contents is damaged.
    """
    try:
        with zipfile.ZipFile(path) as zipped:
            packed = [record for record in zipped.infolist() if record.compress_type != zipfile.ZIP_STORED]
            n_bytes = sum(record.file_size for record in zipped.infolist())
    except Exception as error:
        msg = f"{path} is damaged, or was not written by torch.save ({error!r}). Get it again."
        raise WeightsError(msg) from error
    if packed or n_bytes > path.stat().st_size:
        name = ascii(packed[0].filename)[1:-1] if packed else "its table of contents"
        msg = (
            f"{path} is damaged, or was not written by torch.save: {name} holds more than the file has bytes, or is "
            "compressed, which torch.save does not do. It was not read."
        )
        raise WeightsError(msg)


def _for_disk(name: str, tensor: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """Contiguous copy on the CPU, in the type for the disk."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        msg = f"state_dict[{name!r}] is a {type(tensor).__name__}; a bundle holds tensors only."
        raise ValueError(msg)
    # A copy, because safetensors refuses tensors that share memory.
    copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not is_finite(copy):
        msg = (
            f"state_dict[{name!r}] has values that are not finite (NaN or infinite): the model has diverged, and is "
            "not written. Train again from weights that are good, with a lower learning rate."
        )
        raise ValueError(msg)
    if dtype is None or not copy.is_floating_point():
        return copy
    small = copy.to(dtype)
    # of 8 bits, the largest value stands for all that are larger
    if not is_finite(small) or (small.element_size() == 1 and copy.abs().max() > torch.finfo(dtype).max):
        msg = f"state_dict[{name!r}] has values up to {copy.abs().max():.3g}, which {dtype} cannot hold."
        raise ValueError(msg)
    return small


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # of which there are no sums
        tensor = tensor.half()
    # a finite sum has finite summands, and takes no memory; one that is not may have overflown
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def config_problem(config: Mapping[str, Any], n_genes: int, n_peaks: int | None) -> str | None:
    """What keeps a config from describing a bundle with this many genes, and peaks if it has any."""
    if not isinstance(config.get("model"), str) or not isinstance(config.get("network"), Mapping):
        return "the config needs `model`, a class name, and `network`, a mapping of its arguments"
    stated = config.get("n_genes", config["network"].get("n_genes", n_genes))
    if stated != n_genes:
        return f"the config says {stated} genes, the gene list has {n_genes}"
    if config.get("n_peaks", n_peaks) != n_peaks:
        return f"the config says {config['n_peaks']} peaks, {PEAKS} has {n_peaks}"
    return None


def gene_problem(genes: pd.DataFrame) -> str | None:
    """What keeps a table from being a vocabulary: no gene, one without a name, or one that stands there twice."""
    if genes.empty:
        return "There is no gene"
    name = (
        genes["ensembl_id"]
        .str.strip()
        .where(genes["ensembl_id"].str.strip() != "", genes["symbol"].str.strip())
    )
    if (name == "").any():
        row = int((name == "").to_numpy().argmax())
        return f"Gene {row} has neither `ensembl_id` nor `symbol`"
    own = name if SPECIES not in genes else genes[SPECIES] + " " + name
    if own.duplicated().any():
        row = int(own.duplicated().to_numpy().argmax())
        first = int((own == own.iloc[row]).to_numpy().argmax())
        return f"Gene {row} is {name.iloc[row]!r}, and so is gene {first}: each needs a name of its own"
    return None


def _normalise_genes(genes: pd.DataFrame) -> pd.DataFrame:
    """The columns as text, with "" for what is unknown."""
    columns = [*GENE_COLUMNS, *([SPECIES] if SPECIES in genes else [])]
    table = genes.reindex(columns=columns).astype(object)
    table = table.where(table.notna(), "").astype(str)
    if problem := gene_problem(table):
        msg = f"{problem}; the columns found are {list(genes.columns)}. The bundle cannot be written."
        raise ValueError(msg)
    return table


def _write_table(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, sep="\t", index=False, lineterminator="\n", encoding="utf-8")
