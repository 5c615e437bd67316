"""Train the small ScBERT that ships with cellprior as `scbert-starter`.

    python scripts/train_starter_scbert.py --data <folder of .h5ad> --gene-tables <folder> --out <folder>

Needs the six human training sets and the pancreas set named in `_starter_data.py`, and the two GENCODE tables: the
sets, the held-out cells and the vocabulary are those of `cellplm-starter`. Everything is seeded; the number of threads
(`--threads`) may change the last digits. With `--judge`, the weights that are in the folder are judged and the card
is written anew.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from _starter_card import judge
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
from _starter_fit import as_anndata, cosine, train, trained_on
from _starter_scbert_card import RANDOM_ZERO_GENES, VARIANTS, judge_masked, render_card
from sklearn.utils.extmath import randomized_svd
from torch.optim.lr_scheduler import LambdaLR

from cellprior.model import ScBERT
from cellprior.model.learning._contrast import info_nce
from cellprior.model.learning._plan import Plan
from cellprior.model.scbert._inputs import TARGET_SUM, counts_to_bins, sample_mask
from cellprior.model.scbert._module import ScBERTModule
from cellprior.weights import write_bundle

log = logging.getLogger("starter")


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training."""

    seed: int = 0
    n_genes: int = 6000
    n_hidden: int = 64
    n_layers: int = 3
    n_heads: int = 4
    head_dim: int = 16
    held_out_share: float = 0.1
    steps: int = 1500
    positions: int = 12_000  # of a minibatch: expressed genes and a sample of the others, of 5 to 25 cells
    n_zero_genes: int = 200  # unexpressed genes of a cell, at least, that stand for all of them
    mask_rate: float = 0.3  # the original: 0.15
    replace_rate: float = 0.9
    contrast_every: int = 2  # steps
    contrast_weight: float = 0.3
    temperature: float = 0.2
    depth: tuple[float, float] = (500.0, 10_000.0)  # each cell is thinned to a depth between, unless below it
    learning_rate: float = 2e-3
    warm_up: int = 100  # steps
    weight_decay: float = 1e-3
    clip: float = 1.0
    average: float = 0.995  # of the weights, exponential, per step


@dataclass(frozen=True)
class TrainingSet:
    """What a minibatch is drawn from."""

    counts: sp.csr_matrix
    """Raw counts, cells by vocabulary genes."""

    measured: np.ndarray
    """Numbers of the genes that the study measured."""


class Minibatch(NamedTuple):
    """Some positions of some cells, all of the expressed genes among them `(cells, positions)` each.

    `weight`: how many genes of the cell each stands for.
    """

    tokens: torch.Tensor
    genes: torch.Tensor
    weight: torch.Tensor

    def hidden(self, module: ScBERTModule, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states `(cells, positions, n_hidden)` as of whole cells, by sums over weighted positions."""
        return module._encode(tokens, self.genes, F.pad(self.weight, (0, 1), value=1.0))[:, :-1]


class Step(NamedTuple):
    """Cells of one set, which positions are asked for and which hidden; at times two views of other cells."""

    batch: Minibatch
    selected: torch.Tensor
    replaced: torch.Tensor
    views: tuple[Minibatch, ...]


@torch.no_grad()
def start_from_pca(module: ScBERTModule, sets: list[TrainingSet], recipe: Recipe) -> None:
    """Let gene vectors start as what gene2vec is to the original: genes that vary together are near each other.

    All but eight dimensions are a gene's loadings on the principal components of the pooled training cells (log1p,
    per set centred and of equal weight, per gene scaled), at the same length for all genes; four are its mean.
    """
    centred, rates = [], []
    for data in sets:
        depth = np.maximum(np.asarray(data.counts.sum(axis=1)).ravel(), 1.0)
        x = sp.csr_matrix(sp.diags(TARGET_SUM / depth) @ data.counts).log1p().toarray().astype(np.float32)
        centred.append((x - x.mean(axis=0)) / np.sqrt(len(x)))
        rates.append(np.asarray(data.counts.sum(axis=0)).ravel() / data.counts.sum())
    pooled = np.concatenate(centred)
    pooled /= np.sqrt((pooled**2).sum(axis=0) + 1e-4)
    n_components = recipe.n_hidden - 8
    loadings = randomized_svd(pooled, n_components, random_state=recipe.seed)[2].T
    length = np.linalg.norm(loadings, axis=1, keepdims=True)
    n_measured = np.bincount(np.concatenate([data.measured for data in sets]), minlength=recipe.n_genes)
    rate = np.log(np.sum(rates, axis=0) / np.maximum(n_measured, 1) + 1e-7)
    vectors = module.embedder.gene_vectors
    vectors[:, :n_components] = torch.from_numpy(loadings * np.sqrt(n_components) / np.maximum(length, 1e-6))
    vectors[:, n_components : n_components + 4] = torch.from_numpy((rate - rate.mean()) / rate.std())[:, None]


def draw_cells(
    sets: list[TrainingSet], recipe: Recipe, positions: int, rng: np.random.Generator
) -> tuple[TrainingSet, np.ndarray]:
    """A set and counts `(cells, genes)` of cells with about as many expressed genes each, thinned.

    Sets are drawn by the square root of their size.
    """
    size = np.sqrt([data.counts.shape[0] for data in sets])
    data = sets[rng.choice(len(sets), p=size / size.sum())]
    counts = data.counts[rng.permutation(data.counts.shape[0])[:192]]
    depth = np.asarray(counts.sum(axis=1)).ravel()
    keep = np.minimum(1.0, np.exp(rng.uniform(*np.log(recipe.depth), len(depth))) / np.maximum(depth, 1.0))
    counts.data = rng.binomial(counts.data.astype(np.int64), np.repeat(keep, np.diff(counts.indptr)))
    counts.eliminate_zeros()
    n_expressed = np.diff(counts.indptr)
    order = np.argsort(n_expressed)
    first = int(rng.integers(len(order)))
    room = (n_expressed[order[first:]] + recipe.n_zero_genes) * np.arange(1, len(order) - first + 1)
    n_cells = max(int(np.searchsorted(room, positions)), 1)
    chosen = order[max(first - 4, 0) : first + n_cells]  # at least five, but at the shallow end
    return data, counts[chosen].toarray().astype(np.float32)


def minibatch(counts: np.ndarray, n_zero_genes: int, rng: np.random.Generator) -> Minibatch:
    """All expressed genes of each cell and a random sample of the others, as many in all for every cell.

    The sample follows one order for all cells, so that it does not set them apart.
    """
    tokens = counts_to_bins(torch.from_numpy(counts)).numpy()
    n_genes, n_expressed = tokens.shape[1], (tokens > 0).sum(axis=1, keepdims=True)
    n_positions = min(int(n_expressed.max()) + n_zero_genes, n_genes)
    order = rng.permutation(n_genes) - n_genes * (tokens > 0)
    genes = np.argpartition(order, n_positions - 1, axis=1)[:, :n_positions]
    kept = np.take_along_axis(tokens, genes, axis=1)
    stands_for = (n_genes - n_expressed) / np.maximum(n_positions - n_expressed, 1)
    weight = np.where(kept > 0, 1.0, stands_for).astype(np.float32)
    return Minibatch(torch.from_numpy(kept), torch.from_numpy(genes), torch.from_numpy(weight))


def steps_of(sets: list[TrainingSet], recipe: Recipe) -> Iterator[Step]:
    """What is seen in each step."""
    rng = np.random.default_rng(recipe.seed)
    for step in count(1):
        _, counts = draw_cells(sets, recipe, recipe.positions, rng)
        batch = minibatch(counts, recipe.n_zero_genes, rng)
        mask = sample_mask(batch.tokens.numpy(), rng, rate=recipe.mask_rate, replace=recipe.replace_rate)
        views: list[Minibatch] = []
        if step % recipe.contrast_every == 0:
            data, counts = draw_cells(sets, recipe, recipe.positions, rng)
            for half in np.array_split(rng.permutation(data.measured), 2):
                view = np.zeros_like(counts)
                view[:, half] = counts[:, half]
                views.append(minibatch(view, recipe.n_zero_genes // 2, rng))
        yield Step(batch, *(torch.from_numpy(part) for part in mask), tuple(views))


class StarterPlan(Plan):
    """The original's objective, and at times the contrast of two random halves of the measured genes."""

    def __init__(self, module: ScBERTModule, recipe: Recipe) -> None:
        super().__init__(
            module, n_steps=recipe.steps, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.recipe = recipe

    def training_step(self, batch: Step, batch_idx: int) -> torch.Tensor:
        seen, selected, replaced, views = batch
        hidden = seen.hidden(self.module, seen.tokens.masked_fill(replaced, self.module.n_bins + 1))
        loss = F.cross_entropy(self.module.predict_bins(hidden[selected]), seen.tokens[selected].long())
        parts = {"train_masked": loss.detach()}
        if views:
            contrast = self._contrast(views)
            chance = float(np.log(len(views[0].tokens)))
            parts |= {"train_contrast": contrast.detach(), "train_contrast_floor_chance": chance}
            loss = loss + self.recipe.contrast_weight * contrast
        self.log_epoch(parts, 1, shown="train_masked")  # each step counts the same
        return loss

    def _contrast(self, views: tuple[Minibatch, ...]) -> torch.Tensor:
        """By the mean over all genes and by that over the expressed ones, as the library's."""
        pooled: list[list[torch.Tensor]] = []
        for view in views:
            hidden = view.hidden(self.module, view.tokens)
            pooled.append([])
            for weight in (view.weight, (view.tokens > 0).float()):
                share = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
                mean = torch.bmm(share[:, None], hidden).squeeze(1)
                pooled[-1].append(mean - mean.mean(0))
        temperature = self.recipe.temperature
        losses = [info_nce(*pair, temperature=temperature) for pair in zip(*pooled, strict=True)]
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.98),
        )
        schedule = LambdaLR(
            optimizer, lambda i: min(1.0, (i + 1) / recipe.warm_up) * cosine(i + 1, recipe.steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train_on(
    recipe: Recipe,
    cells: list[CellSet],
    mask: dict[str, np.ndarray],
    vocabulary: pd.DataFrame,
    names: pd.DataFrame,
) -> ScBERT:
    """Train on the cells that are not held out."""
    torch.manual_seed(recipe.seed)
    moved = [to_vocabulary(subset(c, ~mask[c.name]), vocabulary, names) for c in cells]
    sets = [TrainingSet(c.counts, np.flatnonzero(measured)) for c, measured in moved]
    adata = trained_on([c for c, _ in moved])
    ScBERT.setup_anndata(adata)
    network = {name: getattr(recipe, name) for name in ("n_hidden", "n_layers", "n_heads", "head_dim")}
    model = ScBERT(adata, genes=vocabulary, **network)
    start_from_pca(model.module, sets, recipe)
    drawn = steps_of(sets, recipe)
    plan = StarterPlan(model.module, recipe)
    steps = {"n_train": adata.n_obs, "steps": recipe.steps, "clip": recipe.clip, "average": recipe.average}
    train(model, plan, lambda: next(drawn), **steps)
    return model


def main() -> None:
    """Train, evaluate and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files")
    parser.add_argument("--gene-tables", type=Path, required=True, help="folder with the two GENCODE tables")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundle and training.log")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--judge", action="store_true", help="do not train, judge the weights in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    handlers.append(logging.FileHandler(args.out / "training.log", mode="a" if args.judge else "w"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)

    recipe = Recipe()
    cells = [read_set(args.data, name) for name in TRAINING_SETS]
    names = read_gene_names(args.gene_tables, cells)
    mask = held_out(cells, share=recipe.held_out_share, seed=recipe.seed)
    unseen = [read_pbmc68k_reduced(), read_set(args.data, UNSEEN_TISSUE)]
    if args.judge:
        model = ScBERT.from_pretrained(args.out, as_anndata(cells[0]))
    else:
        log.info("%s", asdict(recipe))
        kept = [subset(c, ~mask[c.name]) for c in cells]
        vocabulary = choose_vocabulary(kept, names, n_genes=recipe.n_genes)
        model = train_on(recipe, cells, mask, vocabulary, names)

    def write(card: str) -> None:
        config = {"model": "ScBERT", "network": model._network(), "recipe": asdict(recipe)}
        write_bundle(
            args.out,
            state_dict=model.module.state_dict(),
            config=config,
            genes=model.genes,
            card=card,
            dtype=torch.float16,
            overwrite=True,
        )

    if not args.judge:
        write("Not judged yet.\n")
    gut = next(c for c in cells if c.name == DEPTH_CONFOUNDED)
    level, level_mask = at_equal_depth(gut, mask[gut.name], depth=1000, seed=recipe.seed)
    masked = judge_masked(args.out, [*cells, *unseen], mask)
    log.info("%s", masked.round(4).to_csv(index=False))
    judged, masks = [*cells, level, *unseen], {**mask, level.name: level_mask}
    of_random = {"n_zero_genes": RANDOM_ZERO_GENES}
    results = judge(ScBERT, args.out, judged, masks, variants=VARIANTS, of_random=of_random)
    log.info("%s", results.round(4).to_csv(index=False))
    write(render_card(asdict(recipe), model, cells, mask, unseen, masked, results))


if __name__ == "__main__":
    main()
