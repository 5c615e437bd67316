"""A pickled dictionary of names and numbers, read without running it.

A pickle is a program for a small machine. Here the machine knows only the instructions that a flat dictionary needs,
and of the three names that NumPy's numbers are pickled with it looks up none: they stand for functions of this file.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cellprior.weights._registry import WeightsError

if TYPE_CHECKING:
    import os

MAX_BYTES = 64 * 2**20
_OPCODES = (
    "PROTO FRAME STOP MARK EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE "
    "NEWFALSE BININT BININT1 BININT2 INT LONG1 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES "
    "SHORT_BINBYTES MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
).split()
_FORMATS = {
    "f8": "d",
    "f4": "f",
    "i8": "q",
    "i4": "i",
    "i2": "h",
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
}


class _Type:
    """In the place of NumPy's dtype: the kind of a number and its byte order."""

    def __init__(self, kind: str, align: bool, copy: bool) -> None:
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _Type, data: bytes) -> int | float:
    """In the place of what makes NumPy's numbers."""
    value: int | float = struct.unpack(kind.order + _FORMATS[kind.kind], data)[0]
    return value


def _bytes(text: str, encoding: str) -> bytes:
    """In the place of what makes bytes of the text that old pickles keep them as."""
    return text.encode("latin1")


class _Refused(Exception):
    """What no dictionary of names and numbers does."""


class _Unpickler(pickle._Unpickler):  # in Python, as the one in C knows all instructions
    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES)
    }

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _Type
        if name == "scalar" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _number
        if (module, name) == ("_codecs", "encode"):
            return _bytes
        raise _Refused(f"it names {ascii(f'{module}.{name}')[1:-1]}")

    def load_build(self) -> None:
        """Give a state to a type, and to nothing else."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Type):
            raise _Refused(f"it sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build


def read_dictionary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a pickled dictionary from text to numbers or text, such as those of Geneformer's genes.

    Values are Python's own numbers and text. Raises WeightsError if the file is missing, larger than 64 MB,
    truncated, or anything else than such a dictionary; nothing in it is executed.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"There is no file {path}."
        raise WeightsError(msg)
    if path.stat().st_size > MAX_BYTES:
        msg = f"{path} has {path.stat().st_size / 1e6:,.0f} MB; a dictionary of genes has a few. It was not read."
        raise WeightsError(msg)
    needed = "Needed: a pickled dictionary from names to numbers or names"
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except _Refused as error:
        msg = f"{path} is refused, and nothing in it was executed: {error}. {needed}."
        raise WeightsError(msg) from error
    except (pickle.UnpicklingError, EOFError, IndexError, struct.error) as error:
        msg = f"{path} is truncated or damaged ({error!r}). Get it again."
        raise WeightsError(msg) from error
    except KeyError as error:  # an instruction, or a kind of number
        msg = f"{path} is refused, and nothing in it was executed: it needs what is not known here ({error}). {needed}."
        raise WeightsError(msg) from error
    except (ValueError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        msg = f"{path} is damaged, or not a pickle ({error!r}). {needed}."
        raise WeightsError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds a {type(found).__name__}. {needed}."
        raise WeightsError(msg)
    for key, value in found.items():
        if not isinstance(key, str) or isinstance(value, bool) or not isinstance(value, int | float | str):
            msg = f"{path} holds {type(key).__name__} {str(key)[:40]!r}: {type(value).__name__}. {needed}."
            raise WeightsError(msg)
    return found
