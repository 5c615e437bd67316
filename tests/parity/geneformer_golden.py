"""The tiny Geneformers that the original was run on, as its authors release them."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from safetensors.torch import save_file

from cellprior.model.geneformer._checkpoint import read_official
from cellprior.model.geneformer._module import GeneformerModule

DATA = Path(__file__).parent / "data"
SUFFIX = {"v1": "gc30M", "v2": "gc104M"}


@dataclass
class Golden:
    """One version: tensors of its checkpoint, dictionaries, counts and outputs."""

    version: str
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, version: str) -> Golden:
        with np.load(DATA / f"geneformer_{version}.npz") as file:
            return cls(version, dict(file))

    def __getitem__(self, name: str) -> torch.Tensor:
        found = torch.from_numpy(self.arrays[name])
        return found if found.is_floating_point() else found.long()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        prefix = "tensor/"
        return {
            n.removeprefix(prefix): torch.from_numpy(a)
            for n, a in self.arrays.items()
            if n.startswith(prefix)
        }

    @property
    def dictionaries(self) -> dict[str, dict[str, Any]]:
        """As the authors pickle them, numbers of V1 as NumPy's."""
        names, number = self.arrays["tokens"].tolist(), np.int16 if self.version == "v1" else int
        n_special = 2 if self.version == "v1" else 4
        pairs = zip(self.arrays["mapping_from"].tolist(), self.arrays["mapping_to"].tolist(), strict=True)
        return {
            "token_dictionary": {n: i if i < n_special else number(i) for i, n in enumerate(names)},
            "gene_median_dictionary": dict(
                zip(names[n_special:], map(np.float64, self.arrays["median"][n_special:]), strict=True)
            ),
            "ensembl_mapping_dict": dict(pairs),
            "gene_name_id_dict": {f"SYM{i}": name for i, name in enumerate(names[n_special:])},
        }

    def write(self, folder: Path, *, binary: bool = False, dictionaries: Path | None = None) -> Path:
        """Write a folder in the authors' layout; the path of its weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(str(self.arrays["config"]))
        path = folder / ("pytorch_model.bin" if binary else "model.safetensors")
        if binary:
            tied = {
                "cls.predictions.decoder.weight": self.tensors["bert.embeddings.word_embeddings.weight"],
                "cls.predictions.decoder.bias": self.tensors["cls.predictions.bias"],
            }
            torch.save(self.tensors | tied, path)
        else:
            save_file(self.tensors, path, metadata={"format": "pt"})
        beside = folder if dictionaries is None else dictionaries
        beside.mkdir(parents=True, exist_ok=True)
        for name, content in self.dictionaries.items():
            with (beside / f"{name}_{SUFFIX[self.version]}.pkl").open("wb") as file:
                pickle.dump(content, file, protocol=4)
        return path

    def module(self, folder: Path, **options: Any) -> GeneformerModule:
        """The case in our network."""
        bundle = read_official(self.write(folder, **options))
        module = GeneformerModule(len(bundle.genes), **bundle.config["network"])
        module.load_state_dict(bundle.state_dict)
        return module.eval()

    @property
    def counts(self) -> torch.Tensor:
        """Counts over the vocabulary as the original takes them ``(cells, n_genes)``."""
        theirs = self.dictionaries
        known = {name: i for i, name in enumerate(theirs["gene_median_dictionary"])}
        found = np.zeros((len(self.arrays["counts"]), len(known)), dtype=np.float32)
        for name, column in zip(self.arrays["var_ensembl_id"], self.arrays["counts"].T, strict=True):
            current = theirs["ensembl_mapping_dict"].get(str(name).upper())
            if current in known:
                found[:, known[current]] += column
        return torch.from_numpy(found)

    @property
    def kept(self) -> np.ndarray:
        """Which cells the original does not drop."""
        return np.isin(self.arrays["cells"], self.arrays["cell_id"])

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(str(self.arrays["config"]))

    def adata(self) -> AnnData:
        """The cells, with the ids in capitals, as the original reads them, and those lost that it does not find."""
        ids = [str(name).upper() for name in self.arrays["var_ensembl_id"]]
        ids = ["lost" if "." in name else name for name in ids]
        var = pd.DataFrame({"ensembl_id": ids}, index=[f"gene{i}" for i in range(len(ids))])
        x = sp.csr_matrix(self.arrays["counts"].astype(np.float32))
        return AnnData(x, obs=pd.DataFrame(index=self.arrays["cells"]), var=var)
