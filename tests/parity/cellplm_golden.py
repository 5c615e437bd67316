"""The tiny CellPLMs that the original was run on, as it would have released them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

DATA = Path(__file__).parent / "data"


@dataclass
class Golden:
    """One case: inputs, outputs, and the files of its checkpoint."""

    latent: str
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, latent: str) -> Golden:
        with np.load(DATA / f"cellplm_{latent}.npz") as file:
            return cls(latent, dict(file))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays["out/" + name]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(str(self.arrays["config"]))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """State dict under the released names."""
        tensors = {
            name.removeprefix("state_dict/"): torch.from_numpy(array)
            for name, array in self.arrays.items()
            if name.startswith("state_dict/")
        }
        return {**tensors, "embedder.pe_enc.pe_enc.weight": torch.zeros(10_000, 32)}

    @property
    def adata(self) -> ad.AnnData:
        obs = pd.DataFrame({"batch": pd.Categorical(self.arrays["batch"])}, index=self.arrays["obs_names"])
        var = pd.DataFrame(index=self.arrays["var_names"])
        return ad.AnnData(sp.csr_matrix(self.arrays["counts"]), obs=obs, var=var)

    def step(self, name: str) -> torch.Tensor:
        """Array of the full pretraining step."""
        return torch.from_numpy(self.arrays["step/" + name])

    @property
    def step_values(self) -> dict[str, Any]:
        return json.loads(str(self.arrays["step/values"]))

    def write(self, folder: Path, *, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
        """Write the checkpoint and its configuration as the authors release them; the checkpoint's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"tiny_{self.latent}.best.ckpt"
        torch.save({"model_state_dict": self.tensors if tensors is None else tensors}, path)
        (folder / f"tiny_{self.latent}.config.json").write_text(json.dumps({**self.config, **config}))
        return path
