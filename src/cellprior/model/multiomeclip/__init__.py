"""MultiomeCLIP: RNA and ATAC in one space."""

from __future__ import annotations

from cellprior.model.multiomeclip._model import MultiomeCLIP

__all__ = ["MultiomeCLIP"]
