"""What the tests of downloads hand out and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from cellprior.weights._registry import Entry

GOOD = b"the weights\n" * 100
BAD = b"not the weights"

Register = Callable[..., Entry]


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
