"""The tiny ScBERTs that the original was run on, as it would have released them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellprior.model.scbert._checkpoint import network, rename
from cellprior.model.scbert._module import ScBERTModule

DATA = Path(__file__).parent / "data"


def load(*names: str) -> dict[str, np.ndarray]:
    """Arrays of some files in one dictionary."""
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        with np.load(DATA / f"scbert_{name}.npz") as file:
            arrays |= dict(file)
    return arrays


@dataclass
class Golden:
    """One case: tensors of its checkpoint, inputs and outputs."""

    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, case: str) -> Golden:
        """Case ``"a"``: 60 genes, weights as drawn; ``"b"``: 200 genes, keys and queries four times as long."""
        return cls(load("a") if case == "a" else load("b", "b_layers"))

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays["out/" + name])

    def pretraining(self, name: str) -> torch.Tensor:
        """Array of the pretraining step."""
        return torch.from_numpy(self.arrays["pretrain/" + name])

    @property
    def stored_step(self) -> int:
        """Of case b, the file holds every fifth position of ``encodings_b4``."""
        return 1 if len(self.tokens[0]) == 60 else 5

    @property
    def tokens(self) -> torch.Tensor:
        """Bins ``(4, n_genes)``, without the class token that the original appends."""
        return self["tokens_b4"][:, :-1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """State dict under the released names."""
        return {
            name.removeprefix("state_dict/"): torch.from_numpy(array)
            for name, array in self.arrays.items()
            if name.startswith("state_dict/")
        }

    def module(self, **options: Any) -> ScBERTModule:
        """The case in our network."""
        return module_of(self.tensors, **options)

    def write(self, folder: Path, *, tensors: dict[str, Any] | None = None, genes: bool = True) -> Path:
        """Write the checkpoint as the authors release them, and gene names beside it; the checkpoint's path."""
        tensors = self.tensors if tensors is None else tensors
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "panglao_pretrain.pth"
        moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        torch.save(
            {
                "epoch": 1,
                "model_state_dict": tensors,
                "optimizer_state_dict": moments,
                "scheduler_state_dict": {"last_epoch": 1},
                "losses": 1.0,
            },
            path,
        )
        if genes:
            n_genes = len(self.tensors["pos_emb.emb.weight"]) - 1
            (folder / "gene_order.txt").write_text("".join(f"GENE{i}\n" for i in range(n_genes)))
        return path


def module_of(tensors: dict[str, torch.Tensor], **options: Any) -> ScBERTModule:
    """Tensors under the released names in our network."""
    renamed = rename(tensors, "golden")
    renamed["embedder.gene_vectors"] = renamed["embedder.gene_vectors"][:-1]
    arguments = network(renamed, "golden")
    module = ScBERTModule(len(renamed["embedder.gene_vectors"]), **{**arguments, **options})
    module.load_state_dict(renamed)
    return module.eval()
