"""Reading a pickle without running it: all that it names becomes a placeholder, and data are dug out of these.

A pickle is a program for a small machine, and one of its instructions calls whatever it names. Here a name is never
looked up: in the place of a class or function stands one that only keeps what it was given. Tensors, arrays and the
names in pandas frames are then put together from what was kept.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellprior.weights._bundle import is_zipped, refuse_packed
from cellprior.weights._registry import WeightsError

if TYPE_CHECKING:
    import os

    from torch import Tensor

_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# parts of the standard library that the state of harmless objects names; any other has no place in a checkpoint
_HARMLESS_MODULES = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "pathlib", "uuid"}
_HARMLESS = {
    "_codecs.encode",
    "functools.partial",
    "types.SimpleNamespace",
    *(
        f"builtins.{name}"
        for name in "bool bytearray bytes complex dict float frozenset getattr int list object set slice str".split()
    ),
}
# above what the largest checkpoint has that is known, with the names of a million peaks
MAX_PICKLE = 2**26  # bytes
MAX_STEPS = 8_000_000  # instructions
MAX_TEXTS = 2_000_000  # texts that may be names of globals
MAX_GLOBALS = 1_000
MAX_EXPANSION = 16  # numbers of a tensor for each that is in the file


class Inert:
    """In the place of an object: what it is called, what it was made with, and its state."""

    name = ""
    args: tuple[Any, ...]
    items: list[Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        inert = super().__new__(cls)
        inert.args, inert.items, inert.state = args, [], kwargs or None
        return inert

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is done."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(self.state, dict):
            self.state = {}
        self.state[key] = value

    def append(self, value: Any) -> None:
        """One more item of what is a kind of list."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """More items."""
        self.items.extend(values)


class Bytes(Inert):
    """In the place of the function that gives bytes, which the pickles of Python 2 know as text only."""

    def __new__(cls, text: str, encoding: str) -> Any:
        return text.encode("latin1")


class InertUnpickler(pickle.Unpickler):
    """Unpickler that imports nothing and calls nothing but placeholders and `OrderedDict`."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.known: dict[str, Any] = {"collections.OrderedDict": OrderedDict, "_codecs.encode": Bytes}

    def find_class(self, module: str, name: str) -> Any:
        """A placeholder class with this name."""
        full = _full_name(module, name)
        if is_suspicious(full):
            raise pickle.UnpicklingError(full)
        if full not in self.known:
            self.known[full] = type("Inert", (Inert,), {"name": full})
        return self.known[full]

    def persistent_load(self, pid: Any) -> Any:
        """What stands for a storage in a checkpoint: its type, key, device and size."""
        return pid


class InertCheckpoint:
    """A file that `torch.save` wrote, read without running it.

    Parameters
    ----------
    path
        File.

    Attributes
    ----------
    globals
        What its pickle names, sorted.

    Raises
    ------
    WeightsError
        If the file is missing, truncated, or not of this kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if is_zipped(self.path):
            refuse_packed(self.path)
        try:
            with zipfile.ZipFile(self.path) as zipped:
                names = zipped.namelist()
                (pickled,) = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
                self._pickle = _small(zipped, pickled)
                self.globals = _globals_of(self._pickle)
            self._data = pickled.removesuffix("data.pkl") + "data/"
            self.n_tensors = sum(name.startswith(self._data) for name in names)
        except Exception as error:
            msg = f"{self.path} is damaged, or was not written by torch.save of PyTorch 1.6 or later ({error!r})."
            raise WeightsError(msg) from error

    @property
    def suspicious(self) -> list[str]:
        """Of `globals`, what no checkpoint needs: parts of the standard library that do something."""
        return [name for name in self.globals if is_suspicious(name)]

    def content(self) -> Any:
        """What is in the file: plain containers and values, and `Inert` for all else.

        Raises
        ------
        WeightsError
            If the file names what no checkpoint needs, or is damaged.
        """
        import io

        if self.suspicious:
            msg = (
                f"{self.path} is refused, and nothing in it was executed: it names {', '.join(self.suspicious)}, which "
                "no checkpoint needs. Delete it, and tell whoever gave it to you."
            )
            raise WeightsError(msg)
        try:
            return InertUnpickler(io.BytesIO(self._pickle)).load()
        except Exception as error:
            msg = f"{self.path} is damaged ({error!r}). Get it again."
            raise WeightsError(msg) from error

    def tensors(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors by name, read from the file.

        Raises
        ------
        WeightsError
            If a value is no tensor, or the file is damaged.
        """
        with zipfile.ZipFile(self.path) as zipped:
            try:
                return {str(name): self._tensor(value, zipped) for name, value in values.items()}
            except Exception as error:
                msg = (
                    f"{self.path} holds a tensor that is damaged or of a kind that is not known ({error!r})."
                )
                raise WeightsError(msg) from error

    def _tensor(self, value: Any, zipped: zipfile.ZipFile) -> Tensor:
        import torch

        if value.name == "torch._utils._rebuild_parameter":
            value = value.args[0]
        if value.name != "torch._utils._rebuild_tensor_v2":
            raise TypeError(value.name)
        (_, storage, key, _, numel), offset, size, stride = value.args[:4]
        dtype = getattr(torch, _STORED[storage.name])
        data = bytearray(zipped.read(f"{self._data}{key}"))
        if math.prod(size) > MAX_EXPANSION * max(numel, 1):
            msg = f"{key} holds {numel} numbers, for {math.prod(size)}"
            raise ValueError(msg)
        flat = torch.frombuffer(data, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
        if len(flat) != numel:
            msg = f"{key} holds {len(flat)} numbers, not {numel}"
            raise ValueError(msg)
        return flat.as_strided(size, stride, offset).clone()  # torch refuses to reach beyond the end


_STORED = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Bool": "bool",
    }.items()
}


def found(tree: Any, key: str) -> Iterator[Any]:
    """Values of a key, or attribute, wherever it is in a tree of containers and placeholders."""
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Mapping) and key in part:
            yield part[key]
        inside = part.values() if isinstance(part, Mapping) else part
        if isinstance(part, Inert):
            inside = (part.state, *part.args, *part.items)
        waiting += [value for value in inside if isinstance(value, Inert | Mapping | list | tuple)]


def row_names(frame: Any) -> list[str]:
    """Index of a pandas frame.

    Raises ValueError if that is no frame, or its index is not an array of text.
    """
    try:
        _, axes = frame.state["_mgr"].args
        _, index = axes[-1].args
        _, _, _, _, names = index["data"].state  # version, shape, type, order, values
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        msg = f"that is no pandas frame with an index of text ({error!r})"
        raise ValueError(msg) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        msg = "the index of the pandas frame is not of text"
        raise ValueError(msg)
    return names


def is_suspicious(name: str) -> bool:
    """Whether a global is a part of the standard library that no checkpoint needs."""
    root = name.partition(".")[0]
    return root in sys.stdlib_module_names and root not in _HARMLESS_MODULES and name not in _HARMLESS


def _full_name(module: str, name: str) -> str:
    """Name of a global, without characters that a terminal would obey."""
    return ascii(f"{_OLD_NAMES.get(module, module)}.{name}")[1:-1]


def _small(zipped: zipfile.ZipFile, name: str) -> bytes:
    """A record that is not too large to be looked at."""
    size = zipped.getinfo(name).file_size
    if size > MAX_PICKLE:
        msg = f"its pickle has {size / 1e6:,.0f} MB, at most {MAX_PICKLE / 1e6:,.0f} are looked at"
        raise ValueError(msg)
    return zipped.read(name)


def _globals_of(pickled: bytes) -> list[str]:
    """What a pickle names, sorted, from a list of its instructions."""
    found: set[str] = set()
    memo: dict[Any, str] = {}
    n_memoized = 0
    texts: deque[str] = deque(["", ""], maxlen=2)  # the last two that were pushed
    for step, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        value: Any = argument
        if opcode.name in ("GLOBAL", "INST"):
            found.add(_full_name(*value.split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            found.add(_full_name(*texts))
        elif "UNICODE" in opcode.name or "STRING" in opcode.name:
            texts.append(value)
        elif opcode.name == "MEMOIZE" or "PUT" in opcode.name:
            memo[n_memoized if value is None else value] = texts[-1]
            n_memoized += 1
        elif "GET" in opcode.name:
            texts.append(memo[value])
        if step > MAX_STEPS or len(memo) > MAX_TEXTS or len(found) > MAX_GLOBALS:
            msg = "its pickle has more instructions than any checkpoint"
            raise ValueError(msg)
    return sorted(found)
