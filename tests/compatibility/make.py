"""Write the models of the present version: python -m tests.compatibility.make; existing folders are left alone."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import cellprior as cp
from tests.compatibility.cells import multiome, rna

HERE = Path(__file__).parent
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "CellPLM": {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4, "n_batches": 2},
    "ScBERT": {"n_hidden": 8, "n_layers": 2, "n_heads": 2, "head_dim": 4},
    "MultiomeCLIP": {"n_hidden": 8, "n_latent": 4, "n_components": (6, 6)},
    "UCE": {
        "n_hidden": 8,
        "n_layers": 1,
        "n_heads": 2,
        "n_feedforward": 8,
        "n_latent": 6,
        "decoder_width": 8,
        "binary_widths": [4],
        "sentence_length": 32,
    },  # fmt: skip
}


def train(name: str) -> Any:
    """A model after two epochs, fine-tuned if it can be."""
    torch.manual_seed(0)
    model_class = getattr(cp.model, name)
    if name == "MultiomeCLIP":
        mdata = multiome()
        model_class.setup_mudata(mdata)
        model = model_class(mdata, **NETWORKS[name])
        model.train(max_epochs=2, batch_size=32, **QUIET)
        return model
    adata = rna()
    model_class.setup_anndata(adata, batch_key="sample", labels_key="kind")
    genes = adata.var_names.to_frame(name="symbol").assign(species="human") if name == "UCE" else None
    model = model_class(adata, genes=genes, **NETWORKS[name])
    model.train(max_epochs=2, batch_size=32, **QUIET)
    model.fine_tune(max_epochs=2, trainable="all", calibration_size=0.5, **QUIET)
    return model


def expected(model: Any) -> dict[str, np.ndarray]:
    """The numbers that every later version must give again."""
    numbers = {"latent": model.get_latent_representation()}
    if hasattr(model, "predict"):
        numbers |= {"probability": model.predict(soft=True).to_numpy(), "named": model.predict(reject=0.3)}
    return {
        name: np.asarray(value).astype("U" if value.dtype == object else "f4")
        for name, value in numbers.items()
    }


def main() -> None:
    """Write what is not there yet."""
    major, minor = cp.__version__.split(".")[:2]
    for name in NETWORKS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # two epochs are too few to be good
            model = train(name)
            numbers = expected(model)
        with TemporaryDirectory() as scratch:
            bundle, saved = Path(scratch) / "bundle", Path(scratch) / "saved"
            model.save_pretrained(bundle)
            model.save(str(saved))
            # a model has the oldest format that holds it
            written_as = json.loads((bundle / "config.json").read_text())["format_version"]
            for made, kind in ((bundle, f"bundle-format-{written_as}"), (saved, f"save-{major}.{minor}")):
                folder = HERE / kind / name
                if folder.exists():
                    sys.stdout.write(f"{folder} is there already\n")
                    continue
                np.savez_compressed(made / "expected.npz", **numbers)
                shutil.copytree(made, folder)


if __name__ == "__main__":
    main()
