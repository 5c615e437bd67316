"""The one reader of bundles: whatever is wrong with one is a `WeightsError` that names the file and the field."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellprior.weights._bundle import (
    FILES,
    FORMAT_VERSION,
    GENE_COLUMNS,
    PEAK_COLUMNS,
    PEAKS,
    SPECIES,
    Bundle,
    config_problem,
    gene_problem,
    is_finite,
)
from cellprior.weights._registry import WeightsError

if TYPE_CHECKING:
    import os

    import pandas as pd
    import torch

MAX_TEXT = 2**28  # bytes of a configuration, a table or a card: far more than any has
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_bundle(folder: str | os.PathLike[str], *, check: Callable[[Bundle], None] | None = None) -> Bundle:
    """Read a folder written by `write_bundle`; nothing in it is executed.

    Parameters
    ----------
    folder
        The bundle.
    check
        Called before any tensor is read, with a bundle whose tensors have types and shapes only (on the device
        "meta"): refuses, with a `WeightsError`, what does not fit its network.

    Raises
    ------
    WeightsError
        If a file is missing, damaged or in contradiction to another, a field or a tensor has no value that it could
        have, or the format is newer than this cellprior.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        msg = f"{folder} is not a bundle: it lacks {', '.join(missing)}. A bundle holds {', '.join(FILES)}."
        raise WeightsError(msg)
    config = read_config(folder)
    columns = GENE_COLUMNS if config["format_version"] < 3 else (*GENE_COLUMNS, SPECIES)
    genes = _read_table(folder / "genes.tsv", columns)
    peaks = _read_peaks(folder / PEAKS) if "n_peaks" in config else None
    if problem := config_problem(config, len(genes), None if peaks is None else len(peaks)):
        msg = f"The bundle {folder} contradicts itself: {problem}."
        raise WeightsError(msg)
    check_genes(genes, folder / "genes.tsv")
    card = _read_text(folder / "README.md")
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes = {name: _shape_of(file.get_slice(name), name, path) for name in file.keys()}
            if check is not None:
                check(Bundle(shapes, config, genes, card, peaks, (folder,)))
            tensors = {name: _in_memory(file.get_tensor(name), name, path) for name in shapes}
    except (SafetensorError, OSError) as error:
        msg = f"{path} is damaged or truncated ({error}). Get the bundle again."
        raise WeightsError(msg) from error
    return Bundle(tensors, config, genes, card, peaks, (folder,))


def read_genes(folder: Path) -> pd.DataFrame | None:
    """Vocabulary of a bundle, without its tensors; None if the folder is no bundle, or not here."""
    if (
        any(not (folder / name).is_file() for name in ("config.json", "genes.tsv"))
        or model_of(folder) is None
    ):
        return None
    has_species = read_config(folder)["format_version"] >= 3
    return _read_table(folder / "genes.tsv", (*GENE_COLUMNS, SPECIES) if has_species else GENE_COLUMNS)


def read_config(folder: Path) -> dict[str, Any]:
    """Configuration of a bundle: JSON with the fields that each has, all of them of the right kind.

    Raises WeightsError, with the name of the field.
    """
    path = folder / "config.json"
    content = _json(path)
    config: dict[str, Any] = content if isinstance(content, dict) else {}
    found: Any = config.get("format_version")
    if not _is_whole(found) or found < 1:
        msg = f"{path} has no `format_version`: it is not the config of a cellprior bundle."
        raise WeightsError(msg)
    if found > FORMAT_VERSION:
        msg = (
            f"{path} has format {found}, of cellprior {config.get('cellprior_version')}; this one reads "
            f"formats up to {FORMAT_VERSION}. Upgrade cellprior."
        )
        raise WeightsError(msg)
    if problem := _field_problem(config):
        msg = f"{path}: {problem}. Get the bundle again."
        raise WeightsError(msg)
    return config


def model_of(folder: Path) -> str | None:
    """Name of the model class of a bundle; None if the folder is none, whatever other `config.json` it may have.

    Raises
    ------
    WeightsError
        If its `config.json` is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    content = _json(path)
    if isinstance(content, dict) and not {"model", "format_version"} & content.keys():
        return None
    return str(content.get("model", "")) if isinstance(content, dict) else ""


def check_genes(genes: pd.DataFrame, source: object) -> None:
    """Refuse a vocabulary in which a gene has no name, or stands twice.

    Raises WeightsError, with the rows.
    """
    if problem := gene_problem(genes):
        msg = f"{source}: {problem}. Such weights say nothing of that gene; get them again."
        raise WeightsError(msg)


def _field_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with a field that all bundles have, or may have."""
    network = config.get("network")
    if isinstance(network, dict):
        for name, value in network.items():
            parts = value if isinstance(value, list) else [value]
            if not all(part is None or isinstance(part, bool | int | float | str) for part in parts):
                return f"`network.{name}` is {_shown(value)}; needed: a number, a text, or a list of these"
    for name in ("training_state", "annotation", "split"):
        if not isinstance(config.get(name, {}), dict):
            return f"`{name}` is {_shown(config[name])}; needed: a mapping"
    for name in ("n_genes", "n_peaks"):
        if name in config and not _is_whole(config[name]):
            return f"`{name}` is {_shown(config[name])}; needed: a whole number"
    return _annotation_problem(config.get("annotation", {}))


def _annotation_problem(annotation: Mapping[str, Any]) -> str | None:
    """What is wrong with the label names and the calibration of a fine-tuned model."""
    if not annotation:
        return None
    labels = annotation.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(name, str) for name in labels):
        return f"`annotation.labels` is {_shown(labels)}; needed: a list of names"
    if len(set(labels)) < len(labels):
        return "`annotation.labels` has a name twice"
    ontology, none = (annotation.get(name) for name in ("ontology", "none"))
    if ontology is not None and not _are_names(ontology, len(labels)):
        return f"`annotation.ontology` is {_shown(ontology)}; needed: an id for each label, or an empty text"
    if none is not None and (none not in labels or len(labels) < 2):
        return f"`annotation.none` is {_shown(none)}; needed: one of several labels"
    if problem := _reject_problem(annotation):
        return problem
    if coarse := annotation.get("coarse"):
        if not isinstance(coarse, dict) or not _are_names(coarse.get("labels"), len(labels)):
            return f"`annotation.coarse` is {_shown(coarse)}; needed: `labels`, a name for each label"
        if not coarse.get("calibration"):
            return "`annotation.coarse` has no calibration"
        if problem := _calibration_problem(coarse["calibration"]) or _reject_problem(coarse):
            return f"in `annotation.coarse`, {problem}"
    return _calibration_problem(annotation.get("calibration", {}))


def _are_names(given: Any, n_labels: int) -> bool:
    return isinstance(given, list) and len(given) == n_labels and all(isinstance(name, str) for name in given)


def _reject_problem(state: Mapping[str, Any]) -> str | None:
    reject = state.get("reject")
    if reject is None or (_is_number(reject) and 0 < reject < 1):
        return None
    return f"`annotation.reject` is {_shown(reject)}; needed: a number between 0 and 1"


def _calibration_problem(calibration: Any) -> str | None:
    if not isinstance(calibration, dict):
        return f"`annotation.calibration` is {_shown(calibration)}; needed: a mapping"
    lengths = set()
    for name in ("novelty", "confidence", "correct") if calibration else ():
        values = calibration.get(name)
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            return f"`annotation.calibration.{name}` is {_shown(values)}; needed: a list of numbers"
        lengths.add(len(values))
    if len(lengths) > 1:
        return f"the lists in `annotation.calibration` have {sorted(lengths)} values; needed: as many in each"
    return None


def _shape_of(part: Any, name: str, path: Path) -> torch.Tensor:
    """Type and shape of a tensor in a file, without its values."""
    import torch

    kind = part.get_dtype()
    if kind not in DTYPES:
        msg = f"{path}: the tensor {name!r} is of the type {kind}; needed: {', '.join(DTYPES)}."
        raise WeightsError(msg)
    return torch.empty(part.get_shape(), dtype=getattr(torch, DTYPES[kind]), device="meta")


def _in_memory(tensor: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    """Half precision and less as float32, and all of it finite."""
    import torch

    if not is_finite(tensor):
        msg = f"{path}: the tensor {name!r} has values that are not finite (NaN or infinite). These are no weights."
        raise WeightsError(msg)
    small = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    return tensor.float() if tensor.dtype in small else tensor


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not JSON ({error})."
        raise WeightsError(msg) from error


def _no_number(name: str) -> None:
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        msg = f"{twice!r} stands there twice"
        raise ValueError(msg)
    return found


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT:
            msg = f"{path} has {path.stat().st_size / 1e6:,.0f} MB: that is no file of a bundle."
            raise WeightsError(msg)
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        kind = "cannot be read as a table" if path.suffix == ".tsv" else "is not JSON or text in UTF-8"
        msg = f"{path} {kind} ({error})."
        raise WeightsError(msg) from error
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror or error})."
        raise WeightsError(msg) from error


def _read_peaks(path: Path) -> list[str]:
    if not path.is_file():
        msg = (
            f"{path.parent} lacks {PEAKS}: the config says that the model reads peaks. Get the bundle again."
        )
        raise WeightsError(msg)
    return list(_read_table(path, PEAK_COLUMNS)["peak"])


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    text = _read_text(path)
    try:
        # A gene may be called NA or NAN: nothing is a missing value.
        table = pd.read_csv(io.StringIO(text), sep="\t", dtype=str, keep_default_na=False, na_filter=False)
    except (ValueError, pd.errors.ParserError, OverflowError) as error:
        msg = f"{path} cannot be read as a table ({error})."
        raise WeightsError(msg) from error
    if list(table.columns) != list(columns):
        msg = f"{path} has the columns {_shown(list(table.columns))}; needed: {list(columns)}."
        raise WeightsError(msg)
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what is too much for names of rows
        msg = f"{path} cannot be read as a table (its lines have more fields than its head)."
        raise WeightsError(msg)
    if not text.endswith("\n"):
        msg = f"{path} is truncated: its last line has no end. Get the bundle again."
        raise WeightsError(msg)
    return table
