"""Train the small ScBERT that ships with cellprior as `scbert-starter`.

    python scripts/train_starter_scbert.py --data <folder of .h5ad> --gene-tables <folder> --out <folder>

Needs the six human training sets and the pancreas set named in `_starter_data.py`, and the two GENCODE tables: the
sets, the held-out cells and the vocabulary are those of `cellplm-starter`. Everything is seeded; the number of threads
(`--threads`) may change the last digits. With `--judge`, the weights that are in the folder are judged and the card
is written anew.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
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
from _starter_scbert_card import evaluate, evaluate_masked, render_card
from sklearn.utils.extmath import randomized_svd

from cellprior.model.learning._contrast import info_nce
from cellprior.model.scbert._inputs import TARGET_SUM, counts_to_bins, sample_mask
from cellprior.model.scbert._module import ScBERTModule
from cellprior.weights import read_bundle, write_bundle

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


@dataclass(frozen=True)
class Minibatch:
    """Some positions of some cells, all of the expressed genes among them `(cells, positions)` each."""

    tokens: torch.Tensor
    genes: torch.Tensor
    weight: torch.Tensor
    """How many genes of the cell each stands for."""

    def hidden(self, module: ScBERTModule, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states `(cells, positions, n_hidden)` as of whole cells, by sums over weighted positions."""
        return module._encode(tokens, self.genes, F.pad(self.weight, (0, 1), value=1.0))[:, :-1]


def build(recipe: Recipe) -> tuple[ScBERTModule, dict]:
    """A network with fresh weights, and its arguments."""
    names = ("n_hidden", "n_layers", "n_heads", "head_dim")
    network = {name: getattr(recipe, name) for name in names}
    return ScBERTModule(recipe.n_genes, **network), network


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


def masked_loss(
    module: ScBERTModule, sets: list[TrainingSet], recipe: Recipe, rng: np.random.Generator
) -> torch.Tensor:
    """The original's objective, over cells of one set."""
    _, counts = draw_cells(sets, recipe, recipe.positions, rng)
    batch = minibatch(counts, recipe.n_zero_genes, rng)
    mask = sample_mask(batch.tokens.numpy(), rng, rate=recipe.mask_rate, replace=recipe.replace_rate)
    selected, replaced = (torch.from_numpy(part) for part in mask)
    hidden = batch.hidden(module, batch.tokens.masked_fill(replaced, module.n_bins + 1))
    return F.cross_entropy(module.predict_bins(hidden[selected]), batch.tokens[selected].long())


def contrastive_loss(
    module: ScBERTModule, sets: list[TrainingSet], recipe: Recipe, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Contrast of two random halves of the measured genes, over cells of one set, and what chance gives.

    By the mean over all genes and by that over the expressed ones, as in :mod:`cellprior.model.scbert._loss`.
    """
    data, counts = draw_cells(sets, recipe, recipe.positions, rng)
    views = []
    for half in np.array_split(rng.permutation(data.measured), 2):
        view = np.zeros_like(counts)
        view[:, half] = counts[:, half]
        batch = minibatch(view, recipe.n_zero_genes // 2, rng)
        hidden = batch.hidden(module, batch.tokens)
        views.append([])
        for weight in (batch.weight, (batch.tokens > 0).float()):
            share = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
            pooled = torch.bmm(share[:, None], hidden).squeeze(1)
            views[-1].append(pooled - pooled.mean(0))
    losses = [info_nce(*pair, temperature=recipe.temperature) for pair in zip(*views, strict=True)]
    return torch.stack(losses).mean(), float(np.log(len(counts)))


def train(module: ScBERTModule, sets: list[TrainingSet], recipe: Recipe) -> ScBERTModule:
    """Train; return the averaged weights."""
    rng = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    averaged = copy.deepcopy(module).eval()
    module.train()
    sums, started = np.zeros(4), time.process_time()
    for step in range(1, recipe.steps + 1):
        rate = min(1.0, step / recipe.warm_up) * (0.01 + 0.495 * (1.0 + np.cos(np.pi * step / recipe.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * recipe.learning_rate
        loss = masked_loss(module, sets, recipe, rng)
        sums += (loss.item(), 1, 0, 0)
        if step % recipe.contrast_every == 0:
            contrast, chance = contrastive_loss(module, sets, recipe, rng)
            sums += (0, 0, contrast.item() - chance, 1)
            loss = loss + recipe.contrast_weight * contrast
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        optimizer.step()
        with torch.no_grad():
            share = min(recipe.average, step / (step + 10))
            for mine, new in zip(averaged.parameters(), module.parameters(), strict=True):
                mine.lerp_(new, 1.0 - share)
        if step % 100 == 0:
            shown = (step, time.process_time() - started, sums[0] / sums[1], sums[2] / max(sums[3], 1))
            log.info("step %d, %.0f CPU s: masked %.4f, contrast less chance %.3f", *shown)
            sums[:] = 0
    return averaged


def rounded(module: ScBERTModule) -> ScBERTModule:
    """The module with the weights it will have when read back from half precision."""
    return copy.deepcopy(module).half().float().eval()


def fit(
    recipe: Recipe,
    cells: list[CellSet],
    mask: dict[str, np.ndarray],
    vocabulary: pd.DataFrame,
    names: pd.DataFrame,
) -> tuple[ScBERTModule, dict]:
    """Train on the cells that are not held out."""
    torch.manual_seed(recipe.seed)
    moved = [to_vocabulary(subset(c, ~mask[c.name]), vocabulary, names) for c in cells]
    sets = [TrainingSet(c.counts, np.flatnonzero(measured)) for c, measured in moved]
    module, network = build(recipe)
    log.info("%.2f million parameters", sum(p.numel() for p in module.parameters()) / 1e6)
    start_from_pca(module, sets, recipe)
    return rounded(train(module, sets, recipe)), network


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
        bundle = read_bundle(args.out)
        network, vocabulary = bundle.config["network"], bundle.genes
        module = ScBERTModule(recipe.n_genes, **network)
        module.load_state_dict(bundle.state_dict)
        module.eval()
    else:
        log.info("%s", asdict(recipe))
        kept = [subset(c, ~mask[c.name]) for c in cells]
        vocabulary = choose_vocabulary(kept, names, n_genes=recipe.n_genes)
        module, network = fit(recipe, cells, mask, vocabulary, names)

    def write(card: str) -> None:
        config = {"model": "ScBERT", "network": network, "recipe": asdict(recipe)}
        write_bundle(
            args.out,
            state_dict=module.state_dict(),
            config=config,
            genes=vocabulary,
            card=card,
            dtype=torch.float16,
            overwrite=True,
        )

    if not args.judge:
        write("Not judged yet.\n")
    gut = next(c for c in cells if c.name == DEPTH_CONFOUNDED)
    level, level_mask = at_equal_depth(gut, mask[gut.name], depth=1000, seed=recipe.seed)
    masked = evaluate_masked(module, vocabulary, names, [*cells, *unseen], mask)
    log.info("%s", masked.round(4).to_csv(index=False))
    judged, masks = [*cells, level, *unseen], {**mask, level.name: level_mask}
    results = evaluate(module, network, vocabulary, names, judged, masks)
    log.info("%s", results.round(4).to_csv(index=False))
    write(render_card(asdict(recipe), module, vocabulary, cells, mask, unseen, masked, results))


if __name__ == "__main__":
    main()
