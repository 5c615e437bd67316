"""Train the small CellPLM that ships with cellprior as `cellplm-starter`.

    python scripts/train_starter_cellplm.py --data <folder of .h5ad> --gene-tables <folder> --out <folder>

Needs the six human training sets and the pancreas set named in `_starter_data.py`, and the two GENCODE tables.
Everything is seeded; the number of threads (`--threads`) may change the last digits. Three models are trained: two
without one of the blood studies, only to report on blood that they never saw, then the one that is written, with card
and log.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from _starter_card import judge, render_card
from _starter_data import (
    DEPTH_CONFOUNDED,
    TRAINING_SETS,
    UNSEEN_TISSUE,
    CellSet,
    at_equal_depth,
    choose_vocabulary,
    held_out,
    read_gene_names,
    read_pbmc68k_reduced,
    read_set,
    subset,
    to_vocabulary,
)
from _starter_fit import cosine, train, trained_on
from sklearn.utils.extmath import randomized_svd
from torch.optim.lr_scheduler import LambdaLR

from cellprior.model import CellPLM
from cellprior.model.cellplm._inputs import sample_mask
from cellprior.model.cellplm._module import CellPLMModule
from cellprior.model.learning._plan import Plan
from cellprior.weights import write_bundle

LEFT_OUT = (
    ("pbmc3k_seurat",),
    ("pbmc_kang_ifnb_muscat", "pbmc_kang_ifnb_harmony_unlabelled"),
)  # one study each
log = logging.getLogger("starter")


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training."""

    seed: int = 0
    n_genes: int = 6000
    n_hidden: int = 256
    n_layers: int = 2
    n_heads: int = 8
    n_latent: int = 48
    dropout_rate: float = 0.1
    target_sum: float = 6_000.0
    held_out_share: float = 0.1
    steps: int = 800
    warm_up: int = 100  # steps in which the encoder stands still; then its learning rate rises for as long
    learning_rate: float = 1e-3
    encoder_rate: float = (
        0.2  # times the learning rate: the encoder starts from a PCA, the decoder from nothing
    )
    weight_decay: float = 1e-3
    clip: float = 50.0
    average: float = 0.998  # of the weights, exponential, per step
    kl_rise: float = 1e-4  # per step, as in the original
    kl_limit: float = 0.01  # the original goes to 1
    sentence: tuple[int, int] = (64, 256)  # cells
    one_batch: float = 0.5  # share of sentences from one batch of a set
    depth_limit: float = 4000.0  # deeper cells are thinned to this depth
    panel: float = 0.2  # share of sentences that see a random part of the genes, 10 to 100 %


@dataclass(frozen=True)
class TrainingSet:
    """What a sentence is drawn from."""

    counts: sp.csr_matrix
    """Raw counts, cells by vocabulary genes."""

    measured: torch.Tensor
    """Numbers of the genes that the study measured."""

    batch: np.ndarray
    """Code of each cell's batch, over all sets."""


def training_sets(cells: list[CellSet], measured: list[np.ndarray]) -> list[TrainingSet]:
    """Number the batches of sets in vocabulary order."""
    codes, _ = pd.factorize(np.concatenate([[f"{c.name}/{b}" for b in c.batch] for c in cells]))
    ends = np.cumsum([len(c.batch) for c in cells])[:-1]
    return [
        TrainingSet(c.counts, torch.from_numpy(np.flatnonzero(m)), batch)
        for c, m, batch in zip(cells, measured, np.split(codes, ends), strict=True)
    ]


def network_of(recipe: Recipe, sets: list[TrainingSet]) -> dict:
    """Arguments of the network."""
    names = ("n_hidden", "n_layers", "n_heads", "n_latent", "dropout_rate", "target_sum")
    n_batches = int(max(s.batch.max() for s in sets)) + 1
    return {name: getattr(recipe, name) for name in names} | {
        "latent": "vae",
        "n_batches": n_batches,
        "n_datasets": len(sets),
    }


def log_normalised(data: TrainingSet, target_sum: float) -> sp.csr_matrix:
    """The input of the network: log1p of counts scaled to `target_sum` per cell."""
    depth = np.asarray(data.counts.sum(axis=1)).ravel()
    scaled = sp.csr_matrix(sp.diags(target_sum / np.maximum(depth, 1.0)) @ data.counts)
    return scaled.log1p()


@torch.no_grad()
def start_from_pca(module: CellPLMModule, sets: list[TrainingSet], recipe: Recipe) -> None:
    """Let the untrained network compute a PCA, up to its norms: a few minutes of training then go a long way.

    The gene vectors become principal axes of the pooled, per-set centred training cells (each set weighs the same);
    the linear layer passes each component on with both signs, so that the ReLU loses nothing; the residual branches
    start small; the latent means start as the leading components.
    """
    n_components = recipe.n_hidden // 2
    centred, means = [], []
    for data in sets:
        x = log_normalised(data, recipe.target_sum).toarray()
        means.append(x.mean(axis=0))
        centred.append((x - means[-1]) / np.sqrt(len(x)))
    mean = torch.from_numpy(np.mean(means, axis=0)).float()
    axes = torch.from_numpy(
        randomized_svd(np.concatenate(centred), n_components, random_state=recipe.seed)[2]
    ).float()

    embedder, latent = module.embedder, module.latent
    embedder.gene_embedding.mul_(0.2)
    embedder.gene_embedding[:, :n_components] = axes.T
    channels = torch.randperm(recipe.n_hidden)
    plus, minus = channels[:n_components], channels[n_components:]
    component = torch.arange(n_components)
    embedder.linear.weight.normal_(std=0.005)
    embedder.linear.weight[plus, component] += 1.0
    embedder.linear.weight[minus, component] -= 1.0
    embedder.linear.bias.copy_(-embedder.linear.weight @ (mean @ embedder.gene_embedding))
    for layer in module.encoder:
        for branch in (layer.attention.out, layer.ff[3]):
            branch.weight.mul_(0.1)
            branch.bias.zero_()
    first = torch.arange(recipe.n_latent)
    latent.mu.weight.zero_()
    latent.mu.bias.zero_()
    latent.mu.weight[first, plus[: recipe.n_latent]] = 1.0
    latent.mu.weight[first, minus[: recipe.n_latent]] = -1.0
    latent.log_var.weight.mul_(0.1)
    latent.log_var.bias.fill_(-2.0)


class Sentence(NamedTuple):
    """Number of a set, counts and mask `(cells, genes)`, batch codes `(cells,)`, and numbers of the measured genes."""

    which: int
    counts: torch.Tensor
    mask: torch.Tensor
    batch: torch.Tensor
    measured: torch.Tensor


def draw_sentence(sets: list[TrainingSet], recipe: Recipe, rng: np.random.Generator) -> Sentence:
    """Some cells of a set; sets are drawn evenly."""
    which = int(rng.integers(len(sets)))
    data = sets[which]
    cells = np.arange(len(data.batch))
    if rng.random() < recipe.one_batch:
        cells = np.flatnonzero(data.batch == rng.choice(data.batch))
    size = int(np.exp(rng.uniform(*np.log(recipe.sentence))))
    cells = rng.permutation(cells)[:size]

    counts = data.counts[cells]
    depth = np.asarray(counts.sum(axis=1)).ravel()
    keep = np.minimum(1.0, recipe.depth_limit / np.maximum(depth, 1.0))
    counts.data = rng.binomial(counts.data.astype(np.int64), np.repeat(keep, np.diff(counts.indptr))).astype(
        np.float32
    )

    mask = sample_mask(*counts.shape, rng=rng)
    if rng.random() < recipe.panel:
        kept = np.exp(rng.uniform(np.log(0.1), 0.0))
        mask |= rng.random(counts.shape[1]) > kept
    tensors = (torch.from_numpy(part) for part in (counts.toarray(), mask, data.batch[cells]))
    return Sentence(which, *tensors, data.measured)


class StarterPlan(Plan):
    """The original's objective over the genes each set measured; the encoder follows the decoder slowly."""

    def __init__(self, module: CellPLMModule, recipe: Recipe) -> None:
        super().__init__(
            module, n_steps=recipe.steps, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.recipe = recipe

    def training_step(self, batch: Sentence, batch_idx: int) -> torch.Tensor:
        losses = self.module.pretraining_loss(
            batch.counts,
            batch.mask,
            batch=batch.batch,
            dataset=torch.full_like(batch.batch, batch.which),
            kl_weight=min(self.recipe.kl_rise * (self.trainer.global_step + 1), self.recipe.kl_limit),
            measured=batch.measured,
        )
        # each sentence counts the same
        self.log_epoch({name: value.detach() for name, value in losses.items()}, 1, shown="loss")
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        recipe = self.recipe

        def of_encoder(step: int) -> float:
            thaw = np.clip((step + 1 - recipe.warm_up) / recipe.warm_up, 0.0, 1.0)
            return cosine(step + 1, recipe.steps) * recipe.encoder_rate * float(thaw)

        def of_decoder(step: int) -> float:
            return cosine(step + 1, recipe.steps) * min(1.0, (step + 1) / recipe.warm_up)

        decoder = list(self.module.decoder.parameters())
        inside = {id(p) for p in decoder}
        encoder = [p for p in self.module.parameters() if id(p) not in inside]
        groups = [{"params": encoder}, {"params": decoder}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = LambdaLR(optimizer, [of_encoder, of_decoder])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train_on(
    recipe: Recipe, cells: list[CellSet], mask: dict[str, np.ndarray], names: pd.DataFrame
) -> CellPLM:
    """Choose the vocabulary and train on the cells of `cells` that are not held out."""
    torch.manual_seed(recipe.seed)
    kept = [subset(c, ~mask[c.name]) for c in cells]
    vocabulary = choose_vocabulary(kept, names, n_genes=recipe.n_genes)
    moved = [to_vocabulary(c, vocabulary, names) for c in kept]
    sets = training_sets([m[0] for m in moved], [m[1] for m in moved])
    log.info("training on %s", {c.name: len(c.cells) for c in kept})
    adata = trained_on([m[0] for m in moved])
    CellPLM.setup_anndata(adata)
    model = CellPLM(adata, genes=vocabulary, **network_of(recipe, sets))
    start_from_pca(model.module, sets, recipe)
    rng = np.random.default_rng(recipe.seed)
    plan = StarterPlan(model.module, recipe)
    steps = {"steps": recipe.steps, "clip": recipe.clip, "average": recipe.average}
    train(model, plan, lambda: draw_sentence(sets, recipe, rng), **steps)
    return model


def write(folder: Path, model: CellPLM, recipe: Recipe, card: str) -> None:
    """A bundle in half precision."""
    config = {"model": "CellPLM", "network": model._network(), "recipe": asdict(recipe)}
    tensors = model.module.state_dict()
    write_bundle(
        folder,
        state_dict=tensors,
        config=config,
        genes=model.genes,
        card=card,
        dtype=torch.float16,
        overwrite=True,
    )


def main() -> None:
    """Train, evaluate and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files")
    parser.add_argument("--gene-tables", type=Path, required=True, help="folder with the two GENCODE tables")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundle and training.log")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.out / "training.log", mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    recipe = Recipe()
    log.info("%s", asdict(recipe))
    cells = [read_set(args.data, name) for name in TRAINING_SETS]
    names = read_gene_names(args.gene_tables, cells)
    mask = held_out(cells, share=recipe.held_out_share, seed=recipe.seed)
    unseen = [read_pbmc68k_reduced(), read_set(args.data, UNSEEN_TISSUE)]

    extra = []
    for study in LEFT_OUT:
        log.info("a model that never sees %s", " and ".join(study))
        without = train_on(recipe, [c for c in cells if c.name not in study], mask, names)
        with TemporaryDirectory() as folder:
            write(Path(folder), without, recipe, "Only to be judged.\n")
            extra.append(judge(CellPLM, folder, [c for c in cells if c.name in study], {}))

    log.info("the starter")
    model = train_on(recipe, cells, mask, names)
    write(args.out, model, recipe, "Not judged yet.\n")
    gut = next(c for c in cells if c.name == DEPTH_CONFOUNDED)
    level, level_mask = at_equal_depth(gut, mask[gut.name], depth=1000, seed=recipe.seed)
    judged, masks = [*cells, level, *unseen], {**mask, level.name: level_mask}
    results = judge(CellPLM, args.out, judged, masks)
    write(
        args.out,
        model,
        recipe,
        render_card(asdict(recipe), model, cells, mask, unseen, results, pd.concat(extra)),
    )
    tables = [results, *(e.assign(set=e["set"] + ", left out") for e in extra)]
    log.info("%s", pd.concat(tables).round(4).to_csv(index=False))


if __name__ == "__main__":
    main()
