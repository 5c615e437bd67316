"""ScGPT: the expressed genes of a cell as tokens."""

from __future__ import annotations

from cellprior.model.scgpt._model import ScGPT

__all__ = ["ScGPT"]
