"""UCE's golden case: the files that the original reads, and numbers that it gave."""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from cellprior.model import UCE
from cellprior.model.data._entries import Counts
from cellprior.model.files._strict import load_strictly
from cellprior.model.uce._checkpoint import LATIN, read_official
from cellprior.model.uce._inputs import Genome
from cellprior.model.uce._module import Tokens, UCEModule, sinusoids
from cellprior.weights import write_bundle

DATA = Path(__file__).parent / "data"
N_TOKENS, FIRST_CHROMOSOME, PAD_LENGTH = 827, 772, 1536
LENGTH = 64  # genes of a sentence


class CaseA:
    """410 human and 346 mouse genes, width 32, 2 layers; 26 cells of pbmc3k, 15 of a mouse's pancreas."""

    def __init__(self) -> None:
        with np.load(DATA / "uce_a.npz") as file:
            self.arrays = dict(file)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays under a heading."""
        return {key.removeprefix(prefix): x for key, x in self.arrays.items() if key.startswith(prefix)}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """State dict as saved by the original."""
        found = {name: torch.from_numpy(x) for name, x in self.part("param/").items()}
        return {**found, "pos_encoder.pe": sinusoids(PAD_LENGTH, 32)[:, None]}

    @property
    def positions(self) -> pd.DataFrame:
        """Where genes lie."""
        return pd.DataFrame({name: x.astype(str) for name, x in self.part("positions/").items()})

    @property
    def offsets(self) -> dict[str, int]:
        """Row of the first gene of each species."""
        return dict(
            zip(self["offsets/species"].astype(str).tolist(), self["offsets/row"].tolist(), strict=True)
        )

    def names(self, species: str) -> list[str]:
        """Genes of a species, in order."""
        return self[f"names/{species}"].astype(str).tolist()

    def write(
        self,
        folder: Path,
        *,
        tensors: dict[str, Tensor] | None = None,
        positions: pd.DataFrame | None = None,
        offsets: dict[str, int] | None = None,
    ) -> Path:
        """Write the original's files, with a list of names in the place of proteins; the checkpoint's path."""
        (folder / "protein_embeddings").mkdir(parents=True, exist_ok=True)
        torch.save(self.tensors if tensors is None else tensors, folder / "model.torch")
        (self.positions if positions is None else positions).to_csv(folder / "species_chrom.csv", index=False)
        (folder / "species_offsets.pkl").write_bytes(
            pickle.dumps(self.offsets if offsets is None else offsets)
        )
        for species in LATIN:
            (folder / f"protein_embeddings/{species}.txt").write_text("\n".join(self.names(species)))
        return folder / "model.torch"

    def module(self, folder: Path) -> UCEModule:
        """Written, read, and in our network, in eval mode."""
        bundle = read_official(self.write(folder), LATIN, n_heads=4)
        module = UCEModule(len(bundle.genes), **bundle.config["network"], sentence_length=LENGTH)
        load_strictly(module, bundle.state_dict, "golden")
        return module.eval()

    def bundle(self, folder: Path, species: tuple[str, ...] = ("human", "mouse")) -> Path:
        """Converted, with sentences as short as in the case."""
        bundle = read_official(self.write(folder / "official"), species, n_heads=4)
        config = {**bundle.config, "network": {**bundle.config["network"], "sentence_length": LENGTH}}
        parts = {"state_dict": bundle.state_dict, "genes": bundle.genes}
        return write_bundle(folder / "bundle", config=config, card="", **parts)

    def row_of_token(self, genome: Genome) -> np.ndarray:
        """Our row of each of their tokens."""
        row = np.full(N_TOKENS, -1)
        row[genome.number] = np.arange(len(genome.number))
        row[FIRST_CHROMOSOME + genome.code] = len(genome.number) + np.arange(len(genome.code))
        row[[0, 2, 3]] = genome.pad, genome.close, genome.cls
        return row

    def tokens(self, module: UCEModule, name: str, lengths: np.ndarray | None = None) -> Tokens:
        """Their tokens in our rows."""
        theirs = self[name]
        length = (theirs != 0).sum(1) if lengths is None else lengths
        ours = self.row_of_token(module.genome)[theirs][:, : length.max()]
        return Tokens(torch.from_numpy(ours), torch.from_numpy(length.astype(np.int64)))

    def counts(self, species: str) -> Counts:
        """Of the kept genes, whose columns stand for vocabulary rows."""
        counts = self[f"{species}/counts_kept"]
        row, column = counts.nonzero()
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(counts)))])
        return Counts(indptr, column, counts[row, column].astype(np.float32))

    def genome(self, species: str) -> Genome:
        """Of the kept genes."""
        parts = (
            self[f"{species}/{name}"].astype(np.int64) for name in ("gene_token", "gene_chrom", "gene_start")
        )
        number, chromosome, start = parts
        code = np.arange(N_TOKENS - FIRST_CHROMOSOME)
        return Genome(number, chromosome, start, np.zeros_like(number), code)

    def cells(self, species: str) -> AnnData:
        """Kept cells and genes, as the original has them after its filter."""
        names = self[f"{species}/kept_genes"].astype(str)
        counts = self[f"{species}/counts_kept"].astype(np.float32)
        return AnnData(counts, var=pd.DataFrame(index=names))

    def tied(self, species: str) -> np.ndarray:
        """Cells in whose sentence genes share a place, which the original puts in any order."""
        place = {
            int(token): (int(c), int(s))
            for token, c, s in zip(
                *(self[f"{species}/{name}"] for name in ("gene_token", "gene_chrom", "gene_start")),
                strict=True,
            )
        }
        found = []
        for tokens in self[f"{species}/tokens"]:
            genes = {int(t) for t in tokens if int(t) in place}
            found.append(len({place[t] for t in genes}) < len(genes))
        return np.array(found)


@cache
def case_a() -> CaseA:
    return CaseA()


def embed(weights: Path, adata: AnnData, **how: object) -> np.ndarray:
    """Load, embed and let go."""
    model = UCE.from_pretrained(weights, adata)
    try:
        return model.get_latent_representation(**how)
    finally:
        model.release()
