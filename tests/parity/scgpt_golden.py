"""The tiny scGPTs that the original was run on, as it would have saved them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellprior.model.files._loading import load_strictly
from cellprior.model.scgpt._checkpoint import network, read_official, rename
from cellprior.model.scgpt._inputs import Counts
from cellprior.model.scgpt._module import ScGPTModule, Tokens

DATA = Path(__file__).parent / "data"
ARGS = {
    "pad_token": "<pad>", "input_style": "binned", "input_emb_style": "continuous", "n_bins": 51, "embsize": 48,
    "nlayers": 3, "nheads": 4, "d_hid": 64, "dropout": 0.2, "n_layers_cls": 3, "mask_value": -1, "pad_value": -2,
}  # fmt: skip
OPTIONS = {
    "flash_prenorm": {"pre_norm": True},
    "mvc_detach": {"mvc_decoder_style": "inner product, detach"},
}


class CaseA:
    """800 genes, width 48, 3 layers; 32 cells of pbmc3k, and the losses and gradients of 12 of them."""

    def __init__(self) -> None:
        with np.load(DATA / "scgpt_a.npz") as file:
            self.arrays = dict(file)
        self.vocabulary = {name: i for i, name in enumerate(self.arrays["vocabulary"].tolist())}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """State dict as saved by the original."""
        return {name.removeprefix("param/"): self[name] for name in self.arrays if name.startswith("param/")}

    @property
    def row_of_token(self) -> np.ndarray:
        """Our row of each of their tokens; -1 for <eoc>."""
        rows = np.full(len(self.vocabulary), -1)
        names = [name for name in self.vocabulary if not name.startswith("<")]
        for i, name in enumerate([*names, "<pad>", "<cls>"]):
            rows[self.vocabulary[name]] = i
        return rows

    def tokens(self, name: str, values: str = "value") -> Tokens:
        """Tokens under a heading of the golden file."""
        gene = torch.from_numpy(self.row_of_token[self.arrays[f"{name}/gene"]])
        return Tokens(gene, self[f"{name}/{values}"].long(), (gene != 800).sum(1))

    @property
    def counts(self) -> Counts:
        """Non-zero counts of the 32 cells over the vocabulary, in the order of the golden file."""
        token = self.arrays["token_id_of_column"][self.arrays["counts/indices"].astype(int)]
        known = token >= 0
        indptr = np.concatenate([[0], np.cumsum(known)])[self.arrays["counts/indptr"]]
        value = self.arrays["counts/data"][known].astype(np.float32)
        return Counts(indptr, self.row_of_token[token[known]], value)

    def write(
        self,
        folder: Path,
        *,
        tensors: dict[str, Any] | None = None,
        args: dict[str, Any] | None = None,
        vocabulary: dict[str, int] | None = None,
    ) -> Path:
        """Write the three files; the checkpoint's path."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.tensors if tensors is None else tensors, folder / "best_model.pt")
        (folder / "args.json").write_text(json.dumps(ARGS if args is None else args))
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary if vocabulary is None else vocabulary))
        return folder / "best_model.pt"

    def module(self, folder: Path, **options: Any) -> ScGPTModule:
        """Written, read, and in our network, in eval mode."""
        bundle = read_official(self.write(folder))
        module = ScGPTModule(len(bundle.genes), **{**bundle.config["network"], **options})
        load_strictly(module, bundle.state_dict, "golden")
        return module.eval()


@cache
def case_a() -> CaseA:
    return CaseA()


class Variant:
    """37 genes, width 16, 2 layers; one way to build the original's network."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arrays = {
            key.removeprefix(f"{name}/"): tensor
            for key, tensor in _variants().items()
            if key.startswith(f"{name}/")
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def tensors(self) -> dict[str, Tensor]:
        """State dict as saved by the original."""
        return {key.removeprefix("param/"): x for key, x in self.arrays.items() if key.startswith("param/")}

    def module(self, tensors: dict[str, Tensor] | None = None) -> ScGPTModule:
        """In our network, without dropout."""
        renamed = rename(self.tensors if tensors is None else tensors, self.name)
        arguments = network({"nheads": 2, **OPTIONS.get(self.name, {})}, renamed, self.name)
        embedding = renamed["gene_encoder.embedding.weight"]
        renamed["gene_encoder.embedding.weight"] = embedding[
            :39
        ]  # pad 37, cls 38, and eoc, which is not read
        module = ScGPTModule(37, **{**arguments, "dropout_rate": 0.0})
        load_strictly(module, renamed, self.name)
        return module


@cache
def _variants() -> dict[str, Tensor]:
    """All variants, and what goes into them under ``inputs/``: one array, as a thousand small ones take more space."""
    with np.load(DATA / "scgpt_variants.npz") as file:
        flat, index = file["flat"], json.loads(str(file["index"]))
    found, start = {}, 0
    for name, shape, kind in index:
        size = int(np.prod(shape))
        array = flat[start : start + size].reshape(shape)
        found[name] = torch.from_numpy(array.copy() if kind == "f" else array.astype(np.int64))
        start += size
    return found


def variant_tokens() -> Tokens:
    """Tokens of all variants: six cells, some bins hidden."""
    inputs = Variant("inputs")
    return Tokens(inputs["gene"], inputs["masked"].long(), torch.tensor([20, 20, 17, 12, 9, 5]))
