"""Train the small MultiomeCLIP that ships with cellprior as `multiomeclip-starter`.

    python scripts/train_starter_multiomeclip.py --data <folder> --out <folder>

The folder holds `snareseq_mouse_cortex_2k.h5mu` and `snareseq_mouse_cortex_6k.h5mu`: cells of adult mouse cortex by
SNARE-seq (Chen et al., 2019), raw counts of RNA and ATAC. 1,000 cells of the second are left out: nothing was chosen
on them, and the card is judged on them. Everything is seeded; another processor may change the last digits.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import scanpy as sc
import scvi
import torch
from mudata import MuData

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import multiome

from cellprior._compat import without_pulled_columns
from cellprior.evaluate import accuracy, balanced_accuracy, knn_predict
from cellprior.genes import match
from cellprior.model import MultiomeCLIP
from cellprior.model.multiomeclip._metrics import depth_scores, matching_metrics
from cellprior.model.multiomeclip._training import align
from cellprior.weights import fingerprints, write_bundle, write_trained_on

FILES = ("snareseq_mouse_cortex_2k.h5mu", "snareseq_mouse_cortex_6k.h5mu")
STARTER = "multiomeclip-starter"
CARD = Path(__file__).with_name("_starter_multiomeclip_card.md")
log = logging.getLogger("starter")


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training that is not a default of the model."""

    seed: int = 0
    n_left_out: int = 1_000
    left_out_seed: int = 2026
    least_cells: int = 2  # a peak is open in at least so many training cells
    max_epochs: int = 50
    n_components: tuple[int, ...] = (48, 64, 96, 128, 192)  # of ATAC, that all are folded to: the fewest that
    lost: float = 0.002  # raise the FOSCTTM of cells that training held out by no more than this
    train_size: float = 0.93  # the others say how the modalities lie for cells that were not trained on


def read(path: Path) -> MuData:
    """Counts of both modalities, and labels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mudata announces other defaults
        with without_pulled_columns():
            mdata = md.read(path)
    obs = mdata["rna"].obs[["cell_type"]].astype(str).rename(columns={"cell_type": "label"})
    parts = {
        name: ad.AnnData(x.X.astype(np.float32), var=x.var[[]], obs=obs[[]]) for name, x in mdata.mod.items()
    }
    return made(parts, obs)


def made(parts: dict[str, ad.AnnData], obs: pd.DataFrame) -> MuData:
    """A MuData of both modalities, with labels."""
    with without_pulled_columns():
        mdata = MuData(parts)
    mdata.obs = obs.loc[mdata.obs_names]
    return mdata


def joined(first: MuData, second: MuData) -> MuData:
    """Cells of both."""
    parts = {name: ad.concat([first[name], second[name]]) for name in first.mod}
    return made(parts, pd.concat([first.obs, second.obs]))


def split(folder: Path, recipe: Recipe) -> tuple[MuData, MuData]:
    """Cells to train on, and those that are left out."""
    small, large = (read(folder / name) for name in FILES)
    left_out = np.sort(
        np.random.default_rng(recipe.left_out_seed).permutation(large.n_obs)[: recipe.n_left_out]
    )
    rest = np.setdiff1d(np.arange(large.n_obs), left_out)
    return joined(small, multiome.subset(large, rest)), multiome.subset(large, left_out)


def trained(train: MuData, recipe: Recipe) -> MultiomeCLIP:
    """The starter, with a vocabulary of the peaks that enough cells have."""
    scvi.settings.seed = recipe.seed
    n_open = np.asarray((train["atac"].X > 0).sum(axis=0)).ravel()
    peaks = train["atac"].var_names[n_open >= recipe.least_cells].tolist()
    MultiomeCLIP.setup_mudata(train)
    model = MultiomeCLIP(train, peaks=peaks)
    with contextlib.redirect_stdout(sys.stderr):
        model.train(
            max_epochs=recipe.max_epochs,
            train_size=recipe.train_size,
            accelerator="cpu",
            enable_progress_bar=False,
        )
    for name, values in model.history.items():
        log.info("%s: %s", name, " ".join(f"{x:.4g}" for x in values.iloc[:, 0].astype(float)))
    return model


@torch.no_grad()
def folded(model: MultiomeCLIP, train: MuData, n_components: int) -> MultiomeCLIP:
    """The same model with fewer components of ATAC, which are most of a bundle.

    The directions that are kept are those in which the training cells move what the first layer gives the most: the
    leading ones of W C^(1/2), with W the weights of the layer and C the covariance of its inputs.
    """
    old = model.module.atac
    n_read, n_old = old.layers[0].weight.shape[1], old.components.shape[1]
    cells = model._cells()
    places = torch.from_numpy(model.get_atac_representation(train["atac"]))
    variance, axes = torch.linalg.eigh(places.T @ places / len(places))
    spread = variance.clamp(min=1e-8).sqrt()
    weight = old.layers[0].weight
    left, size, right = torch.linalg.svd(weight[:, :n_old] @ axes * spread, full_matrices=False)
    turn = axes / spread @ right[:n_components].T  # (old, new); cells have unit variance on each
    network = model._network() | {"n_components": [model.module.rna.components.shape[1], n_components]}
    small = MultiomeCLIP(train, genes=model.genes, peaks=model.peaks, **network)
    new = dict(model.module.state_dict())
    new["atac.components"], new["atac.mean"] = old.components @ turn, old.mean @ turn
    new["atac.layers.0.weight"] = torch.cat(
        [left[:, :n_components] * size[:n_components], weight[:, n_old:n_read]], dim=1
    )
    small.module.load_state_dict(new)
    small.is_trained_ = True
    small.module.eval()
    align(small, cells, model.train_indices, model.validation_indices)
    return small


def small_enough(model: MultiomeCLIP, train: MuData, recipe: Recipe) -> MultiomeCLIP:
    """The model with as few components as do."""
    held_out = multiome.subset(train, model.validation_indices)
    best = multiome.matched(model, train, held_out, None)["foscttm"]
    for n_components in recipe.n_components:
        small = folded(model, train, n_components)
        reached = multiome.matched(small, train, held_out, None)["foscttm"]
        log.info("%d components: FOSCTTM %.4f of held-out cells, %.4f with all", n_components, reached, best)
        if reached <= best + recipe.lost:
            break
    return small


def write(folder: Path, model: MultiomeCLIP, recipe: Recipe, card: str) -> None:
    """A bundle in half precision, without the names of cells."""
    write_bundle(
        folder,
        state_dict=model.module.state_dict(),
        config={"model": "MultiomeCLIP", "network": model._network(), "recipe": asdict(recipe)},
        genes=model.genes,
        peaks=model.peaks,
        card=card,
        dtype=torch.float16,
        overwrite=True,
    )


def cells_of(model: MultiomeCLIP, train: MuData) -> np.ndarray:
    """Numbers by which the cells are known again, of their genes."""
    rna = train["rna"]
    return fingerprints(rna.X, match(rna.var, model.genes).index)


def matching(model: MultiomeCLIP, whole: MultiomeCLIP, train: MuData, test: MuData) -> pd.DataFrame:
    """How well cells that were left out are matched, and named from RNA to ATAC, beside what knows less.

    `whole` is the model before its components were folded, whose inputs the linear map reads.
    """
    names = train.obs["label"].to_numpy(), test.obs["label"].to_numpy()
    found = {"starter": multiome.matched(model, train, test, names)}
    kept = {"train": train, "test": test}
    for key, mdata in kept.items():
        atac = mdata["atac"][:, model.peaks].copy()
        kept[key] = made({"rna": mdata["rna"], "atac": atac}, mdata.obs)
    found["before folding, float32"] = multiome.matched(whole, train, test, names)
    found |= multiome.linear(whole, kept["train"], kept["test"], names)
    depth = (np.asarray(test[name].X.sum(axis=1)).ravel() for name in ("rna", "atac"))
    found["sequencing depth alone"] = matching_metrics(depth_scores(*depth))
    found["chance"] = {"foscttm": 0.5, "recall_at_1": 1 / test.n_obs, "recall_at_10": 10 / test.n_obs}
    found["the largest type"] = {"labels": float(np.mean(names[1] == pd.Series(names[0]).mode()[0]))}
    return pd.DataFrame(found).T[["foscttm", "recall_at_1", "recall_at_10", "labels"]]


def naming(model: MultiomeCLIP, whole: MultiomeCLIP, train: MuData, test: MuData) -> pd.DataFrame:
    """Labels of cells that were left out by their 15 nearest training cells, in one modality or both."""
    names, truth = (part.obs["label"].to_numpy() for part in (train, test))
    spaces: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, kind in (("RNA", "rna"), ("ATAC", "atac"), ("both", "joint")):
        spaces[f"starter, {name}"] = tuple(
            model.get_latent_representation(x, modality=kind) for x in (train, test)
        )
    spaces["PCA of RNA, 50 components"] = pca_of_rna(train, test)
    lsi = [whole.get_atac_representation(x["atac"]) for x in (train, test)]
    for n_components in (30, 256):
        spaces[f"LSI of ATAC, {n_components} components"] = (
            lsi[0][:, :n_components],
            lsi[1][:, :n_components],
        )
    rows = {}
    for name, (seen, asked) in spaces.items():
        guess = knn_predict(seen, names, asked)
        rows[name] = {"accuracy": accuracy(truth, guess), "balanced": balanced_accuracy(truth, guess)}
    guess = np.full(test.n_obs, pd.Series(names).mode()[0])
    rows["the largest type"] = {
        "accuracy": accuracy(truth, guess),
        "balanced": balanced_accuracy(truth, guess),
    }
    return pd.DataFrame(rows).T


def pca_of_rna(train: MuData, test: MuData) -> tuple[np.ndarray, np.ndarray]:
    """Components of the log-normalised RNA, fitted to the training cells."""
    both = ad.concat([train["rna"], test["rna"]])
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    fitted = both[: train.n_obs].copy()
    sc.pp.pca(fitted, n_comps=50, random_state=0)
    mean = np.asarray(fitted.X.mean(axis=0)).ravel()
    scores = (both.X @ fitted.varm["PCs"]) - mean @ fitted.varm["PCs"]
    return scores[: train.n_obs], scores[train.n_obs :]


def table(values: pd.DataFrame) -> str:
    """Markdown, three digits."""
    columns = {"foscttm": "FOSCTTM", "recall_at_1": "recall@1", "recall_at_10": "recall@10"}
    values = values.rename(columns=columns)
    lines = ["| | " + " | ".join(values.columns) + " |", "|---" * (values.shape[1] + 1) + "|"]
    for name, row in values.iterrows():
        lines.append(f"| {name} | " + " | ".join("" if np.isnan(x) else f"{x:.3f}" for x in row) + " |")
    return "\n".join(lines)


def render(model: MultiomeCLIP, train: MuData, recipe: Recipe, results: dict[str, Any]) -> str:
    """The card."""
    depth = {name: int(np.median(np.asarray(train[name].X.sum(axis=1)))) for name in ("rna", "atac")}
    return CARD.read_text(encoding="utf-8").format(
        million=sum(p.numel() for p in model.module.parameters()) / 1e6,
        n_train=train.n_obs,
        n_genes=len(model.genes),
        n_peaks=len(model.peaks),
        n_all_peaks=train["atac"].n_vars,
        n_kept=model.module.atac.components.shape[1],
        rna=depth["rna"],
        atac=depth["atac"],
        **(asdict(recipe) | results),
    )


def main() -> None:
    """Train, judge and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two .h5mu files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundle and training.log")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.out / "training.log", mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    recipe = Recipe()
    log.info("%s", asdict(recipe))
    train, test = split(args.data, recipe)
    whole = trained(train, recipe)
    model = small_enough(whole, train, recipe)
    write(args.out, model, recipe, "Not judged yet.\n")
    model = MultiomeCLIP.from_pretrained(args.out)  # as shipped, in half precision
    tables = {"matching": matching(model, whole, train, test), "naming": naming(model, whole, train, test)}
    for name, values in tables.items():
        log.info("%s\n%s", name, values.round(4).to_csv())
    (args.out / "left_out.txt").write_text("\n".join(test.obs_names) + "\n", encoding="utf-8")
    results = {name: table(values) for name, values in tables.items()}
    write(args.out, model, recipe, render(model, train, recipe, results))
    write_trained_on(args.out, cells_of(model, train))


if __name__ == "__main__":
    main()
