"""What the stored outputs of a notebook were made from, in one number."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "cellprior"


def fingerprint(cells: Sequence[str]) -> str:
    """Sha256 of a notebook's own code; of the packaged weights that it names; and, if it evaluates, of the room for it.

    Of ``cellprior.evaluate`` the code counts without comments and docstrings: it alone decides what a report says of
    given numbers. Other rooms are not looked at; their results are tested, and rarely change what a tutorial shows.

    Parameters
    ----------
    cells
        Source of its cells with code.
    """
    text = "\n".join(cells)
    found = hashlib.sha256(text.encode())
    for folder in sorted((PACKAGE / "weights" / "starter").iterdir()):
        if folder.is_dir() and f"{folder.name}-starter" in text:
            found.update((folder / "model.safetensors").read_bytes())
    if "cp.evaluate" in text:
        for path in sorted((PACKAGE / "evaluate").glob("*.py")):
            found.update(_code(path.read_text(encoding="utf-8")).encode())
    return found.hexdigest()


def _code(source: str) -> str:
    """Lines of code, without docstrings, comments and blank lines."""
    words = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            words |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return "\n".join(
        line for i, line in lines if i not in words and line.strip() and not line.strip().startswith("#")
    )
