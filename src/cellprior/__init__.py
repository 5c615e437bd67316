"""Pretrained single-cell models for scverse.

Names only: a room is imported when it is first used, so that `import cellprior` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The one eager import (standard library only): it makes `cellprior.settings` the object, not its module.
from cellprior.settings import settings

if TYPE_CHECKING:
    from cellprior import evaluate, genes, model, pl, pp, tl, weights

__all__ = ["evaluate", "genes", "model", "pl", "pp", "settings", "tl", "weights"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"cellprior.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("cellprior")
    msg = f"module 'cellprior' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
