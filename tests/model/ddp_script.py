"""What two processes do for ``test_distributed.py``: train each model, and take the gradient of each contrast.

    python ddp_script.py FOLDER

Lightning runs it once more, as the second process. Each writes what it has to ``<rank>.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import scvi
import torch
from torch import Tensor

from cellprior.model import CellPLM, MultiomeCLIP, ScBERT
from cellprior.model.data._ranks import rank_and_count
from cellprior.model.learning._processes import gather_cells
from cellprior.model.multiomeclip._loss import same_label
from cellprior.model.multiomeclip._module import MultiomeCLIPModule
from cellprior.model.scbert._loss import contrastive_losses
from cellprior.model.scbert._module import ScBERTModule
from tests.model.multiomeclip.data import cells

N_CELLS, N_GENES, N_PEAKS = 23, 30, 50
DDP: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 2,
    "strategy": "ddp",
    "enable_progress_bar": False,
    "log_every_n_steps": 1,
}


def shares(n_ranks: int) -> list[np.ndarray]:
    """Cells of each process, one more in the first."""
    return np.array_split(np.arange(N_CELLS), n_ranks)


def contrasts(own: np.ndarray) -> dict[str, dict[str, Tensor]]:
    """Loss and gradient of each contrast, of some of the cells or of all."""
    found = {}
    rng = np.random.default_rng(0)
    rna, atac = (torch.from_numpy(rng.poisson(2, (N_CELLS, n)).astype("f")) for n in (N_GENES, N_PEAKS))
    label = torch.from_numpy(rng.integers(-1, 6, N_CELLS))
    torch.manual_seed(0)
    module = ScBERTModule(N_GENES, n_hidden=16, n_layers=1, n_heads=2, head_dim=8)
    half = torch.arange(N_GENES) % 2 == 0
    for name, size in (("scbert", None), ("scbert, micro-batches", 4)):
        module.zero_grad()
        losses = contrastive_losses(module, (rna[own] * half, rna[own] * ~half), micro_batch_size=size)
        losses["contrastive"].backward()
        found[name] = losses | gradients(module)
    for loss in ("infonce", "sigmoid"):
        torch.manual_seed(0)
        clip = MultiomeCLIPModule(N_GENES, N_PEAKS, encoder="vit", n_hidden=16, n_layers=1, loss=loss).eval()
        inputs = {name: clip.encoder_of(name).inputs(x[own]) for name, x in (("rna", rna), ("atac", atac))}
        out = clip(inputs, same=same_label(gather_cells(label[own])), micro_batch_size=5)
        out["loss"].backward()
        found[loss] = {"loss": out["loss"]} | gradients(clip)
    return found


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of each parameter, mean over the processes, as distributed training takes it."""
    _, n_ranks = rank_and_count()
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
            if n_ranks > 1:
                torch.distributed.all_reduce(found[name])
            found[name] /= n_ranks
    return found


def train() -> dict[str, dict[str, Any]]:
    """Tensors and losses of each model, trained together with the other process."""
    models = {}
    scvi.settings.seed = 0
    mdata = cells(300)
    rna = mdata.mod["rna"].copy()
    rna.obs = mdata.obs.copy()
    small = {"n_hidden": 16, "n_layers": 1, "n_heads": 2}
    CellPLM.setup_anndata(rna, batch_key="batch", labels_key="type")
    model = CellPLM(rna, **small, n_latent=8, n_batches=2)
    model.train(max_epochs=8, batch_size=32, plan_kwargs={"lr": 1e-2}, **DDP)
    models["cellplm"] = state(model)
    model.fine_tune(max_epochs=8, batch_size=32, lr=1e-2, **DDP)
    models["cellplm, fine-tuned"] = state(model)
    rna = rna.copy()
    ScBERT.setup_anndata(rna, batch_key="batch")
    scbert = ScBERT(rna, **small, head_dim=8)
    objective = {"objective": "masked+contrastive", "plan_kwargs": {"lr": 1e-2, "redraw_every": 3}}
    scbert.train(max_epochs=6, batch_size=32, **objective, **DDP)
    models["scbert"] = state(scbert)
    MultiomeCLIP.setup_mudata(mdata, batch_key="batch", labels_key="type")
    clip = MultiomeCLIP(mdata, n_hidden=16, n_latent=8, n_components=(12, 20), dropout_rate=0.2)
    clip.train(max_epochs=10, batch_size=32, **DDP)
    models["multiomeclip"] = state(clip)
    return models


def state(model: Any) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.module.state_dict().items()},
        "history": {name: values.iloc[:, 0].tolist() for name, values in (model.history_ or {}).items()},
    }


if __name__ == "__main__":
    models = train()
    rank, n_ranks = rank_and_count()
    found = {"models": models, "contrasts": contrasts(shares(n_ranks)[rank]), "n_ranks": n_ranks}
    torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
