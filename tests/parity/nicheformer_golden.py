"""The tiny Nicheformer that the original was run on, as its authors release theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from safetensors.torch import save_file

from cellprior.model.nicheformer._checkpoint import read_hub
from cellprior.model.nicheformer._inputs import ASSAYS, TECHNOLOGIES, context_code
from cellprior.model.nicheformer._module import NicheformerModule

DATA = Path(__file__).parent / "data"
SPARE = 5  # rows of the table of tokens that none has
UNUSED = {
    "pos": torch.arange(96),
    "encoder_layer.linear1.weight": torch.zeros(64, 32),
    "pooler_head.weight": torch.zeros(32, 32),
    "cls_head.bias": torch.zeros(164),
}


class Golden:
    """Tensors of its checkpoint, counts, means and outputs."""

    def __init__(self) -> None:
        with np.load(DATA / "nicheformer.npz") as file:
            self.arrays = dict(file)

    def __getitem__(self, name: str) -> torch.Tensor:
        found = torch.from_numpy(self.arrays[name])
        return found if found.is_floating_point() else found.long()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Under the original's names, those that nothing uses among them."""
        prefix = "tensor/"
        used = {n.removeprefix(prefix): self[n] for n in self.arrays if n.startswith(prefix)}
        return used | UNUSED

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(str(self.arrays["config"]))

    @property
    def means(self) -> torch.Tensor:
        """By technology, 0 where there is none."""
        return torch.stack([torch.nan_to_num(self[f"mean/{name}"]) for name in TECHNOLOGIES])

    @property
    def counts(self) -> torch.Tensor:
        """Over the vocabulary ``(cells, n_genes)``."""
        row = {name: i for i, name in enumerate(self.arrays["vocabulary"].tolist())}
        found = torch.zeros(len(self.arrays["cells"]), len(row))
        for name, column in zip(self.arrays["var_names"].tolist(), self["counts"].T.float(), strict=True):
            if name in row:
                found[:, row[name]] = column
        return found

    @property
    def assays(self) -> list[str]:
        """Name of each cell's."""
        of_token = {assay.token: name for name, assay in ASSAYS.items()}
        return [of_token[token] for token in self.arrays["assay"].tolist()]

    @property
    def context(self) -> torch.Tensor:
        return torch.tensor([context_code("human", assay) for assay in self.assays])

    def with_context(self, genes: torch.Tensor) -> torch.Tensor:
        """What the original makes of tokens of genes, 0 for none: human, the assay, dissociated, and the genes."""
        n = len(genes)
        prefix = torch.stack([torch.full((n,), 5), self["assay"], torch.full((n,), 3)], dim=1)
        return torch.cat([prefix, genes.masked_fill(genes == 0, 1)], dim=1)[:, :96]

    def vocabulary(self, folder: Path) -> None:
        """Write the files that say which genes there are."""
        folder.mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / "model.h5ad", "w") as file:
            var = file.create_group("var")
            var.attrs["_index"] = "_index"
            var["_index"] = self.arrays["vocabulary"].astype(object)
        for name in TECHNOLOGIES:
            np.save(folder / f"{name}_mean_script.npy", self.arrays[f"mean/{name}"])

    def write(self, folder: Path) -> Path:
        """Write a folder as the hub has it; the path of its weights."""
        self.vocabulary(folder)
        path = folder / "model.safetensors"
        (folder / "config.json").write_text(json.dumps({"model_type": "nicheformer", **self.config}))
        hub = {
            name if name.startswith("classifier_head") else f"nicheformer.{name}": tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(("pooler_head", "cls_head"))
        }
        save_file(hub, path, metadata={"format": "pt"})
        return path

    def write_lightning(self, folder: Path, **content: Any) -> Path:
        """Write what Lightning leaves of a training, with numbers of NumPy in it; the path."""
        self.vocabulary(folder)
        path = folder / "nicheformer.ckpt"
        written = {
            "epoch": 3,
            "state_dict": self.tensors,
            "hyper_parameters": {**self.config, "lr": 1e-4, "autoregressive": False, "pool": None},
            "lr_schedulers": [{"_last_lr": [np.float64(1e-5)]}],
        }
        torch.save(written | content, path)
        return path

    def module(self, folder: Path) -> NicheformerModule:
        """The case in our network."""
        bundle, _ = read_hub(self.write(folder))
        module = NicheformerModule(len(bundle.genes), **bundle.config["network"])
        module.load_state_dict(bundle.state_dict)
        return module.eval()

    def adata(self) -> AnnData:
        """The cells, with columns of ``obs`` as the authors' notebooks have them."""
        obs = pd.DataFrame(
            {"specie": 5, "assay": self.arrays["assay"].astype(int), "modality": 3},
            index=self.arrays["cells"],
        )
        x = sp.csr_matrix(self.arrays["counts"].astype(np.float32))
        return AnnData(x, obs=obs, var=pd.DataFrame(index=self.arrays["var_names"]))


KEYS = {"assay_key": "assay", "species_key": "specie", "modality_key": "modality"}
