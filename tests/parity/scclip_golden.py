"""The tiny scCLIPs that the original was run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cellprior.model.multiomeclip._checkpoint import network, rename
from cellprior.model.multiomeclip._module import MultiomeCLIPModule

DATA = Path(__file__).parent / "data"
NOT_LEARNED = {
    name
    for m in ("rna", "atac")
    for name in (f"{m}.maximum", f"{m}.order", f"alignment.{m}.mean", f"alignment.{m}.axes")
}


@dataclass
class Golden:
    """One case: tensors of its checkpoint, inputs and outputs, gradients, a short training."""

    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, case: str) -> Golden:
        """Case ``"a"`` (fixed scale e), ``"b"`` (learned scale) or ``"overpad"`` (patches that are all padding)."""
        arrays: dict[str, np.ndarray] = {}
        for name in (case, f"{case}_gradients"):
            if (path := DATA / f"scclip_{name}.npz").is_file():
                with np.load(path) as file:
                    arrays |= dict(file)
        return cls(arrays)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def group(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors whose names start with ``name/``, under the rest of their names."""
        names = [key for key in self.arrays if key.startswith(name + "/")]
        return {key.removeprefix(name + "/"): self[key] for key in names}

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What enters the encoders ``(cells, features)``."""
        return {modality: self[f"io/input.{modality}"] for modality in ("rna", "atac")}

    def module(self, **options: bool) -> MultiomeCLIPModule:
        """The case in our network, without dropout."""
        tensors = rename(self.group("state_dict"), "golden")
        arguments = network(tensors, int(self["config/n_heads"]), "golden") | options
        module = MultiomeCLIPModule(*(x.shape[1] for x in self.inputs.values()), **arguments)
        missing, unexpected = module.load_state_dict(tensors, strict=False)
        assert set(missing) == NOT_LEARNED and not unexpected
        module.logit_scale.requires_grad_(bool(self["config/learn_scale"]))
        return module.eval()
