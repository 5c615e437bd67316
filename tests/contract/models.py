"""The models that the contract holds for: one line each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from mudata import MuData

from cellprior import pp
from cellprior._compat import without_pulled_columns
from cellprior.model import UCE, CellPLM, Geneformer, MultiomeCLIP, Nicheformer, ScBERT, ScGPT
from cellprior.model._base import PretrainedModel
from cellprior.model.geneformer._module import GeneformerModule
from cellprior.model.nicheformer._module import NicheformerModule
from cellprior.model.scbert._module import ScBERTModule
from cellprior.model.scgpt._module import ScGPTModule
from cellprior.model.uce._module import UCEModule
from cellprior.weights import fetch, read_bundle, write_bundle

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


@dataclass(frozen=True)
class Entry:
    """A model class, weights that a plain clone has, and data that they can embed."""

    model: type[PretrainedModel]
    find_weights: Callable[[], str]
    make_data: Callable[[], AnnData]
    state: str = "pretrained"

    @property
    def name(self) -> str:
        """For the names of tests."""
        return f"{self.model.__name__} {self.state}"

    @property
    def taught(self) -> Entry:
        """The same model after self-supervised training, and then fine-tuning on labels, of its own data."""
        return Entry(self.model, lambda: _teach(self), self.make_data, "trained and fine-tuned")

    @property
    def weights(self) -> str:
        """Name or folder."""
        return self.find_weights()

    def data(self, adata: AnnData) -> Any:
        """What the model is set up with, of counts of RNA."""
        return adata

    def setup(self, data: Any, **setup: Any) -> None:
        self.model.setup_anndata(data, **setup)

    def looking(self, model: PretrainedModel) -> PretrainedModel:
        """The model, whose embeddings are those that the contract looks at."""
        return model

    def pretrained(
        self, adata: AnnData, weights: str | Path | None = None, **options: Any
    ) -> PretrainedModel:
        """A model with data attached, which from_pretrained sets up if need be."""
        return self.looking(self.model.from_pretrained(weights or self.weights, self.data(adata), **options))

    def load(self, folder: Path, adata: AnnData | Literal[False] | None = None) -> PretrainedModel:
        return self.looking(self.model.load(folder, adata=self.data(adata) if adata else adata))

    def attach(self, adata: AnnData, **setup: Any) -> PretrainedModel:
        """The pretrained model with data attached; without ``setup``, from_pretrained sets the data up."""
        data = self.data(adata)
        if setup:
            self.setup(data, **setup)
        return self.looking(self.model.from_pretrained(self.weights, data))

    def embed(self, adata: AnnData, *, setup: dict[str, Any] | None = None, **options: Any) -> np.ndarray:
        model = self.attach(adata, **(setup or {}))
        try:
            return model.get_latent_representation(**options)
        finally:
            model.release()


@dataclass(frozen=True)
class WithPeaks(Entry):
    """A model that is set up with two modalities: the contract looks at the RNA, beside which is ATAC."""

    def data(self, adata: AnnData) -> MuData:
        return beside_peaks(adata.to_memory() if adata.is_view else adata)

    def setup(self, data: MuData, *, layer: str | None = None, **setup: Any) -> None:
        self.model.setup_mudata(data, rna_layer=layer, **setup)

    def looking(self, model: PretrainedModel) -> PretrainedModel:
        model.get_latent_representation = partial(model.get_latent_representation, modality="rna")
        return model


def beside_peaks(adata: AnnData) -> MuData:
    """The cells with made-up ATAC, which depends on a cell's place alone."""
    counts = np.random.default_rng(0).poisson(0.5, (adata.n_obs, 300)).astype(np.float32)
    peaks = [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(counts.shape[1])]
    atac = AnnData(sp.csr_matrix(counts), obs=adata.obs[[]].copy(), var=pd.DataFrame(index=peaks))
    with without_pulled_columns():
        mdata = MuData({"rna": adata, "atac": atac})
    mdata.obs = adata.obs.copy()
    return mdata


def blood_cells() -> AnnData:
    """700 blood cells that come with scanpy: raw counts of 765 genes, two interleaved batches."""
    return _blood_cells().copy()


@cache
def _blood_cells() -> AnnData:
    import scanpy as sc  # takes seconds, and fresh processes that read other data need none of it

    adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    counts = pp.recover_counts(adata)
    obs = adata.obs[["bulk_labels"]].assign(batch=np.where(np.arange(adata.n_obs) % 3, "a", "b"))
    return AnnData(counts, obs=obs, var=adata.var, layers={"log": adata.X})


def cellplm_starter() -> str:
    return "cellplm-starter"


_FOLDERS: list[TemporaryDirectory] = []  # removed with the process


def new_folder() -> Path:
    _FOLDERS.append(TemporaryDirectory())
    return Path(_FOLDERS[-1].name) / "bundle"


@cache
def tiny_scbert() -> str:
    """A ScBERT of the starter's genes that blood cells have or that were renamed: the starter itself takes too long.

    Its weights are random: the contract is about everything else.
    """
    network = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "head_dim": 8}
    return _tiny("ScBERT", ScBERTModule, network)


@cache
def tiny_geneformer() -> str:
    """A Geneformer of V2, with the token of the cell, of the same genes; random weights, ten times those of a start."""
    network = {
        "n_hidden": 16, "n_layers": 2, "n_heads": 2, "n_feedforward": 32, "n_positions": 128, "special_tokens": True,
    }  # fmt: skip
    return _tiny("Geneformer", GeneformerModule, network, scale=10.0)


@cache
def tiny_scgpt() -> str:
    """A ScGPT of the same genes; random weights."""
    return _tiny("ScGPT", ScGPTModule, {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_ff": 16})


@cache
def tiny_nicheformer() -> str:
    """A Nicheformer of the same genes, without means; random weights, ten times those of a start."""
    network = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_feedforward": 32, "n_positions": 128}
    return _tiny("Nicheformer", NicheformerModule, network, scale=10.0)


@cache
def tiny_uce() -> str:
    """A UCE of the same genes, which it knows to be human; random weights."""
    network = {
        "n_hidden": 16, "n_layers": 2, "n_heads": 2, "n_feedforward": 16, "n_latent": 12, "decoder_width": 16,
        "binary_widths": [8], "sentence_length": 64,
    }  # fmt: skip
    return _tiny("UCE", UCEModule, network, scale=2.0, species="human")


@cache
def tiny_multiomeclip() -> str:
    """A MultiomeCLIP of the genes of blood cells, trained for a moment: what it fits to data is part of it."""
    mdata = beside_peaks(_blood_cells().copy())
    MultiomeCLIP.setup_mudata(mdata)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="After training", category=UserWarning
        )  # nothing can be learned
        torch.manual_seed(0)
        model = MultiomeCLIP(mdata, genes=_genes(), n_hidden=16, n_latent=12, n_components=(10, 10))
        model.train(max_epochs=1, **QUIET)
    folder = new_folder()
    model.save_pretrained(folder)
    model.release()
    return str(folder)


def _genes() -> pd.DataFrame:
    """Genes of the starter that blood cells have, and some that were renamed."""
    genes = read_bundle(fetch("scbert-starter")).genes
    renamed = genes["previous_symbols"] != ""
    known = genes["symbol"].isin(_blood_cells().var_names) | (renamed & (renamed.cumsum() <= 400))
    return genes[known].reset_index(drop=True)


def _tiny(
    name: str,
    module_cls: Callable[..., torch.nn.Module],
    network: dict[str, Any],
    *,
    scale: float = 1.0,
    **columns: str,
) -> str:
    genes = _genes().assign(**columns)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = module_cls(len(genes), **network)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    folder = new_folder()
    config = {"model": name, "network": network}
    write_bundle(folder, state_dict=module.state_dict(), config=config, genes=genes, card="")
    return str(folder)


@cache
def _teach(entry: Entry) -> str:
    adata = entry.make_data()
    with torch.random.fork_rng(), warnings.catch_warnings():
        # two epochs of each are too few to be good, and enough to move what they train
        warnings.filterwarnings("ignore", message="After training", category=UserWarning)
        torch.manual_seed(0)
        model = entry.attach(adata, batch_key="batch", labels_key="bulk_labels")
        model.train(max_epochs=2, batch_size=256, **QUIET)
        model.fine_tune(max_epochs=2, **QUIET)
    folder = new_folder()
    model.save_pretrained(folder)
    model.release()
    return str(folder)


PRETRAINED = [
    Entry(CellPLM, cellplm_starter, blood_cells),
    Entry(ScBERT, tiny_scbert, blood_cells),
    Entry(Geneformer, tiny_geneformer, blood_cells),
    Entry(ScGPT, tiny_scgpt, blood_cells),
    Entry(Nicheformer, tiny_nicheformer, blood_cells),
    Entry(UCE, tiny_uce, blood_cells),
    WithPeaks(MultiomeCLIP, tiny_multiomeclip, blood_cells),
]
# Only for what training can change. What it leaves behind is the same code in all models: further ones are put to it in
# their own folders of tests.
TAUGHT = [entry.taught for entry in PRETRAINED[:2]]
